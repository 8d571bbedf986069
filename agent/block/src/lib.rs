//! The seam between whatever serves disks (NBD, vhost-user, backup) and whatever holds them (the store, a journal).
//!
//! Main types: [`BlockDevice`], [`Geometry`], [`Extent`], [`BlockError`] with its [`BlockErrorKind`];
//! [`model::MemoryDevice`], the slow and obvious device every other one is compared with; [`conformance::run`], the
//! suite every implementation runs.
//!
//! Invariants, for every implementation:
//! 1. All methods take `&self`, may block, and may be called from any thread at any time, also for overlapping ranges.
//! 2. When a write returns, every later read of that range, by any thread, sees it. Of two overlapping writes that run
//!    at the same time, each [`Geometry::block_size`] block ends as one of the two applied after the other; larger
//!    requests are not atomic.
//! 3. A range that does not lie within the device is refused whole with [`BlockErrorKind::OutOfRange`]; nothing of it
//!    is done. A request of length 0 within the device is done at once.
//! 4. Trimmed and zeroed ranges read as zero, at once and for ever until written.
//! 5. [`BlockDevice::flush`] makes every write that returned before it was called as durable as this device can make it.
//!    A device in memory has nothing to do; a journal under it has.
//! 6. The extents of [`BlockDevice::block_status`] are never empty and together cover exactly the range asked for.
//!
//! Owns no threads. Deliberately not here: requests as values, queues, async: a caller that wants parallelism brings
//! its own threads, as the implementer chooses the locks.
#![forbid(unsafe_code)]

use std::ops::Range;

use muster_common::ByteLen;

pub mod conformance;
mod error;
pub mod model;

pub use error::{BlockError, BlockErrorKind};

/// What a device looks like to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// A multiple of `minimum_block`.
    pub size: ByteLen,
    /// Requests aligned to this are served best; also the unit that is written atomically. A power of two.
    pub block_size: u32,
    /// The finest alignment a client should use. The device itself takes any byte range.
    pub minimum_block: u32,
    /// The largest request worth sending at once, in bytes. Longer ones work.
    pub max_request: u32,
    /// Writes, trims and zeroes are refused with [`BlockErrorKind::ReadOnly`].
    pub read_only: bool,
    /// Seeks cost time. Never true for memory.
    pub rotational: bool,
}

impl Geometry {
    /// A device in memory: 4 KiB blocks, 512-byte sectors, requests of up to 32 MiB (what NBD clients send at most).
    pub const fn memory(size: ByteLen, read_only: bool) -> Self {
        Self { size, block_size: 4096, minimum_block: 512, max_request: 32 << 20, read_only, rotational: false }
    }

    /// The range as checked byte offsets, or `OutOfRange`.
    pub fn check(&self, offset: u64, len: u64) -> Result<Range<u64>, BlockError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size.bytes() => Ok(offset..end),
            _ => Err(BlockError::new(
                BlockErrorKind::OutOfRange,
                format!(
                    "range of {len} bytes at offset {offset} is not within a device of {} bytes",
                    self.size.bytes()
                ),
            )),
        }
    }

    /// [`Geometry::check`] for a request that changes the device: also refuses it when read-only.
    pub fn check_write(&self, offset: u64, len: u64) -> Result<Range<u64>, BlockError> {
        if self.read_only {
            return Err(BlockError::new(
                BlockErrorKind::ReadOnly,
                format!("change {len} bytes at offset {offset} of a read-only device"),
            ));
        }
        self.check(offset, len)
    }
}

/// How a write is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Durable before the call returns, as if a flush of this range followed.
    pub fua: bool,
}

/// How zeroes are to be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// The client would rather keep the space than get it back. A thin device may ignore it.
    pub no_hole: bool,
    /// Refuse with [`BlockErrorKind::Unsupported`] rather than be as slow as a write.
    pub fast: bool,
    /// Durable before the call returns.
    pub fua: bool,
}

