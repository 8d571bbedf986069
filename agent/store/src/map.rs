//! Maps: which frame holds each block of an image, volume or snapshot.
//!
//! ```text
//!   Map            stripe 0 .. 15, each a lock          (leaf n of the disk belongs to stripe n mod 16)
//!    |
//!   top            the roots of the 16 trees; each disk has its own
//!    |
//!   inner node     64 x u32: nodes of the level below
//!    |
//!   leaf           64 x u32: frames of 64 consecutive blocks (256 KiB of disk)
//! ```
//!
//! Nodes are 256 bytes in one region, named by number and counted: the trees of different maps share them. 0 is "none",
//! a hole, at every level. A node with one reference belongs to the one map that reaches it and is changed in place,
//! under the lock of its stripe; a node with more is never changed: whoever wants to change it copies it first, and the
//! copy counts one reference more to each child. So a clone is 16 roots counted up, whatever its size.
//!
//! A map costs 4 bytes a block, and 1/16 byte for the counts of its leaves and 1/15 for the nodes above.
//!
//! # Why a process may die at any instant
//! Nothing here is an address: nodes and frames are numbers in regions that may outlive the process. What a store that
//! attaches to them believes is: a disk's record names its top node, tops and inner nodes name nodes, leaves name frames.
//! Each of these names is one aligned word, written (Release) after all that it names is complete: a frame is filled and
//! tagged before a leaf names it, a copy of a node is whole before it takes the original's place, other trees are whole
//! before a record names their top. So what is reachable is a whole tree at every instant, with each block of each write
//! under way old or new; and what a name no longer leads to may be used for something else only after that word was
//! written. Counts, the index, free lists and numbers of mapped blocks are not believed: they are found again
//! (`attach.rs`).

use std::{io, sync::Arc};

use muster_block::{Extent, ExtentKind};

use crate::{
    PageKind,
    account::Account,
    arena::{BLOCK, Words},
    frames::{Domain, Engine, Failed, STICKY, count_up},
    memory::Memory,
    pool::{Pool, Unit},
    sync::{
        Padded, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
};

mod requests;
mod whole;

/// Entries of a node. Small, because the first write below a shared node copies it and counts up all it names; not
/// smaller, because every leaf costs a count and an entry above.
pub(crate) const FANOUT: usize = 64;
pub(crate) const FANOUT_BITS: u32 = FANOUT.trailing_zeros();

/// Locks of a map. Enough for the queues of one disk; 1 KiB a map.
pub(crate) const STRIPES: usize = 16;

/// The root of a map that was closed.
const CLOSED: u32 = u32::MAX;

/// Bytes read under one hold of a stripe's lock: short enough that a writer waits some ten microseconds at most.
const READ_HOLD: usize = 64 << 10;
/// How many frames before it is released a frame's place in the index is asked for.
const RELEASE_AHEAD: usize = 8;

const NODE_BYTES: u64 = (FANOUT * size_of::<u32>()) as u64;
const BESIDE_NODE: u64 = 4;
/// Up to 64 MiB of free nodes stay ours.
const KEEP_NODES: usize = 262_144;

/// What a node costs at most, in bytes.
pub(crate) const NODE_COST: u64 = NODE_BYTES + BESIDE_NODE;

static ZEROES: [u8; 16 * BLOCK] = [0; 16 * BLOCK];

const BLOCK_BYTES: u64 = BLOCK as u64;
pub(crate) const LEAF_BLOCKS: u64 = FANOUT as u64;

/// Why a request on a map was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The budget holds no more.
    Full,
    /// The disk's own quota does not.
    Quota,
    /// The disk was deleted.
    Closed,
    /// What was stored is damaged.
    Lost,
}

impl From<Failed> for Refused {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Full => Refused::Full,
            Failed::Lost => Refused::Lost,
        }
    }
}

pub(crate) struct Nodes {
    words: Words,
    references: Words,
    pub(crate) pool: Pool,
}

