//! A pack: up to 64 MiB of chunks in one object, with an index at its end. Written once, never changed.
//!
//! All integers little-endian.
//!
//! | offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 8 | magic | `MSTRPACK` |
//! | 8 | 4 | version | 1 |
//! | 12 | 4 | reserved | zero |
//! | 16 | 8 | incompatible features | a reader refuses bits it does not know; none defined |
//! | 24 | 8 | compatible features | ignored when unknown; none defined |
//! | 32 | .. | chunks | back to back, in the order they came |
//! | i | 40 n | index | for each chunk: digest (32), offset in the pack (4), length (4) |
//! | i + 40 n | 64 | footer | see below; the last 64 bytes of the object |
//!
//! | footer offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 8 | magic | `MSTRPEND` |
//! | 8 | 4 | entry count n | |
//! | 12 | 4 | reserved | zero |
//! | 16 | 8 | index offset i | |
//! | 24 | 8 | pack length | of the whole object: a cut pack is seen as such |
//! | 32 | 32 | checksum | BLAKE3 of header, index and footer[0..32] |
//!
//! Checksum coverage: each chunk by its digest, everything else by the footer's checksum.

use muster_common::Digest;

use crate::{
    CHUNK_SIZE,
    error::FormatError,
    layout::{check_head, digest_at, layout, put, u32_at, u64_at},
    storage::{Storage, StorageError},
};

const MAGIC: &[u8; 8] = b"MSTRPACK";
const END_MAGIC: &[u8; 8] = b"MSTRPEND";
const VERSION: u32 = 1;
const WHAT: &str = "pack";

layout! {
    header = 32 { MAGIC: 0, 8; VERSION: 8, 4; RESERVED: 12, 4; INCOMPATIBLE: 16, 8; COMPATIBLE: 24, 8; }
}
layout! { entry = 40 { DIGEST: 0, 32; OFFSET: 32, 4; LENGTH: 36, 4; } }
layout! {
    footer = 64 {
        MAGIC: 0, 8; COUNT: 8, 4; RESERVED: 12, 4; INDEX_OFFSET: 16, 8; PACK_LENGTH: 24, 8; CHECKSUM: 32, 32;
    }
}

/// The largest pack a reader accepts.
pub(crate) const MAX_PACK: u64 = 64 << 20;

/// Where a writer closes a pack. Half of the allowed: one pack is filled while another is written, and both are in memory.
pub(crate) const TARGET: usize = 32 << 20;

/// Room for index and footer of a pack of whole chunks.
const INDEX_ROOM: usize = TARGET / CHUNK_SIZE * entry::LEN + footer::LEN;

/// Where one chunk stands in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub digest: Digest,
    pub offset: u32,
    pub len: u32,
}

/// A pack being filled.
pub(crate) struct PackBuilder {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

/// A pack ready to be stored.
pub(crate) struct SealedPack {
    pub bytes: Vec<u8>,
    pub entries: Vec<Entry>,
}

impl PackBuilder {
    /// An empty pack; takes memory with the first chunk.
    pub fn new() -> Self {
        Self::reusing(Vec::new())
    }

