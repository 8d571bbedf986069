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
        pool.take(&self.budget).or_else(|| {
            self.reclaim();
            pool.take(&self.budget)
        })
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

    fn release_frames(&self, account: &Account, frames: &[u32]) {
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
                        frame => self.read_frame(frame, from, piece)?,
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

    /// Shows the range piece by piece, straight from the frames where they are in their place.
    pub(crate) fn show(
        &self,
        map: &Map,
        offset: u64,
        len: u64,
        sink: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<(), Refused> {
        let mut done = 0;
        let mut block = [0; BLOCK];
        while done < len {
            let number = (offset + done) / BLOCK_BYTES;
            let mut at = (number % LEAF_BLOCKS) as usize;
            let mut from = ((offset + done) % BLOCK_BYTES) as usize;
            let end = done + (len - done).min(((FANOUT - at) * BLOCK - from) as u64).min(READ_HOLD as u64);
            let (stripe, index) = place(number / LEAF_BLOCKS);
            let tree = map.stripes[stripe].0.read();
            tree.check_open()?;
            let leaf = self.leaf(&tree, index);
            if leaf == 0 {
                for at in (done..end).step_by(ZEROES.len()) {
                    sink(at, &ZEROES[..(end - at).min(ZEROES.len() as u64) as usize]);
                }
                done = end;
                continue;
            }
            let entries = self.nodes.entries(leaf);
            let marked = self.frames.marks.armed();
            while done < end {
                let frame = entries[at].load(Relaxed);
                // neighbours of the disk that are neighbours in memory, or all zero, are shown at once
                let next = |run: usize| if frame == 0 { 0 } else { frame + run as u32 };
                let most = if marked && frame != 0 { 1 } else { (from + (end - done) as usize).div_ceil(BLOCK) };
                let most = most.min(if frame == 0 { ZEROES.len() / BLOCK } else { FANOUT });
                let run = (1..most).find(|&run| entries[at + run].load(Relaxed) != next(run)).unwrap_or(most);
                let piece = ((end - done) as usize).min(run * BLOCK - from);
                if done + (piece as u64) < end {
                    self.frames.blocks.prefetch(entries[at + run].load(Relaxed));
                }
                if frame == 0 {
                    sink(done, &ZEROES[..piece]);
                } else if marked {
                    self.read_frame(frame, from, &mut block[..piece])?;
                    sink(done, &block[..piece]);
                } else {
                    self.frames.blocks.with_run(frame, run, |bytes| sink(done, &bytes[from..from + piece]));
                }
                (done, at, from) = (done + piece as u64, at + run, 0);
            }
        }
        Ok(())
    }

    pub(crate) fn write(&self, map: &Map, mut offset: u64, mut data: &[u8]) -> Result<(), Refused> {
        while !data.is_empty() {
            let block = offset / BLOCK_BYTES;
            let from = (offset % BLOCK_BYTES) as usize;
            let (result, len) = if from != 0 || data.len() < BLOCK {
                let len = data.len().min(BLOCK - from);
                (self.write_part(map, block, from, &data[..len]), len)
            } else {
                let blocks = (data.len() / BLOCK).min(FANOUT - (block % LEAF_BLOCKS) as usize);
                (self.write_blocks(map, block, &data[..blocks * BLOCK]), blocks * BLOCK)
            };
            match result {
                Ok(()) => {}
                // nothing of this piece was changed: once more when there is room now
                Err(Refused::Full) if map.account.spills() && self.make_room() => continue,
                Err(refused) => return Err(refused),
            }
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
        let replaced = self.peek(map, first, blocks.len(), &mut old);
        // two trips to memory that hashing hides
        replaced.iter().for_each(|&frame| self.prefetch_words(frame));
        let mut result = Ok(());
        for block in blocks {
            match self.intern(map, block, replaced.get(done).copied()) {
                Ok(frame) => {
                    new[done] = frame;
                    holes += u64::from(frame == 0);
                    done += 1;
                }
                Err(failed) => {
                    result = Err(failed.into());
                    break;
                }
            }
        }
        if result.is_ok() {
            let place = place(first / LEAF_BLOCKS);
            let at = (first % LEAF_BLOCKS) as usize;
            let mut tree = map.stripes[place.0].0.write();
            result = self.exchange(map, &mut tree, place, at, &new[..done], &mut old[..done]);
        }
        match result {
            Ok(()) => self.release_frames(&map.account, &old[..done]),
            Err(_) => self.release_frames(&map.account, &new[..done]),
        }
        if holes > 0 {
            self.world.count_zero_blocks(holes);
        }
        result
    }

    /// The frames that a write will replace, as far as they can be known before it: a hint.
    #[inline]
    fn peek<'a>(&self, map: &Map, first: u64, blocks: usize, frames: &'a mut [u32; FANOUT]) -> &'a [u32] {
        let (stripe, index) = place(first / LEAF_BLOCKS);
        let at = (first % LEAF_BLOCKS) as usize;
        let tree = map.stripes[stripe].0.read();
        let leaf = if tree.check_open().is_ok() { self.leaf(&tree, index) } else { 0 };
        if leaf == 0 {
            return &[];
        }
        for (frame, entry) in frames.iter_mut().zip(&self.nodes.entries(leaf)[at..at + blocks]) {
            *frame = entry.load(Relaxed);
        }
        &frames[..blocks]
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
            self.read_frame(frame, 0, &mut block)?;
        }
        change(&mut block);
        let new = [self.intern(map, &block, None)?];
        let mut old = [0];
        let result = self.exchange(map, &mut tree, (stripe, index), at, &new, &mut old);
        drop(tree);
        self.release_frames(&map.account, if result.is_ok() { &old } else { &new });
        if new[0] == 0 && result.is_ok() {
            self.world.count_zero_blocks(1);
        }
        result
    }

    /// Makes the range read as zero and frees what it held.
    pub(crate) fn clear(&self, map: &Map, offset: u64, len: u64) -> Result<(), Refused> {
        let mut end = offset + len;
        if end == map.size() {
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
                let root = &self.nodes.entries(map.top())[stripe];
                let result = self.detach(&map.account, root, tree.height, from, to, &mut detached, &mut cleared);
                tree.root.store(root.load(Relaxed), Relaxed);
                tree.mapped -= cleared;
                if map.account.counts() && result.is_ok() {
                    for index in from..to {
                        map.account.write(index * stripes + stripe as u64, 0, u64::MAX);
                    }
                }
                result
            };
            for (node, level) in detached {
                self.release_node(&map.account, node, level);
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
        let place = place(first / LEAF_BLOCKS);
        let at = (first % LEAF_BLOCKS) as usize;
        let mut tree = map.stripes[place.0].0.write();
        let result = self.exchange(map, &mut tree, place, at, &[0; FANOUT][..count], &mut old[..count]);
        drop(tree);
        if result.is_ok() {
            self.release_frames(&map.account, &old[..count]);
        }
        result
    }

    /// Takes the leaves `from..to` (counted from the first one below `slot`) out of the tree, as few nodes as possible,
    /// for release after the lock. Counts the mapped blocks in them.
    #[allow(clippy::too_many_arguments)]
    fn detach(
        &self,
        account: &Account,
        slot: &AtomicU32,
        level: u32,
        from: u64,
        to: u64,
        detached: &mut Vec<(u32, u32)>,
        cleared: &mut u64,
    ) -> Result<(), Failed> {
        let node = slot.load(Relaxed);
        if node == 0 || from >= to {
            return Ok(());
        }
        let span = 1u64 << (FANOUT_BITS * level);
        if from == 0 && to >= span {
            *cleared += self.count_mapped(node, level);
            slot.store(0, Release);
            detached.push((node, level));
            return Ok(());
        }
        let node = self.own(account, slot, level)?;
        let below = span >> FANOUT_BITS;
        let entries = self.nodes.entries(node);
        for (n, child) in (0..).zip(entries) {
            let start = n * below;
            if start < to && start + below > from {
                let (from, to) = (from.saturating_sub(start), (to - start).min(below));
                self.detach(account, child, level - 1, from, to, detached, cleared)?;
            }
        }
        if entries.iter().all(|entry| entry.load(Relaxed) == 0) {
            slot.store(0, Release);
            self.put_empty_node(account, node);
        }
        Ok(())
    }

    /// A bit for each block of the leaf that is mapped to a frame.
    pub(crate) fn mapped_bits(&self, map: &Map, leaf: u64) -> u64 {
        let (stripe, index) = place(leaf);
        let tree = map.stripes[stripe].0.read();
        if tree.check_open().is_err() {
            return 0;
        }
        match self.leaf(&tree, index) {
            0 => 0,
            leaf => (0..FANOUT)
                .filter(|&at| self.nodes.entries(leaf)[at].load(Relaxed) != 0)
                .fold(0, |bits, at| bits | 1 << at),
        }
    }

    /// A bit for each block of the leaf whose frame is this map's alone.
    pub(crate) fn alone_bits(&self, map: &Map, leaf: u64) -> u64 {
        let mut bits = 0;
        self.for_each_alone(map, leaf, |at, _| bits |= 1 << at);
        bits
    }

    /// Shows the frames of a leaf that are this map's alone, with their place in it. Nobody drops them meanwhile: the stripe
    /// is locked, shared.
    pub(crate) fn for_each_alone(&self, map: &Map, leaf: u64, mut see: impl FnMut(usize, u32)) {
        let (stripe, index) = place(leaf);
        let tree = map.stripes[stripe].0.read();
        if tree.check_open().is_err() {
            return;
        }
        let mut node = tree.root.load(Relaxed);
        for level in (0..=tree.height).rev() {
            if node == 0 || self.nodes.references(node).load(Relaxed) != 1 {
                return;
            }
            if level > 0 {
                node = self.nodes.entries(node)[entry(index, level - 1)].load(Relaxed);
            }
        }
        for (at, entry) in self.nodes.entries(node).iter().enumerate() {
            let frame = entry.load(Relaxed);
            if frame != 0 && self.frames.count(frame) == 1 {
                see(at, frame);
            }
        }
    }

    pub(crate) fn count_mapped(&self, node: u32, level: u32) -> u64 {
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
    /// The trees of a disk of this size where nothing is mapped.
    pub(crate) fn empty_trees(&self, size: u64) -> Result<Trees, Failed> {
        let top = self.take_node(&Account::NONE)?;
        self.nodes.entries(top).iter().for_each(|entry| entry.store(0, Relaxed));
        let empty = |_| Tree { root: AtomicU32::new(0), height: height_of(size), mapped: 0 };
        Ok(Trees { top, stripes: std::array::from_fn(empty) })
    }

    /// The trees that an earlier process left under this top, once they are counted.
    pub(crate) fn found_trees(&self, size: u64, top: u32, mut mapped: impl FnMut(u32) -> u64) -> Trees {
        let entries = self.nodes.entries(top);
        let tree = |stripe: usize| {
            let root = entries[stripe].load(Relaxed);
            Tree { root: AtomicU32::new(root), height: height_of(size), mapped: mapped(root) }
        };
        Trees { top, stripes: std::array::from_fn(tree) }
    }

    /// The trees of a copy of the map as it is now, for a disk of at least its size.
    pub(crate) fn fork(&self, map: &Map, size: u64) -> Result<Trees, Refused> {
        self.fork_frozen(&map.freeze(), size)
    }

    /// The same of a map that the caller froze.
    pub(crate) fn fork_frozen(&self, frozen: &Frozen<'_>, size: u64) -> Result<Trees, Refused> {
        frozen[0].check_open()?;
        let trees = self.empty_trees(size)?;
        let Trees { top, mut stripes } = trees;
        let height = height_of(size).max(frozen[0].height);
        for (stripe, (tree, from)) in stripes.iter_mut().zip(frozen).enumerate() {
            let root = from.root.load(Relaxed);
            if root != 0 {
                self.retain_node(root);
            }
            *tree = Tree { root: AtomicU32::new(root), height: from.height, mapped: from.mapped };
            self.nodes.entries(top)[stripe].store(root, Release);
        }
        let trees = Trees { top, stripes };
        if height == frozen[0].height { Ok(trees) } else { self.raise(trees, height).map_err(Refused::from) }
    }

    /// Adds levels above the roots of trees that no record names yet.
    fn raise(&self, mut trees: Trees, height: u32) -> Result<Trees, Failed> {
        let levels = height - trees.stripes[0].height;
        let needed = levels as usize * trees.stripes.iter().filter(|tree| tree.root.load(Relaxed) != 0).count();
        let mut spare = Vec::new();
        while spare.len() < needed {
            match self.take_node(&Account::NONE) {
                Ok(node) => spare.push(node),
                Err(failed) => {
                    spare.into_iter().for_each(|node| self.put_empty_node(&Account::NONE, node));
                    self.release_trees(&Account::NONE, trees);
                    return Err(failed);
                }
            }
        }
        for (stripe, tree) in trees.stripes.iter_mut().enumerate() {
            tree.height = height;
            let mut root = tree.root.load(Relaxed);
            if root == 0 {
                continue;
            }
            for _ in 0..levels {
                let above = spare.pop().unwrap_or_default();
                let entries = self.nodes.entries(above);
                entries[0].store(root, Relaxed);
                entries[1..].iter().for_each(|entry| entry.store(0, Relaxed));
                root = above;
            }
            tree.root.store(root, Relaxed);
            self.nodes.entries(trees.top)[stripe].store(root, Release);
        }
        Ok(trees)
    }

    /// Puts other trees in the map's place, at one instant, and releases what was there. `note` writes down what must outlive
    /// the process, before anybody sees the change.
    pub(crate) fn install(&self, map: &Map, trees: Trees, note: impl FnOnce(u32)) -> Result<(), Refused> {
        let mut locked = map.seize();
        if let Err(closed) = locked[0].check_open() {
            drop(locked);
            self.release_trees(&Account::NONE, trees);
            return Err(closed);
        }
        note(trees.top);
        let old = self.exchange_trees(map, &mut locked, trees);
        map.account.forget();
        drop(locked);
        self.release_trees(&map.account, old);
        Ok(())
    }

    fn exchange_trees(&self, map: &Map, locked: &mut [RwLockWriteGuard<'_, Tree>; STRIPES], mut trees: Trees) -> Trees {
        for (tree, new) in locked.iter_mut().zip(&mut trees.stripes) {
            std::mem::swap(&mut **tree, new);
        }
        trees.top = map.top.swap(trees.top, Relaxed);
        trees
    }

    /// Makes the disk larger: what is added reads as zero.
    pub(crate) fn grow(&self, map: &Map, size: u64, note: impl FnOnce(u32)) -> Result<(), Refused> {
        let mut locked = map.seize();
        locked[0].check_open()?;
        let height = height_of(size).max(locked[0].height);
        let trees = self.empty_trees(size)?;
        for (stripe, (to, from)) in trees.stripes.iter().zip(&locked).enumerate() {
            let root = from.root.load(Relaxed);
            to.root.store(root, Relaxed);
            self.nodes.entries(trees.top)[stripe].store(root, Release);
            if root != 0 {
                // for as long as two tops name it
                self.retain_node(root);
            }
        }
        let mut trees = trees;
        for (to, from) in trees.stripes.iter_mut().zip(&locked) {
            (to.height, to.mapped) = (from.height, from.mapped);
        }
        let trees = self.raise(trees, height)?;
        note(trees.top);
        let old = self.exchange_trees(map, &mut locked, trees);
        map.account.grow(size);
        map.size.store(size, Release);
        drop(locked);
        self.release_trees(&map.account, old);
        Ok(())
    }

    /// Refuses all requests from now on and frees what only this map holds. A second time nothing is left to do. No record
    /// names the map any more.
    pub(crate) fn close(&self, map: &Map) {
        let closed = |_| Tree { root: AtomicU32::new(CLOSED), height: 0, mapped: 0 };
        let trees = Trees { top: 0, stripes: std::array::from_fn(closed) };
        let mut locked = map.seize();
        let old = self.exchange_trees(map, &mut locked, trees);
        drop(locked);
        self.release_trees(&map.account, old);
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
