//! The numbers the store is held to, and what happens at its limits.
#![allow(clippy::unwrap_used)]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use muster_block::{BlockDevice, BlockErrorKind, WriteFlags, ZeroFlags, conformance::Random};
use muster_common::{ByteLen, Digest, ErrorCode, VolumeId};
use muster_store::{Image, Pages, Store, StoreConfig, StoreError, Volume, VolumeSpec};

fn open(mib: u64) -> Store {
    Store::open(StoreConfig::new(ByteLen::mib(mib))).unwrap()
}

fn digest(n: u8) -> Digest {
    Digest::from_bytes([n; 32])
}

fn blank(store: &Store, size: ByteLen) -> Arc<Volume> {
    store.create_volume(VolumeSpec::blank(VolumeId::random(), size)).unwrap()
}

fn block(seed: u64) -> [u8; 4096] {
    let mut block = [0; 4096];
    Random(seed).fill(&mut block);
    block
}

/// An image of `size` whose blocks are those of `seeds`, laid out from the start.
fn import(store: &Store, n: u8, size: ByteLen, seeds: impl Iterator<Item = u64>) -> Arc<Image> {
    let builder = store.image_builder(digest(n), "image", size).unwrap();
    for (at, seed) in (0..).step_by(4096).zip(seeds) {
        builder.write_chunk(at, &block(seed)).unwrap();
    }
    builder.finish().unwrap()
}

fn write(volume: &Volume, at: u64, data: &[u8]) -> Result<(), muster_block::BlockError> {
    volume.write_at(at, data, WriteFlags::default())
}

#[test]
fn a_clone_of_40_gib_takes_at_most_a_millisecond_and_64_kib() {
    let store = open(64);
    // a block in each of 10,000 places, so that the tree is as deep and wide as it gets
    let builder = store.image_builder(digest(1), "sparse", ByteLen::gib(40)).unwrap();
    for n in 0..10_000 {
        builder.write_chunk(n * (4 << 20), &block(n % 500 + 1)).unwrap();
    }
    builder.finish().unwrap();
    let before = store.stats().resident_bytes.bytes();
    let mut times = Vec::new();
    let clones: Vec<_> = (0..100)
        .map(|_| {
            let start = Instant::now();
            let volume = store.create_volume(VolumeSpec::clone_of(VolumeId::random(), digest(1))).unwrap();
            times.push(start.elapsed());
            volume
        })
        .collect();
    let each = (store.stats().resident_bytes.bytes() - before) / 100;
    times.sort_unstable();
    println!("clone of 40 GiB: median {:?}, slowest {:?}, {each} bytes", times[50], times[99]);
    assert!(each <= 64 << 10, "{each} bytes a clone");
    // the median, because this machine also does other things
    assert!(times[50] <= Duration::from_millis(1), "{:?}", times[50]);
    let start = Instant::now();
    let snapshot = clones[0].snapshot().unwrap();
    assert!(start.elapsed() < Duration::from_millis(10));
    write(&clones[0], 12345, b"mine").unwrap();
    let start = Instant::now();
    clones[0].reset().unwrap();
    assert!(start.elapsed() < Duration::from_millis(100));
    assert_eq!(clones[0].stats().changed_bytes, ByteLen::ZERO);
    drop(snapshot);
    assert!(store.audit().is_exact());
}

#[test]
fn two_overlapping_images_are_resident_at_their_unique_blocks() {
    let store = Store::open(StoreConfig { pages: Pages::Small, ..StoreConfig::new(ByteLen::mib(256)) }).unwrap();
    // 32 MiB each, three quarters in common, at other places in the second one
    import(&store, 1, ByteLen::mib(64), 0..8192);
    import(&store, 2, ByteLen::mib(64), (2048..10_240).rev());
    let stats = store.stats();
    assert_eq!(stats.unique_blocks, 10_240);
    let unique = 10_240.0 * 4096.0;
    let ratio = stats.resident_bytes.bytes() as f64 / unique;
    println!("resident at {ratio:.4} of the unique blocks, dedup ratio {:.3}", stats.dedup_ratio);
    assert!(ratio <= 1.05, "{ratio}");
    assert_eq!(stats.logical_bytes, ByteLen(2 * 8192 * 4096));
    assert_eq!(stats.provisioned_bytes, ByteLen::mib(128));
}