impl Nodes {
    pub(crate) fn reserve(capacity: u32, memory: &Memory) -> io::Result<Nodes> {
        let count = capacity as usize + 1;
        let granule = 4096 / NODE_BYTES as u32;
        let keep = KEEP_NODES.min(capacity as usize / 128);
        let unit = Unit { bytes: NODE_BYTES, beside: BESIDE_NODE, granule, keep };
        let small = |name| memory.file(name, PageKind::Small);
        let lent = Words::reserve(Pool::words(capacity, granule), small("lent-nodes")?.as_ref())?;
        Ok(Nodes {
            words: Words::reserve(count * FANOUT, small("nodes")?.as_ref())?,
            // counted again by whoever attaches
            references: Words::reserve(count, None)?,
            pool: Pool::new(capacity, unit, lent),
        })
    }

    #[inline]
    pub(crate) fn entries(&self, node: u32) -> &[AtomicU32] {
        let at = node as usize * FANOUT;
        &self.words.all()[at..at + FANOUT]
    }

    #[inline]
    pub(crate) fn references(&self, node: u32) -> &AtomicU32 {
        &self.references.all()[node as usize]
    }

    #[cfg(test)]
    pub(crate) fn regions(&self) -> [std::ops::Range<usize>; 2] {
        [self.words.addresses(), self.references.addresses()]
    }
}

/// The blocks of one stripe.
pub(crate) struct Tree {
    /// What the top says, near at hand. 0 when nothing is mapped; [`CLOSED`].
    pub(crate) root: AtomicU32,
    /// Levels above the leaves.
    pub(crate) height: u32,
    /// Blocks mapped to a frame.
    pub(crate) mapped: u64,
}

/// Which frame holds each block of one disk.
pub(crate) struct Map {
    /// In bytes.
    size: AtomicU64,
    /// The node that names the roots. Changes under the locks of all stripes.
    top: AtomicU32,
    pub(crate) stripes: [Padded<RwLock<Tree>>; STRIPES],
    /// Whose blocks its own may be shared with.
    pub(crate) domain: Arc<Domain>,
    /// Quota, reservation, and what happens when memory is full.
    pub(crate) account: Account,
}

/// The trees of a map to be, with their top.
pub(crate) struct Trees {
    pub(crate) top: u32,
    stripes: [Tree; STRIPES],
}

/// Where a leaf is: its stripe, and its place among the leaves of that stripe.
#[inline]
const fn place(leaf: u64) -> (usize, u64) {
    ((leaf % STRIPES as u64) as usize, leaf / STRIPES as u64)
}

#[inline]
const fn entry(index: u64, level: u32) -> usize {
    ((index >> (FANOUT_BITS * level)) % FANOUT as u64) as usize
}

/// The levels above the leaves that a disk of `size` bytes takes.
pub(crate) fn height_of(size: u64) -> u32 {
    let leaves = size.div_ceil(BLOCK_BYTES * LEAF_BLOCKS).div_ceil(STRIPES as u64);
    let mut height = 0;
    while 1u64 << (FANOUT_BITS * height) < leaves {
        height += 1;
    }
    height
}

impl Tree {
    pub(crate) fn check_open(&self) -> Result<(), Refused> {
        if self.root.load(Relaxed) == CLOSED { Err(Refused::Closed) } else { Ok(()) }
    }
}

impl Map {
    pub(crate) fn new(size: u64, trees: Trees, domain: Arc<Domain>, account: Account) -> Map {
        Map {
            size: AtomicU64::new(size),
            top: AtomicU32::new(trees.top),
            stripes: trees.stripes.map(|tree| Padded(RwLock::new(tree))),
            domain,
            account,
        }
    }

    /// In bytes.
    #[inline]
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    /// The node that names the roots; 0 after it was closed.
    pub(crate) fn top(&self) -> u32 {
        self.top.load(Relaxed)
    }

    /// Blocks mapped to a frame.
    pub(crate) fn mapped(&self) -> u64 {
        self.stripes.iter().map(|stripe| stripe.0.read().mapped).sum()
    }

    /// The locks of all stripes, in order: the map as it is at one instant.
    pub(crate) fn freeze(&self) -> Frozen<'_> {
        self.stripes.each_ref().map(|stripe| stripe.0.read())
    }

    fn seize(&self) -> [RwLockWriteGuard<'_, Tree>; STRIPES] {
        self.stripes.each_ref().map(|stripe| stripe.0.write())
    }
}

/// A map that nobody changes.
pub(crate) type Frozen<'a> = [RwLockReadGuard<'a, Tree>; STRIPES];

