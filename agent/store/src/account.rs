//! What one disk may take and what is kept for it: quota, reservation, and what happens when memory is full.
//!
//! A **quota** limits the blocks that a volume has written since it was made or reset and maps to a frame (its *own*
//! blocks), before dedup: what it would take if nobody shared with it.
//!
//! A **reservation** keeps frames and nodes aside, taken from the machine at once, so that as many blocks can be written
//! whatever others do. What is written to such a volume is shared with nobody: a frame of its own that somebody else also
//! held would not come back when it is overwritten, and the promise would be broken by a stranger. Blocks are *fresh* when
//! they were written since the last cut (clone, snapshot): their frames are the volume's alone, so an overwrite gives one
//! back for the one it takes. Invariant, but for frames in the hands of writers under way:
//!
//! > frames kept aside + fresh blocks >= blocks reserved
//!
//! A snapshot makes everything not fresh any more, so it needs the whole reservation once more, or is refused.
//!
//! Bits and counts here are of this process; who attaches finds them again by comparing a volume with its origin.

use crate::{
    config::WhenFull,
    sync::{
        Mutex, RwLock,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

/// Blocks of a leaf: the bits of a word.
const LEAF_BLOCKS: u64 = 64;
/// Frames kept above the reservation for writers under way, of at most 64 blocks each.
const UNDER_WAY: u64 = 256;

pub(crate) struct Account {
    when_full: WhenFull,
    detail: Option<Box<Detail>>,
}

struct Detail {
    /// Blocks; `u64::MAX` without one.
    quota: AtomicU64,
    own: Bits,
    reserve: Option<Reserve>,
}

struct Reserve {
    /// Blocks.
    wanted: u64,
    fresh: Bits,
    frames: Mutex<Vec<u32>>,
    nodes: Mutex<Vec<u32>>,
    /// Nodes that map all of the disk.
    most_nodes: AtomicUsize,
    /// Of those, the ones the tree has for itself: as far as an attaching store found them, until a copy is made.
    own_nodes: AtomicUsize,
    closed: AtomicBool,
}

impl Reserve {
    /// Blocks that have to be the volume's alone, and in memory, with the frames that are kept.
    fn needs(&self) -> u64 {
        (self.wanted + UNDER_WAY).saturating_sub(self.frames.lock().len() as u64)
    }
}

/// Nodes that map all of a disk of so many leaves: a leaf each, inner nodes above them, a root and a path for each of the 16
/// trees.
const fn nodes_for(leaves: u64) -> usize {
    (leaves + leaves / 48 + 16 * 6) as usize
}

/// A bit a block, a word a leaf.
struct Bits {
    words: RwLock<Box<[AtomicU64]>>,
    set: AtomicU64,
}

impl Bits {
    fn new(leaves: u64) -> Bits {
        Bits { words: RwLock::new((0..leaves).map(|_| AtomicU64::new(0)).collect()), set: AtomicU64::new(0) }
    }

    fn grow(&self, leaves: u64) {
        let mut words = self.words.write();
        let kept = words.iter().map(|word| AtomicU64::new(word.load(Relaxed)));
        let grown = kept.chain(std::iter::repeat_with(|| AtomicU64::new(0))).take(leaves as usize).collect();
        *words = grown;
    }

    /// Of one leaf, which nobody else changes. False, and nothing is changed, when more than `most` would be set.
    fn change(&self, leaf: u64, set: u64, clear: u64, most: u64) -> bool {
        let words = self.words.read();
        let Some(word) = words.get(leaf as usize) else { return true };
        let before = word.load(Relaxed);
        let after = (before | set) & !clear;
        let (more, less) = (u64::from((after & !before).count_ones()), u64::from((before & !after).count_ones()));
        if more > 0 {
            let fits = |now: u64| (now + more <= most.saturating_add(less)).then_some(now + more);
            if self.set.fetch_update(SeqCst, SeqCst, fits).is_err() {
                return false;
            }
        }
        self.set.fetch_sub(less, SeqCst);
        word.store(after, Relaxed);
        true
    }

    /// Clears a bit of a leaf that nobody else changes, when more than `least` are set. False when they are not, and nothing is
    /// changed.
    fn clear_above(&self, leaf: u64, bit: u64, least: u64) -> bool {
        let words = self.words.read();
        let Some(word) = words.get(leaf as usize) else { return true };
        let before = word.load(Relaxed);
        if before & bit == 0 {
            return true;
        }
        if self.set.fetch_update(SeqCst, SeqCst, |now| (now > least).then(|| now - 1)).is_err() {
            return false;
        }
        word.store(before & !bit, Relaxed);
        true
    }

    fn has(&self, leaf: u64, bit: u64) -> bool {
        self.words.read().get(leaf as usize).is_some_and(|word| word.load(Relaxed) & bit != 0)
    }

    fn clear(&self) {
        self.words.read().iter().for_each(|word| word.store(0, Relaxed));
        self.set.store(0, SeqCst);
    }

    const fn bytes(leaves: u64) -> u64 {
        leaves * 8
    }
}

/// What an account is opened with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) when_full: WhenFull,
    /// Bytes; 0 without one.
    pub(crate) quota: u64,
    /// Bytes; 0 without one.
    pub(crate) reservation: u64,
}

/// Frames and nodes that a reservation lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lack {
    pub(crate) frames: u64,
    pub(crate) nodes: u64,
}

