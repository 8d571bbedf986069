//! The manifest: which chunk stands where in an image or a backed-up volume. Its BLAKE3 digest is the image's name, so it
//! holds nothing but content (no times, no names), and one content has exactly one manifest: runs are maximal, ascending,
//! and zero chunks are left out.
//!
//! All integers little-endian.
//!
//! | offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 8 | magic | `MSTRMANI` |
//! | 8 | 4 | version | 1 |
//! | 12 | 4 | chunk size | 65536 |
//! | 16 | 8 | incompatible features | a reader refuses bits it does not know; none defined |
//! | 24 | 8 | compatible features | a reader ignores bits it does not know; none defined |
//! | 32 | 8 | logical size | bytes, not zero; the last chunk is short when this is no multiple of 65536 |
//! | 40 | 8 | run count r | |
//! | 48 | 8 | chunk count n | sum of the runs' counts |
//! | 56 | 8 | reserved | zero |
//! | 64 | 16 r | runs | first chunk index (8), count (8): consecutive chunks that are not zero |
//! | 64 + 16 r | 32 n | chunk digests | BLAKE3-256 of each chunk, in order |
//!
//! Checksum coverage: the object's name is the BLAKE3 of all its bytes.

use muster_common::{ByteLen, Digest};

use crate::{
    CHUNK_SIZE,
    error::FormatError,
    layout::{check_head, digest_at, layout, put, u32_at, u64_at},
};

const MAGIC: &[u8; 8] = b"MSTRMANI";
const VERSION: u32 = 1;
const WHAT: &str = "manifest";

layout! {
    header = 64 {
        MAGIC: 0, 8; VERSION: 8, 4; CHUNK_SIZE: 12, 4; INCOMPATIBLE: 16, 8; COMPATIBLE: 24, 8;
        LOGICAL_SIZE: 32, 8; RUN_COUNT: 40, 8; CHUNK_COUNT: 48, 8; RESERVED: 56, 8;
    }
}
layout! { run = 16 { FIRST: 0, 8; COUNT: 8, 8; } }
const DIGEST_LEN: usize = 32;

/// The largest logical size a manifest may claim: 64 TiB, far above any desktop and far below overflow.
pub const MAX_LOGICAL_SIZE: u64 = 64 << 40;

/// One chunk of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRef {
    /// Where it stands in the image.
    pub offset: u64,
    /// Its length: [`CHUNK_SIZE`], or less for the last one.
    pub len: usize,
    pub digest: Digest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u64,
    count: u64,
    /// Position of the run's first digest in `digests`.
    start: u64,
}

/// A parsed, checked manifest. Cheap to share behind an `Arc`; 32 bytes a non-zero chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    size: u64,
    runs: Vec<Run>,
    digests: Vec<Digest>,
}

