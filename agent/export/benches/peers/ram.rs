//! A device without a store.

use muster_block::{BlockDevice, BlockError, Extent, ExtentKind, Geometry, WriteFlags, ZeroFlags};
use muster_common::ByteLen;
use parking_lot::RwLock;

/// Memory and nothing else: what the code around a device costs.
pub struct Ram(pub RwLock<Vec<u8>>);

impl BlockDevice for Ram {
    fn geometry(&self) -> Geometry {
        Geometry::memory(ByteLen(self.0.read().len() as u64), false)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let range = self.geometry().check(offset, buf.len() as u64)?;
        buf.copy_from_slice(&self.0.read()[range.start as usize..range.end as usize]);
        Ok(())
    }
    fn read_with(&self, offset: u64, len: u64, sink: &mut dyn FnMut(u64, &[u8])) -> Result<(), BlockError> {
        let bytes = self.0.read();
        let range = Geometry::memory(ByteLen(bytes.len() as u64), false).check(offset, len)?;
        sink(0, &bytes[range.start as usize..range.end as usize]);
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8], _flags: WriteFlags) -> Result<(), BlockError> {
        let mut bytes = self.0.write();
        let range = Geometry::memory(ByteLen(bytes.len() as u64), false).check(offset, data.len() as u64)?;
        bytes[range.start as usize..range.end as usize].copy_from_slice(data);
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> Result<(), BlockError> {
        let mut bytes = self.0.write();
        let range = Geometry::memory(ByteLen(bytes.len() as u64), false).check(offset, len)?;
        bytes[range.start as usize..range.end as usize].fill(0);
        Ok(())
    }
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.write_zeroes(offset, len, ZeroFlags::default())
    }
    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }
    fn block_status(&self, _offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        out.clear();
        Extent::push(out, len, ExtentKind::Data);
        Ok(())
    }
}