    /// An empty pack in the memory of an earlier one: fresh pages cost more than the copy into them.
    pub fn reusing(mut bytes: Vec<u8>) -> Self {
        bytes.clear();
        bytes.resize(header::LEN, 0);
        put(&mut bytes, header::MAGIC, MAGIC);
        put(&mut bytes, header::VERSION, &VERSION.to_le_bytes());
        Self { bytes, entries: Vec::new() }
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// True when a further chunk would take it above the target.
    pub fn is_full(&self) -> bool {
        self.bytes.len() + CHUNK_SIZE > TARGET
    }

    /// Appends a chunk of at most [`CHUNK_SIZE`] bytes; the caller looks at [`PackBuilder::is_full`] before.
    pub fn push(&mut self, digest: Digest, chunk: &[u8]) {
        debug_assert!(chunk.len() <= CHUNK_SIZE && !self.is_full());
        if self.entries.is_empty() {
            // once, so that a growing pack is not copied; pages are taken as they are filled
            self.bytes.reserve_exact(TARGET + INDEX_ROOM - self.bytes.len());
        }
        self.entries.push(Entry { digest, offset: self.bytes.len() as u32, len: chunk.len() as u32 });
        self.bytes.extend_from_slice(chunk);
    }

    /// Adds index and footer; leaves an empty builder behind.
    pub fn seal(&mut self) -> SealedPack {
        self.seal_reusing(Vec::new())
    }

    /// As [`PackBuilder::seal`]; the empty builder uses the memory of an earlier pack.
    pub fn seal_reusing(&mut self, spare: Vec<u8>) -> SealedPack {
        let PackBuilder { mut bytes, entries } = std::mem::replace(self, Self::reusing(spare));
        let index_offset = bytes.len();
        for e in &entries {
            bytes.extend_from_slice(e.digest.as_bytes());
            bytes.extend_from_slice(&e.offset.to_le_bytes());
            bytes.extend_from_slice(&e.len.to_le_bytes());
        }
        let footer_offset = bytes.len();
        bytes.resize(footer_offset + footer::LEN, 0);
        let length = bytes.len() as u64;
        let end = &mut bytes[footer_offset..];
        put(end, footer::MAGIC, END_MAGIC);
        put(end, footer::COUNT, &(entries.len() as u32).to_le_bytes());
        put(end, footer::INDEX_OFFSET, &(index_offset as u64).to_le_bytes());
        put(end, footer::PACK_LENGTH, &length.to_le_bytes());
        let sum = checksum(
            &bytes[..header::LEN],
            &bytes[index_offset..footer_offset],
            &bytes[footer_offset..footer_offset + footer::CHECKSUM.start],
        );
        put(&mut bytes[footer_offset..], footer::CHECKSUM, sum.as_bytes());
        SealedPack { bytes, entries }
    }
}

fn checksum(head: &[u8], index: &[u8], end: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(head).update(index).update(end);
    Digest::from_bytes(*hasher.finalize().as_bytes())
}

/// What reading a pack's index gave.
pub(crate) enum PackIndex {
    Good { entries: Vec<Entry>, length: u64 },
    Bad(FormatError),
}

/// Reads header, index and footer of a stored pack and checks them; the chunks are checked when they are read.
pub(crate) fn read_index(storage: &dyn Storage, key: &str) -> Result<PackIndex, StorageError> {
    let length = storage.len(key)?;
    let short = FormatError::Truncated { what: WHAT, need: (header::LEN + footer::LEN) as u64, have: length };
    if length < (header::LEN + footer::LEN) as u64 {
        return Ok(PackIndex::Bad(short));
    }
    let head = storage.get_range(key, 0, header::LEN)?;
    if let Err(error) = check_head(&head, WHAT, MAGIC, VERSION, header::LEN) {
        return Ok(PackIndex::Bad(error));
    }
    let end = storage.get_range(key, length - footer::LEN as u64, footer::LEN)?;
    let range = match index_range(&end, length) {
        Ok(range) => range,
        Err(error) => return Ok(PackIndex::Bad(error)),
    };
    let index = storage.get_range(key, range.start, (range.end - range.start) as usize)?;
    Ok(match parse_index(&head, &index, &end, range.start) {
        Ok(entries) => PackIndex::Good { entries, length },
        Err(error) => PackIndex::Bad(error),
    })
}

/// As [`read_index`], over the bytes of a whole pack. Never panics, whatever the bytes are: a fuzzer's entry.
pub(crate) fn parse(bytes: &[u8]) -> Result<Vec<Entry>, FormatError> {
    check_head(bytes, WHAT, MAGIC, VERSION, header::LEN)?;
    let need = (header::LEN + footer::LEN) as u64;
    if (bytes.len() as u64) < need {
        return Err(FormatError::Truncated { what: WHAT, need, have: bytes.len() as u64 });
    }
    let end = &bytes[bytes.len() - footer::LEN..];
    let range = index_range(end, bytes.len() as u64)?;
    parse_index(&bytes[..header::LEN], &bytes[range.start as usize..range.end as usize], end, range.start)
}

fn index_range(end: &[u8], length: u64) -> Result<std::ops::Range<u64>, FormatError> {
    if end[footer::MAGIC] != END_MAGIC[..] {
        return Err(FormatError::Invalid { what: WHAT, reason: "no footer at its end: cut or damaged" });
    }
    let claimed = u64_at(end, footer::PACK_LENGTH);
    if claimed != length || length > MAX_PACK + (MAX_PACK / 512) {
        return Err(FormatError::Truncated { what: WHAT, need: claimed, have: length });
    }
    let start = u64_at(end, footer::INDEX_OFFSET);
    let size = u64::from(u32_at(end, footer::COUNT)) * entry::LEN as u64;
    let stop = length - footer::LEN as u64;
    if start < header::LEN as u64 || start.checked_add(size) != Some(stop) {
        return Err(FormatError::Invalid { what: WHAT, reason: "the index does not lie between chunks and footer" });
    }
    Ok(start..stop)
}

fn parse_index(head: &[u8], index: &[u8], end: &[u8], index_offset: u64) -> Result<Vec<Entry>, FormatError> {
    if checksum(head, index, &end[..footer::CHECKSUM.start]) != digest_at(end, footer::CHECKSUM) {
        return Err(FormatError::Checksum { what: WHAT });
    }
    let mut entries = Vec::with_capacity(index.len() / entry::LEN);
    for raw in index.chunks_exact(entry::LEN) {
        let e = Entry {
            digest: digest_at(raw, entry::DIGEST),
            offset: u32_at(raw, entry::OFFSET),
            len: u32_at(raw, entry::LENGTH),
        };
        let inside = u64::from(e.offset) + u64::from(e.len) <= index_offset && e.offset as usize >= header::LEN;
        if !inside || e.len == 0 || e.len as usize > CHUNK_SIZE {
            return Err(FormatError::Invalid { what: WHAT, reason: "an index entry points outside of the chunks" });
        }
        entries.push(e);
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::storage::MemoryStorage;

    fn example() -> SealedPack {
        let mut builder = PackBuilder::new();
        for chunk in [&b"first chunk"[..], b"second"] {
            builder.push(crate::digest_of(chunk), chunk);
        }
        builder.seal()
    }

    #[test]
    fn the_encoding_is_pinned_by_golden_bytes() {
        let golden = include_bytes!("../tests/golden/pack-v1.bin");
        let sealed = example();
        assert_eq!(sealed.bytes, golden);
        assert_eq!(parse(golden).unwrap(), sealed.entries);
        let storage = MemoryStorage::new();
        storage.put("packs/golden", golden).unwrap();
        match read_index(&storage, "packs/golden").unwrap() {
            PackIndex::Good { entries, length } => assert_eq!((entries, length), (sealed.entries, golden.len() as u64)),
            PackIndex::Bad(e) => panic!("{e}"),
        }
    }

    #[test]
    fn a_full_pack_stays_within_the_limit() {
        let mut builder = PackBuilder::new();
        let mut n = 0u64;
        while !builder.is_full() {
            builder.push(Digest::from_bytes([0; 32]), &vec![7; CHUNK_SIZE]);
            n += 1;
        }
        let sealed = builder.seal();
        assert_eq!(n, 511);
        assert!((sealed.bytes.len() as u64) < MAX_PACK);
        assert_eq!(parse(&sealed.bytes).unwrap().len(), 511);
        assert!(builder.is_empty());
    }

    #[test]
    fn every_changed_bit_outside_of_the_chunks_and_every_cut_is_noticed() {
        let good = example().bytes;
        for at in (0..header::LEN).chain(header::LEN + 17..good.len()) {
            for bit in 0..8 {
                let mut bytes = good.clone();
                bytes[at] ^= 1 << bit;
                assert!(parse(&bytes).is_err(), "bit {bit} of byte {at}");
            }
        }
        for len in 0..good.len() {
            assert!(parse(&good[..len]).is_err(), "cut to {len}");
        }
    }

    #[test]
    fn a_pack_of_a_newer_version_says_so() {
        let mut bytes = example().bytes;
        bytes[16] = 1;
        assert_eq!(parse(&bytes), Err(FormatError::Features { what: WHAT, bits: 1 }));
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), graft in any::<bool>()) {
            let mut bytes = bytes;
            if graft {
                bytes.splice(0..0, example().bytes[..header::LEN].to_vec());
                bytes.extend_from_slice(END_MAGIC);
                bytes.resize(bytes.len() + 56, 1);
            }
            crate::fuzz::pack(&bytes);
            crate::fuzz::reference(&bytes);
            crate::fuzz::manifest(&bytes);
        }
    }
}
