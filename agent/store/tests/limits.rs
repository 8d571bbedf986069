//! What happens when memory is full: quotas, reservations, refusals, spilling. And whose blocks are shared.
#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, sync::Arc};

use muster_block::{BlockDevice, BlockErrorKind, WriteFlags, conformance::Random};
use muster_common::{ByteLen, TenantId, VolumeId};
use muster_store::{Attached, Pages, SpillConfig, Store, StoreConfig, StoreError, Volume, VolumeSpec, WhenFull};

const BLOCK: u64 = 4096;

fn block(seed: u64) -> [u8; 4096] {
    let mut block = [0; 4096];
    Random(seed).fill(&mut block);
    block
}

fn write(volume: &Volume, n: u64, seed: u64) -> Result<(), BlockErrorKind> {
    volume.write_at(n * BLOCK, &block(seed), WriteFlags::default()).map_err(|error| error.kind())
}

fn assert_block(volume: &Volume, n: u64, seed: u64) {
    let mut found = [0; 4096];
    volume.read_at(n * BLOCK, &mut found).unwrap();
    assert!(found == block(seed), "block {n} is not that of seed {seed}");
}

fn assert_exact(store: &Store) {
    let audit = store.audit();
    assert!(audit.is_exact(), "{:?}", audit.faults);
}

fn open(mib: u64) -> Store {
    Store::open(StoreConfig { pages: Pages::Small, ..StoreConfig::new(ByteLen::mib(mib)) }).unwrap()
}

fn create(store: &Store, mib: u64, change: impl FnOnce(&mut VolumeSpec)) -> Result<Arc<Volume>, StoreError> {
    let mut spec = VolumeSpec::blank(VolumeId::random(), ByteLen::mib(mib));
    change(&mut spec);
    store.create_volume(spec)
}

/// Writes new blocks until the store refuses; how many fitted.
fn fill(volume: &Volume, first: u64, seed: u64) -> u64 {
    (0..).take_while(|n| write(volume, first + n, seed << 32 | n) != Err(BlockErrorKind::NoSpace)).count() as u64
}

#[test]
fn a_quota_is_met_to_the_block_and_by_nobody_else() {
    let store = open(64);
    let volume = create(&store, 32, |spec| spec.quota = Some(ByteLen::mib(1))).unwrap();
    let other = create(&store, 32, |_| {}).unwrap();
    assert_eq!(fill(&volume, 0, 1), 256);
    assert_eq!(volume.write_at(0, &block(7), WriteFlags::default()).map_err(|e| e.kind()), Ok(()), "an overwrite");
    for n in 0..1000 {
        write(&other, n, 1000 + n).unwrap();
    }
    // zeroes take nothing, and what is trimmed can be written elsewhere
    volume.write_at(20 << 20, &[0; 1 << 20], WriteFlags::default()).unwrap();
    volume.trim(0, 10 * BLOCK).unwrap();
    assert_eq!(fill(&volume, 5000, 2), 10);
    let error = volume.write_at(6000 * BLOCK, &block(8), WriteFlags::default()).unwrap_err();
    assert!(muster_common::Chain(&error).to_string().contains("quota"), "{}", muster_common::Chain(&error));
    assert!(volume.set_quota(ByteLen::mib(2)));
    assert_eq!(fill(&volume, 7000, 3), 256);
    volume.reset().unwrap();
    assert_eq!(fill(&volume, 0, 4), 512);
    assert_exact(&store);
}

