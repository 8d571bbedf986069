//! Maps: which frame holds each block of an image, volume or snapshot.
//!
//! ```text
//!   Map            stripe 0 .. 15, each a lock and the root of a tree
//!    |                           (leaf n of the disk belongs to stripe n mod 16)
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
//! Nothing here is an address: nodes, frames and counts are numbers in regions, so that all of it can one day lie in
//! memory that outlives the process.

use std::{
    io,
    sync::atomic::{
        AtomicU32,
        Ordering::{AcqRel, Acquire, Relaxed},
    },
};

use muster_block::{Extent, ExtentKind};
use parking_lot::{RwLock, RwLockReadGuard};

use crate::{
    arena::{BLOCK, Words},
    frames::{Engine, Full, STICKY, count_up},
    pool::{Pool, Unit},
    sync::Padded,
};

/// Entries of a node. Small, because the first write below a shared node copies it and counts up all it names; not
/// smaller, because every leaf costs a count and an entry above.
const FANOUT: usize = 64;
const FANOUT_BITS: u32 = FANOUT.trailing_zeros();

/// Locks of a map. Enough for the queues of one disk; 1 KiB a map.
pub(crate) const STRIPES: usize = 16;

/// The root of a map that was closed.
const CLOSED: u32 = u32::MAX;

/// Bytes read under one hold of a stripe's lock: short enough that a writer waits some ten microseconds at most.
const READ_HOLD: usize = 64 << 10;

const NODE_BYTES: u64 = (FANOUT * size_of::<u32>()) as u64;
const BESIDE_NODE: u64 = 4;
/// 64 MiB of free nodes stay ours.
const KEEP_NODES: usize = 262_144;

/// What a node costs at most, in bytes.
pub(crate) const NODE_COST: u64 = NODE_BYTES + BESIDE_NODE;

const BLOCK_BYTES: u64 = BLOCK as u64;
const LEAF_BLOCKS: u64 = FANOUT as u64;

/// Why a request on a map was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Full,
    Closed,
}

impl From<Full> for Refused {
    fn from(_: Full) -> Self {
        Refused::Full
    }
}

pub(crate) struct Nodes {
    words: Words,
    references: Words,
    pub(crate) pool: Pool,
}

impl Nodes {
    pub(crate) fn reserve(capacity: u32) -> io::Result<Nodes> {
        let count = capacity as usize + 1;
        let granule = 4096 / NODE_BYTES as u32;
        let unit = Unit { bytes: NODE_BYTES, beside: BESIDE_NODE, granule, keep: KEEP_NODES };
        Ok(Nodes {
            words: Words::reserve(count * FANOUT)?,
            references: Words::reserve(count)?,
            pool: Pool::new(capacity, unit),
        })
    }

    #[inline]
    fn entries(&self, node: u32) -> &[AtomicU32] {
        let at = node as usize * FANOUT;
        &self.words.all()[at..at + FANOUT]
    }

    #[inline]
    fn references(&self, node: u32) -> &AtomicU32 {
        &self.references.all()[node as usize]
    }

    #[cfg(test)]
    pub(crate) fn regions(&self) -> [std::ops::Range<usize>; 2] {
        [self.words.addresses(), self.references.addresses()]
    }
}

/// The blocks of one stripe.
pub(crate) struct Tree {
    /// 0 when nothing is mapped; [`CLOSED`].
    root: AtomicU32,
    /// Levels above the leaves.
    height: u32,
    /// Blocks mapped to a frame.
    mapped: u64,
}

/// Which frame holds each block of one disk.
pub(crate) struct Map {
    /// In bytes.
    pub(crate) size: u64,
    stripes: [Padded<RwLock<Tree>>; STRIPES],
}

pub(crate) type Trees = [Tree; STRIPES];

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
fn height_of(size: u64) -> u32 {
    let leaves = size.div_ceil(BLOCK_BYTES * LEAF_BLOCKS).div_ceil(STRIPES as u64);
    let mut height = 0;
    while 1u64 << (FANOUT_BITS * height) < leaves {
        height += 1;
    }
    height
}

impl Tree {
    fn check_open(&self) -> Result<(), Refused> {
        if self.root.load(Relaxed) == CLOSED { Err(Refused::Closed) } else { Ok(()) }
    }
}