impl Account {
    /// Of disks nobody limits.
    pub(crate) const NONE: Account = Account { when_full: WhenFull::Refuse, detail: None };

    pub(crate) fn new(limits: Limits, size: u64) -> Account {
        let Limits { when_full, quota, reservation } = limits;
        if quota == 0 && reservation == 0 {
            return Account { when_full, detail: None };
        }
        let blocks = |bytes: u64| bytes.div_ceil(4096);
        let leaves = blocks(size).div_ceil(LEAF_BLOCKS);
        let reserve = (reservation > 0).then(|| Reserve {
            wanted: blocks(reservation.min(size)),
            fresh: Bits::new(leaves),
            frames: Mutex::default(),
            nodes: Mutex::default(),
            most_nodes: AtomicUsize::new(nodes_for(leaves)),
            own_nodes: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
        });
        let quota = if quota == 0 { u64::MAX } else { blocks(quota) };
        Account {
            when_full,
            detail: Some(Box::new(Detail { quota: AtomicU64::new(quota), own: Bits::new(leaves), reserve })),
        }
    }

    /// What an account takes beside the map.
    pub(crate) fn cost(limits: Limits, size: u64) -> u64 {
        let bits = Bits::bytes(size.div_ceil(4096).div_ceil(LEAF_BLOCKS));
        match (limits.quota, limits.reservation) {
            (0, 0) => 0,
            (_, 0) => bits,
            _ => 2 * bits,
        }
    }

    /// What a disk of that size takes beside the map under this account.
    pub(crate) fn bytes(&self, size: u64) -> u64 {
        let bits = Bits::bytes(size.div_ceil(4096).div_ceil(LEAF_BLOCKS));
        self.detail.as_ref().map_or(0, |detail| if detail.reserve.is_some() { 2 * bits } else { bits })
    }

    /// Whether [`Account::write`] has to be told of writes.
    #[inline]
    pub(crate) fn counts(&self) -> bool {
        self.detail.is_some()
    }

    pub(crate) fn spills(&self) -> bool {
        self.when_full == WhenFull::Spill
    }

    fn reserve(&self) -> Option<&Reserve> {
        self.detail.as_ref()?.reserve.as_ref()
    }

    /// Whether what is written is shared with nobody.
    #[inline]
    pub(crate) fn is_alone(&self) -> bool {
        self.detail.as_ref().is_some_and(|detail| detail.reserve.is_some())
    }

    /// Notes which blocks of a leaf are about to be mapped and which unmapped; false when the quota does not allow it. The
    /// caller has the write lock of the leaf.
    pub(crate) fn write(&self, leaf: u64, mapped: u64, unmapped: u64) -> bool {
        let Some(detail) = &self.detail else { return true };
        if !detail.own.change(leaf, mapped, unmapped, detail.quota.load(Relaxed)) {
            return false;
        }
        if let Some(reserve) = &detail.reserve {
            reserve.fresh.change(leaf, mapped, unmapped, u64::MAX);
        }
        true
    }

