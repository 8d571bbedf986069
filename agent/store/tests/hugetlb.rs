//! A store on hugetlb pages: what it was promised at its opening is there whatever becomes of the other pages, and what is
//! not there is refused then, never met as SIGBUS later.
//!
//! Needs root and memory that can be set aside (192 MiB, for the length of the test, whatever was set aside before). Says
//! on stderr when it could not be run.
#![allow(clippy::unwrap_used)]

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use muster_block::{BlockDevice, BlockErrorKind, WriteFlags, conformance};
use muster_common::{ByteLen, ErrorCode, VolumeId};
use muster_store::{Attached, PageKind, Pages, SpillConfig, Store, StoreConfig, StoreError, Volume, VolumeSpec};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const ARENA: &str = "MUSTER_TEST_HUGE_ARENA";
const BLOCK: u64 = 4096;
/// Set aside for the test.
const PAGES: u64 = 96;
const BUDGET: ByteLen = ByteLen::mib(64);
/// Pages of a store of that budget: one more, for the frame that stands for none.
const OF_STORE: u64 = 33;

fn count(name: &str) -> u64 {
    std::fs::read_to_string(Path::new(POOL).join(name)).unwrap().trim().parse().unwrap()
}

/// Pages that somebody could still have.
fn available() -> u64 {
    count("free_hugepages") - count("resv_hugepages")
}

/// Huge pages set aside, and as many as before when it is dropped.
struct SetAside {
    before: u64,
}

impl SetAside {
    fn new(pages: u64) -> Result<SetAside, String> {
        let pool = Path::new(POOL).join("nr_hugepages");
        let before = std::fs::read_to_string(&pool).map_err(|e| format!("no hugetlb pages of 2 MiB here: {e}"))?;
        let aside = SetAside { before: before.trim().parse().unwrap() };
        let wanted = aside.before + pages;
        std::fs::write(&pool, wanted.to_string()).map_err(|e| format!("huge pages cannot be set aside: {e}"))?;
        let got = count("nr_hugepages");
        if got < wanted || available() < pages {
            return Err(format!("{pages} huge pages are needed, {} are to be had", got - aside.before));
        }
        Ok(aside)
    }
}

impl Drop for SetAside {
    fn drop(&mut self) {
        let _ = std::fs::write(Path::new(POOL).join("nr_hugepages"), self.before.to_string());
    }
}

/// A directory in memory, gone with the value.
struct Place(PathBuf);

impl Place {
    fn new() -> Place {
        Place(PathBuf::from(format!("/dev/shm/muster-test-{}", VolumeId::random().short())))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Ok(store) = Store::open(config(&self.0, BUDGET)) {
            store.discard();
        }
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn config(place: &Path, budget: ByteLen) -> StoreConfig {
    StoreConfig { pages: Pages::Huge, directory: Some(place.join("arena")), ..StoreConfig::new(budget) }
}

fn private(pages: u64) -> StoreConfig {
    StoreConfig { pages: Pages::Huge, ..StoreConfig::new(ByteLen::mib(2 * pages - 2)) }
}

/// Takes all pages that are left but for `leave`, in a store of its own.
fn thief(leave: u64) -> Store {
    let thief = Store::open(private(available() - leave)).unwrap();
    assert_eq!(available(), leave);
    thief
}

fn block(n: u64) -> Vec<u8> {
    n.to_le_bytes().repeat(512)
}

/// Writes blocks `seed + n` at `n` until the store is full; how many fitted.
fn fill(volume: &Volume, seed: u64) -> u64 {
    for n in 0.. {
        match volume.write_at(n * BLOCK, &block(seed + n), WriteFlags::default()) {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error.kind(), BlockErrorKind::NoSpace);
                return n;
            }
        }
    }
    unreachable!()
}

fn holds(volume: &Volume, seed: u64, blocks: u64) {
    let mut buf = vec![0; BLOCK as usize];
    for n in 0..blocks {
        volume.read_at(n * BLOCK, &mut buf).unwrap();
        assert!(buf == block(seed + n), "block {n}");
    }
}

fn blank(store: &Store, id: VolumeId) -> std::sync::Arc<Volume> {
    store.create_volume(VolumeSpec::blank(id, ByteLen::gib(1))).unwrap()
}

/// Filled to the brim, emptied, and filled again while every page that is not the store's is somebody else's.
fn fill_twice(store: &Store) {
    let (before, used) = (available(), store.stats().used_bytes);
    let volume = blank(store, VolumeId::random());
    let fitted = fill(&volume, 1 << 40);
    let least = store.stats().budget.bytes() * 95 / 100 - (2 << 20) - used.bytes();
    assert!(fitted * BLOCK >= least, "only {fitted} blocks fit");
    holds(&volume, 1 << 40, fitted);
    volume.trim(0, 1 << 30).unwrap();
    assert!(store.stats().used_bytes == used, "{:?}", store.stats());
    // what others need has the store look for whole free pages
    let others: Vec<VolumeId> = (0..10_000)
        .map_while(|_| {
            let stats = store.stats();
            let full = stats.frame_bytes.bytes() > used.bytes() + stats.budget.bytes() / 2;
            full.then(|| blank(store, VolumeId::random()).id())
        })
        .collect();
    assert!(others.len() < 10_000, "{:?}", store.stats());
    others.into_iter().for_each(|id| store.delete_volume(id).unwrap());
    assert_eq!(available(), before, "the pages stay the store's");
    {
        let _thief = (before > 0).then(|| thief(0));
        let again = fill(&volume, 2 << 40);
        assert!(again + 600 > fitted, "{again} of {fitted} fit again");
        holds(&volume, 2 << 40, again);
    }
    store.delete_volume(volume.id()).unwrap();
    assert!(store.audit().is_exact(), "{:?}", store.audit().faults);
}

