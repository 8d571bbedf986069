//! Any sequence of operations leaves every disk as the obvious model says, every count exact, and one frame for every
//! different block.
#![allow(clippy::unwrap_used)]

use std::{collections::HashSet, sync::Arc};

use muster_block::{
    BlockDevice, WriteFlags, ZeroFlags,
    conformance::{Random, assert_contents, assert_extents},
    model::MemoryDevice,
};
use muster_common::{ByteLen, Digest, VolumeId};
use muster_store::{Image, Pages, Snapshot, Store, StoreConfig, StoreError, Volume, VolumeSpec};
use proptest::{prelude::*, test_runner::FileFailurePersistence};

/// 24 leaves and a piece: trees of two levels, with stripes that have one leaf and stripes that have two.
const SIZE: u64 = (6 << 20) + 512;
/// A tree of one level that a larger clone has to raise.
const SMALL: u64 = 1 << 20;

#[derive(Clone, Debug)]
enum Step {
    Write { volume: usize, at: u64, len: u64, seed: u64 },
    WriteBlocks { volume: usize, block: u64, count: u64, seed: u64 },
    Trim { volume: usize, at: u64, len: u64 },
    Zero { volume: usize, at: u64, len: u64 },
    Blank { small: bool },
    Snapshot { volume: usize },
    Forget { snapshot: usize },
    CloneSnapshot { snapshot: usize, grow: bool },
    Import { seed: u64 },
    CloneImage { image: usize },
    Commit { snapshot: usize },
    DropImage { image: usize },
    Reset { volume: usize },
    Revert { volume: usize, snapshot: usize },
    Delete { volume: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let volume = 0..8usize;
    let snapshot = 0..8usize;
    let at = 0..SIZE;
    // mostly small, sometimes most of the disk
    let len = prop_oneof![4 => 0..20_000u64, 2 => 0..400_000u64, 1 => 0..SIZE];
    // few seeds, so that blocks are equal across disks
    let seed = 0..5u64;
    prop_oneof![
        6 => (volume.clone(), at.clone(), len.clone(), seed.clone())
            .prop_map(|(volume, at, len, seed)| Step::Write { volume, at, len, seed }),
        6 => (volume.clone(), 0..SIZE / 4096, 1..200u64, seed.clone())
            .prop_map(|(volume, block, count, seed)| Step::WriteBlocks { volume, block, count, seed }),
        3 => (volume.clone(), at.clone(), len.clone()).prop_map(|(volume, at, len)| Step::Trim { volume, at, len }),
        2 => (volume.clone(), at, len).prop_map(|(volume, at, len)| Step::Zero { volume, at, len }),
        1 => any::<bool>().prop_map(|small| Step::Blank { small }),
        2 => volume.clone().prop_map(|volume| Step::Snapshot { volume }),
        1 => snapshot.clone().prop_map(|snapshot| Step::Forget { snapshot }),
        2 => (snapshot.clone(), any::<bool>()).prop_map(|(snapshot, grow)| Step::CloneSnapshot { snapshot, grow }),
        1 => seed.prop_map(|seed| Step::Import { seed }),
        2 => volume.clone().prop_map(|image| Step::CloneImage { image }),
        1 => snapshot.clone().prop_map(|snapshot| Step::Commit { snapshot }),
        1 => volume.clone().prop_map(|image| Step::DropImage { image }),
        1 => volume.clone().prop_map(|volume| Step::Reset { volume }),
        1 => (volume.clone(), snapshot).prop_map(|(volume, snapshot)| Step::Revert { volume, snapshot }),
        1 => volume.prop_map(|volume| Step::Delete { volume }),
    ]
}

struct Pair<D> {
    real: D,
    model: MemoryDevice,
    /// What a reset goes back to.
    origin: Vec<u8>,
}

#[derive(Default)]
struct World {
    volumes: Vec<Pair<Arc<Volume>>>,
    snapshots: Vec<Pair<Snapshot>>,
    images: Vec<Pair<Arc<Image>>>,
    imported: u8,
}

fn pick<T>(items: &[T], n: usize) -> Option<usize> {
    (!items.is_empty()).then(|| n % items.len())
}

fn grown(mut bytes: Vec<u8>, size: u64) -> Vec<u8> {
    bytes.resize(size as usize, 0);
    bytes
}

impl World {
    fn both(&self, volume: usize) -> Option<[&dyn BlockDevice; 2]> {
        let pair = &self.volumes[pick(&self.volumes, volume)?];
        Some([&pair.real, &pair.model])
    }

    fn add(&mut self, real: Arc<Volume>, contents: Vec<u8>) {
        self.volumes.push(Pair { real, model: MemoryDevice::from_bytes(contents.clone()), origin: contents });
    }

