//! A map on the books of its store, as a block device. Volumes, snapshots, images and builders are disks with a name.

use std::sync::Arc;

use muster_block::{BlockDevice, BlockError, Extent, Geometry, WriteFlags, ZeroFlags};
use muster_common::ByteLen;

use crate::{
    StoreError,
    map::{Map, Refused, Trees},
    store::Inner,
};

/// What a disk costs beside its nodes: the map, its entry in the books, and the handles around it.
pub(crate) const DISK_COST: u64 = (size_of::<Map>() + 512) as u64;

/// A larger disk than this is a mistake.
const LARGEST: u64 = 1 << 50;

pub(crate) struct Disk {
    pub(crate) inner: Arc<Inner>,
    pub(crate) map: Arc<Map>,
    /// Its entry in the books.
    number: u64,
    pub(crate) read_only: bool,
}

impl Disk {
    pub(crate) fn check_size(size: ByteLen) -> Result<(), StoreError> {
        let rule = match size.bytes() {
            0 => "it must not be empty",
            bytes if !bytes.is_multiple_of(512) => "it must be a multiple of 512 bytes",
            bytes if bytes > LARGEST => "it must not be larger than 1 PiB",
            _ => return Ok(()),
        };
        Err(StoreError::Size { size, rule })
    }

    /// Takes over the trees. The caller is inside the world since before it made them.
    pub(crate) fn new(inner: &Arc<Inner>, size: u64, trees: Trees, read_only: bool) -> Result<Disk, StoreError> {
        if !inner.engine.charge(DISK_COST) {
            inner.engine.release_trees(trees);
            return Err(inner.full(DISK_COST));
        }
        let map = Arc::new(Map::new(size, trees));
        let number = inner.enter_in_books(&map);
        Ok(Disk { inner: Arc::clone(inner), map, number, read_only })
    }

    pub(crate) fn size(&self) -> ByteLen {
        ByteLen(self.map.size)
    }

    /// A disk of its own that starts as this one is now. The caller is inside the world.
    pub(crate) fn fork(&self, size: u64, read_only: bool) -> Result<Disk, StoreError> {
        let trees = self.inner.engine.fork(&self.map, size).map_err(|refused| self.inner.refused(refused))?;
        Disk::new(&self.inner, size, trees, read_only)
    }

    /// Byte ranges mapped to other frames than `other` maps them to.
    pub(crate) fn differences(&self, other: &Disk) -> Result<Vec<(u64, u64)>, StoreError> {
        if !Arc::ptr_eq(&self.inner, &other.inner) {
            return Err(StoreError::ForeignSnapshot);
        }
        let runs =
            self.inner.engine.differences(&self.map, &other.map).map_err(|refused| self.inner.refused(refused))?;
        let size = self.map.size.max(other.map.size);
        Ok(runs.into_iter().map(|(first, count)| (first * 4096, (count * 4096).min(size - first * 4096))).collect())
    }

    fn refuse(&self, refused: Refused, what: &str, offset: u64, len: u64) -> BlockError {
        let cause = self.inner.refused(refused);
        BlockError::with_source(cause.block_kind(), format!("{what} {len} bytes at offset {offset}"), cause)
    }

    fn clear(&self, what: &str, offset: u64, len: u64) -> Result<(), BlockError> {
        self.geometry().check_write(offset, len)?;
        let engine = &self.inner.engine;
        let _inside = engine.world.enter();
        engine.clear(&self.map, offset, len).map_err(|refused| self.refuse(refused, what, offset, len))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let engine = &self.inner.engine;
        let _inside = engine.world.enter_again();
        engine.close(&self.map);
        self.inner.strike_from_books(self.number);
        engine.budget.credit(DISK_COST);
    }
}

impl BlockDevice for Disk {
    fn geometry(&self) -> Geometry {
        Geometry::memory(self.size(), self.read_only)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let len = buf.len() as u64;
        self.geometry().check(offset, len)?;
        self.inner.engine.read(&self.map, offset, buf).map_err(|refused| self.refuse(refused, "read", offset, len))
    }

    fn write_at(&self, offset: u64, data: &[u8], _flags: WriteFlags) -> Result<(), BlockError> {
        let len = data.len() as u64;
        self.geometry().check_write(offset, len)?;
        let engine = &self.inner.engine;
        let _inside = engine.world.enter();
        engine.write(&self.map, offset, data).map_err(|refused| self.refuse(refused, "write", offset, len))
    }

    /// Never slower than a write, so `fast` is always granted. The store is thin: `no_hole` is taken as a wish, and the
    /// range gives its memory back.
    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> Result<(), BlockError> {
        self.clear("zero", offset, len)
    }

    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.clear("trim", offset, len)
    }

    /// Nothing to do: memory is all there is. What must outlive the agent is backed up, or journalled above.
    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        self.geometry().check(offset, len)?;
        out.clear();
        self.inner
            .engine
            .extents(&self.map, offset, len, out)
            .map_err(|refused| self.refuse(refused, "look at", offset, len))
    }
}

/// Makes a type that has a disk a block device.
macro_rules! device {
    ($name:ty, $($disk:ident).+) => {
        impl BlockDevice for $name {
            fn geometry(&self) -> Geometry {
                self.$($disk).+.geometry()
            }
            fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
                self.$($disk).+.read_at(offset, buf)
            }
            fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
                self.$($disk).+.write_at(offset, data, flags)
            }
            fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
                self.$($disk).+.write_zeroes(offset, len, flags)
            }
            fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
                self.$($disk).+.trim(offset, len)
            }
            fn flush(&self) -> Result<(), BlockError> {
                self.$($disk).+.flush()
            }
            fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
                self.$($disk).+.block_status(offset, len, out)
            }
        }
    };
}

device!(crate::Volume, disk);
device!(crate::Snapshot, disk);
device!(crate::Image, disk);