// Nodes.
impl Engine {
    pub(crate) fn purge_nodes(&self, keep: usize) {
        self.nodes.pool.purge(keep, &self.budget, |run| {
            self.nodes.words.give_back(run.start as usize * FANOUT..run.end as usize * FANOUT);
        });
    }

    /// A node with one reference and whatever entries.
    fn take_node(&self, account: &Account) -> Result<u32, Failed> {
        let node = account.node().or_else(|| self.take_free_node()).ok_or(Failed::Full)?;
        self.nodes.references(node).store(1, Relaxed);
        Ok(node)
    }

    pub(crate) fn take_free_node(&self) -> Option<u32> {
        let pool = &self.nodes.pool;
        // a granule of nodes is a page, and what is beside it
        pool.take(&self.budget).or_else(|| self.find_memory(2 * BLOCK_BYTES, || pool.take(&self.budget)))
    }

    fn retain_node(&self, node: u32) {
        count_up(self.nodes.references(node), u32::MAX, STICKY);
    }

    pub(crate) fn put_node(&self, node: u32) {
        if self.nodes.pool.put(node) {
            self.purge_nodes(self.nodes.pool.keep() / 2);
        }
    }

    /// Drops a reference to the node, and with the last one those it holds.
    fn release_node(&self, account: &Account, node: u32, level: u32) {
        if node == 0 {
            return;
        }
        let references = self.nodes.references(node);
        if references.load(Relaxed) == STICKY {
            return;
        }
        let before = references.fetch_sub(1, AcqRel);
        assert_ne!(before, 0, "reference to node {node} dropped twice");
        if before > 1 {
            return;
        }
        let mut children = [0; FANOUT];
        let entries = self.nodes.entries(node);
        children.iter_mut().zip(entries).for_each(|(child, entry)| *child = entry.load(Relaxed));
        if level == 0 {
            self.release_frames(account, &children);
        } else {
            children.iter().for_each(|&child| self.release_node(account, child, level - 1));
        }
        if !account.keep_node(node) {
            self.put_node(node);
        }
    }

    pub(crate) fn release_trees(&self, account: &Account, trees: Trees) {
        // all trees are of one height; a closed map has no top
        self.release_node(account, trees.top, trees.stripes[0].height + 1);
    }

    /// Makes the node in `slot` one that only this slot refers to, and so one that may be changed.
    /// The caller holds the write lock under which `slot` lies, and owns the node `slot` lies in.
    fn own(&self, account: &Account, slot: &AtomicU32, level: u32) -> Result<u32, Failed> {
        let node = slot.load(Relaxed);
        // Acquire: whoever else referred to it is done reading it. Nobody else can refer to it anew.
        if node != 0 && self.nodes.references(node).load(Acquire) == 1 {
            return Ok(node);
        }
        let copy = self.take_node(account)?;
        let entries = self.nodes.entries(copy);
        if node == 0 {
            entries.iter().for_each(|entry| entry.store(0, Relaxed));
        } else {
            for (to, from) in entries.iter().zip(self.nodes.entries(node)) {
                let child = from.load(Relaxed);
                match child {
                    0 => {}
                    frame if level == 0 => self.retain_frame(frame),
                    child => self.retain_node(child),
                }
                to.store(child, Relaxed);
            }
        }
        slot.store(copy, Release);
        self.release_node(account, node, level);
        Ok(copy)
    }

    /// The leaf, or 0.
    #[inline]
    fn leaf(&self, tree: &Tree, index: u64) -> u32 {
        let mut node = tree.root.load(Relaxed);
        for level in (1..=tree.height).rev() {
            if node == 0 {
                return 0;
            }
            node = self.nodes.entries(node)[entry(index, level - 1)].load(Relaxed);
        }
        node
    }

