//! Which frame holds a given block: a hint from hash to frame, always checked by comparing bytes.
//!
//! [`SHARDS`] tables, each behind its own lock. A slot is 8 bytes: the 32-bit tag of the block's hash above the frame's
//! number; 0 is empty. The tag's upper bits choose the table and all lower bits the place, so the table is a nearly
//! sorted array (Robin Hood hashing with linear probing): a search ends at the first entry that is closer to its home
//! than the searched one would be, and a removal moves its followers back, so there are no tombstones.
//!
//! Cost: tables grow by 2/5 at 4/5 full: 10 to 14 bytes a frame.

use crate::{
    arena::prefetch,
    pool::Budget,
    sync::{
        Mutex, MutexGuard, Padded,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// Enough that 16 threads seldom meet in one, and that growing one (under its lock) takes well under a millisecond
/// for 64 GiB of frames. (Few where schedules are tried out: there they are to meet.)
pub(crate) const SHARDS: usize = if cfg!(feature = "shuttle") { 2 } else { 1024 };
const SHARD_BITS: u32 = SHARDS.trailing_zeros();

/// Equal tags are looked at, and compared, this often in one search. In a store of 64 GiB two different blocks share a
/// tag once in 250 searches; a longer row than this is somebody's attack, and then a block is stored without being
/// listed: attackers lose the sharing of their own blocks, and nobody's searches grow long.
const MOST_COMPARED: usize = 8;

const SLOT: u64 = size_of::<u64>() as u64;
const SMALLEST: usize = 16;

/// The table that lists this tag.
#[inline]
pub(crate) const fn shard_of(tag: u32) -> usize {
    (tag >> (u32::BITS - SHARD_BITS)) as usize
}

pub(crate) struct Index {
    shards: Box<[Padded<Slots>]>,
}

#[derive(Default)]
struct Slots {
    shard: Mutex<Shard>,
    /// Address and length of the table, for prefetches only: may be those of a table that is gone.
    base: AtomicUsize,
    len: AtomicUsize,
}

#[derive(Default)]
pub(crate) struct Shard {
    slots: Box<[u64]>,
    used: usize,
    /// Blocks found, and blocks not found, by `Frames::intern`; here because the lock is held anyway.
    pub(crate) hits: u64,
    pub(crate) misses: u64,
}

/// Sums over all shards.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IndexCounts {
    /// Entries that fit before tables grow.
    pub(crate) room: u64,
    pub(crate) hits: u64,
    pub(crate) misses: u64,
}

/// What a search ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Frame(u32),
    Nowhere,
    /// So many different blocks share this tag that another one must not be listed.
    TooManyOthers,
}

/// Bytes the index takes when empty.
pub(crate) const FIXED: u64 = (SHARDS * size_of::<Padded<Slots>>()) as u64;

/// The place of a tag in a table of `len` slots, by its lower bits.
#[inline]
const fn home(tag: u32, len: usize) -> usize {
    (((tag << SHARD_BITS) as u64 * len as u64) >> 32) as usize
}

impl Index {
    pub(crate) fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| Padded::default()).collect() }
    }

    #[inline]
    pub(crate) fn shard(&self, tag: u32) -> MutexGuard<'_, Shard> {
        let Slots { shard, base, len } = &self.shards[shard_of(tag)].0;
        let shard = shard.lock();
        // tables change seldom: mostly this line is only read
        let now = shard.slots.as_ptr().addr();
        if base.load(Relaxed) != now {
            base.store(now, Relaxed);
            len.store(shard.slots.len(), Relaxed);
        }
        shard
    }

    /// Brings the place near where a tag is listed, or would be.
    #[inline]
    pub(crate) fn prefetch(&self, tag: u32) {
        let Slots { base, len, .. } = &self.shards[shard_of(tag)].0;
        prefetch(base.load(Relaxed) + home(tag, len.load(Relaxed)) * size_of::<u64>());
    }

    /// Fills a shard that is empty with slots (tag above frame), and charges for it whether the budget holds it or not.
    pub(crate) fn fill(&self, shard: usize, slots: &[u64], budget: &Budget) {
        let mut shard = self.shards[shard].0.shard.lock();
        debug_assert_eq!(shard.used, 0);
        if slots.is_empty() {
            return;
        }
        // as full as after growing, so that the next entries do not make it grow again
        let size = SMALLEST.max(slots.len() * 7 / 5 + 1);
        budget.charge_anyway(size as u64 * SLOT);
        shard.resize(size, budget);
        for &slot in slots {
            shard.place(slot);
        }
        shard.used = slots.len();
    }

    pub(crate) fn counts(&self) -> IndexCounts {
        let mut counts = IndexCounts::default();
        for shard in &self.shards {
            let shard = shard.0.shard.lock();
            counts.room += (shard.slots.len() * 4 / 5).saturating_sub(shard.used) as u64;
            counts.hits += shard.hits;
            counts.misses += shard.misses;
        }
        counts
    }

    /// Every (tag, frame) listed.
    pub(crate) fn for_each(&self, mut see: impl FnMut(u32, u32)) {
        for shard in &self.shards {
            for &slot in shard.0.shard.lock().slots.iter().filter(|&&slot| slot != 0) {
                see((slot >> 32) as u32, slot as u32);
            }
        }
    }
}

