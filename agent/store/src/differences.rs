//! What two maps do not share: found by walking both trees at once and skipping every node they have in common.

use std::sync::atomic::Ordering::Relaxed;

use crate::{
    frames::Engine,
    map::{FANOUT, FANOUT_BITS, LEAF_BLOCKS, Map, Refused, STRIPES},
};

impl Engine {
    /// Runs of blocks (first, count) that the two maps do not map to the same frame, in order. Looks only at what they
    /// do not share. Neither changes meanwhile, or what changes may or may not be in the result.
    pub(crate) fn differences(&self, a: &Map, b: &Map) -> Result<Vec<(u64, u64)>, Refused> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (leaf, bits) in self.differing_leaves(a, b)? {
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

    /// The same leaf by leaf: number, and a bit for each of its blocks.
    pub(crate) fn differing_leaves(&self, a: &Map, b: &Map) -> Result<Vec<(u64, u64)>, Refused> {
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
        Ok(leaves)
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