impl Map {
    pub(crate) fn empty_trees(size: u64) -> Trees {
        std::array::from_fn(|_| Tree { root: AtomicU32::new(0), height: height_of(size), mapped: 0 })
    }

    pub(crate) fn new(size: u64, trees: Trees) -> Map {
        Map { size, stripes: trees.map(|tree| Padded(RwLock::new(tree))) }
    }

    /// Blocks mapped to a frame.
    pub(crate) fn mapped(&self) -> u64 {
        self.stripes.iter().map(|stripe| stripe.0.read().mapped).sum()
    }

    /// The locks of all stripes, in order: the map as it is at one instant.
    fn freeze(&self) -> [RwLockReadGuard<'_, Tree>; STRIPES] {
        self.stripes.each_ref().map(|stripe| stripe.0.read())
    }
}

// Nodes.
impl Engine {
    pub(crate) fn purge_nodes(&self, keep: usize) {
        self.nodes.pool.purge(keep, &self.budget, |run| {
            self.nodes.words.give_back(run.start as usize * FANOUT..run.end as usize * FANOUT);
        });
    }

    /// A node with one reference and whatever entries.
    fn take_node(&self) -> Result<u32, Full> {
        let pool = &self.nodes.pool;
        let node = pool
            .take(&self.budget)
            .or_else(|| {
                self.reclaim();
                pool.take(&self.budget)
            })
            .ok_or(Full)?;
        self.nodes.references(node).store(1, Relaxed);
        Ok(node)
    }

    fn retain_node(&self, node: u32) {
        count_up(self.nodes.references(node), STICKY);
    }

    fn put_node(&self, node: u32) {
        if self.nodes.pool.put(node) {
            self.purge_nodes(self.nodes.pool.keep() / 2);
        }
    }

    /// Drops a reference to the node, and with the last one those it holds.
    fn release_node(&self, node: u32, level: u32) {
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
        for entry in self.nodes.entries(node) {
            match entry.load(Relaxed) {
                0 => {}
                frame if level == 0 => self.release_frame(frame),
                child => self.release_node(child, level - 1),
            }
        }
        self.put_node(node);
    }

    pub(crate) fn release_trees(&self, trees: Trees) {
        for tree in trees {
            let root = tree.root.into_inner();
            if root != CLOSED {
                self.release_node(root, tree.height);
            }
        }
    }