#[test]
fn a_reservation_holds_whatever_others_do() {
    let store = open(64);
    let reserved = create(&store, 16, |spec| spec.reservation = Some(ByteLen::mib(16))).unwrap();
    assert!(store.stats().reserved_bytes >= ByteLen::mib(16));
    let greedy = create(&store, 1024, |_| {}).unwrap();
    let fitted = fill(&greedy, 0, 1);
    assert!(fitted > 8000 && fitted < 12_000, "{fitted}");
    // every block of it, again and again, also what others hold as well
    let blocks = 16 << 8;
    for round in 0..3 {
        for n in 0..blocks {
            let seed = if n % 7 == 0 { 1 << 32 | n } else { (round + 9) << 40 | n };
            write(&reserved, n, seed).unwrap();
        }
        assert_exact(&store);
    }
    // a snapshot needs as much again
    let refused = reserved.snapshot().err().map(|error| error.code());
    assert_eq!(refused, Some(muster_common::ErrorCode::NoSpace));
    greedy.trim(0, 1 << 30).unwrap();
    let snapshot = reserved.snapshot().unwrap();
    fill(&greedy, 0, 2);
    for n in 0..blocks {
        write(&reserved, n, 77 << 40 | n).unwrap();
    }
    let mut found = [0; 4096];
    snapshot.read_at(BLOCK, &mut found).unwrap();
    assert!(found == block(11 << 40 | 1));
    assert_exact(&store);
    drop(snapshot);
    let too_much = create(&store, 64, |spec| spec.reservation = Some(ByteLen::mib(64))).err();
    assert!(matches!(too_much, Some(StoreError::NoSpace { .. })), "{too_much:?}");
    store.delete_volume(reserved.id()).unwrap();
    assert_eq!(store.stats().reserved_bytes, ByteLen::ZERO);
    assert_exact(&store);
}

#[test]
fn tenants_share_among_themselves_only() {
    let store = open(64);
    let tenants = [None, Some(TenantId::random()), Some(TenantId::random())];
    for tenant in tenants {
        for _ in 0..2 {
            let volume = create(&store, 4, |spec| spec.tenant = tenant).unwrap();
            for n in 0..100 {
                write(&volume, n, n).unwrap();
            }
            assert_eq!(volume.stats().tenant, tenant);
        }
    }
    assert_eq!(store.stats().unique_blocks, 300);
    for volume in store.volumes() {
        assert!(store.verify_volume(volume.id()).unwrap().is_clean());
    }
    assert_exact(&store);
}

/// Writes until the disk is full too, and again: then nobody gets more memory, and who has some promised has it.
#[test]
fn a_reservation_holds_although_the_volume_spills() {
    let place = Spilling::new();
    let (store, _) = place.open(ByteLen::mib(8));
    let reserved = create(&store, 32, |spec| {
        (spec.reservation, spec.when_full) = (Some(ByteLen::mib(4)), WhenFull::Spill);
    })
    .unwrap();
    let promised = 4 << 8;
    for n in 0..promised {
        write(&reserved, n, 1 << 32 | n).unwrap();
    }
    let greedy = create(&store, 64, |spec| spec.when_full = WhenFull::Spill).unwrap();
    fill(&greedy, 0, 2);
    assert!(store.stats().spilled_bytes > ByteLen::mib(7), "{:?}", store.stats());
    let reads = store.stats().spill_reads;
    for n in 0..promised {
        assert_block(&reserved, n, 1 << 32 | n);
    }
    assert_eq!(store.stats().spill_reads, reads, "nothing of it is on the disk");
    for round in 0..4 {
        for n in 0..promised {
            write(&reserved, (n * 7 + round * 300) % promised, (round + 9) << 40 | n).unwrap();
        }
        assert_exact(&store);
    }
    // the next process promises as much
    let id = reserved.id();
    drop((reserved, greedy, store));
    let (store, attached) = place.open(ByteLen::mib(8));
    assert!(matches!(&attached, Attached::Warm(report) if report.faults.is_empty()), "{attached:?}");
    let reserved = store.volume(id).unwrap();
    for n in 0..promised {
        write(&reserved, n, 77 << 40 | n).unwrap();
    }
    assert_exact(&store);
}

/// Bytes that the spill file takes on its disk.
fn on_disk(place: &Spilling) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(place.directory.path().join("spill")).unwrap().blocks() * 512
}