impl Shard {
    /// Where a tag would be if nobody else were here: its lower bits, scaled to the table.
    #[inline]
    fn home(&self, tag: u32) -> usize {
        home(tag, self.slots.len())
    }

    /// How far from its home the entry at `at` is.
    #[inline]
    fn distance(&self, at: usize, slot: u64) -> usize {
        let home = self.home((slot >> 32) as u32);
        if at >= home { at - home } else { at + self.slots.len() - home }
    }

    #[inline]
    fn after(&self, at: usize) -> usize {
        if at + 1 == self.slots.len() { 0 } else { at + 1 }
    }

    /// The slots that hold `tag`, nearest first.
    #[inline]
    fn find_slot(&self, tag: u32, mut wanted: impl FnMut(u32) -> bool) -> Option<usize> {
        if self.slots.is_empty() {
            return None;
        }
        let mut at = self.home(tag);
        for distance in 0..self.slots.len() {
            let slot = self.slots[at];
            if slot == 0 || self.distance(at, slot) < distance {
                return None;
            }
            if (slot >> 32) as u32 == tag && wanted(slot as u32) {
                return Some(at);
            }
            at = self.after(at);
        }
        None
    }

    /// The frame listed under `tag` that `same` says is the one.
    #[inline]
    pub(crate) fn find(&self, tag: u32, mut same: impl FnMut(u32) -> bool) -> Found {
        let mut others = 0;
        let mut found = Found::Nowhere;
        self.find_slot(tag, |frame| {
            if same(frame) {
                found = Found::Frame(frame);
                return true;
            }
            others += 1;
            if others == MOST_COMPARED {
                found = Found::TooManyOthers;
            }
            others == MOST_COMPARED
        });
        found
    }

    /// Lists a frame; false when the budget does not hold the larger table it would take.
    #[must_use]
    pub(crate) fn insert(&mut self, tag: u32, frame: u32, charge: impl FnOnce(u64) -> bool, budget: &Budget) -> bool {
        if (self.used + 1) * 5 > self.slots.len() * 4 {
            let larger = SMALLEST.max(self.slots.len() * 7 / 5 + 1);
            if !charge(larger as u64 * SLOT) {
                return false;
            }
            self.resize(larger, budget);
        }
        self.place(u64::from(tag) << 32 | u64::from(frame));
        self.used += 1;
        true
    }

    /// Lists a frame's block under another frame, when it is listed.
    pub(crate) fn renumber(&mut self, tag: u32, frame: u32, to: u32) {
        if let Some(at) = self.find_slot(tag, |listed| listed == frame) {
            self.slots[at] = u64::from(tag) << 32 | u64::from(to);
        }
    }

    fn place(&mut self, mut slot: u64) {
        let mut at = self.home((slot >> 32) as u32);
        let mut distance = 0;
        while self.slots[at] != 0 {
            let there = self.distance(at, self.slots[at]);
            if there < distance {
                std::mem::swap(&mut self.slots[at], &mut slot);
                distance = there;
            }
            at = self.after(at);
            distance += 1;
        }
        self.slots[at] = slot;
    }

    /// The new table is charged already; the old one is credited.
    fn resize(&mut self, size: usize, budget: &Budget) {
        let old = std::mem::replace(&mut self.slots, vec![0; size].into_boxed_slice());
        for &slot in old.iter().filter(|&&slot| slot != 0) {
            self.place(slot);
        }
        budget.credit(old.len() as u64 * SLOT);
    }