    fn apply(&mut self, store: &Store, step: Step) -> Option<()> {
        match step {
            Step::Write { volume, at, len, seed } => {
                let devices = self.both(volume)?;
                let size = devices[0].geometry().size.bytes();
                let at = at.min(size);
                let mut data = vec![0; len.min(size - at) as usize];
                if seed > 0 {
                    Random(seed).fill(&mut data);
                }
                for device in devices {
                    device.write_at(at, &data, WriteFlags::default()).unwrap();
                }
            }
            Step::WriteBlocks { volume, block, count, seed } => {
                let devices = self.both(volume)?;
                let blocks = devices[0].geometry().size.bytes() / 4096;
                let first = block % blocks;
                let mut data = vec![0; (count.min(blocks - first) * 4096) as usize];
                for (n, chunk) in data.chunks_mut(4096).enumerate() {
                    let kind = (seed + n as u64) % 7;
                    if kind > 0 {
                        Random(kind).fill(chunk);
                    }
                }
                for device in devices {
                    device.write_at(first * 4096, &data, WriteFlags::default()).unwrap();
                }
            }
            Step::Trim { volume, at, len } | Step::Zero { volume, at, len } => {
                let devices = self.both(volume)?;
                let size = devices[0].geometry().size.bytes();
                let at = at.min(size);
                let len = len.min(size - at);
                for device in devices {
                    match step {
                        Step::Trim { .. } => device.trim(at, len).unwrap(),
                        _ => device.write_zeroes(at, len, ZeroFlags::default()).unwrap(),
                    }
                }
            }
            Step::Blank { small } => {
                let size = if small { SMALL } else { SIZE };
                let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen(size))).unwrap();
                self.add(volume, vec![0; size as usize]);
            }
            Step::Snapshot { volume } => {
                let pair = &self.volumes[pick(&self.volumes, volume)?];
                let contents = pair.model.contents();
                let real = pair.real.snapshot().unwrap();
                // what changed since each older snapshot of the same size covers every byte that differs
                for older in self.snapshots.iter().filter(|older| older.origin.len() == contents.len()) {
                    check_changes(&real, &contents, older);
                }
                self.snapshots.push(Pair { real, model: MemoryDevice::from_bytes(contents.clone()), origin: contents });
            }
            Step::Forget { snapshot } => {
                self.snapshots.swap_remove(pick(&self.snapshots, snapshot)?);
            }
            Step::CloneSnapshot { snapshot, grow } => {
                let pair = &self.snapshots[pick(&self.snapshots, snapshot)?];
                let size = if grow { SIZE } else { pair.origin.len() as u64 };
                let spec = VolumeSpec::blank(VolumeId::random(), ByteLen(size));
                let real = store.create_volume_from(spec, &pair.real).unwrap();
                let contents = grown(pair.origin.clone(), size);
                self.add(real, contents);
            }
            Step::Import { seed } => {
                self.imported += 1;
                let mut contents = vec![0; SMALL as usize];
                for (n, chunk) in contents.chunks_mut(4096).enumerate().filter(|(n, _)| n % 3 > 0) {
                    Random(seed + n as u64).fill(chunk);
                }
                let digest = Digest::from_bytes([self.imported; 32]);
                let builder = store.image_builder(digest, "image", ByteLen(SMALL)).unwrap();
                assert!(matches!(
                    store.image_builder(digest, "image", ByteLen(SMALL)),
                    Err(StoreError::ImageInProgress(_))
                ));
                for (n, chunk) in contents.chunks(64 << 10).enumerate().rev() {
                    builder.write_chunk((n as u64) << 16, chunk).unwrap();
                }
                let real = builder.finish().unwrap();
                self.images.push(Pair { real, model: MemoryDevice::from_bytes(contents.clone()), origin: contents });
            }
            Step::CloneImage { image } => {
                let pair = &self.images[pick(&self.images, image)?];
                let spec = VolumeSpec::clone_of(VolumeId::random(), pair.real.digest());
                let contents = pair.origin.clone();
                self.add(store.create_volume(spec).unwrap(), contents);
            }
            Step::Commit { snapshot } => {
                self.imported += 1;
                let pair = &self.snapshots[pick(&self.snapshots, snapshot)?];
                let real = store.commit(&pair.real, Digest::from_bytes([self.imported; 32]), "committed").unwrap();
                let contents = pair.origin.clone();
                self.images.push(Pair { real, model: MemoryDevice::from_bytes(contents.clone()), origin: contents });
            }
            Step::DropImage { image } => {
                let image = pick(&self.images, image)?;
                let digest = self.images[image].real.digest();
                let used = self.volumes.iter().any(|volume| volume.real.base() == Some(digest));
                match store.drop_image(&digest) {
                    Ok(()) => {
                        assert!(!used);
                        self.images.swap_remove(image);
                    }
                    Err(error) => assert!(used && matches!(error, StoreError::ImageInUse { .. }), "{error}"),
                }
            }
            Step::Reset { volume } => {
                let volume = pick(&self.volumes, volume)?;
                let pair = &mut self.volumes[volume];
                let generation = pair.real.generation();
                assert_eq!(pair.real.reset().unwrap(), generation + 1);
                pair.model = MemoryDevice::from_bytes(pair.origin.clone());
                assert_eq!(pair.real.stats().changed_bytes, ByteLen::ZERO);
            }
            Step::Revert { volume, snapshot } => {
                let (volume, snapshot) = (pick(&self.volumes, volume)?, pick(&self.snapshots, snapshot)?);
                let (pair, snapshot) = (&mut self.volumes[volume], &self.snapshots[snapshot]);
                match pair.real.revert(&snapshot.real) {
                    Ok(_) => {
                        let size = pair.origin.len() as u64;
                        pair.model = MemoryDevice::from_bytes(grown(snapshot.origin.clone(), size));
                    }
                    Err(error) => assert!(matches!(error, StoreError::SmallerThanBase { .. })),
                }
            }
            Step::Delete { volume } => {
                let pair = self.volumes.swap_remove(pick(&self.volumes, volume)?);
                store.delete_volume(pair.real.id()).unwrap();
            }
        }
        Some(())
    }

    fn check(&self, store: &Store) {
        let mut unique: HashSet<Vec<u8>> = HashSet::new();
        let mut mapped = 0;
        let mut see = |real: &dyn BlockDevice, model: &MemoryDevice, what: &str| {
            let contents = model.contents();
            assert_contents(real, &contents, what);
            assert_extents(real, 0, contents.len() as u64, &contents);
            for block in contents.chunks(4096).filter(|block| block.iter().any(|&byte| byte != 0)) {
                mapped += 1;
                unique.insert(grown(block.to_vec(), 4096));
            }
        };
        self.volumes.iter().for_each(|pair| see(&pair.real, &pair.model, "volume"));
        self.snapshots.iter().for_each(|pair| see(&pair.real, &pair.model, "snapshot"));
        self.images.iter().for_each(|pair| see(&pair.real, &pair.model, "image"));
        // the origins of deleted snapshots and images live on in the volumes made from them
        let audit = store.audit();
        assert!(audit.is_exact(), "{:?}", audit.faults);
        assert!(store.stats().unique_blocks >= unique.len() as u64);
        assert!(store.stats().logical_bytes.bytes() >= mapped * 4096);
        for pair in &self.volumes {
            assert!(store.verify_volume(pair.real.id()).unwrap().is_clean());
        }
    }
}

