//! A process that writes is killed (SIGKILL) and the next one attaches: whatever had returned is there, block by block
//! against an oracle, counts are exact, and what was under way is there whole or not at all.
//!
//! 200 times by default, and 100 times with less memory than is written, so that blocks are on their way to the disk and back;
//! `MUSTER_STORE_KILLS=2000` for more.
#![allow(clippy::unwrap_used)]

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use muster_block::{BlockDevice, WriteFlags, ZeroFlags, conformance::Random};
use muster_common::{ByteLen, Digest, VolumeId};
use muster_store::{Attached, SpillConfig, Store, StoreConfig, Volume, VolumeSpec, WhenFull};

const SIZE: usize = 4 << 20;
const BLOCK: usize = 4096;
/// Each with a volume of its own.
const WRITERS: u64 = 3;
const ARENA: &str = "MUSTER_TEST_ARENA";
const ROUND: &str = "MUSTER_TEST_ROUND";
const SPILLS: &str = "MUSTER_TEST_SPILLS";

/// A directory in memory, gone with the value.
struct Place(PathBuf, WhenFull);

impl Place {
    fn new() -> Place {
        Self::of(WhenFull::Refuse)
    }
    fn of(when_full: WhenFull) -> Place {
        Place(PathBuf::from(format!("/dev/shm/muster-test-{}", VolumeId::random().short())), when_full)
    }
    fn config(&self) -> StoreConfig {
        config(&self.0, self.1)
    }
    fn attach(&self) -> (Store, Attached) {
        Store::open_or_attach(self.config()).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Ok(store) = Store::open(self.config()) {
            store.discard();
        }
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn config(directory: &Path, when_full: WhenFull) -> StoreConfig {
    let spill = SpillConfig { file: directory.join("spilled"), limit: ByteLen::mib(16) };
    let (mib, spill) = if when_full == WhenFull::Spill { (3, Some(spill)) } else { (128, None) };
    StoreConfig { directory: Some(directory.join("arena")), spill, ..StoreConfig::new(ByteLen::mib(mib)) }
}

fn volume_id(writer: u64) -> VolumeId {
    VolumeId::from_bytes([writer as u8 + 1; 16])
}

fn digest() -> Digest {
    Digest::from_bytes([7; 32])
}

/// One thing a writer does. Drawn from the round and its number, by the writer and by the oracle.
#[derive(Debug, PartialEq)]
enum Step {
    Write { at: usize, data: Vec<u8> },
    Zero { at: usize, len: usize },
    Reset,
}

fn step(round: u64, writer: u64, number: u64) -> Step {
    let mut random = Random(round << 32 ^ writer << 24 ^ number << 2);
    let mut at = random.below(SIZE as u64) as usize;
    let mut len = 1 + random.below(48 << 10) as usize;
    if random.below(4) > 0 {
        (at, len) = (at / BLOCK * BLOCK, len.next_multiple_of(BLOCK));
    }
    len = len.min(SIZE - at);
    match random.below(40) {
        0 => Step::Reset,
        1..5 => Step::Zero { at, len },
        // few contents, so that blocks are shared among the volumes
        5..12 => Step::Write { at, data: vec![random.below(3) as u8; len] },
        _ => {
            let mut data = vec![0; len];
            random.fill(&mut data);
            Step::Write { at, data }
        }
    }
}

/// The writers: go on until killed, and write down how many steps each has done, in memory that stays.
#[test]
fn a_process_that_writes_until_it_is_killed() {
    let (Some(arena), Ok(round)) = (std::env::var_os(ARENA), std::env::var(ROUND)) else { return };
    let (arena, round): (PathBuf, u64) = (arena.into(), round.parse().unwrap());
    let when_full = if std::env::var_os(SPILLS).is_some() { WhenFull::Spill } else { WhenFull::Refuse };
    let store = Store::open(config(&arena, when_full)).unwrap();
    let done = OpenOptions::new().write(true).open(arena.join("done")).unwrap();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (store, done) = (&store, &done);
            scope.spawn(move || {
                let volume = store.volume(volume_id(writer)).unwrap();
                for number in 0.. {
                    match step(round, writer, number) {
                        Step::Write { at, data } => volume.write_at(at as u64, &data, WriteFlags::default()).unwrap(),
                        Step::Zero { at, len } => {
                            volume.write_zeroes(at as u64, len as u64, ZeroFlags::default()).unwrap();
                        }
                        Step::Reset => {
                            volume.reset().unwrap();
                        }
                    }
                    done.write_all_at(&(number + 1).to_le_bytes(), writer * 8).unwrap();
                }
            });
        }
        if when_full == WhenFull::Spill {
            // what is shared is not spilled
            return;
        }
        // and one that makes and deletes whatever else there is
        let store = &store;
        scope.spawn(move || {
            let mut random = Random(round);
            for number in 0u64.. {
                let volume = store.volume(volume_id(random.below(WRITERS))).unwrap();
                let snapshot = volume.snapshot().unwrap();
                match random.below(6) {
                    0 => {
                        let digest = Digest::from_bytes([100 + random.below(100) as u8; 32]);
                        if store.drop_image(&digest).is_err() {
                            let _ = store.commit(&snapshot, digest, "committed");
                        }
                    }
                    1 => {
                        store.keep_snapshot(&snapshot, volume.id(), &format!("{round}.{number}")).unwrap();
                    }
                    2 => {
                        if let Some(kept) = store.snapshots().first() {
                            store.drop_snapshot(kept.id).unwrap();
                        }
                    }
                    3 | 4 => {
                        let id = VolumeId::from_bytes([100 + random.below(100) as u8; 16]);
                        if store.delete_volume(id).is_err() {
                            let spec = VolumeSpec::blank(id, ByteLen(SIZE as u64));
                            let clone = store.create_volume_from(spec, &snapshot).unwrap();
                            clone.write_at(0, &number.to_le_bytes(), WriteFlags::default()).unwrap();
                        }
                    }
                    _ => {
                        let together: Vec<VolumeId> = (0..WRITERS).map(volume_id).collect();
                        store.snapshot_together(&together).unwrap();
                    }
                }
            }
        });
    });
}

