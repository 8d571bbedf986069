//! Volumes and their snapshots.

use muster_block::{BlockDevice, BlockError, Extent, Geometry, WriteFlags, ZeroFlags};
use muster_common::{Digest, VolumeId};

use crate::{StoreError, VolumeStats};

/// A writable disk that started as an image, a snapshot or zeroes.
pub struct Volume {}

#[allow(clippy::unimplemented, unused_variables, missing_docs)]
impl Volume {
    pub fn id(&self) -> VolumeId {
        unimplemented!()
    }
    pub fn generation(&self) -> u64 {
        unimplemented!()
    }
    pub fn base(&self) -> Option<Digest> {
        unimplemented!()
    }
    /// The volume as it is now, for ever.
    pub fn snapshot(&self) -> Result<Snapshot, StoreError> {
        unimplemented!()
    }
    /// Back to what it was made from; returns the new generation.
    pub fn reset(&self) -> Result<u64, StoreError> {
        unimplemented!()
    }
    /// Becomes the snapshot; returns the new generation.
    pub fn revert(&self, snapshot: &Snapshot) -> Result<u64, StoreError> {
        unimplemented!()
    }
    pub fn stats(&self) -> VolumeStats {
        unimplemented!()
    }
}

/// A volume as it was at one instant. Immutable; frees what only it holds when the last clone of the handle goes.
#[derive(Clone)]
pub struct Snapshot {}

#[allow(clippy::unimplemented, unused_variables, missing_docs)]
impl Snapshot {
    /// Byte ranges (offset, length) whose mapping differs from the older snapshot's: what an incremental backup reads.
    pub fn changed_since(&self, older: &Snapshot) -> Result<Vec<(u64, u64)>, StoreError> {
        unimplemented!()
    }
}

macro_rules! device {
    ($name:ty) => {
        #[allow(clippy::unimplemented, unused_variables)]
        impl BlockDevice for $name {
            fn geometry(&self) -> Geometry {
                unimplemented!()
            }
            fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
                unimplemented!()
            }
            fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
                unimplemented!()
            }
            fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
                unimplemented!()
            }
            fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
                unimplemented!()
            }
            fn flush(&self) -> Result<(), BlockError> {
                unimplemented!()
            }
            fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
                unimplemented!()
            }
        }
    };
}
device!(Volume);
device!(Snapshot);
device!(crate::Image);