fn check_changes(real: &Snapshot, contents: &[u8], older: &Pair<Snapshot>) {
    let changed = real.changed_since(&older.real).unwrap();
    assert_eq!(changed, older.real.changed_since(real).unwrap(), "a difference has no direction");
    let mut at = 0;
    for (offset, len) in changed {
        let (offset, end) = (offset as usize, (offset + len) as usize);
        assert!(offset >= at && len > 0);
        assert!(contents[at..offset] == older.origin[at..offset], "a change before {offset} was missed");
        assert!(contents[offset..end] != older.origin[offset..end], "{offset}..{end} did not change");
        at = end;
    }
    assert!(contents[at..] == older.origin[at..], "a change after {at} was missed");
}

/// 24 cases unless `PROPTEST_CASES` says otherwise.
fn config() -> ProptestConfig {
    let mut config = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 24;
    }
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/model.txt");
    config.failure_persistence = Some(Box::new(FileFailurePersistence::Direct(file)));
    config
}

proptest! {
    #![proptest_config(config())]
    #[test]
    fn any_sequence_of_operations_equals_the_model(
        small in any::<bool>(),
        steps in prop::collection::vec(step(), 1..60)
    ) {
        let pages = if small { Pages::Small } else { Pages::Transparent };
        let store = Store::open(StoreConfig { pages, ..StoreConfig::new(ByteLen::mib(512)) }).unwrap();
        let empty = store.stats();
        let mut world = World::default();
        world.apply(&store, Step::Blank { small: false });
        for step in steps {
            world.apply(&store, step);
        }
        world.check(&store);
        // with everything gone, nothing is left
        for pair in world.volumes.drain(..) {
            store.delete_volume(pair.real.id()).unwrap();
        }
        let images: Vec<Digest> = store.images().iter().map(|image| image.digest).collect();
        world = World::default();
        for digest in images {
            store.drop_image(&digest).unwrap();
        }
        world.check(&store);
        let stats = store.stats();
        prop_assert_eq!((stats.unique_blocks, stats.logical_bytes), (0, empty.logical_bytes));
        prop_assert_eq!((stats.images, stats.volumes, stats.snapshots), (0, 0, 0));
        prop_assert_eq!(store.audit().nodes, 0);
    }
}