    /// What an attaching store, or one that reverted, finds to be the volume's own.
    pub(crate) fn found_own(&self, leaf: u64, bits: u64) {
        if let Some(detail) = &self.detail {
            detail.own.change(leaf, bits, 0, u64::MAX);
        }
    }

    /// What an attaching store finds to be the volume's alone.
    pub(crate) fn found_fresh(&self, leaf: u64, bits: u64) {
        if let Some(reserve) = self.reserve() {
            reserve.fresh.change(leaf, bits, 0, u64::MAX);
        }
    }

    /// Nodes that an attaching store finds to be the volume's alone.
    pub(crate) fn found_nodes(&self, nodes: usize) {
        if let Some(reserve) = self.reserve() {
            reserve.own_nodes.store(nodes, SeqCst);
        }
    }

    /// Blocks that are the volume's alone and may leave memory: those beyond what the reservation needs of them, with the frames
    /// that are kept.
    pub(crate) fn may_leave(&self) -> u64 {
        self.reserve().map_or(u64::MAX, |reserve| reserve.fresh.set.load(SeqCst).saturating_sub(reserve.needs()))
    }

    /// Whether the reservation counts on the block being there. The caller has the lock of the leaf.
    pub(crate) fn counts_on(&self, leaf: u64, bit: u64) -> bool {
        self.reserve().is_some_and(|reserve| reserve.fresh.has(leaf, bit))
    }

    /// How many blocks it counts on.
    pub(crate) fn counts_on_blocks(&self) -> u64 {
        self.reserve().map_or(0, |reserve| reserve.fresh.set.load(SeqCst))
    }

    /// Notes that a block leaves memory; false when the reservation needs it there. The caller has the write lock of the leaf.
    pub(crate) fn leave(&self, leaf: u64, bit: u64) -> bool {
        self.reserve().is_none_or(|reserve| reserve.fresh.clear_above(leaf, bit, reserve.needs()))
    }

    /// The contents were exchanged for others.
    pub(crate) fn forget(&self) {
        if let Some(detail) = &self.detail {
            detail.own.clear();
        }
        self.cut();
    }

    /// The disk will have that size: from now on as many nodes are lacking as that takes. Returns the number of before.
    pub(crate) fn provide_for(&self, size: u64) -> usize {
        let nodes = nodes_for(size.div_ceil(4096).div_ceil(LEAF_BLOCKS));
        self.reserve().map_or(0, |reserve| reserve.most_nodes.swap(nodes, SeqCst))
    }

    /// It will not, after all.
    pub(crate) fn provide_again(&self, nodes: usize) {
        if let Some(reserve) = self.reserve() {
            reserve.most_nodes.store(nodes, SeqCst);
        }
    }

    /// The disk became larger. The caller keeps writers out.
    pub(crate) fn grow(&self, size: u64) {
        let leaves = size.div_ceil(4096).div_ceil(LEAF_BLOCKS);
        if let Some(detail) = &self.detail {
            detail.own.grow(leaves);
            if let Some(reserve) = &detail.reserve {
                reserve.fresh.grow(leaves);
            }
        }
    }

    /// A copy was made: nothing is the volume's alone any more.
    pub(crate) fn cut(&self) {
        if let Some(reserve) = self.reserve() {
            reserve.fresh.clear();
            reserve.own_nodes.store(0, SeqCst);
        }
    }

    #[cfg(test)]
    pub(crate) fn own_blocks(&self) -> Option<u64> {
        self.detail.as_ref().map(|detail| detail.own.set.load(Relaxed))
    }

    /// Blocks that the quota still allows; `None` without one.
    pub(crate) fn quota_left(&self) -> Option<u64> {
        let detail = self.detail.as_ref()?;
        let quota = detail.quota.load(Relaxed);
        (quota != u64::MAX).then(|| quota.saturating_sub(detail.own.set.load(Relaxed)))
    }

    /// In bytes.
    pub(crate) fn quota(&self) -> Option<u64> {
        let blocks = self.detail.as_ref()?.quota.load(Relaxed);
        (blocks != u64::MAX).then_some(blocks * 4096)
    }