/// What is killed: writes blocks, says so, and waits for its end.
#[test]
fn a_process_that_is_killed_on_hugetlb() {
    let Some(arena) = std::env::var_os(ARENA) else { return };
    let store = Store::open(config(Path::new(&arena), BUDGET)).unwrap();
    let volume = blank(&store, VolumeId::from_bytes([7; 16]));
    for n in 0..5000 {
        volume.write_at(n * BLOCK, &block(9000 + n), WriteFlags::default()).unwrap();
    }
    volume.trim(0, 1000 * BLOCK).unwrap();
    println!("written");
    std::io::stdin().lines().for_each(drop);
}

fn write_and_be_killed(place: &Path) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_that_is_killed_on_hugetlb", "--nocapture"])
        .env(ARENA, place)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    // the harness's own words may stand before it
    assert!(out.lines().map_while(Result::ok).any(|line| line.ends_with("written")), "the writer ended");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn what_was_promised_is_there_and_what_is_not_there_is_refused() {
    let _aside = match SetAside::new(PAGES) {
        Ok(aside) => aside,
        Err(why) => {
            eprintln!("SKIPPED: a store on hugetlb pages was not tried: {why}");
            return;
        }
    };
    let all = available();

    // private memory
    {
        let store = Store::open(private(OF_STORE)).unwrap();
        assert_eq!((store.stats().pages, available()), (PageKind::Huge, all - OF_STORE), "no more and no less");
        fill_twice(&store);
        conformance::run(|size| store.create_volume(VolumeSpec::blank(VolumeId::random(), size)).unwrap());
    }
    assert_eq!(available(), all);

    // memory that outlives the process
    let place = Place::new();
    let (store, attached) = Store::open_or_attach(config(&place.0, BUDGET)).unwrap();
    assert_eq!((attached, store.stats().pages), (Attached::Fresh(None), PageKind::Huge));
    assert_eq!(available(), all - OF_STORE);
    fill_twice(&store);
    conformance::run(|size| store.create_volume(VolumeSpec::blank(VolumeId::random(), size)).unwrap());
    store.volumes().into_iter().for_each(|volume| store.delete_volume(volume.id()).unwrap());

    // more than there is
    let refused = |config: StoreConfig| {
        let error = Store::open(config).err().expect("it is too large");
        assert_eq!(error.code(), ErrorCode::Unavailable);
        assert!(matches!(error, StoreError::HugePages { .. }), "{error:?}");
        error.to_string()
    };
    let text = refused(private(all - OF_STORE + 1));
    assert!(text.contains(&format!("{} huge pages", all - OF_STORE + 1)), "{text}");
    let other = Place::new();
    for _ in 0..2 {
        refused(config(&other.0, ByteLen::mib(2 * all)));
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(mounts.matches(&format!("{}/arena/huge ", other.0.display())).count() <= 1, "{mounts}");
    // and once there is enough of it, it opens
    assert!(Store::open(config(&other.0, ByteLen::mib(20))).unwrap().stats().pages == PageKind::Huge);
    drop(other);
    assert_eq!(available(), all - OF_STORE);

    // spilling needs memory that goes back block by block
    let spill = Some(SpillConfig { file: place.0.join("spilled"), limit: ByteLen::mib(64) });
    let error = Store::open(StoreConfig { spill, ..private(20) }).err().unwrap();
    assert_eq!(error.code(), ErrorCode::InvalidArgument, "{error}");

    // killed, and found again although nothing else is left
    drop(store);
    write_and_be_killed(&place.0);
    assert_eq!(available(), all - OF_STORE, "a killed store's pages are kept for the next one");
    {
        let _thief = thief(0);
        let (store, attached) = Store::open_or_attach(config(&place.0, BUDGET)).unwrap();
        let Attached::Warm(report) = attached else { panic!("{attached:?}") };
        assert!(report.faults.is_empty() && report.frames == 4000, "{report:?}");
        let volume = store.volume(VolumeId::from_bytes([7; 16])).unwrap();
        let mut buf = vec![1; 1000 * BLOCK as usize];
        volume.read_at(0, &mut buf).unwrap();
        assert!(buf.iter().all(|byte| *byte == 0));
        for n in 1000..5000 {
            volume.read_at(n * BLOCK, &mut buf[..BLOCK as usize]).unwrap();
            assert!(buf[..BLOCK as usize] == block(9000 + n), "block {n}");
        }
        fill_twice(&store);
        drop((volume, store));

        // a larger budget that cannot be had loses nothing
        refused(config(&place.0, ByteLen::mib(2 * all)));
        let (store, attached) = Store::open_or_attach(config(&place.0, BUDGET)).unwrap();
        assert!(matches!(attached, Attached::Warm(_)), "{attached:?}");
        assert_eq!(store.volumes().len(), 1);
        store.discard();
    }
    assert!(!place.0.join("arena").exists());
    assert_eq!(available(), all, "discarded, its pages are anybody's");
}