#[test]
fn the_spill_file_takes_no_more_than_its_limit_and_gives_back_what_nobody_wants() {
    let place = Spilling::new();
    let limit = ByteLen::mib(12);
    let (store, _) = place.open(limit);
    let volumes = [(); 2].map(|()| create(&store, 24, |spec| spec.when_full = WhenFull::Spill).unwrap());
    let mut random = Random(5);
    let mut model = [[0u64; 3 << 10]; 2];
    for seed in 1..30_000u64 {
        let (of, n) = (random.below(2) as usize, random.below(3 << 10));
        write(&volumes[of], n, seed).unwrap();
        model[of][n as usize] = seed;
        if seed % 1000 == 0 {
            assert!(on_disk(&place) <= limit.bytes() + (256 << 10), "{} of {limit}", on_disk(&place));
        }
    }
    assert_exact(&store);
    for (volume, blocks) in volumes.iter().zip(&model) {
        (0..).zip(blocks).filter(|(_, seed)| **seed > 0).for_each(|(n, seed)| assert_block(volume, n, *seed));
    }
    let [kept, gone] = volumes;
    let (before, id) = (on_disk(&place), gone.id());
    drop(gone);
    store.delete_volume(id).unwrap();
    // what lies in a row goes back while others are still there
    kept.trim(0, 11 << 20).unwrap();
    for _ in 0..100 {
        store.give_back();
    }
    assert!(on_disk(&place) < before, "{before}");
    for n in 11 << 8..3 << 10 {
        if model[0][n as usize] > 0 {
            assert_block(&kept, n, model[0][n as usize]);
        }
    }
    kept.trim(0, 24 << 20).unwrap();
    store.give_back();
    assert_eq!(on_disk(&place), 0);
    for n in 0..6 << 10 {
        write(&kept, n, 7 << 40 | n).unwrap();
    }
    assert!(on_disk(&place) > 8 << 20);
    for n in 0..6 << 10 {
        assert_block(&kept, n, 7 << 40 | n);
    }
    assert_exact(&store);
}

/// A store that spills, on a disk and in memory that outlives it.
struct Spilling {
    directory: tempfile::TempDir,
    arena: PathBuf,
}

impl Spilling {
    fn new() -> Spilling {
        let arena = PathBuf::from(format!("/dev/shm/muster-test-{}", VolumeId::random().short()));
        Spilling { directory: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(), arena }
    }
    fn open(&self, limit: ByteLen) -> (Store, Attached) {
        let spill = SpillConfig { file: self.directory.path().join("spill"), limit };
        let config = StoreConfig {
            pages: Pages::Small,
            directory: Some(self.arena.clone()),
            spill: Some(spill),
            ..StoreConfig::new(ByteLen::mib(16))
        };
        Store::open_or_attach(config).unwrap()
    }
}

impl Drop for Spilling {
    fn drop(&mut self) {
        let (store, _) = self.open(ByteLen::mib(64));
        store.discard();
    }
}

#[test]
fn cold_blocks_go_to_the_disk_and_come_back() {
    let place = Spilling::new();
    let (store, _) = place.open(ByteLen::mib(64));
    let spills = |spec: &mut VolumeSpec| spec.when_full = WhenFull::Spill;
    let volume = create(&store, 64, spills).unwrap();
    let other = create(&store, 64, |_| {}).unwrap();
    for n in 0..500 {
        write(&other, n, 9 << 40 | n).unwrap();
    }
    // three times the budget
    let blocks = 48 << 8;
    for n in 0..blocks {
        write(&volume, n, n + 1).unwrap();
    }
    let stats = store.stats();
    assert!(stats.resident_bytes <= stats.budget, "{stats:?}");
    assert!(stats.spilled_bytes >= ByteLen::mib(32), "{stats:?}");
    assert_exact(&store);
    // who does not spill is refused, and only he
    let refused = (0..4000).find_map(|n| write(&other, 1000 + n, 8 << 40 | n).err());
    assert_eq!(refused, Some(BlockErrorKind::NoSpace));
    let reads = store.stats().spill_reads;
    for n in 0..500 {
        assert_block(&other, n, 9 << 40 | n);
    }
    assert_eq!(store.stats().spill_reads, reads, "nothing of it is on the disk");
    for n in (0..blocks).rev() {
        assert_block(&volume, n, n + 1);
    }
    // parts of blocks that are away are written as others are
    let mut random = Random(3);
    for _ in 0..500 {
        let n = random.below(blocks);
        volume.write_at(n * BLOCK + 100, b"in the middle", WriteFlags::default()).unwrap();
        let mut expected = block(n + 1);
        expected[100..113].copy_from_slice(b"in the middle");
        let mut found = [0; 4096];
        volume.read_at(n * BLOCK, &mut found).unwrap();
        assert!(found == expected);
    }
    assert!(store.verify_volume(volume.id()).unwrap().is_clean());
    assert_exact(&store);
    // and the next process has them, too
    let (id, away) = (volume.id(), store.stats().spilled_bytes);
    drop((volume, other, store));
    let (store, attached) = place.open(ByteLen::mib(64));
    assert!(matches!(&attached, Attached::Warm(report) if report.faults.is_empty()), "{attached:?}");
    assert_eq!(store.stats().spilled_bytes, away);
    assert!(store.stats().resident_bytes <= ByteLen::mib(17), "{:?}", store.stats());
    assert_exact(&store);
    assert!(store.verify_volume(id).unwrap().is_clean());
    // what is deleted leaves neither memory nor disk
    store.delete_volume(id).unwrap();
    assert_eq!(store.stats().spilled_bytes, ByteLen::ZERO);
    assert_exact(&store);
}

