//! Whole maps: made, forked, grown, put in the place of others, closed.

use super::*;

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

    /// The trees of a copy of the map as it is now, for a disk of at least its size. What little that takes others make room
    /// for, if they may.
    pub(crate) fn fork(&self, map: &Map, size: u64) -> Result<Trees, Refused> {
        self.with_room(|refused| *refused == Refused::Full, || self.fork_frozen(&map.freeze(), size))
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
