//! Requests: what a disk is asked. Offsets and lengths were checked against its size.

use super::*;

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
                    let soon = entries[at + run..].iter().take(2);
                    soon.for_each(|entry| self.frames.blocks.prefetch(entry.load(Relaxed)));
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
        let lacks_room = |refused: &Refused| *refused == Refused::Full && map.account.spills();
        while !data.is_empty() {
            let block = offset / BLOCK_BYTES;
            let from = (offset % BLOCK_BYTES) as usize;
            let part = from != 0 || data.len() < BLOCK;
            let len = if part {
                data.len().min(BLOCK - from)
            } else {
                (data.len() / BLOCK).min(FANOUT - (block % LEAF_BLOCKS) as usize) * BLOCK
            };
            // of a piece that is refused nothing was changed
            self.with_room(lacks_room, || {
                let piece = &data[..len];
                if part { self.write_part(map, block, from, piece) } else { self.write_blocks(map, block, piece) }
            })?;
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
        // what was cleared stays so; the rest needs a node of its own, or a frame for a part of a block
        self.with_room(
            |refused| *refused == Refused::Full && map.account.spills(),
            || self.clear_range(map, offset, len),
        )
    }

    fn clear_range(&self, map: &Map, offset: u64, len: u64) -> Result<(), Refused> {
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

    /// A bit for each block of the leaf whose frame is this map's alone, and in memory.
    pub(crate) fn fresh_bits(&self, map: &Map, leaf: u64) -> u64 {
        let mut bits = 0;
        self.for_each_alone(map, leaf, |at, frame| {
            bits |= u64::from(!self.frames.marks.get(frame).is_away()) << at;
        });
        bits
    }

    /// Nodes that are this map's alone.
    pub(crate) fn alone_nodes(&self, map: &Map) -> usize {
        fn below(engine: &Engine, node: u32, level: u32) -> usize {
            if node == 0 || engine.nodes.references(node).load(Relaxed) != 1 {
                return 0;
            }
            let children = engine.nodes.entries(node).iter().filter(|_| level > 0);
            1 + children.map(|child| below(engine, child.load(Relaxed), level - 1)).sum::<usize>()
        }
        let trees = map.freeze();
        let open = trees.iter().filter(|tree| tree.check_open().is_ok());
        open.map(|tree| below(self, tree.root.load(Relaxed), tree.height)).sum()
    }

    /// Shows the frames of a leaf that are this map's alone, with their place in it. Nobody drops them meanwhile: the stripe
    /// is locked, shared.
    pub(crate) fn for_each_alone(&self, map: &Map, leaf: u64, mut see: impl FnMut(usize, u32)) {
        let (stripe, index) = place(leaf);
        let tree = map.stripes[stripe].0.read();
        for (at, entry) in self.alone_leaf(&tree, index).iter().enumerate() {
            let frame = entry.load(Relaxed);
            if frame != 0 && self.frames.count(frame) == 1 {
                see(at, frame);
            }
        }
    }

    /// Has `change` change entries of a leaf that is this map's alone, while nobody reads or writes it. None are shown when it
    /// is not, or gone.
    pub(crate) fn change_alone(&self, map: &Map, leaf: u64, change: impl FnOnce(&[AtomicU32])) {
        let (stripe, index) = place(leaf);
        let tree = map.stripes[stripe].0.write();
        change(self.alone_leaf(&tree, index));
    }

    /// The entries of a leaf when nobody else reaches it; none otherwise.
    fn alone_leaf(&self, tree: &Tree, index: u64) -> &[AtomicU32] {
        if tree.check_open().is_err() {
            return &[];
        }
        let mut node = tree.root.load(Relaxed);
        for level in (0..=tree.height).rev() {
            // Acquire: whoever else reached it is done
            if node == 0 || self.nodes.references(node).load(Acquire) != 1 {
                return &[];
            }
            if level > 0 {
                node = self.nodes.entries(node)[entry(index, level - 1)].load(Relaxed);
            }
        }
        self.nodes.entries(node)
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