#[test]
fn a_full_store_refuses_with_no_space_and_loses_nothing() {
    for pages in [Pages::Small, Pages::Transparent] {
        let store = Store::open(StoreConfig { pages, ..StoreConfig::new(ByteLen::mib(32)) }).unwrap();
        let volume = blank(&store, ByteLen::gib(1));
        let fitted = (0..)
            .take_while(|&n| match write(&volume, n * 4096, &block(n + 1)) {
                Ok(()) => true,
                Err(error) => {
                    assert_eq!(error.kind(), BlockErrorKind::NoSpace);
                    false
                }
            })
            .count() as u64;
        let stats = store.stats();
        assert!(stats.resident_bytes <= stats.budget, "{stats:?}");
        assert!(fitted * 4096 >= stats.budget.bytes() * 95 / 100 - (2 << 20), "only {fitted} blocks fit: {stats:?}");
        assert!(!store.would_fit(ByteLen::mib(1)));
        assert!(stats.no_space > 0);
        // an overwrite of a shared block needs a frame as well
        let snapshot = volume.snapshot();
        assert_eq!(write(&volume, 0, &block(u64::MAX)).unwrap_err().kind(), BlockErrorKind::NoSpace);
        drop(snapshot);
        for n in 0..fitted {
            let mut buf = [0; 4096];
            volume.read_at(n * 4096, &mut buf).unwrap();
            assert!(buf == block(n + 1), "block {n}");
        }
        // what is known fits always, and what is trimmed can be written again
        write(&volume, 0, &block(2)).unwrap();
        volume.trim(0, 1 << 20).unwrap();
        assert!(store.would_fit(ByteLen::kib(900)));
        for n in 0..225 {
            write(&volume, n * 4096, &block(1_000_000 + n)).unwrap();
        }
        let audit = store.audit();
        assert!(audit.is_exact(), "{:?}", audit.faults);
    }
}

#[test]
fn what_would_fit_fits() {
    let store = open(64);
    let volume = blank(&store, ByteLen::gib(1));
    let available = store.stats().available_bytes;
    assert!(available >= ByteLen::mib(62), "{available}");
    assert!(store.would_fit(available) && !store.would_fit(ByteLen(available.bytes() + 4096)));
    // all but what a huge page or a batch in another thread's hands may keep
    for n in 0..(available.bytes() - (3 << 20)) / 4096 {
        write(&volume, n * 4096, &block(n + 1)).unwrap();
    }
}

#[test]
fn zero_blocks_take_no_memory_and_trimmed_ones_give_it_back() {
    let store = open(64);
    let volume = blank(&store, ByteLen::gib(8));
    let empty = store.stats();
    for n in 0..8192 {
        write(&volume, n << 20, &[0; 64 << 10]).unwrap();
    }
    let stats = store.stats();
    assert_eq!((stats.unique_blocks, stats.zero_blocks), (0, 8192 * 16));
    assert_eq!(stats.resident_bytes, empty.resident_bytes);
    for n in 0..1024 {
        write(&volume, n * 8192, &block(n + 1)).unwrap();
    }
    assert_eq!(store.stats().unique_blocks, 1024);
    volume.write_zeroes(0, 4 << 20, ZeroFlags { no_hole: true, fast: true, fua: true }).unwrap();
    assert_eq!(store.stats().unique_blocks, 512);
    // a block that a partial write makes zero is a hole as well
    for n in 512..1024 {
        write(&volume, n * 8192, &[0; 2048]).unwrap();
        write(&volume, n * 8192 + 2048, &[0; 2048]).unwrap();
    }
    assert_eq!(store.stats().unique_blocks, 0);
    volume.trim(0, 8 << 30).unwrap();
    // its top
    assert_eq!(store.audit().nodes, 1);
}

#[test]
fn sixteen_threads_that_write_the_same_blocks_store_each_once() {
    let store = open(64);
    let volumes: Vec<_> = (0..16).map(|_| blank(&store, ByteLen::mib(8))).collect();
    for round in 0..4 {
        std::thread::scope(|scope| {
            for (number, volume) in volumes.iter().enumerate() {
                scope.spawn(move || {
                    let mut random = Random(number as u64);
                    for _ in 0..2000 {
                        let n = random.below(1000);
                        write(volume, n * 4096, &block(round * 500 + n + 1)).unwrap();
                        if random.below(4) == 0 {
                            volume.trim(random.below(1000) * 4096, 4096).unwrap();
                        }
                    }
                });
            }
        });
        let audit = store.audit();
        assert!(audit.is_exact(), "{:?}", audit.faults);
    }
    for volume in &volumes {
        volume.trim(0, 8 << 20).unwrap();
    }
    assert_eq!(store.stats().unique_blocks, 0);
}