    pub(crate) fn set_quota(&self, bytes: u64) {
        if let Some(detail) = &self.detail {
            detail.quota.store(if bytes == 0 { u64::MAX } else { bytes.div_ceil(4096) }, Relaxed);
        }
    }

    /// What has to be kept aside in addition, now or (`after_cut`) when a copy is made.
    pub(crate) fn lack(&self, after_cut: bool) -> Lack {
        let Some(reserve) = self.reserve() else { return Lack::default() };
        let fresh = if after_cut { 0 } else { reserve.fresh.set.load(SeqCst) };
        let own_nodes = if after_cut { 0 } else { reserve.own_nodes.load(SeqCst) };
        let wanted = reserve.wanted.saturating_sub(fresh) + UNDER_WAY;
        Lack {
            frames: wanted.saturating_sub(reserve.frames.lock().len() as u64),
            nodes: reserve.most_nodes.load(SeqCst).saturating_sub(reserve.nodes.lock().len() + own_nodes) as u64,
        }
    }

    pub(crate) fn fill(&self, frames: Vec<u32>, nodes: Vec<u32>) {
        if let Some(reserve) = self.reserve() {
            reserve.frames.lock().extend(frames);
            reserve.nodes.lock().extend(nodes);
        }
    }

    /// Everything that is kept aside, of a disk that is no more: whoever still has frames of it on their way keeps none here.
    pub(crate) fn empty(&self) -> (Vec<u32>, Vec<u32>) {
        match self.reserve() {
            None => Default::default(),
            Some(reserve) => {
                let (mut frames, mut nodes) = (reserve.frames.lock(), reserve.nodes.lock());
                reserve.closed.store(true, SeqCst);
                (std::mem::take(&mut *frames), std::mem::take(&mut *nodes))
            }
        }
    }

    /// A frame kept aside.
    pub(crate) fn frame(&self) -> Option<u32> {
        self.reserve()?.frames.lock().pop()
    }

    /// Keeps a freed frame, when one is lacking. True when it is kept.
    pub(crate) fn keep_frame(&self, frame: u32) -> bool {
        let Some(reserve) = self.reserve() else { return false };
        let mut frames = reserve.frames.lock();
        let lacks = frames.len() as u64 + reserve.fresh.set.load(SeqCst) < reserve.wanted + UNDER_WAY;
        let keep = lacks && !reserve.closed.load(SeqCst);
        if keep {
            frames.push(frame);
        }
        keep
    }

    pub(crate) fn node(&self) -> Option<u32> {
        self.reserve()?.nodes.lock().pop()
    }

    pub(crate) fn keep_node(&self, node: u32) -> bool {
        let Some(reserve) = self.reserve() else { return false };
        let mut nodes = reserve.nodes.lock();
        let keep = nodes.len() < reserve.most_nodes.load(SeqCst) && !reserve.closed.load(SeqCst);
        if keep {
            nodes.push(node);
            // perhaps one of those
            let _ = reserve.own_nodes.fetch_update(SeqCst, SeqCst, |own| own.checked_sub(1));
        }
        keep
    }

    /// Frames and nodes kept aside, for the audit and for statistics.
    pub(crate) fn kept(&self) -> (Vec<u32>, Vec<u32>) {
        match self.reserve() {
            None => Default::default(),
            Some(reserve) => (reserve.frames.lock().clone(), reserve.nodes.lock().clone()),
        }
    }

    /// Frames kept aside beyond those for writers under way.
    pub(crate) fn spare_frames(&self) -> u64 {
        self.kept_frames().saturating_sub(UNDER_WAY)
    }