#[test]
fn what_the_store_needs_for_itself_is_there_while_blocks_can_leave() {
    let place = Spilling::new();
    let (store, _) = place.open(ByteLen::mib(64));
    let volume = create(&store, 64, |spec| spec.when_full = WhenFull::Spill).unwrap();
    for n in 0..24 << 8 {
        write(&volume, n, n + 1).unwrap();
    }
    let full = store.stats();
    assert!(full.budget.bytes() - full.resident_bytes.bytes() < 8192, "{full:?}");
    let mut blank = Vec::new();
    for round in 0..200 {
        // each takes a kilobyte or two; what it shares does not leave meanwhile
        drop(volume.snapshot().unwrap());
        drop(store.snapshot_together(&[volume.id()]).unwrap());
        if round % 50 == 0 {
            assert!(store.verify_volume(volume.id()).unwrap().is_clean());
        }
        // more than stays free after a write
        let others = if round == 100 { 400 } else { 1 };
        blank.extend((0..others).map(|_| create(&store, 64, |_| {}).unwrap()));
        for n in 0..7 {
            let at = 7000 + 8 * round + n;
            write(&volume, at, 6 << 40 | at).unwrap();
        }
        assert!(store.stats().resident_bytes <= full.budget);
    }
    assert_exact(&store);
}

#[test]
fn volumes_with_reservations_leave_room_for_others_to_spill() {
    let place = Spilling::new();
    let (store, _) = place.open(ByteLen::mib(64));
    let spills = |spec: &mut VolumeSpec| {
        (spec.when_full, spec.reservation) = (WhenFull::Spill, Some(ByteLen::kib(64)));
    };
    let reserved = [(); 5].map(|()| create(&store, 4, spills).unwrap());
    for (at, volume) in (0..).zip(&reserved) {
        for n in 0..272 {
            write(volume, n, (at + 1) << 40 | n).unwrap();
        }
    }
    let greedy = create(&store, 64, |spec| spec.when_full = WhenFull::Spill).unwrap();
    for n in 0..32 << 8 {
        write(&greedy, n, 99 << 40 | n).unwrap();
    }
    for (at, volume) in (0..).zip(&reserved) {
        (0..272).for_each(|n| assert_block(volume, n, (at + 1) << 40 | n));
        (0..16).for_each(|n| write(volume, n, (at + 1) << 50 | n).unwrap());
    }
    assert_exact(&store);
}

#[test]
fn blocks_from_before_a_snapshot_leave_when_it_is_gone() {
    let place = Spilling::new();
    let (store, _) = place.open(ByteLen::mib(64));
    let volume = create(&store, 32, |spec| {
        (spec.when_full, spec.reservation) = (WhenFull::Spill, Some(ByteLen::mib(1)));
    })
    .unwrap();
    // seven MiB more than is reserved
    for n in 0..8 << 8 {
        write(&volume, n, 1 << 40 | n).unwrap();
    }
    drop(store.snapshot_together(&[volume.id()]).unwrap());
    let stubborn = create(&store, 32, |_| {}).unwrap();
    let other = create(&store, 32, |spec| spec.when_full = WhenFull::Spill).unwrap();
    fill(&stubborn, 0, 3);
    for n in 0..1000 {
        write(&other, n, 4 << 40 | n).unwrap();
    }
    for n in 0..256 {
        write(&volume, n * 8, 5 << 40 | n).unwrap();
    }
    assert_exact(&store);
}