    /// Makes the node in `slot` one that only this slot refers to, and so one that may be changed.
    /// The caller holds the write lock under which `slot` lies, and owns the node `slot` lies in.
    fn own(&self, slot: &AtomicU32, level: u32) -> Result<u32, Full> {
        let node = slot.load(Relaxed);
        // Acquire: whoever else referred to it is done reading it. Nobody else can refer to it anew.
        if node != 0 && self.nodes.references(node).load(Acquire) == 1 {
            return Ok(node);
        }
        let copy = self.take_node()?;
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
        slot.store(copy, Relaxed);
        self.release_node(node, level);
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

    /// The slot that holds the leaf, after making the leaf and all above it the tree's own.
    fn own_leaf<'a>(&'a self, tree: &'a Tree, index: u64) -> Result<&'a AtomicU32, Full> {
        let mut slot = &tree.root;
        for level in (1..=tree.height).rev() {
            let node = self.own(slot, level)?;
            slot = &self.nodes.entries(node)[entry(index, level - 1)];
        }
        self.own(slot, 0)?;
        Ok(slot)
    }

    /// Puts `new` frames (0: holes) at a leaf's slots from `first` on, taking over their references, and puts the
    /// references of those they replace in `old`. When refused nothing is changed. The caller has the write lock.
    fn exchange(&self, tree: &mut Tree, index: u64, first: usize, new: &[u32], old: &mut [u32]) -> Result<(), Refused> {
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
        let slot = self.own_leaf(tree, index)?;
        let entries = self.nodes.entries(slot.load(Relaxed));
        let mut mapped = tree.mapped;
        for ((entry, &new), old) in entries[first..].iter().zip(new).zip(old) {
            *old = entry.load(Relaxed);
            entry.store(new, Relaxed);
            mapped = mapped + u64::from(new != 0) - u64::from(*old != 0);
        }
        if holes && entries.iter().all(|entry| entry.load(Relaxed) == 0) {
            let leaf = slot.load(Relaxed);
            slot.store(0, Relaxed);
            self.put_empty_node(leaf);
        }
        tree.mapped = mapped;
        Ok(())
    }

    /// Frees a node that is ours alone and holds nothing.
    fn put_empty_node(&self, node: u32) {
        self.nodes.references(node).store(0, Relaxed);
        self.put_node(node);
    }

    fn release_frames(&self, frames: &[u32]) {
        for &frame in frames.iter().filter(|&&frame| frame != 0) {
            self.release_frame(frame);
        }
    }
}

// Requests. Offsets and lengths were checked against the size of the disk.
impl Engine {
    pub(crate) fn read(&self, map: &Map, mut offset: u64, mut buf: &mut [u8]) -> Result<(), Refused> {
        while !buf.is_empty() {
            let block = offset / BLOCK_BYTES;
            let mut at = (block % LEAF_BLOCKS) as usize;
            let mut from = (offset % BLOCK_BYTES) as usize;
            let len = buf.len().min((FANOUT - at) * BLOCK - from).min(READ_HOLD);
            let (mut now, later) = buf.split_at_mut(len);
            let (stripe, index) = place(block / LEAF_BLOCKS);
            let tree = map.stripes[stripe].0.read();
            tree.check_open()?;
            let leaf = self.leaf(&tree, index);
            if leaf == 0 {
                now.fill(0);
            } else {
                let entries = self.nodes.entries(leaf);
                while !now.is_empty() {
                    let (piece, rest) = now.split_at_mut(now.len().min(BLOCK - from));
                    match entries[at].load(Relaxed) {
                        0 => piece.fill(0),
                        frame => self.frames.blocks.read(frame, from, piece),
                    }
                    (now, at, from) = (rest, at + 1, 0);
                }
            }
            drop(tree);
            offset += len as u64;
            buf = later;
        }
        Ok(())
    }

    pub(crate) fn write(&self, map: &Map, mut offset: u64, mut data: &[u8]) -> Result<(), Refused> {
        while !data.is_empty() {
            let block = offset / BLOCK_BYTES;
            let from = (offset % BLOCK_BYTES) as usize;
            let len = if from != 0 || data.len() < BLOCK {
                let len = data.len().min(BLOCK - from);
                self.write_part(map, block, from, &data[..len])?;
                len
            } else {
                let blocks = (data.len() / BLOCK).min(FANOUT - (block % LEAF_BLOCKS) as usize);
                self.write_blocks(map, block, &data[..blocks * BLOCK])?;
                blocks * BLOCK
            };
            offset += len as u64;
            data = &data[len..];
        }
        Ok(())
    }

    /// Whole blocks within one leaf. All that is slow happens before the lock.
    fn write_blocks(&self, map: &Map, first: u64, data: &[u8]) -> Result<(), Refused> {
        let (mut new, mut old) = ([0; FANOUT], [0; FANOUT]);
        let (blocks, _) = data.as_chunks::<BLOCK>();
        let (mut done, mut holes) = (0, 0);
        let mut result = Ok(());
        for block in blocks {
            match self.intern(block) {
                Ok(frame) => {
                    new[done] = frame;
                    holes += u64::from(frame == 0);
                    done += 1;
                }
                Err(Full) => {
                    result = Err(Refused::Full);
                    break;
                }
            }
        }
        if result.is_ok() {
            let (stripe, index) = place(first / LEAF_BLOCKS);
            let at = (first % LEAF_BLOCKS) as usize;
            let mut tree = map.stripes[stripe].0.write();
            result = self.exchange(&mut tree, index, at, &new[..done], &mut old[..done]);
        }
        match result {
            Ok(()) => self.release_frames(&old[..done]),
            Err(_) => self.release_frames(&new[..done]),
        }
        if holes > 0 {
            self.world.count_zero_blocks(holes);
        }
        result
    }

    /// A part of one block: read, change and write under the lock, so that writers of other parts lose nothing.
    fn write_part(&self, map: &Map, number: u64, from: usize, data: &[u8]) -> Result<(), Refused> {
        self.change_block(map, number, |block| block[from..from + data.len()].copy_from_slice(data))
    }

