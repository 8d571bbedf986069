//! Volumes as block devices: the suite of muster-block, on every kind of page and every kind of origin.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use muster_block::{BlockDevice, BlockErrorKind, Extent, ExtentKind, WriteFlags, ZeroFlags, conformance};
use muster_common::{ByteLen, Digest, VolumeId};
use muster_store::{Pages, Store, StoreConfig, VolumeSpec};

fn store(pages: Pages) -> Store {
    Store::open(StoreConfig { pages, ..StoreConfig::new(ByteLen::mib(256)) }).unwrap()
}

fn digest(n: u8) -> Digest {
    Digest::from_bytes([n; 32])
}

#[test]
fn a_blank_volume_conforms_on_small_pages() {
    let store = store(Pages::Small);
    conformance::run(|size| store.create_volume(VolumeSpec::blank(VolumeId::random(), size)).unwrap());
    assert!(store.audit().is_exact(), "{:?}", store.audit().faults);
}

#[test]
fn a_blank_volume_conforms_on_transparent_huge_pages() {
    let store = store(Pages::Transparent);
    conformance::run(|size| store.create_volume(VolumeSpec::blank(VolumeId::random(), size)).unwrap());
    assert!(store.audit().is_exact(), "{:?}", store.audit().faults);
}

#[test]
fn a_clone_whose_image_was_larger_once_and_is_zero_conforms() {
    // every node of the clone is shared at first
    let store = store(Pages::Auto);
    conformance::run(|size| {
        let scratch = store.create_volume(VolumeSpec::blank(VolumeId::random(), size)).unwrap();
        scratch.write_at(0, &vec![5; size.bytes() as usize], WriteFlags::default()).unwrap();
        let full = scratch.snapshot().unwrap();
        let volume = store.create_volume_from(VolumeSpec::blank(VolumeId::random(), size), &full).unwrap();
        volume.write_zeroes(0, size.bytes(), ZeroFlags::default()).unwrap();
        let zero = volume.snapshot().unwrap();
        store.delete_volume(scratch.id()).unwrap();
        store.delete_volume(volume.id()).unwrap();
        store.create_volume_from(VolumeSpec::blank(VolumeId::random(), size), &zero).unwrap()
    });
    assert!(store.audit().is_exact(), "{:?}", store.audit().faults);
}

#[test]
fn images_and_snapshots_and_read_only_volumes_refuse_changes() {
    let store = store(Pages::Auto);
    let builder = store.image_builder(digest(1), "one", ByteLen::mib(1)).unwrap();
    builder.write_chunk(4096, &[7; 8192]).unwrap();
    let image = builder.finish().unwrap();
    let spec = VolumeSpec { read_only: true, ..VolumeSpec::clone_of(VolumeId::random(), digest(1)) };
    let volume = store.create_volume(spec).unwrap();
    let snapshot = volume.snapshot().unwrap();
    let devices: [&dyn BlockDevice; 3] = [&*image, &*volume, &snapshot];
    for device in devices {
        assert!(device.geometry().read_only);
        let flags = WriteFlags::default();
        assert_eq!(device.write_at(0, &[1], flags).unwrap_err().kind(), BlockErrorKind::ReadOnly);
        assert_eq!(device.trim(0, 1).unwrap_err().kind(), BlockErrorKind::ReadOnly);
        assert_eq!(device.write_zeroes(0, 1, ZeroFlags::default()).unwrap_err().kind(), BlockErrorKind::ReadOnly);
        let mut buf = [0; 2];
        device.read_at(4095, &mut buf).unwrap();
        assert_eq!(buf, [0, 7]);
        let mut extents = Vec::new();
        device.block_status(0, 1 << 20, &mut extents).unwrap();
        assert_eq!(
            extents,
            [
                Extent { len: 4096, kind: ExtentKind::Hole },
                Extent { len: 8192, kind: ExtentKind::Data },
                Extent { len: (1 << 20) - 12288, kind: ExtentKind::Hole }
            ]
        );
    }
}

#[test]
fn a_deleted_volume_is_fenced_and_its_snapshot_is_not() {
    let store = store(Pages::Auto);
    let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(1))).unwrap();
    volume.write_at(0, &[3; 4096], WriteFlags::default()).unwrap();
    let snapshot = volume.snapshot().unwrap();
    store.delete_volume(volume.id()).unwrap();
    let mut buf = [0; 4096];
    let results = [
        volume.read_at(0, &mut buf),
        volume.write_at(0, &[1; 4096], WriteFlags::default()),
        volume.write_at(0, &[1; 4], WriteFlags::default()),
        volume.trim(0, 1 << 20),
        volume.trim(0, 4096),
        volume.block_status(0, 4096, &mut Vec::new()),
    ];
    for result in results {
        assert_eq!(result.unwrap_err().kind(), BlockErrorKind::Fenced);
    }
    assert!(volume.snapshot().is_err() && volume.reset().is_err());
    snapshot.read_at(0, &mut buf).unwrap();
    assert_eq!(buf, [3; 4096]);
    drop(snapshot);
    let device: Arc<dyn BlockDevice> = volume;
    drop(device);
    assert_eq!(store.stats().unique_blocks, 0);
    assert!(store.audit().is_exact());
}