fn start(place: &Place, round: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_that_writes_until_it_is_killed", "--nocapture"])
        .env(ARENA, &place.0)
        .envs((place.1 == WhenFull::Spill).then_some((SPILLS, "1")))
        .env(ROUND, round.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn steps_done(done: &File, writer: u64) -> u64 {
    let mut bytes = [0; 8];
    done.read_exact_at(&mut bytes, writer * 8).unwrap();
    u64::from_le_bytes(bytes)
}

/// What one volume should hold.
struct Oracle {
    bytes: Vec<u8>,
    generation: u64,
}

fn apply(oracle: &mut Oracle, step: &Step, image: &[u8]) {
    match step {
        Step::Write { at, data } => oracle.bytes[*at..*at + data.len()].copy_from_slice(data),
        Step::Zero { at, len } => oracle.bytes[*at..*at + *len].fill(0),
        Step::Reset => {
            oracle.bytes.copy_from_slice(image);
            oracle.generation += 1;
        }
    }
}

/// Compares a volume with the oracle after `done` steps; the next one may have happened in part, block by block. The
/// oracle then knows what did.
fn compare(volume: &Volume, oracle: &mut Oracle, round: u64, writer: u64, done: u64, image: &[u8]) {
    for number in 0..done {
        apply(oracle, &step(round, writer, number), image);
    }
    let next = step(round, writer, done);
    let mut after = Oracle { bytes: oracle.bytes.clone(), generation: oracle.generation };
    apply(&mut after, &next, image);
    let mut found = vec![0; SIZE];
    volume.read_at(0, &mut found).unwrap();
    if next == Step::Reset {
        let expected = if volume.generation() == after.generation { &after } else { &*oracle };
        assert_eq!(volume.generation(), expected.generation, "round {round} writer {writer}");
        assert!(found == expected.bytes, "round {round} writer {writer}: a reset happened in part");
        oracle.generation = expected.generation;
    } else {
        assert_eq!(volume.generation(), oracle.generation, "round {round} writer {writer}");
        for (n, block) in found.chunks(BLOCK).enumerate() {
            let range = n * BLOCK..n * BLOCK + block.len();
            assert!(
                block == &oracle.bytes[range.clone()] || block == &after.bytes[range],
                "round {round} writer {writer}: block {n} is neither as before step {done} nor as after ({next:?})"
            );
        }
    }
    oracle.bytes = found;
}

#[test]
fn a_killed_process_loses_nothing_that_had_returned() {
    kill_again_and_again(&Place::new(), 200);
}

#[test]
fn a_killed_process_loses_nothing_that_was_on_its_way_to_the_disk() {
    kill_again_and_again(&Place::of(WhenFull::Spill), 100);
}

fn kill_again_and_again(place: &Place, times: u64) {
    let kills = std::env::var("MUSTER_STORE_KILLS").map_or(times, |kills| kills.parse().unwrap());
    std::fs::create_dir_all(&place.0).unwrap();
    let mut image = vec![0; SIZE];
    Random(1).fill(&mut image[..SIZE / 2]);
    let mut oracles: Vec<Oracle> = Vec::new();
    {
        let (store, attached) = place.attach();
        assert_eq!(attached, Attached::Fresh(None));
        let builder = store.image_builder(digest(), "image", ByteLen(SIZE as u64)).unwrap();
        builder.write_chunk(0, &image).unwrap();
        builder.finish().unwrap();
        for writer in 0..WRITERS {
            let spec = VolumeSpec { when_full: place.1, ..VolumeSpec::clone_of(volume_id(writer), digest()) };
            store.create_volume(spec).unwrap();
            oracles.push(Oracle { bytes: image.clone(), generation: 0 });
        }
    }
    let done = place.0.join("done");
    let (mut steps, mut spilled) = (0, 0);
    for round in 1..=kills {
        std::fs::write(&done, [0; 8 * WRITERS as usize]).unwrap();
        let file = File::open(&done).unwrap();
        let mut child = start(place, round);
        // it is killed at some moment after everybody has begun
        let mut random = Random(round);
        let deadline = Instant::now() + Duration::from_secs(60);
        let wanted = 1 + random.below(12);
        while (0..WRITERS).any(|writer| steps_done(&file, writer) < wanted) {
            assert!(Instant::now() < deadline, "round {round}: the writers do not get on");
            assert!(child.try_wait().unwrap().is_none(), "round {round}: the writers ended");
            std::thread::sleep(Duration::from_micros(300));
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let (store, attached) = place.attach();
        let Attached::Warm(report) = attached else { panic!("round {round}: {attached:?}") };
        assert!(report.faults.is_empty(), "round {round}: {:?}", report.faults);
        let audit = store.audit();
        assert!(audit.is_exact(), "round {round}: {:?}", audit.faults);
        spilled += u64::from(store.stats().spilled_bytes > ByteLen::ZERO);
        for writer in 0..WRITERS {
            let volume = store.volume(volume_id(writer)).unwrap();
            let finished = steps_done(&file, writer);
            steps += finished;
            compare(&volume, &mut oracles[writer as usize], round, writer, finished, &image);
        }
        for volume in store.volumes() {
            assert!(store.verify_volume(volume.id()).unwrap().is_clean());
        }
        for kept in store.snapshots() {
            let snapshot = store.snapshot(kept.id).unwrap();
            snapshot.read_at(0, &mut vec![0; SIZE]).unwrap();
            if store.snapshots().len() > 20 {
                store.drop_snapshot(kept.id).unwrap();
            }
        }
        assert!(store.audit().is_exact());
        let mut found = vec![0; SIZE];
        store.image(&digest()).unwrap().read_at(0, &mut found).unwrap();
        assert!(found == image, "round {round}: the image changed");
    }
    assert!(
        place.1 == WhenFull::Refuse || spilled > kills / 2,
        "seldom was there anything on the disk: {spilled} times"
    );
    println!("{kills} kills, {steps} steps, {spilled} times with blocks on the disk");
}

#[test]
fn what_an_orderly_process_leaves_is_found_again_and_discarded() {
    let place = Place::new();
    let id = VolumeId::random();
    let kept = {
        let (store, _) = place.attach();
        let mut spec = VolumeSpec::blank(id, ByteLen::mib(8));
        spec.generation = 41;
        spec.quota = Some(ByteLen::mib(2));
        let volume = store.create_volume(spec).unwrap();
        volume.write_at(5000, b"before", WriteFlags::default()).unwrap();
        let snapshot = volume.snapshot().unwrap();
        let kept = store.keep_snapshot(&snapshot, id, "monday").unwrap();
        volume.write_at(5000, b"after!", WriteFlags::default()).unwrap();
        volume.grow(ByteLen::gib(20)).unwrap();
        volume.write_at(19 << 30, b"far away", WriteFlags::default()).unwrap();
        assert!(Store::open(place.config()).is_err(), "one process at a time");
        kept
    };
    let (store, attached) = place.attach();
    let Attached::Warm(report) = attached else { panic!("{attached:?}") };
    assert_eq!((report.images, report.volumes, report.snapshots, &report.faults), (0, 1, 1, &vec![]));
    let volume = store.volume(id).unwrap();
    assert_eq!((volume.generation(), volume.size()), (41, ByteLen::gib(20)));
    assert_eq!(volume.stats().quota, Some(ByteLen::mib(2)));
    let read = |device: &dyn BlockDevice, at: u64| {
        let mut buf = [0; 6];
        device.read_at(at, &mut buf).unwrap();
        buf
    };
    assert_eq!(&read(&*volume, 5000), b"after!");
    assert_eq!(&read(&*volume, 19 << 30), b"far aw");
    assert_eq!(store.snapshots(), std::slice::from_ref(&kept));
    let snapshot = store.snapshot(kept.id).unwrap();
    assert_eq!(&read(&snapshot, 5000), b"before");
    assert_eq!(volume.revert(&snapshot).unwrap(), 42);
    assert_eq!(&read(&*volume, 5000), b"before");
    assert!(store.audit().is_exact());
    drop((snapshot, volume));
    let volume = Arc::downgrade(&store.volume(id).unwrap());
    store.discard();
    assert!(volume.upgrade().is_none());
    assert!(!place.0.join("arena").exists());
    let (_, attached) = place.attach();
    assert_eq!(attached, Attached::Fresh(None));
}

#[test]
fn memory_that_cannot_be_believed_is_said_and_begun_anew() {
    let place = Place::new();
    let header = place.0.join("arena/store");
    {
        let (store, _) = place.attach();
        store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(1))).unwrap();
    }
    let file = OpenOptions::new().write(true).open(&header).unwrap();
    file.write_all_at(&9u32.to_le_bytes(), 8).unwrap();
    let (store, attached) = place.attach();
    let Attached::Fresh(Some(why)) = attached else { panic!("{attached:?}") };
    assert!(why.contains("version 9"), "{why}");
    assert!(store.volumes().is_empty() && store.audit().is_exact());
}