    fn change_block(&self, map: &Map, number: u64, change: impl FnOnce(&mut [u8; BLOCK])) -> Result<(), Refused> {
        let (stripe, index) = place(number / LEAF_BLOCKS);
        let at = (number % LEAF_BLOCKS) as usize;
        let mut tree = map.stripes[stripe].0.write();
        tree.check_open()?;
        let leaf = self.leaf(&tree, index);
        let frame = if leaf == 0 { 0 } else { self.nodes.entries(leaf)[at].load(Relaxed) };
        let mut block = [0; BLOCK];
        if frame != 0 {
            self.frames.blocks.read(frame, 0, &mut block);
        }
        change(&mut block);
        let new = [self.intern(&block)?];
        let mut old = [0];
        let result = self.exchange(&mut tree, index, at, &new, &mut old);
        drop(tree);
        self.release_frames(if result.is_ok() { &old } else { &new });
        if new[0] == 0 && result.is_ok() {
            self.world.count_zero_blocks(1);
        }
        result
    }

    /// Makes the range read as zero and frees what it held.
    pub(crate) fn clear(&self, map: &Map, offset: u64, len: u64) -> Result<(), Refused> {
        let mut end = offset + len;
        if end == map.size {
            // of a short last block there is nothing behind the end to keep
            end = end.next_multiple_of(BLOCK_BYTES);
        }
        let (first, last) = (offset.div_ceil(BLOCK_BYTES), end / BLOCK_BYTES);
        if first > last {
            return self.clear_part(map, offset, end);
        }
        self.clear_part(map, offset, first * BLOCK_BYTES)?;
        self.clear_blocks(map, first, last)?;
        self.clear_part(map, last * BLOCK_BYTES, end)
    }

    /// Bytes within one block.
    fn clear_part(&self, map: &Map, offset: u64, end: u64) -> Result<(), Refused> {
        if offset == end {
            return Ok(());
        }
        let from = (offset % BLOCK_BYTES) as usize;
        self.change_block(map, offset / BLOCK_BYTES, |block| block[from..from + (end - offset) as usize].fill(0))
    }

    /// Blocks `first..last`.
    fn clear_blocks(&self, map: &Map, first: u64, last: u64) -> Result<(), Refused> {
        let (first_leaf, last_leaf) = (first.div_ceil(LEAF_BLOCKS), last / LEAF_BLOCKS);
        if first_leaf > last_leaf {
            return self.clear_in_leaf(map, first, last);
        }
        self.clear_in_leaf(map, first, first_leaf * LEAF_BLOCKS)?;
        for (stripe, lock) in map.stripes.iter().enumerate() {
            // the leaves of this stripe among first_leaf..last_leaf
            let stripes = STRIPES as u64;
            let index = |leaf: u64| (leaf + stripes - 1 - stripe as u64) / stripes;
            let (from, to) = (index(first_leaf), index(last_leaf));
            if from == to {
                continue;
            }
            let mut detached = Vec::new();
            let result = {
                let mut tree = lock.0.write();
                tree.check_open()?;
                let mut cleared = 0;
                let result = self.detach(&tree.root, tree.height, from, to, &mut detached, &mut cleared);
                tree.mapped -= cleared;
                result
            };
            for (node, level) in detached {
                self.release_node(node, level);
            }
            result?;
        }
        self.clear_in_leaf(map, last_leaf * LEAF_BLOCKS, last)
    }

    fn clear_in_leaf(&self, map: &Map, first: u64, last: u64) -> Result<(), Refused> {
        let count = (last - first) as usize;
        if count == 0 {
            return Ok(());
        }
        let mut old = [0; FANOUT];
        let (stripe, index) = place(first / LEAF_BLOCKS);
        let at = (first % LEAF_BLOCKS) as usize;
        let mut tree = map.stripes[stripe].0.write();
        let result = self.exchange(&mut tree, index, at, &[0; FANOUT][..count], &mut old[..count]);
        drop(tree);
        if result.is_ok() {
            self.release_frames(&old[..count]);
        }
        result
    }

