//! How much memory images will take in a store of 4 KiB frames: the number of distinct blocks that are not zero.
//!
//! Blocks are told apart by 8 bytes of a BLAKE3 keyed at random: at 10^9 blocks (4 TiB) the expected number of unequal
//! blocks taken for equal is 0.03, and no image can be made to collide on purpose. 8 to 16 bytes of memory a block.

use std::{
    collections::HashSet,
    hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState},
    ops::ControlFlow,
};

use muster_common::ByteLen;

use crate::{Repository, error::RepositoryError, ingest::Progress, scan::BLOCK, source::ReadAt};

/// The keys are hashes already.
#[derive(Default)]
pub(crate) struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// Distinct blocks seen.
pub(crate) struct BlockSet {
    key: [u8; 32],
    seen: HashSet<u64, BuildHasherDefault<Identity>>,
}

impl BlockSet {
    pub fn new() -> Self {
        let mut key = [0; 32];
        for (i, part) in key.chunks_exact_mut(8).enumerate() {
            part.copy_from_slice(&RandomState::new().hash_one(i).to_le_bytes());
        }
        Self { key, seen: HashSet::default() }
    }

    pub fn key(&self) -> [u8; 32] {
        self.key
    }

    pub fn extend(&mut self, blocks: &[u64]) {
        self.seen.extend(blocks);
    }

    pub fn resident(&self) -> ByteLen {
        ByteLen((self.seen.len() * BLOCK) as u64)
    }
}

/// What one more source adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// The source's size.
    pub logical: ByteLen,
    /// Bytes of frames it needs that no source before it needed.
    pub added: ByteLen,
    /// Bytes of frames of all sources so far: the predicted resident bytes.
    pub resident: ByteLen,
}

/// What one more source adds to a repository, and to stores that hold the repository's images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EstimateBeside {
    pub estimate: Estimate,
    /// Bytes of chunks that the repository does not have: what an import would write.
    pub new_bytes: ByteLen,
    /// Bytes of frames in those chunks and in no other chunk of the source. A store that holds the images the other chunks
    /// stand in needs so much more for this one, at most: a block may stand in another chunk of theirs.
    pub unknown: ByteLen,
}

/// Predicts the resident bytes of one or several images in one store, where equal blocks are kept once.
pub struct Estimator {
    blocks: BlockSet,
}

impl Default for Estimator {
    fn default() -> Self {
        Self::new()
    }
}

impl Estimator {
    pub fn new() -> Self {
        Self { blocks: BlockSet::new() }
    }

    /// Reads a source whole, on all cores. The callback may cancel.
    pub fn add(
        &mut self,
        source: &dyn ReadAt,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Estimate, RepositoryError> {
        let before = self.blocks.resident();
        let total = source.size();
        let blocks = &mut self.blocks;
        crate::scan::scan(source, false, Some(blocks.key()), &mut |unit| {
            blocks.extend(unit.blocks);
            match progress(Progress { done: ByteLen(unit.end), total, new_bytes: ByteLen::ZERO }) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(RepositoryError::Cancelled),
            }
        })?;
        let resident = blocks.resident();
        Ok(Estimate { logical: total, added: ByteLen(resident.0 - before.0), resident })
    }

    /// As [`Estimator::add`], and compares the source's chunks with those a repository has (the index only, nothing is read
    /// there): half as fast again, and free where the disk is slower than that.
    pub fn add_beside(
        &mut self,
        source: &dyn ReadAt,
        repository: &Repository,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<EstimateBeside, RepositoryError> {
        let before = self.blocks.resident();
        let total = source.size();
        let blocks = &mut self.blocks;
        let key = blocks.key();
        let mut known = BlockSet { key, seen: HashSet::default() };
        let mut all = BlockSet { key, seen: HashSet::default() };
        let mut new = HashSet::new();
        let mut new_bytes = 0;
        crate::scan::scan(source, true, Some(key), &mut |unit| {
            for chunk in unit.chunks {
                let here = &unit.blocks[chunk.blocks.clone()];
                all.extend(here);
                if repository.contains_chunk(&chunk.digest) {
                    known.extend(here);
                } else if new.insert(chunk.digest) {
                    new_bytes += chunk.range.len() as u64;
                }
            }
            match progress(Progress { done: ByteLen(unit.end), total, new_bytes: ByteLen(new_bytes) }) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(RepositoryError::Cancelled),
            }
        })?;
        let unknown = ByteLen(all.resident().0 - known.resident().0);
        blocks.seen.extend(&all.seen);
        let resident = blocks.resident();
        let estimate = Estimate { logical: total, added: ByteLen(resident.0 - before.0), resident };
        Ok(EstimateBeside { estimate, new_bytes: ByteLen(new_bytes), unknown })
    }

    /// The predicted resident bytes of all sources so far.
    pub fn resident(&self) -> ByteLen {
        self.blocks.resident()
    }
}

/// The predicted resident bytes of one source alone.
pub fn estimate(source: &dyn ReadAt) -> Result<ByteLen, RepositoryError> {
    Ok(Estimator::new().add(source, &mut |_| ControlFlow::Continue(()))?.resident)
}