    /// Frames kept aside.
    pub(crate) fn kept_frames(&self) -> u64 {
        self.reserve().map_or(0, |reserve| reserve.frames.lock().len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn own_blocks_are_a_set_that_never_exceeds_the_quota(
            writes in prop::collection::vec((0..4u64, any::<u64>(), any::<u64>()), 1..200),
            quota in 1..200u64,
        ) {
            let limits = Limits { quota: quota * 4096, ..Limits::default() };
            let account = Account::new(limits, 4 * 64 * 4096);
            let mut model = [0u64; 4];
            for (leaf, mapped, unmapped) in writes {
                // few bits, so that quotas are met and not only exceeded
                let (mapped, unmapped) = (mapped & mapped >> 7, unmapped & !(mapped & mapped >> 7));
                let mut after = model;
                after[leaf as usize] = (after[leaf as usize] | mapped) & !unmapped;
                let count = |model: &[u64; 4]| model.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
                let grows = after[leaf as usize] & !model[leaf as usize] != 0;
                let allowed = !grows || count(&after) <= quota;
                prop_assert_eq!(account.write(leaf, mapped, unmapped), allowed);
                if allowed {
                    model = after;
                }
                prop_assert_eq!(account.own_blocks(), Some(count(&model)));
            }
        }
    }

    const WANTED: u64 = 40;

    proptest! {
        /// A volume with a reservation, as the map uses its account, while nobody else leaves a frame in the store.
        #[test]
        fn what_is_kept_suffices_for_any_writes_within_the_reservation(
            steps in prop::collection::vec((0..8u8, 0..WANTED), 1..300),
        ) {
            let account = Account::new(Limits { reservation: WANTED * 4096, ..Limits::default() }, 128 * 4096);
            let mut next = 1;
            let mut top_up = |after_cut| {
                let lack = account.lack(after_cut).frames as u32;
                account.fill((next..next + lack).collect(), Vec::new());
                next += lack;
            };
            top_up(false);
            let mut others = 1 << 20;
            // the frame of each block, while it is the volume's alone, and in memory
            let mut fresh = std::collections::BTreeMap::new();
            for (step, block) in steps {
                // more blocks than are promised, while nobody else wants the others' frames
                let block = if step == 4 { block + WANTED } else { block };
                let (leaf, bit) = (block / LEAF_BLOCKS, 1 << (block % LEAF_BLOCKS));
                let dropped = match step {
                    4 => {
                        others += 1;
                        prop_assert!(account.write(leaf, bit, 0));
                        fresh.insert(block, others)
                    }
                    0..4 => {
                        let frame = account.frame();
                        prop_assert!(frame.is_some(), "the promise is broken");
                        prop_assert!(account.write(leaf, bit, 0));
                        fresh.insert(block, frame.unwrap_or_default())
                    }
                    // it goes to the disk, if it may
                    7 if fresh.contains_key(&block) => {
                        let may = fresh.len() as u64 + account.kept_frames() > WANTED + UNDER_WAY;
                        prop_assert_eq!(account.may_leave() > 0, may);
                        prop_assert_eq!(account.leave(leaf, bit), may);
                        if may {
                            // its frame goes to whoever made it leave
                            fresh.remove(&block);
                        }
                        None
                    }
                    5 | 6 => {
                        prop_assert!(account.write(leaf, 0, bit));
                        fresh.remove(&block)
                    }
                    _ => {
                        // a copy is made, once all is kept that it takes: it holds the frames from now on
                        top_up(true);
                        account.cut();
                        fresh.clear();
                        None
                    }
                };
                // what is not kept goes to others
                let _ = dropped.map(|frame| account.keep_frame(frame));
                let kept = account.kept_frames();
                prop_assert!(kept + fresh.len() as u64 >= WANTED, "{kept} kept, {} fresh", fresh.len());
                prop_assert!(kept <= WANTED + UNDER_WAY);
                let mut all = account.kept().0;
                all.extend(fresh.values());
                let count = all.len();
                all.sort_unstable();
                all.dedup();
                prop_assert_eq!(all.len(), count, "a frame is in two hands");
            }
        }
    }

    #[test]
    fn frames_come_back_until_the_reservation_is_whole() {
        let limits = Limits { reservation: 1000 * 4096, ..Limits::default() };
        let account = Account::new(limits, 2000 * 4096);
        assert_eq!(account.lack(false).frames, 1000 + UNDER_WAY);
        account.fill((1..=1000 + UNDER_WAY as u32).collect(), Vec::new());
        assert_eq!(account.lack(false).frames, 0);
        for _ in 0..10 {
            account.frame().unwrap();
        }
        assert!(account.write(0, 0x3ff, 0));
        assert!(!account.keep_frame(1), "nothing is lacking");
        assert!(account.write(0, 0, 1));
        assert!(account.keep_frame(1), "a block was given up");
        account.cut();
        assert_eq!(account.lack(false).frames, 9);
    }
}
