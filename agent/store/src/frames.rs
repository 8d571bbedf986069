//! Frames: a block's bytes, stored once, counted, found again by content.
//!
//! A frame's life: taken from the pool -> filled -> listed in the index with one reference -> shared -> last reference
//! dropped -> off the index -> back in the pool. The count goes from 1 to 0 only under the lock of the index shard that
//! lists the frame, and an index hit counts up under that lock, so a frame that is found is never one that just died.
//! Anybody else who counts up holds a reference already.

//! Whose blocks may be shared with whose is a matter of *domains*: each tenant is one, and all who have no tenant are one.
//! A domain has its own key, and a frame is found only by its own domain, so that no tenant learns by timing what another
//! one has stored.

use std::{io, sync::Arc};

use twox_hash::XxHash3_64;

use crate::{
    PageKind,
    account::Account,
    arena::{BLOCK, Blocks, Words, prefetch},
    index::{Found, Index},
    map::{Map, Nodes},
    marks::{Mark, Marks},
    memory::Memory,
    pool::{Budget, Pool, Unit},
    spill::Spill,
    sync::{
        RwLock, World,
        atomic::{
            AtomicU32,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
};

/// Why a block was not stored, or not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The budget does not hold it.
    Full,
    /// The bytes are damaged, or the spill file does not give them.
    Lost,
}

/// Counts at the top stay there: such a node is never freed, rather than freed too early.
pub(crate) const STICKY: u32 = u32::MAX;
/// As [`STICKY`], of frames.
pub(crate) const STICKY_FRAME: u32 = COUNT;
/// Bits of a frame's word that are its count; those above are its domain's number.
const COUNT: u32 = (1 << DOMAIN_SHIFT) - 1;
const DOMAIN_SHIFT: u32 = 24;
/// The domain of frames that are in no index: blocks of volumes with a reservation, and those that share their tag with
/// too many others.
pub(crate) const ALONE: u32 = 255;

/// Reference count and tag.
pub(crate) const BESIDE_FRAME: u64 = 8;

/// Free frames up to this many stay ours, so that a store that frees and fills does not go to the kernel (128 MiB).
const KEEP_FRAMES: usize = 32_768;

/// Free frames in huge pages that are otherwise in use go back so many at a time (4 MiB, a few milliseconds).
const MOST_CUT: usize = 1024;

/// Counts one more, for somebody who holds a reference or the lock under which the count may reach zero. `mask` are the
/// bits that count.
pub(crate) fn count_up(references: &AtomicU32, mask: u32, sticky: u32) {
    let before = references.fetch_update(Relaxed, Relaxed, |word| (word & mask < sticky).then_some(word + 1));
    debug_assert!(before.is_err() || before.is_ok_and(|word| word & mask != 0), "counted up from zero");
}

/// Counts a frame one less unless it is the last one. True when it was not.
fn count_down_shared(references: &AtomicU32, sticky: u32) -> bool {
    references
        .fetch_update(Release, Acquire, |word| match word & COUNT {
            0 | 1 => None,
            count if count >= sticky => Some(word),
            _ => Some(word - 1),
        })
        .is_ok()
}

/// Whose blocks are shared.
pub(crate) struct Domain {
    /// 0: of all without a tenant.
    pub(crate) number: u8,
    /// All zero where there is none.
    pub(crate) tenant: [u8; 16],
    /// Keys the hash, so that a guest cannot prepare blocks that share tags.
    secret: [u8; 192],
}

impl Domain {
    /// `key` is the store's.
    pub(crate) fn new(number: u8, key: &[u8; 32], tenant: [u8; 16]) -> Domain {
        let mut secret = [0; 192];
        blake3::Hasher::new_keyed(key).update(&tenant).finalize_xof().fill(&mut secret);
        Domain { number, tenant, secret }
    }

    #[inline]
    pub(crate) fn tag_of(&self, block: &[u8; BLOCK]) -> u32 {
        // the only error is a secret that is too short
        (XxHash3_64::oneshot_with_secret(&self.secret, block).unwrap_or_default() >> 32) as u32
    }
}

pub(crate) struct Frames {
    pub(crate) blocks: Blocks,
    /// Two words a frame, side by side because they are wanted together: whose it is and how many references it has, and
    /// the tag it is listed under, which is also its checksum.
    words: Words,
    pub(crate) marks: Marks,
    pub(crate) pool: Pool,
    pub(crate) index: Index,
}

/// Everything the maps of one store are made of.
pub(crate) struct Engine {
    pub(crate) budget: Budget,
    pub(crate) frames: Frames,
    pub(crate) nodes: Nodes,
    pub(crate) world: World,
    pub(crate) pages: PageKind,
    pub(crate) spill: Option<Spill>,
    /// By number.
    pub(crate) domains: RwLock<Vec<Arc<Domain>>>,
    /// [`STICKY_FRAME`], but for tests.
    pub(crate) sticky: u32,
}

/// Whether every byte is zero. Blocks that are not mostly show it in their first bytes.
#[inline]
pub(crate) fn is_zero(block: &[u8]) -> bool {
    block.chunks(128).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

impl Frames {
    pub(crate) fn reserve(capacity: u32, pages: PageKind, memory: &Memory) -> io::Result<Frames> {
        let count = capacity as usize + 1;
        let granule = if pages == PageKind::Small { 1 } else { 512 };
        // of a small store a smaller part
        let keep = KEEP_FRAMES.min(capacity as usize / 128);
        let unit = Unit { bytes: BLOCK as u64, beside: BESIDE_FRAME, granule, keep };
        let small = |name| memory.file(name, PageKind::Small);
        let lent = Words::reserve(Pool::words(capacity, granule), small("lent-frames")?.as_ref())?;
        Ok(Frames {
            blocks: Blocks::reserve(count, pages, memory.file("frames", pages)?.as_ref())?,
            words: Words::reserve(2 * count, small("words")?.as_ref())?,
            marks: Marks::reserve(capacity, memory)?,
            pool: Pool::new(capacity, unit, lent),
            index: Index::new(),
        })
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
        self.references(frame).load(Acquire) & COUNT
    }

    pub(crate) fn domain(&self, frame: u32) -> u8 {
        (self.references(frame).load(Acquire) >> DOMAIN_SHIFT) as u8
    }

    /// Forgets all counts up to this number, and not whose the frames are: before an attaching store counts again.
    pub(crate) fn forget_counts(&self, frames: std::ops::Range<u32>) {
        for words in self.words.all()[2 * frames.start as usize..2 * frames.end as usize].chunks_exact(2) {
            words[0].fetch_and(!COUNT, Relaxed);
        }
    }

    /// Counts a reference that was found again; at the top it sticks.
    pub(crate) fn count_again(&self, frame: u32) {
        count_up_from_zero(self.references(frame));
    }

    /// The words of frames are near when they are wanted.
    pub(crate) fn populate_words(&self, frames: std::ops::Range<u32>) {
        self.words.populate(2 * frames.start as usize..2 * frames.end as usize);
    }

    pub(crate) fn tag(&self, frame: u32) -> u32 {
        self.tag_word(frame).load(Relaxed)
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
        self.budget.charge(bytes) || self.find_memory(bytes, || self.budget.charge(bytes).then_some(())).is_some()
    }

    /// Tries again and again, after giving more and more memory back that free frames and nodes still take: as little as does
    /// for `bytes` at first, because each page that goes back interrupts every processor.
    pub(crate) fn find_memory<T>(&self, bytes: u64, again: impl Fn() -> Option<T>) -> Option<T> {
        if self.pages == PageKind::Small {
            let frames = bytes.div_ceil(BLOCK as u64) as usize;
            self.frames.pool.purge_some(frames, &self.budget, |run| self.frames.blocks.give_back(run));
            if let Some(found) = again() {
                return Some(found);
            }
        }
        self.reclaim();
        // a free frame among used ones is of no use here: its memory is
        again().or_else(|| (self.cut_frames(0) > 0).then(&again)?)
    }

    /// Gives free memory back to the machine: what one pool keeps may be what another one needs.
    pub(crate) fn reclaim(&self) {
        self.purge_frames(0);
        self.purge_nodes(0);
    }

    /// Gives memory of free frames among used ones back to the machine, some at a time, until `keep` are left. How many.
    pub(crate) fn cut_frames(&self, keep: usize) -> usize {
        if self.pages != PageKind::Transparent {
            // small pages go back one by one anyway, and those of hugetlbfs never in part
            return 0;
        }
        self.frames.pool.cut(keep, MOST_CUT, &self.budget, |run| self.frames.blocks.give_back(run))
    }

    fn purge_frames(&self, keep: usize) {
        self.frames.pool.purge(keep, &self.budget, |run| self.frames.blocks.give_back(run));
    }

    pub(crate) fn take_frame(&self) -> Option<u32> {
        let pool = &self.frames.pool;
        pool.take(&self.budget).or_else(|| {
            self.reclaim();
            pool.take(&self.budget)
        })
    }

    pub(crate) fn put_frame(&self, frame: u32) {
        if self.frames.pool.put(frame) {
            self.purge_frames(self.frames.pool.keep() / 2);
        }
    }

    /// Copies bytes of a frame the caller keeps alive, from wherever they are.
    #[inline]
    pub(crate) fn read_frame(&self, frame: u32, from: usize, buf: &mut [u8]) -> Result<(), Failed> {
        let frames = &self.frames;
        if !frames.marks.armed() {
            frames.blocks.read(frame, from, buf);
            return Ok(());
        }
        loop {
            let (mark, sequence) = frames.marks.begin(frame);
            match mark {
                Mark::Here => {
                    frames.blocks.read(frame, from, buf);
                    if let Some(spill) = &self.spill {
                        spill.touch(frame);
                    }
                }
                Mark::Away => self.read_away(frame, from, buf)?,
                Mark::Damaged | Mark::Gone => return Err(Failed::Lost),
            }
            if frames.marks.unchanged(frame, sequence) {
                return Ok(());
            }
        }
    }

    /// Whether a frame the caller keeps alive holds this block.
    #[inline]
    fn holds(&self, frame: u32, block: &[u8; BLOCK]) -> bool {
        if !self.frames.marks.armed() {
            return self.frames.blocks.with(frame, |stored| stored == block);
        }
        let mut stored = [0; BLOCK];
        self.read_frame(frame, 0, &mut stored).is_ok() && stored == *block
    }

    /// Whether a frame the caller keeps alive still has the hash it was stored under.
    pub(crate) fn is_sound(&self, frame: u32) -> bool {
        let mut block = [0; BLOCK];
        self.read_frame(frame, 0, &mut block).is_ok() && self.is_of(frame, &block)
    }

    /// Whether a block has the hash a frame was stored under.
    pub(crate) fn is_of(&self, frame: u32, block: &[u8; BLOCK]) -> bool {
        let tag = self.frames.tag(frame);
        let domains = self.domains.read();
        match domains.get(usize::from(self.frames.domain(frame))) {
            Some(domain) => domain.tag_of(block) == tag,
            // shared with nobody: whose it is does not stand beside it
            None => domains.iter().any(|domain| domain.tag_of(block) == tag),
        }
    }

    /// Has the machine give the memory of these frames, in order, now; false when it has none.
    pub(crate) fn populate(&self, frames: &[u32]) -> bool {
        let runs: Vec<&[u32]> = frames.chunk_by(|a, b| a + 1 == *b).collect();
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(8);
        let each = runs.len().div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            let parts: Vec<_> = runs
                .chunks(each)
                .map(|part| {
                    scope.spawn(move || {
                        part.iter().all(|run| self.frames.blocks.populate(run[0]..run[run.len() - 1] + 1).is_ok())
                    })
                })
                .collect();
            parts.into_iter().all(|part| part.join().unwrap_or(false))
        })
    }

    /// The frame that holds this block, with one reference for the caller; 0 for an all-zero block. `replaced` is the frame
    /// that will be released for it, if anybody knows.
    #[inline]
    pub(crate) fn intern(&self, map: &Map, block: &[u8; BLOCK], replaced: Option<u32>) -> Result<u32, Failed> {
        if is_zero(block) {
            return Ok(0);
        }
        let tag = map.domain.tag_of(block);
        self.frames.index.prefetch(tag);
        if let Some(frame) = replaced {
            self.prefetch_place(frame);
        }
        if map.account.is_alone() {
            return self.store_alone(&map.account, tag, block);
        }
        self.intern_tagged(&map.domain, tag, block)
    }

    /// Stores a block that is shared with nobody.
    fn store_alone(&self, account: &Account, tag: u32, block: &[u8; BLOCK]) -> Result<u32, Failed> {
        let frame = account.frame().or_else(|| self.take_frame()).ok_or(Failed::Full)?;
        self.frames.blocks.fill(frame, block);
        self.frames.tag_word(frame).store(tag, Relaxed);
        self.frames.references(frame).store(ALONE << DOMAIN_SHIFT | 1, Release);
        Ok(frame)
    }

    /// Brings near what releasing a frame, which may be gone meanwhile, will look at: first its words, then its place in the
    /// index.
    #[inline]
    pub(crate) fn prefetch_words(&self, frame: u32) {
        prefetch(std::ptr::from_ref(self.frames.references(frame)).addr());
    }

    #[inline]
    pub(crate) fn prefetch_place(&self, frame: u32) {
        self.frames.index.prefetch(self.frames.tag(frame));
    }

    #[inline]
    fn intern_tagged(&self, domain: &Domain, tag: u32, block: &[u8; BLOCK]) -> Result<u32, Failed> {
        let frames = &self.frames;
        let mut shard = frames.index.shard(tag);
        let found = shard.find(tag, |frame| frames.domain(frame) == domain.number && self.holds(frame, block));
        if let Found::Frame(frame) = found {
            count_up(frames.references(frame), COUNT, self.sticky);
            shard.hits += 1;
            return Ok(frame);
        }
        let frame = self.take_frame().ok_or(Failed::Full)?;
        frames.blocks.fill(frame, block);
        frames.tag_word(frame).store(tag, Relaxed);
        if found == Found::Nowhere && !shard.insert(tag, frame, |bytes| self.charge(bytes), &self.budget) {
            drop(shard);
            self.put_frame(frame);
            return Err(Failed::Full);
        }
        let domain = if found == Found::Nowhere { u32::from(domain.number) } else { ALONE };
        frames.references(frame).store(domain << DOMAIN_SHIFT | 1, Release);
        shard.misses += 1;
        Ok(frame)
    }

    /// Passes what is known of a frame (tag, domain, place in the index) on to a number without references, which has one
    /// then, and drops both references that the frame must have, of which none can be counted up but in the index. False, and
    /// nothing is changed, when it has others, or was found damaged.
    pub(crate) fn renumber(&self, frame: u32, to: u32) -> bool {
        let frames = &self.frames;
        let tag = frames.tag(frame);
        // whoever finds it in the index counts it up under this lock
        let mut shard = frames.index.shard(tag);
        let word = frames.references(frame).load(Acquire);
        if word & COUNT != 2 || self.sticky <= 2 || frames.marks.get(frame) != Mark::Here {
            return false;
        }
        frames.tag_word(to).store(tag, Relaxed);
        frames.references(to).store(word - 1, Release);
        if word >> DOMAIN_SHIFT != ALONE {
            shard.renumber(tag, frame, to);
        }
        frames.references(frame).store(word - 2, Release);
        true
    }

    /// One more reference to a frame the caller has one of.
    #[inline]
    pub(crate) fn retain_frame(&self, frame: u32) {
        count_up(self.frames.references(frame), COUNT, self.sticky);
    }

    /// Drops the caller's reference. The frame, when it was the last one: it is the caller's to give back.
    #[inline]
    #[must_use]
    pub(crate) fn release_frame_to(&self, frame: u32) -> Option<u32> {
        let references = self.frames.references(frame);
        if count_down_shared(references, self.sticky) {
            return None;
        }
        // Perhaps the last one. Only under the shard's lock is that certain, because a search may find the frame now.
        let tag = self.frames.tag(frame);
        let mut shard = self.frames.index.shard(tag);
        if count_down_shared(references, self.sticky) {
            return None;
        }
        let before = references.fetch_sub(1, AcqRel);
        assert_eq!(before & COUNT, 1, "reference to frame {frame} dropped twice");
        if before >> DOMAIN_SHIFT != ALONE {
            shard.remove(tag, frame, &self.budget);
        }
        drop(shard);
        if self.frames.marks.armed() && !self.unmark(frame) { None } else { Some(frame) }
    }
}

/// Counts one more where zero means that nobody has counted yet.
pub(crate) fn count_up_from_zero(references: &AtomicU32) {
    let _ = references.fetch_update(Relaxed, Relaxed, |word| (word & COUNT < COUNT).then_some(word + 1));
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
        count_up(&count, COUNT, 5);
        count_up(&count, COUNT, 5);
        assert_eq!(count.load(Relaxed), 5);
        for _ in 0..10 {
            assert!(count_down_shared(&count, 5));
        }
        assert_eq!(count.load(Relaxed), 5);
    }
}