    /// Takes the leaves `from..to` (counted from the first one below `slot`) out of the tree, as few nodes as possible,
    /// for release after the lock. Counts the mapped blocks in them.
    fn detach(
        &self,
        slot: &AtomicU32,
        level: u32,
        from: u64,
        to: u64,
        detached: &mut Vec<(u32, u32)>,
        cleared: &mut u64,
    ) -> Result<(), Full> {
        let node = slot.load(Relaxed);
        if node == 0 || from >= to {
            return Ok(());
        }
        let span = 1u64 << (FANOUT_BITS * level);
        if from == 0 && to >= span {
            *cleared += self.count_mapped(node, level);
            slot.store(0, Relaxed);
            detached.push((node, level));
            return Ok(());
        }
        let node = self.own(slot, level)?;
        let below = span >> FANOUT_BITS;
        let entries = self.nodes.entries(node);
        for (n, child) in (0..).zip(entries) {
            let start = n * below;
            if start < to && start + below > from {
                let (from, to) = (from.saturating_sub(start), (to - start).min(below));
                self.detach(child, level - 1, from, to, detached, cleared)?;
            }
        }
        if entries.iter().all(|entry| entry.load(Relaxed) == 0) {
            slot.store(0, Relaxed);
            self.put_empty_node(node);
        }
        Ok(())
    }

    fn count_mapped(&self, node: u32, level: u32) -> u64 {
        let entries = self.nodes.entries(node).iter().map(|entry| entry.load(Relaxed)).filter(|&entry| entry != 0);
        if level == 0 { entries.count() as u64 } else { entries.map(|child| self.count_mapped(child, level - 1)).sum() }
    }

    pub(crate) fn extents(&self, map: &Map, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), Refused> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let leaf_number = at / BLOCK_BYTES / LEAF_BLOCKS;
            let leaf_end = ((leaf_number + 1) * LEAF_BLOCKS * BLOCK_BYTES).min(end);
            let (stripe, index) = place(leaf_number);
            let tree = map.stripes[stripe].0.read();
            tree.check_open()?;
            let leaf = self.leaf(&tree, index);
            if leaf == 0 {
                Extent::push(out, leaf_end - at, ExtentKind::Hole);
                at = leaf_end;
                continue;
            }
            let entries = self.nodes.entries(leaf);
            while at < leaf_end {
                let block = at / BLOCK_BYTES;
                let block_end = ((block + 1) * BLOCK_BYTES).min(end);
                let mapped = entries[(block % LEAF_BLOCKS) as usize].load(Relaxed) != 0;
                Extent::push(out, block_end - at, if mapped { ExtentKind::Data } else { ExtentKind::Hole });
                at = block_end;
            }
        }
        Ok(())
    }
}

// Whole maps.
impl Engine {
    /// The trees of a copy of the map as it is now, for a disk of at least its size.
    pub(crate) fn fork(&self, map: &Map, size: u64) -> Result<Trees, Refused> {
        let trees = {
            let frozen = map.freeze();
            frozen[0].check_open()?;
            frozen.each_ref().map(|tree| {
                let root = tree.root.load(Relaxed);
                if root != 0 {
                    self.retain_node(root);
                }
                Tree { root: AtomicU32::new(root), height: tree.height, mapped: tree.mapped }
            })
        };
        self.raise(trees, height_of(size)).map_err(Refused::from)
    }

    /// Adds levels above the roots.
    fn raise(&self, mut trees: Trees, height: u32) -> Result<Trees, Full> {
        for tree in &mut trees {
            while tree.height < height {
                let root = tree.root.load(Relaxed);
                if root != 0 {
                    match self.take_node() {
                        Ok(above) => {
                            let entries = self.nodes.entries(above);
                            entries[0].store(root, Relaxed);
                            entries[1..].iter().for_each(|entry| entry.store(0, Relaxed));
                            tree.root.store(above, Relaxed);
                        }
                        Err(Full) => {
                            self.release_trees(trees);
                            return Err(Full);
                        }
                    }
                }
                tree.height += 1;
            }
        }
        Ok(trees)
    }

    /// Puts other trees in the map's place, at one instant, and releases what was there.
    pub(crate) fn install(&self, map: &Map, trees: Trees) -> Result<(), Refused> {
        let mut locked = map.stripes.each_ref().map(|stripe| stripe.0.write());
        if let Err(closed) = locked[0].check_open() {
            drop(locked);
            self.release_trees(trees);
            return Err(closed);
        }
        let mut trees = trees;
        for (tree, new) in locked.iter_mut().zip(&mut trees) {
            std::mem::swap(&mut **tree, new);
        }
        drop(locked);
        self.release_trees(trees);
        Ok(())
    }

