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

/// The same with its 4 KiB blocks anywhere, as a disk's are after random writes: what any device that keeps blocks one by
/// one can reach. Whole blocks only, their number a power of two.
pub struct Strewn(pub Ram);

impl Strewn {
    const BLOCK: u64 = 4096;

    fn place(&self, offset: u64) -> u64 {
        let blocks = self.0.geometry().size.bytes() / Self::BLOCK;
        assert!(blocks.is_power_of_two() && offset.is_multiple_of(Self::BLOCK));
        let (mask, half) = (blocks - 1, blocks.trailing_zeros() / 2);
        // each step gives another number for each number
        let mut n = offset / Self::BLOCK;
        n ^= n >> half;
        n = n.wrapping_mul(0x9e37_79b1) & mask;
        n ^= n >> half;
        n * Self::BLOCK
    }

    fn each(offset: u64, len: u64) -> impl Iterator<Item = u64> {
        (offset..offset + len).step_by(Self::BLOCK as usize)
    }
}

impl BlockDevice for Strewn {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let places = Self::each(offset, buf.len() as u64).map(|at| self.place(at));
        places.zip(buf.chunks_mut(Self::BLOCK as usize)).try_for_each(|(at, block)| self.0.read_at(at, block))
    }
    fn read_with(&self, offset: u64, len: u64, sink: &mut dyn FnMut(u64, &[u8])) -> Result<(), BlockError> {
        let bytes = self.0.0.read();
        for at in Self::each(offset, len) {
            let place = self.place(at) as usize;
            sink(at - offset, &bytes[place..place + Self::BLOCK as usize]);
        }
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
        let places = Self::each(offset, data.len() as u64).map(|at| self.place(at));
        places.zip(data.chunks(Self::BLOCK as usize)).try_for_each(|(at, block)| self.0.write_at(at, block, flags))
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
        Self::each(offset, len).try_for_each(|at| self.0.write_zeroes(self.place(at), Self::BLOCK, flags))
    }
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.write_zeroes(offset, len, ZeroFlags::default())
    }
    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }
    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        self.0.block_status(offset, len, out)
    }
}