fn rss() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Numbers that spilled blocks had lie among those of no memory at all: no huge page is taken for one of them.
#[test]
fn what_comes_back_takes_what_is_charged_with_huge_pages_too() {
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let spill = Some(SpillConfig { file: place.path().join("spill"), limit: ByteLen::mib(256) });
    let config = StoreConfig { pages: Pages::Transparent, spill, ..StoreConfig::new(ByteLen::mib(64)) };
    let Ok(store) = Store::open(config) else {
        eprintln!("skipped: this kernel has no transparent huge pages");
        return;
    };
    let volume = create(&store, 256, |spec| spec.when_full = WhenFull::Spill).unwrap();
    let blocks = 200 << 8;
    for n in 0..blocks {
        write(&volume, n, 1 << 40 | n).unwrap();
    }
    // the last ones written are in memory: room for some of the others
    volume.trim(160 << 20, 40 << 20).unwrap();
    while store.give_back() > ByteLen::ZERO {}
    let (before, charged) = (rss(), store.stats().resident_bytes);
    for n in (0..120 << 8).step_by(512) {
        (0..3).for_each(|_| assert_block(&volume, n, 1 << 40 | n));
    }
    let (taken, charged) = (rss().saturating_sub(before), store.stats().resident_bytes.bytes() - charged.bytes());
    assert!(charged > 0 && taken < 8 << 20, "{} MiB were taken for {charged} bytes", taken >> 20);
    for n in 0..160 << 8 {
        assert_block(&volume, n, 1 << 40 | n);
    }
    for n in (0..blocks).step_by(3) {
        write(&volume, n, 2 << 40 | n).unwrap();
    }
    for n in 0..160 << 8 {
        assert_block(&volume, n, if n % 3 == 0 { 2 } else { 1 } << 40 | n);
    }
    assert!(store.stats().resident_bytes <= store.stats().budget);
    assert_exact(&store);
}

#[test]
fn a_spill_file_that_is_full_refuses_like_memory_does() {
    let place = Spilling::new();
    let (store, _) = place.open(ByteLen::mib(4));
    let volume = create(&store, 64, |spec| spec.when_full = WhenFull::Spill).unwrap();
    let fitted = fill(&volume, 0, 1);
    assert!((4000..5200).contains(&fitted), "{fitted}");
    for n in 0..fitted {
        assert_block(&volume, n, 1 << 32 | n);
    }
    volume.trim(0, 4 << 20).unwrap();
    for n in 0..900 {
        write(&volume, n, 2 << 32 | n).unwrap();
    }
    assert_exact(&store);
}

#[test]
fn readers_and_writers_of_spilled_blocks_see_what_was_written() {
    let place = Spilling::new();
    let (store, _) = place.open(ByteLen::mib(128));
    let volumes: Vec<_> =
        (0..4).map(|_| create(&store, 12, |spec| spec.when_full = WhenFull::Spill).unwrap()).collect();
    std::thread::scope(|scope| {
        for (thread, volume) in (0u64..).zip(&volumes) {
            let store = &store;
            scope.spawn(move || {
                let blocks = 12 << 8;
                let mut random = Random(thread);
                // what each block was last written with; 0: never
                let mut oracle = vec![0u64; blocks as usize];
                for step in 1..=12_000u64 {
                    let n = random.below(blocks);
                    match random.below(4) {
                        0 | 1 => {
                            // some contents are everybody's
                            let seed =
                                if random.below(5) == 0 { 1 + random.below(50) } else { thread << 40 | step << 8 };
                            write(volume, n, seed).unwrap();
                            oracle[n as usize] = seed;
                        }
                        2 if step % 50 == 0 => {
                            volume.trim(n * BLOCK, BLOCK).unwrap();
                            oracle[n as usize] = 0;
                        }
                        _ if oracle[n as usize] != 0 => assert_block(volume, n, oracle[n as usize]),
                        _ => {}
                    }
                    if step % 4000 == 0 && thread == 0 {
                        assert_exact(store);
                    }
                }
                for (n, seed) in (0..).zip(oracle).filter(|(_, seed)| *seed != 0) {
                    assert_block(volume, n, seed);
                }
            });
        }
    });
    assert!(store.stats().spill_writes > 0 && store.stats().spill_reads > 0);
    assert_exact(&store);
}