    /// Refuses all requests from now on and frees what only this map holds. A second time nothing is left to do.
    pub(crate) fn close(&self, map: &Map) {
        let mut trees = Map::empty_trees(0).map(|tree| Tree { root: AtomicU32::new(CLOSED), ..tree });
        let mut locked = map.stripes.each_ref().map(|stripe| stripe.0.write());
        for (tree, new) in locked.iter_mut().zip(&mut trees) {
            std::mem::swap(&mut **tree, new);
        }
        drop(locked);
        self.release_trees(trees);
    }

    /// Runs of blocks (first, count) that the two maps do not map to the same frame, in order. Looks only at what they
    /// do not share. Neither changes meanwhile, or what changes may or may not be in the result.
    pub(crate) fn differences(&self, a: &Map, b: &Map) -> Result<Vec<(u64, u64)>, Refused> {
        if std::ptr::eq(a, b) {
            return Ok(Vec::new());
        }
        let mut leaves = Vec::new();
        for (stripe, (a, b)) in a.stripes.iter().zip(&b.stripes).enumerate() {
            // The order is that of addresses, so that two calls with the maps the other way round cannot wait for each
            // other.
            let (a, b) = if std::ptr::from_ref(a) <= std::ptr::from_ref(b) {
                let first = a.0.read();
                (first, b.0.read())
            } else {
                let first = b.0.read();
                (a.0.read(), first)
            };
            a.check_open()?;
            b.check_open()?;
            let mut see = |index: u64, a: u32, b: u32| {
                leaves.push((index * STRIPES as u64 + stripe as u64, self.leaf_difference(a, b)));
            };
            self.compare((a.root.load(Relaxed), a.height), (b.root.load(Relaxed), b.height), 0, &mut see);
        }
        leaves.sort_unstable_by_key(|&(leaf, _)| leaf);
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (leaf, bits) in leaves {
            for at in (0..LEAF_BLOCKS).filter(|at| bits >> at & 1 == 1) {
                let block = leaf * LEAF_BLOCKS + at;
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == block => *count += 1,
                    _ => runs.push((block, 1)),
                }
            }
        }
        Ok(runs)
    }

    fn compare(&self, a: (u32, u32), b: (u32, u32), index: u64, see: &mut impl FnMut(u64, u32, u32)) {
        let ((a, a_level), (b, b_level)) = (a, b);
        if a == b && (a == 0 || a_level == b_level) {
            return;
        }
        let level = a_level.max(b_level);
        if level == 0 {
            return see(index, a, b);
        }
        for n in 0..FANOUT {
            let below = |node: u32, node_level: u32| {
                if node == 0 {
                    (0, level - 1)
                } else if node_level == level {
                    (self.nodes.entries(node)[n].load(Relaxed), level - 1)
                } else if n == 0 {
                    // the lower tree is the first child of the level it lacks
                    (node, node_level)
                } else {
                    (0, level - 1)
                }
            };
            self.compare(below(a, a_level), below(b, b_level), index << FANOUT_BITS | n as u64, see);
        }
    }

    /// A bit for each block of a leaf whose frames differ.
    fn leaf_difference(&self, a: u32, b: u32) -> u64 {
        let frame = |leaf: u32, at: usize| if leaf == 0 { 0 } else { self.nodes.entries(leaf)[at].load(Relaxed) };
        (0..FANOUT).filter(|&at| frame(a, at) != frame(b, at)).fold(0, |bits, at| bits | 1 << at)
    }

    /// Calls `see` with each mapped block's number and frame, in the order of the trees.
    pub(crate) fn for_each_block(&self, map: &Map, mut see: impl FnMut(u64, u32)) -> Result<(), Refused> {
        for (stripe, lock) in map.stripes.iter().enumerate() {
            let tree = lock.0.read();
            tree.check_open()?;
            self.compare((tree.root.load(Relaxed), tree.height), (0, 0), 0, &mut |index, leaf, _| {
                let first = (index * STRIPES as u64 + stripe as u64) * LEAF_BLOCKS;
                for (at, entry) in (0..).zip(self.nodes.entries(leaf)) {
                    match entry.load(Relaxed) {
                        0 => {}
                        frame => see(first + at, frame),
                    }
                }
            });
        }
        Ok(())
    }
}

