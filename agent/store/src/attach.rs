//! What a store does with the memory that an earlier process left: believes the maps, and finds everything else again.
//!
//! Believed are the records (each has a checksum) and the trees below their tops (`map.rs` says why they are whole
//! whenever the process ended). Found again: how many references each node and frame has, by walking every node once;
//! which numbers are free; how many blocks each tree maps; and the index, from the tags beside the counts. So nothing that
//! was torn by the end can be believed, and what only the earlier process knew (snapshots nobody kept, images half brought
//! in, frames taken and not yet named) is free again.
//!
//! The walk is by several threads: whoever counts a node first goes on below it. The index is filled shard by shard, from
//! runs sorted by shard, so that each table is filled while it is near the processor.

use std::sync::atomic::{
    AtomicBool, AtomicUsize,
    Ordering::{AcqRel, Relaxed},
};

use muster_common::ByteLen;

use crate::{
    arena::BLOCK,
    frames::{ALONE, Engine, STICKY},
    index::SHARDS,
    map::FANOUT,
    marks::Mark,
};

/// Below this many frames one thread is quicker than several.
const FEW: u32 = 100_000;

/// A tree to walk: its top, and the level of that.
pub(crate) struct Found {
    pub(crate) top: u32,
    pub(crate) level: u32,
    /// A name in it led nowhere.
    pub(crate) damaged: AtomicBool,
}

impl Found {
    pub(crate) fn new(top: u32, level: u32) -> Found {
        Found { top, level, damaged: AtomicBool::new(false) }
    }
}

fn threads(work: u32) -> usize {
    if work < FEW { 1 } else { std::thread::available_parallelism().map_or(1, |n| n.get().min(16)) }
}