#[test]
fn an_image_abandoned_half_way_leaves_nothing() {
    let store = open(64);
    let empty = store.stats();
    let builder = store.image_builder(digest(1), "half", ByteLen::mib(16)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let builder = &builder;
            scope.spawn(move || {
                for n in (thread..1000).step_by(4) {
                    builder.write_chunk(n * 4096, &block(n + 1)).unwrap();
                }
            });
        }
    });
    assert!(matches!(store.image_builder(digest(1), "again", ByteLen::mib(16)), Err(StoreError::ImageInProgress(_))));
    assert!(store.image(&digest(1)).is_none() && store.images().is_empty());
    assert_eq!(store.stats().unique_blocks, 1000);
    drop(builder);
    let stats = store.stats();
    assert_eq!((stats.unique_blocks, stats.snapshots), (0, empty.snapshots));
    assert!(store.audit().is_exact());
    import(&store, 1, ByteLen::mib(1), 1..10);
    assert!(matches!(store.image_builder(digest(1), "again", ByteLen::mib(1)), Err(StoreError::ImageExists(_))));
}

#[test]
fn an_image_in_use_is_not_dropped_and_says_so() {
    let store = open(64);
    import(&store, 1, ByteLen::mib(1), 1..100);
    let volume = store.create_volume(VolumeSpec::clone_of(VolumeId::random(), digest(1))).unwrap();
    let error = store.drop_image(&digest(1)).unwrap_err();
    assert_eq!(error.code(), ErrorCode::InUse);
    assert_eq!(store.images()[0].volumes, 1);
    store.delete_volume(volume.id()).unwrap();
    drop(volume);
    store.drop_image(&digest(1)).unwrap();
    assert_eq!(store.stats().unique_blocks, 0);
    assert_eq!(store.drop_image(&digest(1)).unwrap_err().code(), ErrorCode::NotFound);
}

#[test]
fn bad_requests_are_refused_with_their_code() {
    let store = open(64);
    import(&store, 1, ByteLen::mib(1), 1..10);
    let id = VolumeId::random();
    let code = |result: Result<Arc<Volume>, StoreError>| result.err().map(|error| error.code());
    let spec = VolumeSpec::blank(id, ByteLen::mib(1));
    let with = |size| VolumeSpec { size, ..VolumeSpec::clone_of(id, digest(1)) };
    assert_eq!(code(store.create_volume(VolumeSpec { size: None, ..spec.clone() })), Some(ErrorCode::InvalidArgument));
    assert_eq!(code(store.create_volume(with(Some(ByteLen(1000))))), Some(ErrorCode::InvalidArgument));
    assert_eq!(code(store.create_volume(with(Some(ByteLen(512))))), Some(ErrorCode::InvalidArgument));
    assert_eq!(code(store.create_volume(VolumeSpec::clone_of(id, digest(2)))), Some(ErrorCode::NotFound));
    let volume = store.create_volume(with(Some(ByteLen::gib(2)))).unwrap();
    assert_eq!(code(store.create_volume(spec)), Some(ErrorCode::AlreadyExists));
    assert_eq!(store.delete_volume(VolumeId::random()).unwrap_err().code(), ErrorCode::NotFound);
    let other = open(64);
    let foreign = blank(&other, ByteLen::mib(1)).snapshot().unwrap();
    assert_eq!(volume.revert(&foreign).unwrap_err().code(), ErrorCode::InvalidArgument);
    assert!(Store::open(StoreConfig::new(ByteLen::kib(1))).is_err());
    assert!(Store::open(StoreConfig::new(ByteLen::gib(1 << 20))).is_err());
}

#[test]
fn a_closed_store_gives_its_volumes_up() {
    let store = open(64);
    let volume = blank(&store, ByteLen::mib(1));
    write(&volume, 0, &block(1)).unwrap();
    let weak = Arc::downgrade(&volume);
    drop(volume);
    let second = store.clone();
    drop(store);
    assert!(weak.upgrade().is_some());
    drop(second);
    assert!(weak.upgrade().is_none());
}
