//! What a request asks for, and what the device says it is: virtio-blk without I/O.

use muster_block::Geometry;

/// Unit of every offset and length of virtio-blk, whatever the block size.
pub(crate) const SECTOR: u64 = 512;
/// Largest data of one request: [`SEGMENTS`] of [`SEGMENT_BYTES`] fit.
pub(crate) const MAX_DATA: u64 = 32 << 20;
/// Buffers of one request we ask drivers to stay within: a queue of QEMU's default size, less header and status.
const SEGMENTS: u32 = 126;
/// Largest buffer we ask drivers to stay within.
const SEGMENT_BYTES: u32 = 256 << 10;
/// Ranges in one discard or write-zeroes request.
pub(crate) const MAX_RANGES: u32 = 16;
/// Longest range to discard, 4 GiB, and to zero, 1 GiB: what a queue is held up by stays bounded.
pub(crate) const MAX_DISCARD_SECTORS: u32 = 8 << 20;
pub(crate) const MAX_ZERO_SECTORS: u32 = 2 << 20;
/// Bytes of the answer to a request for the device's name.
pub(crate) const NAME_BYTES: usize = 20;
/// Bytes of the device's configuration.
pub(crate) const CONFIG_BYTES: usize = 60;

/// Feature bits, by number.
pub(crate) mod feature {
    pub(crate) const SIZE_MAX: u64 = 1 << 1;
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
    /// vhost's own: writes to guest memory are logged.
    pub(crate) const LOG_ALL: u64 = 1 << 26;
    pub(crate) const INDIRECT: u64 = 1 << 28;
    pub(crate) const EVENT_INDEX: u64 = 1 << 29;
    /// vhost-user's own: rings are enabled one by one, and there are protocol features.
    pub(crate) const PROTOCOL: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;
}

/// Status bytes.
pub(crate) mod status {
    pub(crate) const OK: u8 = 0;
    pub(crate) const IO_ERROR: u8 = 1;
    pub(crate) const UNSUPPORTED: u8 = 2;
}

/// What is offered for a device.
pub(crate) fn features(geometry: &Geometry) -> u64 {
    let both = feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::MQ
        | feature::LOG_ALL
        | feature::INDIRECT
        | feature::EVENT_INDEX
        | feature::PROTOCOL
        | feature::VERSION_1;
    let only = if geometry.read_only { feature::RO } else { feature::DISCARD | feature::WRITE_ZEROES };
    both | only
}

/// The device's configuration as virtio lays it out.
///
/// | offset | size | field | | offset | size | field |
/// |---|---|---|---|---|---|---|
/// | 0 | 8 | capacity, sectors | | 34 | 2 | queues |
/// | 8 | 4 | largest buffer | | 36 | 4 | longest discard, sectors |
/// | 12 | 4 | most buffers | | 40 | 4 | most ranges of a discard |
/// | 16 | 4 | geometry (0) | | 44 | 4 | alignment of a discard, sectors |
/// | 20 | 4 | logical block, bytes | | 48 | 4 | longest zeroing, sectors |
/// | 24 | 1 | physical block, log2 of logical ones | | 52 | 4 | most ranges of a zeroing |
/// | 25 | 1 | alignment offset (0) | | 56 | 1 | zeroing may give space back (1) |
/// | 26 | 2 | smallest good request, logical blocks | | 57 | 3 | 0 |
/// | 28 | 4 | best request, logical blocks | | 32 | 2 | write cache, 0 |
pub(crate) fn config(geometry: &Geometry, queues: u16) -> [u8; CONFIG_BYTES] {
    let mut out = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    let logical = geometry.minimum_block.max(SECTOR as u32);
    let physical = geometry.block_size.max(logical);
    put(0, &(geometry.size.bytes() / SECTOR).to_le_bytes());
    put(8, &SEGMENT_BYTES.to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &logical.to_le_bytes());
    put(24, &[(physical / logical).trailing_zeros() as u8]);
    put(26, &((physical / logical) as u16).to_le_bytes());
    put(34, &queues.to_le_bytes());
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &(physical / SECTOR as u32).to_le_bytes());
    put(48, &MAX_ZERO_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]);
    out
}