impl Manifest {
    /// Parses and checks bytes from anywhere. Does not compare them with a name: see [`Manifest::parse_named`].
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let invalid = |reason| FormatError::Invalid { what: WHAT, reason };
        check_head(bytes, WHAT, MAGIC, VERSION, header::LEN)?;
        if u32_at(bytes, header::CHUNK_SIZE) as usize != CHUNK_SIZE {
            return Err(invalid("the chunk size is not 65536"));
        }
        if u64_at(bytes, header::RESERVED) != 0 {
            return Err(invalid("reserved bytes are not zero"));
        }
        let size = u64_at(bytes, header::LOGICAL_SIZE);
        if size == 0 || size > MAX_LOGICAL_SIZE {
            return Err(invalid("the logical size is zero or above 64 TiB"));
        }
        let run_count = u64_at(bytes, header::RUN_COUNT);
        let chunk_count = u64_at(bytes, header::CHUNK_COUNT);
        let need =
            (run_count as u128) * run::LEN as u128 + (chunk_count as u128) * DIGEST_LEN as u128 + header::LEN as u128;
        if need != bytes.len() as u128 {
            return Err(FormatError::Truncated {
                what: WHAT,
                need: u64::try_from(need).unwrap_or(u64::MAX),
                have: bytes.len() as u64,
            });
        }
        // from here on the counts are bounded by the length of the bytes at hand
        let total = size.div_ceil(CHUNK_SIZE as u64);
        let (run_bytes, digest_bytes) = bytes[header::LEN..].split_at(run_count as usize * run::LEN);
        let mut runs = Vec::with_capacity(run_count as usize);
        let (mut end, mut start) = (None::<u64>, 0u64);
        for raw in run_bytes.chunks_exact(run::LEN) {
            let (first, count) = (u64_at(raw, run::FIRST), u64_at(raw, run::COUNT));
            if end.is_some_and(|end| first <= end) {
                return Err(invalid("runs overlap, touch or are not ascending"));
            }
            let stop = first.checked_add(count).filter(|&stop| count > 0 && stop <= total);
            let Some(stop) = stop else {
                return Err(invalid("a run is empty or ends behind the image"));
            };
            runs.push(Run { first, count, start });
            end = Some(stop);
            start += count;
        }
        if start != chunk_count {
            return Err(invalid("the runs do not add up to the chunk count"));
        }
        let digests = digest_bytes.chunks_exact(DIGEST_LEN).map(|raw| digest_at(raw, 0..32)).collect();
        Ok(Self { size, runs, digests })
    }

    /// Parses bytes that must hash to `name` (what came over the network or from a disk).
    pub fn parse_named(bytes: &[u8], name: &Digest) -> Result<Self, FormatError> {
        if crate::digest_of(bytes) != *name {
            return Err(FormatError::Checksum { what: WHAT });
        }
        Self::parse(bytes)
    }

    /// The one encoding of this content.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; header::LEN];
        put(&mut bytes, header::MAGIC, MAGIC);
        put(&mut bytes, header::VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, header::CHUNK_SIZE, &(CHUNK_SIZE as u32).to_le_bytes());
        put(&mut bytes, header::LOGICAL_SIZE, &self.size.to_le_bytes());
        put(&mut bytes, header::RUN_COUNT, &(self.runs.len() as u64).to_le_bytes());
        put(&mut bytes, header::CHUNK_COUNT, &(self.digests.len() as u64).to_le_bytes());
        bytes.reserve_exact(self.runs.len() * run::LEN + self.digests.len() * DIGEST_LEN);
        for run in &self.runs {
            bytes.extend_from_slice(&run.first.to_le_bytes());
            bytes.extend_from_slice(&run.count.to_le_bytes());
        }
        for digest in &self.digests {
            bytes.extend_from_slice(digest.as_bytes());
        }
        bytes
    }

    /// The name of this content: BLAKE3 of [`Manifest::encode`].
    pub fn digest(&self) -> Digest {
        crate::digest_of(&self.encode())
    }

    /// The image's size.
    pub fn size(&self) -> ByteLen {
        ByteLen(self.size)
    }

    /// How many chunks are not zero (counting repeated ones each time).
    pub fn chunk_count(&self) -> u64 {
        self.digests.len() as u64
    }

    /// Bytes that are not in zero chunks.
    pub fn data_bytes(&self) -> ByteLen {
        ByteLen(self.chunks().map(|c| c.len as u64).sum())
    }

    /// The chunks that are not zero, ascending. Everything between them is zero.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkRef> + '_ {
        self.runs.iter().flat_map(move |run| {
            (0..run.count).map(move |i| self.chunk_ref(run.first + i, self.digests[(run.start + i) as usize]))
        })
    }

    /// The chunk that covers `offset`; `None` when those bytes are zero or behind the end.
    pub fn chunk_at(&self, offset: u64) -> Option<ChunkRef> {
        let index = offset / CHUNK_SIZE as u64;
        let run = self.runs[..self.runs.partition_point(|r| r.first <= index)].last()?;
        let within = index - run.first;
        (within < run.count).then(|| self.chunk_ref(index, self.digests[(run.start + within) as usize]))
    }

    /// From `offset`: whether the bytes belong to stored chunks, and where that ends (at most the size).
    pub(crate) fn span_at(&self, offset: u64) -> (bool, u64) {
        let index = offset / CHUNK_SIZE as u64;
        let next = self.runs.partition_point(|r| r.first <= index);
        let end = |chunk: u64| (chunk * CHUNK_SIZE as u64).min(self.size);
        match self.runs[..next].last() {
            Some(run) if index < run.first + run.count => (true, end(run.first + run.count)),
            _ => (false, self.runs.get(next).map_or(self.size, |run| end(run.first))),
        }
    }

    fn chunk_ref(&self, index: u64, digest: Digest) -> ChunkRef {
        let offset = index * CHUNK_SIZE as u64;
        ChunkRef { offset, len: (self.size - offset).min(CHUNK_SIZE as u64) as usize, digest }
    }
}

/// Builds a manifest from ascending chunks.
#[derive(Debug)]
pub struct ManifestBuilder {
    size: u64,
    runs: Vec<Run>,
    digests: Vec<Digest>,
}

impl ManifestBuilder {
    /// # Panics
    /// When `size` is zero or above [`MAX_LOGICAL_SIZE`].
    pub fn new(size: ByteLen) -> Self {
        assert!(size.0 > 0 && size.0 <= MAX_LOGICAL_SIZE, "a manifest's size is 1 byte to 64 TiB");
        Self { size: size.0, runs: Vec::new(), digests: Vec::new() }
    }

    /// Adds the chunk with this index. Chunks that are all zero must be left out.
    ///
    /// # Panics
    /// When chunks do not come in ascending order or one lies behind the end.
    pub fn push(&mut self, index: u64, digest: Digest) {
        assert!(index < self.size.div_ceil(CHUNK_SIZE as u64), "the chunk lies in the image");
        let start = self.digests.len() as u64;
        match self.runs.last_mut() {
            Some(run) if run.first + run.count == index => run.count += 1,
            last => {
                assert!(last.is_none_or(|run| run.first + run.count < index), "chunks come in ascending order");
                self.runs.push(Run { first: index, count: 1, start });
            }
        }
        self.digests.push(digest);
    }

