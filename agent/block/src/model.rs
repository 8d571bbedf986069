//! The oracle: a disk that is one vector behind one lock. Slow, obvious, and what every real device must equal.

use muster_common::ByteLen;
use parking_lot::RwLock;

use crate::{BlockDevice, BlockError, Extent, ExtentKind, Geometry, WriteFlags, ZeroFlags};

/// A disk held in one `Vec<u8>`. Holes are the all-zero blocks.
pub struct MemoryDevice {
    geometry: Geometry,
    bytes: RwLock<Vec<u8>>,
}

impl MemoryDevice {
    /// A writable device full of zeroes.
    pub fn new(size: ByteLen) -> Self {
        Self::from_bytes(vec![0; size.bytes() as usize])
    }

    /// A writable device that holds `bytes`.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { geometry: Geometry::memory(ByteLen(bytes.len() as u64), false), bytes: RwLock::new(bytes) }
    }

    /// The same device, taking no more changes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.geometry.read_only = true;
        self
    }

    /// All it holds now: also how the model takes a snapshot.
    pub fn contents(&self) -> Vec<u8> {
        self.bytes.read().clone()
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        let range = self.geometry.check_write(offset, len)?;
        self.bytes.write()[range.start as usize..range.end as usize].fill(0);
        Ok(())
    }
}

impl BlockDevice for MemoryDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let range = self.geometry.check(offset, buf.len() as u64)?;
        buf.copy_from_slice(&self.bytes.read()[range.start as usize..range.end as usize]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8], _flags: WriteFlags) -> Result<(), BlockError> {
        let range = self.geometry.check_write(offset, data.len() as u64)?;
        self.bytes.write()[range.start as usize..range.end as usize].copy_from_slice(data);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> Result<(), BlockError> {
        self.zero(offset, len)
    }

    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.zero(offset, len)
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        let range = self.geometry.check(offset, len)?;
        out.clear();
        let bytes = self.bytes.read();
        let block = u64::from(self.geometry.block_size);
        let mut at = range.start;
        while at < range.end {
            let start = at / block * block;
            let end = (start + block).min(self.geometry.size.bytes());
            let zero = bytes[start as usize..end as usize].iter().all(|&byte| byte == 0);
            let kind = if zero { ExtentKind::Hole } else { ExtentKind::Data };
            Extent::push(out, end.min(range.end) - at, kind);
            at = end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn the_model_conforms() {
        crate::conformance::run(|size| Arc::new(MemoryDevice::new(size)));
    }
}
