//! Frames: a block's bytes, stored once, counted, found again by content.
//!
//! A frame's life: taken from the pool -> filled -> listed in the index with one reference -> shared -> last reference
//! dropped -> off the index -> back in the pool. The count goes from 1 to 0 only under the lock of the index shard that
//! lists the frame, and an index hit counts up under that lock, so a frame that is found is never one that just died.
//! Anybody else who counts up holds a reference already.

use std::{
    io,
    sync::atomic::{
        AtomicU32,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
};

use xxhash_rust::xxh3::xxh3_64_with_secret;

use crate::{
    PageKind,
    arena::{BLOCK, Blocks, Words},
    index::{Found, Index},
    map::Nodes,
    pool::{Budget, Pool, Unit},
    sync::World,
};

/// The budget does not hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// Counts at the top stay there: such a frame or node is never freed, rather than freed too early.
pub(crate) const STICKY: u32 = u32::MAX;

/// Reference count and tag.
pub(crate) const BESIDE_FRAME: u64 = 8;

/// Free frames up to this many stay ours, so that a store that frees and fills does not go to the kernel (128 MiB).
const KEEP_FRAMES: usize = 32_768;

/// Counts one more, for somebody who holds a reference or the lock under which the count may reach zero.
pub(crate) fn count_up(references: &AtomicU32, sticky: u32) {
    let before = references.fetch_update(Relaxed, Relaxed, |count| (count < sticky).then_some(count + 1));
    debug_assert_ne!(before, Ok(0), "counted up from zero");
}

/// Counts one less unless it is the last one. True when it was not.
fn count_down_shared(references: &AtomicU32, sticky: u32) -> bool {
    references
        .fetch_update(Release, Acquire, |count| match count {
            0 | 1 => None,
            count if count >= sticky => Some(count),
            count => Some(count - 1),
        })
        .is_ok()
}

pub(crate) struct Frames {
    pub(crate) blocks: Blocks,
    /// Two words a frame, side by side because they are wanted together: how many references it has, and the tag it is
    /// listed under, which is also its checksum.
    words: Words,
    pub(crate) pool: Pool,
    pub(crate) index: Index,
    /// Keys the hash, so that a guest cannot prepare blocks that share tags.
    secret: [u8; 192],
}

/// Everything the maps of one store are made of.
pub(crate) struct Engine {
    pub(crate) budget: Budget,
    pub(crate) frames: Frames,
    pub(crate) nodes: Nodes,
    pub(crate) world: World,
    pub(crate) pages: PageKind,
    /// [`STICKY`], but for tests.
    pub(crate) sticky: u32,
}

/// Whether every byte is zero. Blocks that are not mostly show it in their first bytes.
#[inline]
pub(crate) fn is_zero(block: &[u8]) -> bool {
    block.chunks(128).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

impl Frames {
    pub(crate) fn reserve(capacity: u32, pages: PageKind) -> io::Result<Frames> {
        let count = capacity as usize + 1;
        let granule = if pages == PageKind::Small { 1 } else { 512 };
        let unit = Unit { bytes: BLOCK as u64, beside: BESIDE_FRAME, granule, keep: KEEP_FRAMES };
        let mut secret = [0; 192];
        rand::fill(&mut secret);
        Ok(Frames {
            blocks: Blocks::reserve(count, pages)?,
            words: Words::reserve(2 * count)?,
            pool: Pool::new(capacity, unit),
            index: Index::new(),
            secret,
        })
    }

    #[inline]
    fn tag_of(&self, block: &[u8; BLOCK]) -> u32 {
        (xxh3_64_with_secret(block, &self.secret) >> 32) as u32
    }

    #[inline]
    fn references(&self, frame: u32) -> &AtomicU32 {
        &self.words.all()[2 * frame as usize]
    }

    #[inline]
    fn tag_word(&self, frame: u32) -> &AtomicU32 {
        &self.words.all()[2 * frame as usize + 1]
    }

    pub(crate) fn count(&self, frame: u32) -> u32 {
        self.references(frame).load(Acquire)
    }

    pub(crate) fn tag(&self, frame: u32) -> u32 {
        self.tag_word(frame).load(Relaxed)
    }

    /// Whether a frame the caller keeps alive still has the hash it was stored under.
    pub(crate) fn is_sound(&self, frame: u32) -> bool {
        self.blocks.with(frame, |block| self.tag_of(block)) == self.tag(frame)
    }

    #[cfg(test)]
    pub(crate) fn regions(&self) -> [std::ops::Range<usize>; 2] {
        [self.blocks.addresses(), self.words.addresses()]
    }

    /// Damages a frame, for tests of verification.
    #[cfg(test)]
    pub(crate) fn flip_a_bit(&self, frame: u32) {
        let mut block = self.blocks.with(frame, |block| *block);
        block[1234] ^= 4;
        self.blocks.fill(frame, &block);
    }
}

impl Engine {
    /// Charges the budget, after giving memory of free frames and nodes back when it has to.
    pub(crate) fn charge(&self, bytes: u64) -> bool {
        self.budget.charge(bytes) || {
            self.reclaim();
            self.budget.charge(bytes)
        }
    }

    /// Gives all free memory back to the machine: what one pool keeps may be what another one needs.
    pub(crate) fn reclaim(&self) {
        self.purge_frames(0);
        self.purge_nodes(0);
    }

    fn purge_frames(&self, keep: usize) {
        self.frames.pool.purge(keep, &self.budget, |run| self.frames.blocks.give_back(run));
    }

    fn take_frame(&self) -> Result<u32, Full> {
        let pool = &self.frames.pool;
        pool.take(&self.budget)
            .or_else(|| {
                self.reclaim();
                pool.take(&self.budget)
            })
            .ok_or(Full)
    }

    fn put_frame(&self, frame: u32) {
        if self.frames.pool.put(frame) {
            self.purge_frames(self.frames.pool.keep() / 2);
        }
    }

    /// The frame that holds this block, with one reference for the caller; 0 for an all-zero block.
    #[inline]
    pub(crate) fn intern(&self, block: &[u8; BLOCK]) -> Result<u32, Full> {
        if is_zero(block) {
            return Ok(0);
        }
        let frames = &self.frames;
        let tag = frames.tag_of(block);
        let mut shard = frames.index.shard(tag);
        let found = shard.find(tag, |frame| frames.blocks.with(frame, |stored| stored == block));
        if let Found::Frame(frame) = found {
            count_up(frames.references(frame), self.sticky);
            shard.hits += 1;
            return Ok(frame);
        }
        let frame = self.take_frame()?;
        frames.blocks.fill(frame, block);
        frames.tag_word(frame).store(tag, Relaxed);
        if found == Found::Nowhere && !shard.insert(tag, frame, |bytes| self.charge(bytes), &self.budget) {
            drop(shard);
            self.put_frame(frame);
            return Err(Full);
        }
        frames.references(frame).store(1, Release);
        shard.misses += 1;
        Ok(frame)
    }

    /// One more reference to a frame the caller has one of.
    #[inline]
    pub(crate) fn retain_frame(&self, frame: u32) {
        count_up(self.frames.references(frame), self.sticky);
    }

    /// Drops the caller's reference.
    #[inline]
    pub(crate) fn release_frame(&self, frame: u32) {
        let references = self.frames.references(frame);
        if count_down_shared(references, self.sticky) {
            return;
        }
        // Perhaps the last one. Only under the shard's lock is that certain, because a search may find the frame now.
        let tag = self.frames.tag(frame);
        let mut shard = self.frames.index.shard(tag);
        if count_down_shared(references, self.sticky) {
            return;
        }
        let before = references.fetch_sub(1, AcqRel);
        assert_eq!(before, 1, "reference to frame {frame} dropped twice");
        shard.remove(tag, frame, &self.budget);
        drop(shard);
        self.put_frame(frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_all_zero_block_is_zero() {
        let mut block = [0; BLOCK];
        assert!(is_zero(&block));
        for at in [0, 1, 127, 128, 2048, BLOCK - 1] {
            block[at] = 1;
            assert!(!is_zero(&block), "{at}");
            block[at] = 0;
        }
    }

    #[test]
    fn a_count_at_the_top_stays_there() {
        let count = AtomicU32::new(4);
        count_up(&count, 5);
        count_up(&count, 5);
        assert_eq!(count.load(Relaxed), 5);
        for _ in 0..10 {
            assert!(count_down_shared(&count, 5));
        }
        assert_eq!(count.load(Relaxed), 5);
    }
}