    pub fn finish(self) -> Manifest {
        Manifest { size: self.size, runs: self.runs, digests: self.digests }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digest(n: u8) -> Digest {
        Digest::from_bytes([n; 32])
    }

    /// Three runs, the last chunk short.
    fn example() -> Manifest {
        let mut builder = ManifestBuilder::new(ByteLen(20 * CHUNK_SIZE as u64 + 512));
        for (index, name) in [(0, 1), (1, 2), (5, 3), (19, 1), (20, 4)] {
            builder.push(index, digest(name));
        }
        builder.finish()
    }

    #[test]
    fn the_encoding_is_pinned_by_golden_bytes() {
        let golden = include_bytes!("../tests/golden/manifest-v1.bin");
        assert_eq!(example().encode(), golden);
        assert_eq!(Manifest::parse(golden).unwrap(), example());
        assert_eq!(
            example().digest().to_string(),
            include_str!("../tests/golden/manifest-v1.digest").trim(),
            "the name of an image is a promise to every repository out there"
        );
    }

    #[test]
    fn chunks_are_found_by_offset_and_holes_are_not() {
        let manifest = example();
        let all: Vec<_> = manifest.chunks().collect();
        assert_eq!(all.len(), 5);
        assert_eq!(all[4].len, 512);
        for index in 0..21u64 {
            let expected = all.iter().find(|c| c.offset == index * CHUNK_SIZE as u64).copied();
            assert_eq!(manifest.chunk_at(index * CHUNK_SIZE as u64 + 7), expected, "chunk {index}");
        }
        assert_eq!(manifest.chunk_at(u64::MAX), None);
        assert_eq!(manifest.data_bytes().0, 4 * CHUNK_SIZE as u64 + 512);
        assert_eq!(manifest.span_at(0), (true, 2 * CHUNK_SIZE as u64));
        assert_eq!(manifest.span_at(2 * CHUNK_SIZE as u64), (false, 5 * CHUNK_SIZE as u64));
        assert_eq!(manifest.span_at(19 * CHUNK_SIZE as u64), (true, manifest.size().0));
    }

    #[test]
    fn features_versions_and_sizes_that_are_not_known_are_refused_clearly() {
        let good = example().encode();
        let change = |at: usize, value: u64| {
            let mut bytes = good.clone();
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            Manifest::parse(&bytes)
        };
        assert_eq!(change(16, 4), Err(FormatError::Features { what: WHAT, bits: 4 }));
        assert!(change(24, 4).is_ok(), "compatible bits are ignored");
        assert!(matches!(change(8, 2 | 65536 << 32), Err(FormatError::Version { version: 2, .. })));
        assert!(matches!(change(8, 1 | 4096 << 32), Err(FormatError::Invalid { .. })));
        for (at, value) in [
            (32, 0),
            (32, u64::MAX),
            (32, 1),
            (40, 4),
            (48, 6),
            (48, u64::MAX),
            (40, u64::MAX),
            (56, 1),
            (64, 4),
            (72, 0),
            (72, 6),
        ] {
            assert!(change(at, value).is_err(), "{value:#x} at {at}");
        }
        for len in 0..good.len() {
            assert!(Manifest::parse(&good[..len]).is_err(), "cut to {len}");
        }
        assert_eq!(
            Manifest::parse_named(&good, &digest(9)),
            Err(FormatError::Checksum { what: WHAT }),
            "bytes must hash to the name they were asked by"
        );
    }

    proptest! {
        #[test]
        fn any_set_of_chunks_survives_its_encoding(
            size in 1u64..500 * CHUNK_SIZE as u64,
            wanted in proptest::collection::btree_map(0u64..500, any::<u8>(), 0..200),
        ) {
            let mut builder = ManifestBuilder::new(ByteLen(size));
            let inside: Vec<_> = wanted.into_iter().filter(|(i, _)| i * (CHUNK_SIZE as u64) < size).collect();
            for (index, name) in &inside {
                builder.push(*index, digest(*name));
            }
            let manifest = builder.finish();
            let bytes = manifest.encode();
            prop_assert_eq!(&Manifest::parse(&bytes).unwrap(), &manifest);
            let back: Vec<_> = manifest.chunks().map(|c| (c.offset / CHUNK_SIZE as u64, c.digest.as_bytes()[0])).collect();
            prop_assert_eq!(back, inside);
        }

        #[test]
        fn damaged_bytes_never_panic(at in 0usize..400, value in any::<u8>(), cut in 0usize..400) {
            let mut bytes = example().encode();
            let at = at % bytes.len();
            bytes[at] = value;
            crate::fuzz::manifest(&bytes);
            bytes.truncate(cut);
            crate::fuzz::manifest(&bytes);
        }
    }
}