    /// Takes a frame off the list, when it is there.
    pub(crate) fn remove(&mut self, tag: u32, frame: u32, budget: &Budget) {
        let Some(mut at) = self.find_slot(tag, |listed| listed == frame) else { return };
        loop {
            let next = self.after(at);
            let slot = self.slots[next];
            if slot == 0 || self.distance(next, slot) == 0 {
                break;
            }
            self.slots[at] = slot;
            at = next;
        }
        self.slots[at] = 0;
        self.used -= 1;
        let smaller = SMALLEST.max(self.used * 2);
        if self.used * 4 < self.slots.len() && smaller < self.slots.len() && budget.charge(smaller as u64 * SLOT) {
            self.resize(smaller, budget);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn check(shard: &Shard, model: &HashSet<(u32, u32)>) {
        assert_eq!(shard.used, model.len());
        for &(tag, frame) in model {
            assert_eq!(shard.find(tag, |found| found == frame), Found::Frame(frame), "{tag:#x}");
        }
        let listed: HashSet<(u32, u32)> =
            shard.slots.iter().filter(|&&slot| slot != 0).map(|&slot| ((slot >> 32) as u32, slot as u32)).collect();
        assert_eq!(&listed, model);
    }

    proptest! {
        #[test]
        fn any_insertions_and_removals_equal_a_set(
            steps in prop::collection::vec((any::<bool>(), 0..300u32, 0..4u32), 1..800)
        ) {
            let (mut shard, budget) = (Shard::default(), Budget::new(u64::MAX));
            let mut model = HashSet::new();
            for (step, (insert, place, twin)) in steps.into_iter().enumerate() {
                // few homes, so that rows grow long, wrap around the end and share tags
                let tag = if place % 3 == 0 { u32::MAX >> SHARD_BITS } else { place << 14 };
                if insert {
                    let frame = step as u32 + 1;
                    // what the caller does: a tag that has too many is not listed
                    if shard.find(tag, |_| false) != Found::TooManyOthers {
                        prop_assert!(shard.insert(tag, frame, |bytes| budget.charge(bytes), &budget));
                        model.insert((tag, frame));
                    }
                } else if let Some(&(tag, frame)) = model.iter().min_by_key(|(t, f)| (t.abs_diff(tag), f % (twin + 2))) {
                    model.remove(&(tag, frame));
                    if twin == 3 {
                        let to = step as u32 + 1;
                        shard.renumber(tag, frame, to);
                        model.insert((tag, to));
                    } else {
                        shard.remove(tag, frame, &budget);
                    }
                }
                check(&shard, &model);
                prop_assert_eq!(budget.charged(), shard.slots.len() as u64 * SLOT);
            }
        }
    }

    #[test]
    fn a_frame_costs_at_most_14_bytes_of_index() {
        let (mut shard, budget) = (Shard::default(), Budget::new(u64::MAX));
        for frame in 1..100_000u32 {
            let tag = frame.wrapping_mul(0x9e37_79b9) >> SHARD_BITS;
            assert!(shard.insert(tag, frame, |bytes| budget.charge(bytes), &budget));
            if frame > 1000 {
                assert!(budget.charged() as f64 / f64::from(frame) <= 14.05, "{frame}");
            }
        }
    }

    #[test]
    fn a_row_of_equal_tags_is_searched_only_so_far() {
        let (mut shard, budget) = (Shard::default(), Budget::new(u64::MAX));
        for frame in 1..100 {
            assert!(shard.insert(7, frame, |bytes| budget.charge(bytes), &budget));
        }
        let mut compared = 0;
        let found = shard.find(7, |_| {
            compared += 1;
            false
        });
        assert_eq!((found, compared), (Found::TooManyOthers, MOST_COMPARED));
        for frame in 1..100 {
            shard.remove(7, frame, &budget);
        }
        assert_eq!(shard.used, 0);
    }

    #[test]
    fn a_full_budget_refuses_and_changes_nothing() {
        let (mut shard, budget) = (Shard::default(), Budget::new(SMALLEST as u64 * SLOT));
        let fitted = (1..100).take_while(|&frame| shard.insert(frame, frame, |b| budget.charge(b), &budget)).count();
        assert_eq!(fitted, SMALLEST * 4 / 5);
        assert_eq!(shard.used, fitted);
    }
}