/// An exact recount. With the world stopped.
pub(crate) struct Recount<'a> {
    engine: &'a Engine,
    pub(crate) frames: Vec<u32>,
    pub(crate) nodes: Vec<u32>,
    pub(crate) faults: Vec<String>,
}

impl<'a> Recount<'a> {
    pub(crate) fn new(engine: &'a Engine) -> Self {
        let frames = engine.frames.pool.stats().next as usize;
        let nodes = engine.nodes.pool.stats().next as usize;
        Self { engine, frames: vec![0; frames], nodes: vec![0; nodes], faults: Vec::new() }
    }

    pub(crate) fn fault(&mut self, text: String) {
        if self.faults.len() < 1000 {
            self.faults.push(text);
        }
    }

    pub(crate) fn add(&mut self, map: &Map) {
        for stripe in &map.stripes {
            let tree = stripe.0.read();
            let root = tree.root.load(Relaxed);
            if root == CLOSED {
                continue;
            }
            self.visit(root, tree.height);
            let mapped = if root == 0 { 0 } else { self.engine.count_mapped(root, tree.height) };
            if mapped != tree.mapped {
                self.fault(format!("a tree maps {mapped} blocks and says {}", tree.mapped));
            }
        }
    }

    fn visit(&mut self, node: u32, level: u32) {
        if node == 0 {
            return;
        }
        let Some(seen) = self.nodes.get_mut(node as usize) else {
            return self.fault(format!("a map names node {node}, which was never dealt"));
        };
        *seen += 1;
        if *seen > 1 {
            return;
        }
        for at in 0..FANOUT {
            match self.engine.nodes.entries(node)[at].load(Relaxed) {
                0 => {}
                frame if level == 0 => match self.frames.get_mut(frame as usize) {
                    Some(count) => *count = count.saturating_add(1),
                    None => self.fault(format!("node {node} names frame {frame}, which was never dealt")),
                },
                child => self.visit(child, level - 1),
            }
        }
    }

    /// Compares counts, free lists and index with what was added.
    pub(crate) fn compare(&mut self) {
        let engine = self.engine;
        for frame in 1..self.frames.len() as u32 {
            let (expected, found) = (self.frames[frame as usize], engine.frames.count(frame));
            if expected != found && found < engine.sticky {
                self.fault(format!("frame {frame} counts {found} references, {expected} exist"));
            }
        }
        for node in 1..self.nodes.len() as u32 {
            let (expected, found) = (self.nodes[node as usize], engine.nodes.references(node).load(Acquire));
            if expected != found {
                self.fault(format!("node {node} counts {found} references, {expected} exist"));
            }
        }
        let is_free = |used: &[u32], free: Vec<u32>, kind: &str, count: &dyn Fn(u32) -> u32| {
            let mut faults = Vec::new();
            let mut listed = vec![false; used.len()];
            for number in free {
                if std::mem::replace(&mut listed[number as usize], true) {
                    faults.push(format!("{kind} {number} is free twice"));
                }
            }
            for number in 1..used.len() {
                let in_use = used[number] > 0 || count(number as u32) > 0;
                if in_use == listed[number] {
                    let state = if in_use { "used and free" } else { "neither used nor free" };
                    faults.push(format!("{kind} {number} is {state}"));
                }
            }
            faults
        };
        let frames =
            is_free(&self.frames, engine.frames.pool.free_numbers(), "frame", &|frame| engine.frames.count(frame));
        let nodes = is_free(&self.nodes, engine.nodes.pool.free_numbers(), "node", &|node| {
            engine.nodes.references(node).load(Acquire)
        });
        for fault in frames.into_iter().chain(nodes) {
            self.fault(fault);
        }
        let mut listed = vec![false; self.frames.len()];
        engine.frames.index.for_each(|tag, frame| {
            if engine.frames.count(frame) == 0 || engine.frames.tag(frame) != tag {
                self.fault(format!("the index lists frame {frame} under {tag:#x}, which does not hold it"));
            } else if std::mem::replace(&mut listed[frame as usize], true) {
                self.fault(format!("the index lists frame {frame} twice"));
            }
        });
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