    /// The slot that holds the leaf, after making the leaf and all above it the tree's own. The caller has the stripe's
    /// write lock.
    fn own_leaf<'a>(&'a self, map: &Map, tree: &Tree, stripe: usize, index: u64) -> Result<&'a AtomicU32, Failed> {
        let root = &self.nodes.entries(map.top())[stripe];
        let mut slot = root;
        let mut result = Ok(());
        for level in (1..=tree.height).rev() {
            match self.own(&map.account, slot, level) {
                Ok(node) => slot = &self.nodes.entries(node)[entry(index, level - 1)],
                Err(failed) => {
                    result = Err(failed);
                    break;
                }
            }
        }
        if result.is_ok() {
            result = self.own(&map.account, slot, 0).map(drop);
        }
        tree.root.store(root.load(Relaxed), Relaxed);
        result.map(|()| slot)
    }

    /// Puts `new` frames (0: holes) at a leaf's slots from `first` on, taking over their references, and puts the
    /// references of those they replace in `old`. When refused nothing is changed. The caller has the write lock.
    fn exchange(
        &self,
        map: &Map,
        tree: &mut Tree,
        (stripe, index): (usize, u64),
        first: usize,
        new: &[u32],
        old: &mut [u32],
    ) -> Result<(), Refused> {
        tree.check_open()?;
        let leaf = self.leaf(tree, index);
        let holes = new.iter().all(|&frame| frame == 0);
        let same = match leaf {
            0 => holes,
            leaf => self.nodes.entries(leaf)[first..].iter().zip(new).all(|(entry, &new)| entry.load(Relaxed) == new),
        };
        if same {
            // what is written is there already: what is shared stays shared
            old.copy_from_slice(new);
            return Ok(());
        }
        let slot = self.own_leaf(map, tree, stripe, index)?;
        if map.account.counts() {
            let written = |wanted: fn(u32) -> bool| {
                (first..).zip(new).filter(|&(_, &new)| wanted(new)).fold(0, |bits, (at, _)| bits | 1u64 << at)
            };
            let leaf = index * STRIPES as u64 + stripe as u64;
            if !map.account.write(leaf, written(|new| new != 0), written(|new| new == 0)) {
                return Err(Refused::Quota);
            }
        }
        let entries = self.nodes.entries(slot.load(Relaxed));
        let mut mapped = tree.mapped;
        for ((entry, &new), old) in entries[first..].iter().zip(new).zip(old) {
            *old = entry.load(Relaxed);
            entry.store(new, Release);
            mapped = mapped + u64::from(new != 0) - u64::from(*old != 0);
        }
        if holes && entries.iter().all(|entry| entry.load(Relaxed) == 0) {
            let leaf = slot.load(Relaxed);
            slot.store(0, Release);
            if tree.height == 0 {
                tree.root.store(0, Relaxed);
            }
            self.put_empty_node(&map.account, leaf);
        }
        tree.mapped = mapped;
        Ok(())
    }

    /// Frees a node that is ours alone and holds nothing.
    fn put_empty_node(&self, account: &Account, node: u32) {
        self.nodes.references(node).store(0, Relaxed);
        if !account.keep_node(node) {
            self.put_node(node);
        }
    }

    pub(crate) fn release_frames(&self, account: &Account, frames: &[u32]) {
        // Each is two trips to memory, one after the other: its words, then its place in the index. Both are begun early.
        let ahead = |n: usize| frames.get(n).copied().filter(|&frame| frame != 0);
        (0..2 * RELEASE_AHEAD).filter_map(ahead).for_each(|frame| self.prefetch_words(frame));
        for (n, &frame) in frames.iter().enumerate() {
            if let Some(frame) = ahead(n + 2 * RELEASE_AHEAD) {
                self.prefetch_words(frame);
            }
            if let Some(frame) = ahead(n + RELEASE_AHEAD) {
                self.prefetch_place(frame);
            }
            if frame == 0 {
                continue;
            }
            if let Some(freed) = self.release_frame_to(frame)
                && !account.keep_frame(freed)
            {
                self.put_frame(freed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_height_is_the_least_that_reaches_every_block() {
        let stripes = 16 * 64 * 4096;
        for (size, height) in [(0, 0), (1, 0), (stripes, 0), (stripes + 1, 1), (64 * stripes, 1), (40 << 30, 3)] {
            assert_eq!(height_of(size), height, "{size}");
        }
    }

    #[test]
    fn an_entry_is_the_digit_of_its_level() {
        let index = 5 << 12 | 6 << 6 | 7;
        assert_eq!((entry(index, 0), entry(index, 1), entry(index, 2)), (7, 6, 5));
    }
}