/// The first 16 readable bytes of a request.
pub(crate) const HEADER_BYTES: usize = 16;

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Fill the writable buffers from this byte.
    Read {
        offset: u64,
    },
    /// Write the readable buffers at this byte.
    Write {
        offset: u64,
    },
    Flush,
    /// Give ranges back; they follow in the readable buffers.
    Discard,
    /// Zero ranges.
    WriteZeroes,
    /// Say the device's name.
    Name,
    /// Something else.
    Unknown,
}

impl Kind {
    pub(crate) fn decode(header: &[u8; HEADER_BYTES]) -> Kind {
        let word = u128::from_le_bytes(*header);
        // What overflows is beyond the end of every device.
        let offset = ((word >> 64) as u64).saturating_mul(SECTOR);
        match word as u32 {
            0 => Kind::Read { offset },
            1 => Kind::Write { offset },
            4 => Kind::Flush,
            8 => Kind::Name,
            11 => Kind::Discard,
            13 => Kind::WriteZeroes,
            _ => Kind::Unknown,
        }
    }
}

/// Bytes of one range.
pub(crate) const RANGE_BYTES: usize = 16;

/// A range of a discard or write-zeroes request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// The space may be given back.
    pub(crate) unmap: bool,
}

impl Range {
    /// The range, or the status that refuses it.
    pub(crate) fn decode(bytes: &[u8; RANGE_BYTES], discard: bool) -> Result<Range, u8> {
        let word = u128::from_le_bytes(*bytes);
        let (sectors, flags) = ((word >> 64) as u32, (word >> 96) as u32);
        if flags & !1 != 0 || (discard && flags != 0) {
            return Err(status::UNSUPPORTED);
        }
        let longest = if discard { MAX_DISCARD_SECTORS } else { MAX_ZERO_SECTORS };
        if sectors > longest {
            return Err(status::IO_ERROR);
        }
        let offset = (word as u64).saturating_mul(SECTOR);
        Ok(Range { offset, len: u64::from(sectors) * SECTOR, unmap: flags & 1 != 0 })
    }
}

#[cfg(test)]
mod tests {
    use muster_common::ByteLen;

    use super::*;

    #[test]
    fn the_configuration_says_512_over_4096_and_the_size() {
        let config = config(&Geometry::memory(ByteLen::mib(1), false), 4);
        let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().expect("four bytes"));
        assert_eq!((word(0), word(4)), (2048, 0));
        assert_eq!(word(20), 512);
        assert_eq!(config[24], 3);
        assert_eq!(u16::from_le_bytes([config[34], config[35]]), 4);
        assert_eq!(word(44), 8);
        assert_eq!(config[56], 1);
    }

    #[test]
    fn a_read_only_device_offers_no_changes() {
        let features = features(&Geometry::memory(ByteLen::mib(1), true));
        assert_ne!(features & feature::RO, 0);
        assert_eq!(features & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    }

    #[test]
    fn places_that_overflow_are_beyond_every_end() {
        let header = |kind: u32, sector: u64| {
            let mut bytes = [0; HEADER_BYTES];
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            bytes[8..].copy_from_slice(&sector.to_le_bytes());
            Kind::decode(&bytes)
        };
        assert_eq!(header(0, 2), Kind::Read { offset: 1024 });
        assert_eq!(header(1, u64::MAX / 512), Kind::Write { offset: u64::MAX / 512 * 512 });
        assert_eq!(header(1, u64::MAX / 512 + 1), Kind::Write { offset: u64::MAX });
        assert_eq!(header(2, 0), Kind::Unknown);
    }

    #[test]
    fn ranges_are_bounded_and_their_flags_known() {
        let range = |sector: u64, sectors: u32, flags: u32, discard| {
            let word = u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96;
            Range::decode(&word.to_le_bytes(), discard)
        };
        assert_eq!(range(2, 8, 1, false), Ok(Range { offset: 1024, len: 4096, unmap: true }));
        assert_eq!(range(2, 8, 1, true), Err(status::UNSUPPORTED));
        assert_eq!(range(2, 8, 2, false), Err(status::UNSUPPORTED));
        assert_eq!(range(0, MAX_ZERO_SECTORS + 1, 0, false), Err(status::IO_ERROR));
        assert_eq!(range(u64::MAX, 1, 0, true), Ok(Range { offset: u64::MAX, len: 512, unmap: false }));
    }
}
