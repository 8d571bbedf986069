//! Any sequence of requests on disks that together are larger than memory: what spills and what does not reads as the
//! obvious model says, and a block that is refused is as it was.
#![allow(clippy::unwrap_used)]

use muster_block::{
    BlockDevice, BlockErrorKind, WriteFlags,
    conformance::{Random, assert_contents},
    model::MemoryDevice,
};
use muster_common::{ByteLen, VolumeId};
use muster_store::{Pages, Snapshot, SpillConfig, Store, StoreConfig, Volume, VolumeSpec, WhenFull};
use proptest::{prelude::*, test_runner::FileFailurePersistence};
use std::sync::Arc;

const BLOCK: u64 = 4096;
/// Of each disk; four of them are twice the budget.
const BLOCKS: u64 = 256;

#[derive(Clone, Debug)]
enum Step {
    Write { disk: usize, block: u64, count: u64, seed: u64 },
    Part { disk: usize, block: u64, from: u64 },
    Read { disk: usize, block: u64, count: u64 },
    Trim { disk: usize, block: u64, count: u64 },
    Snapshot { disk: usize },
    Forget,
}

fn step() -> impl Strategy<Value = Step> {
    let range =
        (0..4usize, 0..BLOCKS, 1..120u64).prop_map(|(disk, block, count)| (disk, block, count.min(BLOCKS - block)));
    prop_oneof![
        6 => (range.clone(), 0..1_000_000u64)
            .prop_map(|((disk, block, count), seed)| Step::Write { disk, block, count, seed }),
        2 => (0..4usize, 0..BLOCKS, 0..4000u64).prop_map(|(disk, block, from)| Step::Part { disk, block, from }),
        4 => range.clone().prop_map(|(disk, block, count)| Step::Read { disk, block, count }),
        2 => range.prop_map(|(disk, block, count)| Step::Trim { disk, block, count }),
        1 => (0..4usize).prop_map(|disk| Step::Snapshot { disk }),
        1 => Just(Step::Forget),
    ]
}

struct World {
    store: Store,
    disks: Vec<(Arc<Volume>, MemoryDevice)>,
    snapshots: Vec<(Snapshot, MemoryDevice)>,
}

impl World {
    fn new(place: &std::path::Path) -> World {
        let spill = SpillConfig { file: place.join("spilled"), limit: ByteLen::mib(6) };
        let config = StoreConfig { pages: Pages::Small, spill: Some(spill), ..StoreConfig::new(ByteLen::mib(2)) };
        let store = Store::open(config).unwrap();
        let size = ByteLen(BLOCKS * BLOCK);
        let disks = (0..4)
            .map(|n| {
                let when_full = if n < 3 { WhenFull::Spill } else { WhenFull::Refuse };
                let spec = VolumeSpec { when_full, ..VolumeSpec::blank(VolumeId::random(), size) };
                (store.create_volume(spec).unwrap(), MemoryDevice::new(size))
            })
            .collect();
        World { store, disks, snapshots: Vec::new() }
    }

    /// One request for both; the model is told only what the disk did. A piece is at most one leaf's, so it is whole or
    /// not there.
    fn write(&self, disk: usize, at: u64, data: &[u8]) {
        let (volume, model) = &self.disks[disk];
        let mut at = at;
        let mut data = data;
        while !data.is_empty() {
            let (piece, rest) = data.split_at(data.len().min((BLOCK - at % BLOCK) as usize));
            match volume.write_at(at, piece, WriteFlags::default()) {
                Ok(()) => model.write_at(at, piece, WriteFlags::default()).unwrap(),
                Err(error) => assert_eq!(error.kind(), BlockErrorKind::NoSpace, "{error}"),
            }
            (at, data) = (at + piece.len() as u64, rest);
        }
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Write { disk, block, count, seed } => {
                let mut data = vec![0; (count * BLOCK) as usize];
                for (n, chunk) in (0..).zip(data.chunks_mut(BLOCK as usize)) {
                    // some are everybody's
                    Random(if n % 5 == 0 { n } else { seed << 8 | n }).fill(chunk);
                }
                self.write(disk, block * BLOCK, &data);
            }
            Step::Part { disk, block, from } => self.write(disk, block * BLOCK + from, b"in the middle of it"),
            Step::Read { disk, block, count } => {
                let (volume, model) = &self.disks[disk];
                let (mut found, mut wanted) = (vec![1; (count * BLOCK) as usize], vec![2; (count * BLOCK) as usize]);
                volume.read_at(block * BLOCK, &mut found).unwrap();
                model.read_at(block * BLOCK, &mut wanted).unwrap();
                assert!(found == wanted, "disk {disk} differs in blocks {block} to {}", block + count);
            }
            Step::Trim { disk, block, count } => {
                let (volume, model) = &self.disks[disk];
                // of a shared leaf a copy is needed, for which there may be no room
                match volume.trim(block * BLOCK, count * BLOCK) {
                    Ok(()) => model.trim(block * BLOCK, count * BLOCK).unwrap(),
                    Err(error) => {
                        assert_eq!(error.kind(), BlockErrorKind::NoSpace, "{error}");
                        // any part of it may have happened
                        let mut now = vec![0; (BLOCKS * BLOCK) as usize];
                        volume.read_at(0, &mut now).unwrap();
                        model.write_at(0, &now, WriteFlags::default()).unwrap();
                    }
                }
            }
            Step::Snapshot { disk } => {
                let (volume, model) = &self.disks[disk];
                if let Ok(snapshot) = volume.snapshot() {
                    self.snapshots.push((snapshot, MemoryDevice::from_bytes(model.contents())));
                }
            }
            Step::Forget => drop(self.snapshots.pop()),
        }
        let stats = self.store.stats();
        assert!(stats.resident_bytes <= stats.budget, "{stats:?}");
    }

    fn check(&self) {
        let audit = self.store.audit();
        assert!(audit.is_exact(), "{:?}", audit.faults);
        for (n, (volume, model)) in self.disks.iter().enumerate() {
            assert_contents(&**volume, &model.contents(), &format!("disk {n}"));
        }
        for (snapshot, model) in &self.snapshots {
            assert_contents(snapshot, &model.contents(), "snapshot");
        }
    }
}

/// 24 cases unless `PROPTEST_CASES` says otherwise.
fn config() -> ProptestConfig {
    let mut config = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 24;
    }
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/spilling.txt");
    config.failure_persistence = Some(Box::new(FileFailurePersistence::Direct(file)));
    config
}

proptest! {
    #![proptest_config(config())]
    #[test]
    fn any_sequence_of_requests_on_more_than_memory_equals_the_model(steps in prop::collection::vec(step(), 1..80)) {
        let place = tempfile::tempdir().unwrap();
        let mut world = World::new(place.path());
        for step in steps {
            world.apply(step);
        }
        world.check();
        world.snapshots.clear();
        for (volume, _) in world.disks.drain(..) {
            world.store.delete_volume(volume.id()).unwrap();
        }
        let audit = world.store.audit();
        prop_assert!(audit.is_exact(), "{:?}", audit.faults);
        let stats = world.store.stats();
        prop_assert_eq!((stats.spilled_bytes, stats.unique_blocks), (ByteLen::ZERO, 0));
    }
}
