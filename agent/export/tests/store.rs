//! The export over the real store: an imported image is read back whole, clones are independent, a full store is ENOSPC.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;

use std::sync::Arc;

use common::{NAME, Served, run, tool};
use muster_block::BlockDevice;
use muster_common::{ByteLen, Digest, VolumeId};
use muster_export::Operation;
use muster_export::protocol::command;
use muster_store::{Store, StoreConfig, VolumeSpec};

const MIB: usize = 1 << 20;

/// Every block has contents of its own, unless it is one of many alike or zero.
fn image_bytes(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (index, block) in bytes.chunks_exact_mut(4096).enumerate() {
        match index % 5 {
            0 | 1 => block.chunks_exact_mut(8).enumerate().for_each(|(at, word)| {
                word.copy_from_slice(&((index * 512 + at) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
            }),
            2 => block.fill(0xc3),
            _ => {}
        }
    }
    bytes
}

fn store_with_image(budget: ByteLen, bytes: &[u8]) -> (Store, Digest) {
    let store = Store::open(StoreConfig::new(budget)).unwrap();
    let digest = Digest::from_bytes([7; 32]);
    let builder = store.image_builder(digest, "image", ByteLen(bytes.len() as u64)).unwrap();
    for (index, chunk) in bytes.chunks(64 << 10).enumerate() {
        builder.write_chunk((index * (64 << 10)) as u64, chunk).unwrap();
    }
    builder.finish().unwrap();
    (store, digest)
}

#[test]
fn an_imported_image_is_read_back_whole_and_clones_are_independent() {
    let Some(mut nbdcopy) = tool("nbdcopy", "libnbd-bin") else { return };
    let bytes = image_bytes(24 * MIB);
    let (store, digest) = store_with_image(ByteLen::mib(256), &bytes);
    let first = store.create_volume(VolumeSpec::clone_of(VolumeId::random(), digest)).unwrap();
    let second = store.create_volume(VolumeSpec::clone_of(VolumeId::random(), digest)).unwrap();
    let served = Served::new(first.clone());
    served.registry.add("second", second).unwrap();
    run(nbdcopy.arg(served.uri()).arg(served.path("out")));
    assert!(std::fs::read(served.path("out")).unwrap() == bytes, "what nbdcopy read differs from the image");

    let mut client = served.client(true);
    assert_eq!(client.ask(command::WRITE, 0, 4096, 8192, &[1; 8192]).errno, 0);
    assert_eq!(client.ask(command::TRIM, 0, MIB as u64, MIB as u32, &[]).errno, 0);
    let uri = served.uri().replace(NAME, "second");
    run(tool("nbdcopy", "libnbd-bin").unwrap().arg(uri).arg(served.path("out2")));
    assert!(std::fs::read(served.path("out2")).unwrap() == bytes, "a write to one clone is seen by the other");
    let mut expected = bytes;
    expected[4096..4096 + 8192].fill(1);
    expected[MIB..2 * MIB].fill(0);
    let reply = client.ask(command::READ, 0, 0, expected.len() as u32, &[]);
    assert!(reply.bytes(0, expected.len()) == expected);
    assert!(!reply.holes.is_empty(), "the trimmed MiB comes as a hole");
    assert!(store.audit().is_exact());
}

#[test]
fn a_full_store_is_enospc_to_the_client_and_trim_makes_room_again() {
    const ENOSPC: u32 = 28;
    let store = Store::open(StoreConfig::new(ByteLen::mib(32))).unwrap();
    let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(64))).unwrap();
    let served = Served::new(volume);
    let mut client = served.client(true);
    let unique = |index: usize| -> Vec<u8> {
        (0..MIB / 8).flat_map(|word| ((index * MIB + word) as u64 * 0x9e37_79b9 + 1).to_le_bytes()).collect()
    };
    let mut errno = 0;
    let mut written = 0;
    while errno == 0 && written < 64 {
        errno = client.ask(command::WRITE, 0, (written * MIB) as u64, MIB as u32, &unique(written)).errno;
        written += 1;
    }
    assert_eq!(errno, ENOSPC, "after {written} MiB");
    // What was written before is whole, and room that is given back can be used.
    assert!(client.ask(command::READ, 0, 0, MIB as u32, &[]).bytes(0, MIB) == unique(0));
    assert_eq!(client.ask(command::TRIM, 0, 0, (written * MIB) as u32, &[]).errno, 0);
    assert_eq!(client.ask(command::WRITE, 0, 0, MIB as u32, &unique(99)).errno, 0);
    assert_eq!(served.registry.statistics(NAME).unwrap().of(Operation::Write).errors, 1);
}

#[test]
fn concurrent_connections_write_disjoint_blocks_of_one_volume() {
    let store = Store::open(StoreConfig::new(ByteLen::mib(128))).unwrap();
    let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(16))).unwrap();
    let served = Arc::new(Served::new(volume.clone()));
    std::thread::scope(|scope| {
        for lane in 0..4u8 {
            let served = &served;
            scope.spawn(move || {
                let mut client = served.client(lane % 2 == 0);
                for block in (u64::from(lane)..4096).step_by(4) {
                    assert_eq!(client.ask(command::WRITE, 0, block * 4096, 4096, &[lane + 1; 4096]).errno, 0);
                }
            });
        }
    });
    let mut bytes = vec![0; 16 * MIB];
    volume.read_at(0, &mut bytes).unwrap();
    for (index, block) in bytes.chunks_exact(4096).enumerate() {
        assert!(block.iter().all(|byte| *byte == (index % 4) as u8 + 1), "block {index}");
    }
    assert!(store.audit().is_exact());
}
