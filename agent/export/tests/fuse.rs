//! A volume of the store over NBD, as a file through `nbdfuse`, against bytes in memory.
//!
//! 20,000 requests each of two seeds; `MUSTER_EXERCISE=1000000` for more, `MUSTER_EXERCISE_SEED=…` for one seed.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;
mod exerciser;
mod private;

use std::sync::Arc;

use common::Served;
use exerciser::{DeviceTarget, Exerciser, FileTarget, Kind};
use muster_block::conformance::{Random, assert_contents};
use muster_block::model::MemoryDevice;
use muster_block::{BlockDevice, BlockError, Extent, Geometry, WriteFlags, ZeroFlags};
use muster_common::{ByteLen, Digest, VolumeId};
use muster_store::{Store, StoreConfig, Volume, VolumeSpec};
use private::{Nbdfuse, privately};

/// Not a whole number of blocks.
const SIZE: usize = (4 << 20) + 3 * 512;

/// A volume that takes single bytes. Every volume does; but clients of an export are told to keep to sectors, and libnbd
/// does.
struct Bytewise(Arc<Volume>);

impl BlockDevice for Bytewise {
    fn geometry(&self) -> Geometry {
        Geometry { minimum_block: 1, ..self.0.geometry() }
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.0.read_at(offset, buf)
    }
    fn read_with(&self, offset: u64, len: u64, sink: &mut dyn FnMut(u64, &[u8])) -> Result<(), BlockError> {
        self.0.read_with(offset, len, sink)
    }
    fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
        self.0.write_at(offset, data, flags)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
        self.0.write_zeroes(offset, len, flags)
    }
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.0.trim(offset, len)
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.0.flush()
    }
    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        self.0.block_status(offset, len, out)
    }
}

/// A clone of an image of which some blocks are alike and some are zero, and what it holds.
fn clone_of_an_image(store: &Store) -> (Arc<Volume>, Vec<u8>) {
    let mut bytes = vec![0; SIZE];
    for (n, block) in bytes.chunks_mut(4096).enumerate().filter(|(n, _)| n % 3 > 0) {
        Random(n as u64 % 200).fill(block);
    }
    let digest = Digest::from_bytes([7; 32]);
    let builder = store.image_builder(digest, "image", ByteLen(SIZE as u64)).unwrap();
    builder.write_chunk(0, &bytes).unwrap();
    builder.finish().unwrap();
    (store.create_volume(VolumeSpec::clone_of(VolumeId::random(), digest)).unwrap(), bytes)
}

fn exercise(seed: u64, requests: u64) {
    let store = Store::open(StoreConfig::new(ByteLen::mib(64))).unwrap();
    let (volume, bytes) = clone_of_an_image(&store);
    let served = Served::new(Arc::new(Bytewise(volume.clone())));
    let mounted = Nbdfuse::mount(&served.path("mounted"), &served.uri());
    let target = FileTarget::open(&mounted.file());
    let (expected, counts) = Exerciser::new(target, bytes, seed).run(requests);
    drop(mounted);
    assert_contents(&*volume, &expected, &format!("the volume after seed {seed}"));
    assert!(counts.values().sum::<u64>() >= requests && counts.contains_key(&Kind::MapWrite));
    assert!(store.audit().is_exact(), "{:?}", store.audit().faults);
    assert!(store.verify_volume(volume.id()).unwrap().is_clean());
}

/// A disk that trims the last byte too few.
struct Forgetful(MemoryDevice);

impl BlockDevice for Forgetful {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.0.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
        self.0.write_at(offset, data, flags)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
        self.0.write_zeroes(offset, len, flags)
    }
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.0.trim(offset, len - 1)
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.0.flush()
    }
    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        self.0.block_status(offset, len, out)
    }
}

#[test]
#[should_panic(expected = "should be 0x0; 1 bytes differ\nthe last requests:")]
fn a_disk_that_forgets_one_byte_is_found_out() {
    let device: Arc<dyn BlockDevice> = Arc::new(Forgetful(MemoryDevice::new(ByteLen(SIZE as u64))));
    Exerciser::new(DeviceTarget::new(|| device.clone()), vec![0; SIZE], 1).run(2_000);
}

#[test]
fn random_requests_through_nbdfuse_equal_the_model() {
    privately("random_requests_through_nbdfuse_equal_the_model", || {
        if !Nbdfuse::is_here() {
            return;
        }
        let number = |name: &str| Some(std::env::var(name).ok()?.parse::<u64>().unwrap());
        let requests = number("MUSTER_EXERCISE").unwrap_or(20_000);
        let seeds = number("MUSTER_EXERCISE_SEED").map_or(vec![1, 2], |seed| vec![seed]);
        for seed in seeds {
            let began = std::time::Instant::now();
            exercise(seed, requests);
            eprintln!("seed {seed}: {requests} requests in {:.1} s", began.elapsed().as_secs_f64());
        }
    });
}