impl Engine {
    /// Counts every reference below these trees again. When a name leads nowhere, one of the trees it lies below is marked
    /// as damaged; then [`Engine::is_whole`] says which ones are.
    pub(crate) fn count_all(&self, trees: &[Found]) {
        let (frames, nodes) = (self.frames.pool.dealt_before(), self.nodes.pool.dealt_before());
        let threads = threads(frames);
        let parts = |of: u32, n: usize| {
            let each = of.div_ceil(threads as u32);
            (each * n as u32).min(of)..(each * (n as u32 + 1)).min(of)
        };
        std::thread::scope(|scope| {
            for n in 0..threads {
                scope.spawn(move || {
                    let part = parts(frames, n);
                    self.frames.populate_words(part.clone());
                    self.frames.forget_counts(part);
                });
            }
        });
        // the tops are counted here; what lies below them is the work to share
        let mut work = Vec::new();
        for (number, tree) in trees.iter().enumerate() {
            if tree.top == 0 || tree.top >= nodes || self.nodes.references(tree.top).fetch_add(1, Relaxed) != 0 {
                tree.damaged.store(true, Relaxed);
                continue;
            }
            for root in self.nodes.entries(tree.top) {
                match root.load(Relaxed) {
                    0 => {}
                    root => work.push((number, root, tree.level - 1)),
                }
            }
        }
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(&(number, root, level)) = work.get(next.fetch_add(1, Relaxed)) {
                        if !self.count_below(root, level, (frames, nodes)) {
                            trees[number].damaged.store(true, Relaxed);
                        }
                    }
                });
            }
        });
    }

    /// False when something below names what cannot be.
    fn count_below(&self, node: u32, level: u32, most: (u32, u32)) -> bool {
        if node >= most.1 {
            return false;
        }
        let references = self.nodes.references(node);
        let before = references.fetch_update(AcqRel, Relaxed, |count| (count < STICKY).then_some(count + 1));
        if before != Ok(0) {
            return true;
        }
        let mut sound = true;
        for entry in self.nodes.entries(node) {
            match entry.load(Relaxed) {
                0 => {}
                frame if level == 0 && frame < most.0 => self.frames.count_again(frame),
                _ if level == 0 => sound = false,
                child => sound &= self.count_below(child, level - 1, most),
            }
        }
        sound
    }

    /// Whether all names below this node lead somewhere.
    pub(crate) fn is_whole(&self, node: u32, level: u32) -> bool {
        let (frames, nodes) = (self.frames.pool.dealt_before(), self.nodes.pool.dealt_before());
        node != 0
            && node < nodes
            && self.nodes.entries(node).iter().map(|entry| entry.load(Relaxed)).filter(|&named| named != 0).all(
                |named| {
                    if level == 0 { named < frames } else { self.is_whole(named, level - 1) }
                },
            )
    }

    /// Before everything is counted once more.
    pub(crate) fn forget_nodes(&self) {
        for node in 1..self.nodes.pool.dealt_before() {
            self.nodes.references(node).store(0, Relaxed);
        }
    }

    /// The free lists of both pools, the marks, and the index, once all references are counted. How many numbers in use had
    /// no memory: damage.
    pub(crate) fn find_again(&self) -> usize {
        let frames = self.frames.pool.dealt_before();
        self.frames.marks.adopt(frames);
        let away = |frame| self.frames.marks.get(frame).is_away();
        let wrong = self.frames.pool.adopt(|frame| self.frames.count(frame) > 0, away, &self.budget)
            + self.nodes.pool.adopt(|node| self.nodes.references(node).load(Relaxed) > 0, |_| false, &self.budget);
        if self.frames.marks.counts().0 > 0 {
            for frame in 1..frames {
                if away(frame) && self.frames.count(frame) == 0 {
                    // the process ended before the mark was taken away, or before anybody named it
                    self.frames.marks.set(frame, Mark::Here);
                }
            }
            self.budget.credit(self.frames.marks.counts().0 * BLOCK as u64);
        }
        self.fill_index(frames);
        wrong
    }

    fn fill_index(&self, frames: u32) {
        let threads = threads(frames);
        let each = SHARDS.div_ceil(threads);
        std::thread::scope(|scope| {
            for n in 0..threads {
                scope.spawn(move || {
                    let shards = (each * n).min(SHARDS)..(each * (n + 1)).min(SHARDS);
                    let mut runs: Vec<Vec<u64>> = vec![Vec::new(); shards.len()];
                    let expected = frames as usize / SHARDS;
                    runs.iter_mut().for_each(|run| run.reserve(expected + expected / 8));
                    for frame in 1..frames {
                        if self.frames.count(frame) == 0 || u32::from(self.frames.domain(frame)) == ALONE {
                            continue;
                        }
                        let tag = self.frames.tag(frame);
                        let shard = crate::index::shard_of(tag);
                        if shards.contains(&shard) {
                            runs[shard - shards.start].push(u64::from(tag) << 32 | u64::from(frame));
                        }
                    }
                    for (shard, run) in shards.zip(runs) {
                        self.frames.index.fill(shard, &run, &self.budget);
                    }
                });
            }
        });
    }

    /// Blocks mapped below a root, of roots that many trees share counted once.
    pub(crate) fn mapped_below(&self, root: u32, level: u32, known: &mut std::collections::HashMap<u32, u64>) -> u64 {
        if root == 0 {
            return 0;
        }
        if level == 0 || self.nodes.references(root).load(Relaxed) == 1 {
            return self.mapped_once(root, level, known);
        }
        if let Some(&mapped) = known.get(&root) {
            return mapped;
        }
        let mapped = self.mapped_once(root, level, known);
        known.insert(root, mapped);
        mapped
    }

    fn mapped_once(&self, node: u32, level: u32, known: &mut std::collections::HashMap<u32, u64>) -> u64 {
        let entries = self.nodes.entries(node);
        debug_assert_eq!(entries.len(), FANOUT);
        let named = entries.iter().map(|entry| entry.load(Relaxed)).filter(|&entry| entry != 0);
        if level == 0 {
            named.count() as u64
        } else {
            named.map(|child| self.mapped_below(child, level - 1, known)).sum()
        }
    }
}

/// What was found in the memory an earlier process left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttachReport {
    pub images: usize,
    pub volumes: usize,
    pub snapshots: usize,
    /// Frames in use.
    pub frames: u64,
    pub resident_bytes: ByteLen,
    /// From the call to a store that serves.
    pub took: std::time::Duration,
    /// What could not be believed, for people. Empty as a rule.
    pub faults: Vec<String>,
}
