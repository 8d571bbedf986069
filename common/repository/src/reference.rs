//! A reference keeps manifests and blobs alive and may carry a payload of the caller's (a backup record, say). It is one
//! object, so publishing it is one atomic step.
//!
//! All integers little-endian.
//!
//! | offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 8 | magic | `MSTRREFE` |
//! | 8 | 4 | version | 1 |
//! | 12 | 4 | entry count n | |
//! | 16 | 8 | incompatible features | a reader refuses bits it does not know; none defined |
//! | 24 | 8 | compatible features | ignored when unknown; none defined |
//! | 32 | 8 | payload length p | |
//! | 40 | 36 n | entries | kind (4): 1 manifest, 2 blob; digest (32) |
//! | 40 + 36 n | p | payload | the caller's |
//! | 40 + 36 n + p | 32 | checksum | BLAKE3 of all bytes before |

use muster_common::Digest;

use crate::{
    error::{FormatError, RepositoryError},
    layout::{check_head, digest_at, layout, put, u32_at, u64_at},
};

const MAGIC: &[u8; 8] = b"MSTRREFE";
const VERSION: u32 = 1;
const WHAT: &str = "reference";
const CHECKSUM_LEN: usize = 32;

layout! {
    header = 40 {
        MAGIC: 0, 8; VERSION: 8, 4; COUNT: 12, 4; INCOMPATIBLE: 16, 8; COMPATIBLE: 24, 8; PAYLOAD: 32, 8;
    }
}
layout! { entry = 36 { KIND: 0, 4; DIGEST: 4, 32; } }

/// What a reference keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kept {
    /// A manifest, and so all of its chunks.
    Manifest(Digest),
    Blob(Digest),
}

/// A parsed reference.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Reference {
    pub kept: Vec<Kept>,
    pub payload: Vec<u8>,
}

impl Reference {
    /// Parses and checks bytes from anywhere.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        check_head(bytes, WHAT, MAGIC, VERSION, header::LEN)?;
        let count = u64::from(u32_at(bytes, header::COUNT));
        let payload = u64_at(bytes, header::PAYLOAD);
        let need = (header::LEN + CHECKSUM_LEN) as u128 + u128::from(count) * entry::LEN as u128 + u128::from(payload);
        if need != bytes.len() as u128 {
            let need = u64::try_from(need).unwrap_or(u64::MAX);
            return Err(FormatError::Truncated { what: WHAT, need, have: bytes.len() as u64 });
        }
        let (body, sum) = bytes.split_at(bytes.len() - CHECKSUM_LEN);
        if crate::digest_of(body) != digest_at(sum, 0..CHECKSUM_LEN) {
            return Err(FormatError::Checksum { what: WHAT });
        }
        let (entries, payload) = body[header::LEN..].split_at(count as usize * entry::LEN);
        let kept = entries
            .chunks_exact(entry::LEN)
            .map(|raw| match u32_at(raw, entry::KIND) {
                1 => Ok(Kept::Manifest(digest_at(raw, entry::DIGEST))),
                2 => Ok(Kept::Blob(digest_at(raw, entry::DIGEST))),
                _ => Err(FormatError::Invalid { what: WHAT, reason: "an entry is of an unknown kind" }),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { kept, payload: payload.to_vec() })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; header::LEN];
        put(&mut bytes, header::MAGIC, MAGIC);
        put(&mut bytes, header::VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, header::COUNT, &(self.kept.len() as u32).to_le_bytes());
        put(&mut bytes, header::PAYLOAD, &(self.payload.len() as u64).to_le_bytes());
        for kept in &self.kept {
            let (kind, digest) = match kept {
                Kept::Manifest(digest) => (1u32, digest),
                Kept::Blob(digest) => (2, digest),
            };
            bytes.extend_from_slice(&kind.to_le_bytes());
            bytes.extend_from_slice(digest.as_bytes());
        }
        bytes.extend_from_slice(&self.payload);
        let sum = crate::digest_of(&bytes);
        bytes.extend_from_slice(sum.as_bytes());
        bytes
    }
}

/// Refuses what cannot be the name of a reference.
pub(crate) fn check_name(name: &str) -> Result<(), RepositoryError> {
    let good = (1..=200).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'));
    if good { Ok(()) } else { Err(RepositoryError::InvalidName { name: name.to_string() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Reference {
        Reference {
            kept: vec![Kept::Manifest(Digest::from_bytes([1; 32])), Kept::Blob(Digest::from_bytes([2; 32]))],
            payload: b"what the caller says".to_vec(),
        }
    }

    #[test]
    fn the_encoding_is_pinned_by_golden_bytes() {
        let golden = include_bytes!("../tests/golden/reference-v1.bin");
        assert_eq!(example().encode(), golden);
        assert_eq!(Reference::parse(golden).unwrap(), example());
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_noticed() {
        let good = example().encode();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bytes = good.clone();
                bytes[at] ^= 1 << bit;
                assert!(Reference::parse(&bytes).is_err(), "bit {bit} of byte {at}");
            }
            assert!(Reference::parse(&good[..at]).is_err(), "cut to {at}");
        }
    }

    #[test]
    fn names_that_are_not_plain_are_refused() {
        for name in ["", ".x", "a/b", "A", "ä", &"x".repeat(201)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        assert!(check_name("backup-0.1_2").is_ok());
    }
}
