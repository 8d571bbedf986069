//! Fixed-place fields of the on-disk formats. `layout!` turns a table into byte ranges and checks at compile time
//! that the fields touch and fill the declared size.

use crate::error::FormatError;

macro_rules! layout {
    ($(#[$doc:meta])* $name:ident = $total:literal { $($field:ident: $offset:literal, $len:literal;)+ }) => {
        $(#[$doc])*
        mod $name {
            #![allow(dead_code, reason = "the table is complete also where a field is always zero")]
            use std::ops::Range;
            pub const LEN: usize = $total;
            $(pub const $field: Range<usize> = $offset..$offset + $len;)+
            const _: () = {
                let mut end = 0;
                $(assert!($offset == end, "fields must touch"); end += $len;)+
                assert!(end == LEN, "fields must fill the declared size");
            };
        }
    };
}
pub(crate) use layout;

use std::ops::Range;

/// Reads a little-endian `u32` field. The caller has checked the length.
pub(crate) fn u32_at(bytes: &[u8], field: Range<usize>) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[field]);
    u32::from_le_bytes(raw)
}

/// Reads a little-endian `u64` field. The caller has checked the length.
pub(crate) fn u64_at(bytes: &[u8], field: Range<usize>) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[field]);
    u64::from_le_bytes(raw)
}

/// Copies a 32-byte field. The caller has checked the length.
pub(crate) fn digest_at(bytes: &[u8], field: Range<usize>) -> muster_common::Digest {
    let mut raw = [0; 32];
    raw.copy_from_slice(&bytes[field]);
    muster_common::Digest::from_bytes(raw)
}

pub(crate) fn put(bytes: &mut [u8], field: Range<usize>, value: &[u8]) {
    bytes[field].copy_from_slice(value);
}

/// Every format's first fields lie at the same places: magic 0..8, version 8..12, incompatible bits 16..24.
pub(crate) fn check_head(
    bytes: &[u8],
    what: &'static str,
    magic: &[u8; 8],
    supported: u32,
    head: usize,
) -> Result<(), FormatError> {
    if bytes.len() < 8 || bytes[..8] != magic[..] {
        return Err(FormatError::Magic { what });
    }
    if bytes.len() < head {
        return Err(FormatError::Truncated { what, need: head as u64, have: bytes.len() as u64 });
    }
    let version = u32_at(bytes, 8..12);
    if version != supported {
        return Err(FormatError::Version { what, version, supported });
    }
    let bits = u64_at(bytes, 16..24);
    if bits != 0 {
        return Err(FormatError::Features { what, bits });
    }
    Ok(())
}