/// What the device holds for a stretch of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Takes space; may still happen to be zero.
    Data,
    /// Takes no space and reads as zero.
    Hole,
}

/// A stretch of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Never 0.
    pub len: u64,
    pub kind: ExtentKind,
}

impl Extent {
    /// Appends `len` bytes of `kind` to `out`, joining them with the last extent when the kind is the same.
    pub fn push(out: &mut Vec<Extent>, len: u64, kind: ExtentKind) {
        match out.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.kind == kind => last.len += len,
            _ => out.push(Extent { len, kind }),
        }
    }
}

/// A disk. See the module's invariants.
pub trait BlockDevice: Send + Sync {
    /// Cheap; the size may grow between calls, nothing else changes.
    fn geometry(&self) -> Geometry;

    /// A request may wait for a disk or a network. Whoever serves many devices with few threads gives such a one threads of
    /// its own.
    fn may_wait(&self) -> bool {
        false
    }

    /// Fills `buf` from `offset`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError>;

    /// Shows `len` bytes from `offset` to `sink`, piece by piece and without a copy where the device can: each piece with
    /// its place in the request (0 is the first byte asked for). All of the request is shown, in any order; a piece may be
    /// shown again, and then the last showing counts. For whoever may not take a `&mut [u8]` of where the bytes go, as a
    /// guest's memory. The sink must not call the device.
    fn read_with(&self, offset: u64, len: u64, sink: &mut dyn FnMut(u64, &[u8])) -> Result<(), BlockError> {
        self.geometry().check(offset, len)?;
        let mut buf = [0; 16 << 10];
        let mut done = 0;
        while done < len {
            let piece = &mut buf[..(len - done).min(16 << 10) as usize];
            self.read_at(offset + done, piece)?;
            sink(done, piece);
            done += piece.len() as u64;
        }
        Ok(())
    }

    /// Writes `data` at `offset`. After an error any part of the range may have been written.
    fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError>;

    /// Makes the range read as zero.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError>;

    /// Gives the range back; it then reads as zero.
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError>;

    /// Makes what was written before durable.
    fn flush(&self) -> Result<(), BlockError>;

    /// Replaces the contents of `out` with the extents of the range.
    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError>;
}

impl<D: BlockDevice + ?Sized> BlockDevice for std::sync::Arc<D> {
    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }
    fn may_wait(&self) -> bool {
        (**self).may_wait()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        (**self).read_at(offset, buf)
    }
    fn read_with(&self, offset: u64, len: u64, sink: &mut dyn FnMut(u64, &[u8])) -> Result<(), BlockError> {
        (**self).read_with(offset, len, sink)
    }
    fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
        (**self).write_at(offset, data, flags)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
        (**self).write_zeroes(offset, len, flags)
    }
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        (**self).trim(offset, len)
    }
    fn flush(&self) -> Result<(), BlockError> {
        (**self).flush()
    }
    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        (**self).block_status(offset, len, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_overflows_is_out_of_range() {
        let geometry = Geometry::memory(ByteLen::mib(1), false);
        assert!(geometry.check(0, 1 << 20).is_ok());
        assert!(geometry.check(1 << 20, 0).is_ok());
        for (offset, len) in [(1, 1 << 20), (u64::MAX, 1), (u64::MAX, u64::MAX), ((1 << 20) + 1, 0)] {
            assert_eq!(geometry.check(offset, len).unwrap_err().kind(), BlockErrorKind::OutOfRange);
        }
    }

    #[test]
    fn extents_of_one_kind_are_joined() {
        let mut out = Vec::new();
        for (len, kind) in [(1, ExtentKind::Data), (2, ExtentKind::Data), (0, ExtentKind::Hole), (3, ExtentKind::Hole)]
        {
            Extent::push(&mut out, len, kind);
        }
        assert_eq!(out, [Extent { len: 3, kind: ExtentKind::Data }, Extent { len: 3, kind: ExtentKind::Hole }]);
    }
}