#[test]
fn what_was_spilled_is_not_given_up_for_a_wrong_configuration() {
    let place = Spilling::new();
    let (store, _) = place.open(ByteLen::mib(64));
    let volume = create(&store, 64, |spec| spec.when_full = WhenFull::Spill).unwrap();
    for n in 0..8000 {
        write(&volume, n, n + 1).unwrap();
    }
    assert!(store.stats().spilled_bytes > ByteLen::ZERO);
    assert!(store.spill_room().unwrap() < ByteLen::mib(64));
    let id = volume.id();
    drop((volume, store));
    let without = || StoreConfig {
        pages: Pages::Small,
        directory: Some(place.arena.clone()),
        ..StoreConfig::new(ByteLen::mib(16))
    };
    let text = |config| Store::open_or_attach(config).err().unwrap().to_string();
    assert!(text(without()).contains("none is configured now"));
    let elsewhere = SpillConfig { file: place.directory.path().join("other"), limit: ByteLen::mib(64) };
    assert!(text(StoreConfig { spill: Some(elsewhere), ..without() }).contains("other does not hold them"));
    let (store, attached) = place.open(ByteLen::mib(64));
    assert!(matches!(&attached, Attached::Warm(report) if report.faults.is_empty()), "{attached:?}");
    assert!(store.verify_volume(id).unwrap().is_clean());
    // a file that another store spills to is not opened, and nothing of it is lost
    let same = SpillConfig { file: place.directory.path().join("spill"), limit: ByteLen::mib(64) };
    let config = StoreConfig { spill: Some(same), ..StoreConfig::new(ByteLen::mib(16)) };
    let error = Store::open(config).err().unwrap();
    assert!(muster_common::Chain(&error).to_string().contains("another process"), "{}", muster_common::Chain(&error));
    assert!(store.verify_volume(id).unwrap().is_clean());
    store.delete_volume(id).unwrap();
}

#[test]
fn a_reserved_volume_that_has_grown_keeps_its_promise_all_over_the_disk() {
    let store = open(64);
    let reserved = create(&store, 8, |spec| spec.reservation = Some(ByteLen::mib(4))).unwrap();
    reserved.grow(ByteLen::gib(1)).unwrap();
    let greedy = create(&store, 1024, |_| {}).unwrap();
    fill(&greedy, 0, 1);
    assert!(!greedy.would_fit(ByteLen::mib(1)) && reserved.would_fit(ByteLen::mib(1)));
    // as many leaves as there are blocks
    for n in 0..4 << 8 {
        write(&reserved, n * 250, 7 << 40 | n).unwrap();
    }
    assert!(!reserved.would_fit(ByteLen::mib(1)), "it has what was promised");
    assert_exact(&store);
    // what it would take to map a larger disk is not there: refused, and nothing has changed
    let refused = reserved.grow(ByteLen::gib(64)).unwrap_err();
    assert!(matches!(refused, StoreError::NoSpace { .. }), "{refused}");
    assert_eq!(reserved.size(), ByteLen::gib(1));
    let resident = store.stats().resident_bytes;
    assert_exact(&store);
    store.delete_volume(reserved.id()).unwrap();
    assert!(store.stats().resident_bytes <= resident);
    assert_exact(&store);
}

#[test]
fn a_quota_that_is_nearly_met_counts_as_used_up_and_goes_with_its_volume() {
    let store = open(64);
    let volume = create(&store, 32, |spec| spec.quota = Some(ByteLen::mib(1))).unwrap();
    assert!(volume.takes_quota() && volume.would_fit(ByteLen::mib(8)));
    for n in 0..193 {
        write(&volume, n, n + 1).unwrap();
    }
    assert!(volume.quota_is_used_up() && !volume.would_fit(ByteLen::kib(4)));
    assert!(volume.set_quota(ByteLen::mib(2)));
    assert!(!volume.quota_is_used_up());
    assert_eq!(volume.quota(), Some(ByteLen::mib(2)));
    let before = store.stats().metadata_bytes.bytes();
    volume.grow(ByteLen::gib(4)).unwrap();
    let more = store.stats().metadata_bytes.bytes() - before;
    assert!(more >= 120 << 10, "a bit a block is charged: {more}");
    assert!(!create(&store, 32, |_| {}).unwrap().takes_quota());
    assert_exact(&store);
}
