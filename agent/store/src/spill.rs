//! Frames that went to a file on a local disk because memory was full, and back.
//!
//! Only volumes that say so ([`crate::WhenFull::Spill`]) spill, and only blocks that are theirs alone: frames with one
//! reference, below nodes with one reference. So nobody else ever waits for a disk because of them. Which ones: a clock hand
//! goes over the leaves of those volumes; a frame read since it last came by is passed over once. Of a volume with a
//! reservation only what it has beyond that. While a snapshot is held, what it shares does not leave.
//!
//! The block lies in the (sparse) file at a number that has no memory, and that is what the leaf names from then on, so there
//! is no table to keep. The frame itself is free, with its memory, for the writer who needs one: nothing is given back to
//! the machine, which would interrupt every processor for each page. The file is read and written with `O_DIRECT` where that
//! works: pages of it in the kernel's cache would be memory that nobody counts.
//!
//! ```text
//!   frame n here --- spill: count n up, write it at a number m without memory, mark m away; then, when the leaf still names
//!                    n and nobody else does: the index lists m, the leaf names m, n is free ------------------> m away
//!   m away --------- second read in a row, and there is room: fill m, mark it here ---------------------------> m here
//!   m away --------- last reference dropped: mark it here ----------------------------> m free without memory
//! ```
//!
//! No lock is held while the disk writes: what the leaf names then is looked at again, alone with it. Reading back, dropping
//! and bringing back a block that is away exclude each other by the lock of its slot ([`LOCKS`]). A process that dies on the
//! way leaves a number away that nobody names, which whoever attaches finds free. Readers take no lock to read what is here
//! (`marks.rs`).

use std::{
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::PathBuf,
    sync::{Arc, Weak},
};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use crate::{
    arena::{BLOCK, Words},
    config::SpillConfig,
    frames::{Engine, Failed},
    map::{LEAF_BLOCKS, Map, Refused},
    marks::{Mark, Marks},
    sync::{
        Mutex, Padded,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{Relaxed, Release},
        },
    },
};

const LOCKS: usize = 64;
/// Frames spilled at a time: few enough that a writer waits a millisecond, enough that the next ones do not wait.
const BATCH: usize = 64;
/// A hole costs the file system up to a millisecond on a busy disk, whether it is of one block or of a thousand: so many
/// unused ones in a row are worth one (256 KiB). Fewer are written anew.
const WORTH: u32 = 64;
/// Numbers looked at in a search for unused ones (256 MiB of the file), so that nobody waits long for it.
const LOOKED_AT: u32 = 1 << 16;
/// Holes made at a time.
const HOLES: usize = 8;

/// A block that `O_DIRECT` takes.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

pub(crate) struct Spill {
    file: File,
    path: PathBuf,
    /// Frames that may be away.
    limit: u64,
    locks: [Padded<Mutex<()>>; LOCKS],
    /// A bit a frame: used since the hand came by.
    used: Words,
    /// When it was opened.
    was_empty: bool,
    hand: Mutex<Hand>,
    /// Maps the hand does not know yet.
    newcomers: Mutex<Vec<Weak<Map>>>,
    /// What takes room in the file. Of whoever writes blocks to it and marks them, or makes holes.
    stored: Mutex<Stored>,
    written: AtomicU64,
    read: AtomicU64,
}

/// The clock hand, and whom it goes over.
#[derive(Default)]
struct Hand {
    maps: Vec<Weak<Map>>,
    map: usize,
    /// The leaf it stands at.
    leaf: u64,
    /// What is written to the file together.
    buffer: Vec<u8>,
}

/// Which numbers' blocks may take room in the file, away or not.
#[derive(Default)]
struct Stored {
    /// A bit a number.
    bits: Vec<u64>,
    /// The number to look for unused ones from.
    next: u32,
}

/// A block on its way to the disk. One reference to its frame is the spiller's.
#[derive(Clone)]
struct Leaving {
    map: Arc<Map>,
    leaf: u64,
    /// Its place in the leaf.
    at: usize,
    frame: u32,
    /// The number by which it is found in the file; 0 while it has none.
    to: u32,
}

impl Spill {
    pub(crate) fn open(config: &SpillConfig, frames: u32, keep: bool) -> io::Result<Spill> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let direct = options.clone().custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32).open(&config.file);
        // tmpfs and some others refuse it
        let file = match direct {
            Ok(file) => file,
            Err(_) => options.open(&config.file)?,
        };
        // before anything in it is thrown away
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(io::Error::other("it is in use by another process: each agent needs a file of its own"));
        }
        let file_len = file.metadata()?.len();
        let was_empty = file_len == 0;
        if !keep {
            file.set_len(0)?;
        }
        Ok(Spill {
            file,
            path: config.file.clone(),
            limit: config.limit.bytes() / BLOCK as u64,
            locks: std::array::from_fn(|_| Padded::default()),
            used: Words::reserve(frames as usize / 32 + 1, None)?,
            was_empty,
            hand: Mutex::default(),
            newcomers: Mutex::default(),
            stored: Mutex::new(Stored::of(if keep { file_len } else { 0 })),
            written: AtomicU64::new(0),
            read: AtomicU64::new(0),
        })
    }

    /// Nothing was in the file when it was opened.
    pub(crate) fn was_empty(&self) -> bool {
        self.was_empty
    }

    /// Frames that may be away.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// From now on the hand goes over this map, too.
    pub(crate) fn watch(&self, map: &Arc<Map>) {
        // not the hand: whoever has it may wait for the disk
        let mut newcomers = self.newcomers.lock();
        newcomers.retain(|map| map.strong_count() > 0);
        newcomers.push(Arc::downgrade(map));
    }

    pub(crate) fn discard(&self) {
        let _ = std::fs::remove_file(&self.path);
    }

    fn lock(&self, frame: u32) -> &Mutex<()> {
        &self.locks[frame as usize % LOCKS].0
    }

    /// Notes that the frame is in use.
    #[inline]
    pub(crate) fn touch(&self, frame: u32) {
        let (word, bit) = (&self.used.all()[frame as usize / 32], 1 << (frame % 32));
        // mostly set already: then no cache line is taken from anybody
        if word.load(Relaxed) & bit == 0 {
            word.fetch_or(bit, Relaxed);
        }
    }

    /// Whether it was in use since this was last asked.
    fn was_used(&self, frame: u32) -> bool {
        let (word, bit) = (&self.used.all()[frame as usize / 32], 1 << (frame % 32));
        word.load(Relaxed) & bit != 0 && word.fetch_and(!bit, Relaxed) & bit != 0
    }

    fn fetch(&self, frame: u32, block: &mut Aligned) -> Result<(), Failed> {
        self.read.fetch_add(1, Relaxed);
        self.file.read_exact_at(&mut block.0, u64::from(frame) * BLOCK as u64).map_err(|_| Failed::Lost)
    }

    /// Gives blocks of the file back to the file system that nobody wants any more, where `least` and more lie in a row: so many
    /// holes. An error only costs room on the disk: blocks are written anew before they are read again.
    fn make_holes(&self, marks: &Marks, least: u32, holes: usize) {
        let mut stored = self.stored.lock();
        // nobody spills meanwhile: what is not away now stays so
        if marks.counts().0 == 0 {
            if !stored.bits.is_empty() && self.file.set_len(0).is_ok() {
                *stored = Stored::default();
            }
            return;
        }
        for _ in 0..holes {
            let unused = |number| marks.get(number) != Mark::Away;
            let Some(run) = stored.find(least, unused) else { return };
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let (first, len) = (u64::from(run.start), run.len() as u64);
            let _ = fallocate(&self.file, hole, first * BLOCK as u64, len * BLOCK as u64);
            stored.remove(run);
        }
    }

    /// Writes blocks to the file, at numbers in a row that nobody names yet, and marks them; false when the disk did not take
    /// them.
    fn write(&self, marks: &Marks, run: &[Leaving], blocks: &[u8]) -> bool {
        let mut stored = self.stored.lock();
        if self.file.write_all_at(blocks, u64::from(run[0].to) * BLOCK as u64).is_err() {
            return false;
        }
        for one in run {
            // what had the number before was another block
            self.was_used(one.to);
            marks.set(one.to, Mark::Away);
            stored.insert(one.to);
        }
        drop(stored);
        self.written.fetch_add(run.len() as u64, Relaxed);
        true
    }

    /// Whether so many more blocks would take more room on the disk than the file may.
    fn is_full(&self, more: usize) -> bool {
        let taken = self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512 / BLOCK as u64);
        taken + more as u64 > self.limit
    }

    /// Blocks written to the file and read from it since the start.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.written.load(Relaxed), self.read.load(Relaxed))
    }
}

impl Stored {
    /// All that a file of so many bytes may hold.
    fn of(bytes: u64) -> Stored {
        let words = (bytes / BLOCK as u64).div_ceil(64);
        Stored { bits: vec![u64::MAX; words as usize], next: 0 }
    }

    fn has(&self, number: u32) -> bool {
        self.bits.get(number as usize / 64).is_some_and(|word| word >> (number % 64) & 1 == 1)
    }

    fn insert(&mut self, number: u32) {
        let word = number as usize / 64;
        if word >= self.bits.len() {
            self.bits.resize(word + 1, 0);
        }
        self.bits[word] |= 1 << (number % 64);
    }

    fn remove(&mut self, numbers: Range<u32>) {
        for number in numbers {
            if let Some(word) = self.bits.get_mut(number as usize / 64) {
                *word &= !(1 << (number % 64));
            }
        }
    }

    /// The next `least` or more in a row that `unused` says yes to, from where the last search ended, around the end. It looks
    /// at [`LOOKED_AT`] only.
    fn find(&mut self, least: u32, unused: impl Fn(u32) -> bool) -> Option<Range<u32>> {
        let mut looked = 0;
        while looked < LOOKED_AT.min(self.bits.len() as u32 * 64) {
            let first = self.next;
            let Some(&word) = self.bits.get(first as usize / 64) else {
                self.next = 0;
                continue;
            };
            if word == 0 && first.is_multiple_of(64) {
                (self.next, looked) = (first + 64, looked + 64);
                continue;
            }
            let mut end = first;
            while end - first < LOOKED_AT && self.has(end) && unused(end) {
                end += 1;
            }
            looked += end - first + 1;
            if end - first >= least {
                self.next = end;
                return Some(first..end);
            }
            self.next = end + 1;
        }
        None
    }
}

impl Engine {
    /// Before there are readers, of a store that may spill.
    pub(crate) fn expect_spilling(&self) {
        if self.spill.is_some() {
            let blocks = &self.frames.blocks;
            self.frames.marks.arm();
            self.frames.pool.set_spare(BATCH, &self.budget, |numbers| blocks.use_small(numbers));
        }
    }

    /// Gives room on the disk back that spilled blocks do not take any more, some at a time.
    pub(crate) fn tidy_spilled(&self) {
        if let Some(spill) = &self.spill {
            spill.make_holes(&self.frames.marks, WORTH, HOLES);
        }
    }

    /// Reads a frame that is away, and brings it back when it is wanted again.
    #[cold]
    pub(crate) fn read_away(&self, frame: u32, from: usize, buf: &mut [u8]) -> Result<(), Failed> {
        let Some(spill) = &self.spill else { return Err(Failed::Lost) };
        let mut block = Aligned([0; BLOCK]);
        {
            let _alone = spill.lock(frame).lock();
            if self.frames.marks.get(frame) != Mark::Away {
                // brought back meanwhile: the caller sees that and reads it there
                return Ok(());
            }
            spill.fetch(frame, &mut block)?;
            if !self.is_of(frame, &block.0) {
                self.frames.marks.set(frame, Mark::Gone);
                return Err(Failed::Lost);
            }
            buf.copy_from_slice(&block.0[from..from + buf.len()]);
            let again = spill.was_used(frame);
            spill.touch(frame);
            if !again || !self.budget.charge(BLOCK as u64) {
                return Ok(());
            }
            self.frames.pool.lend(frame);
            self.frames.blocks.fill(frame, &block.0);
            self.frames.marks.set(frame, Mark::Here);
        }
        Ok(())
    }

    /// A frame without references is no longer away. False when it was, and so has no memory now: it is back in the pool
    /// then.
    #[cold]
    pub(crate) fn unmark(&self, frame: u32) -> bool {
        let mark = self.frames.marks.get(frame);
        if mark == Mark::Here {
            return true;
        }
        let alone = self.spill.as_ref().map(|spill| spill.lock(frame).lock());
        let mark = self.frames.marks.get(frame);
        if mark != Mark::Here {
            self.frames.marks.set(frame, Mark::Here);
        }
        drop(alone);
        if !mark.is_away() {
            return true;
        }
        self.frames.pool.put_hollow(frame);
        false
    }

    /// Spills some frames; false when there is nothing to spill, or no room for it. `again`: the caller had it make room
    /// before, and that did not suffice.
    #[cold]
    pub(crate) fn make_room(&self, again: bool) -> bool {
        let Some(spill) = &self.spill else { return false };
        let mut hand = spill.hand.lock();
        // who waits here finds room made by whom it waited for
        if !again && self.has_room() {
            return true;
        }
        let chosen = self.choose(spill, &mut hand);
        let (moved, changed) = self.send(spill, &mut hand.buffer, chosen);
        let mut freed: Vec<u32> = moved.iter().map(|one| one.frame).collect();
        let blocks = &self.frames.blocks;
        // Numbers for the next time, while there is still something to pay with what is beside them: a page of memory does
        // for hundreds.
        while !self.frames.pool.has_spare(&self.budget, |numbers| blocks.use_small(numbers))
            && let Some(frame) = freed.pop()
        {
            blocks.give_back(frame..frame + 1);
            self.frames.pool.put_hollow(frame);
            self.budget.credit(BLOCK as u64);
        }
        freed.into_iter().for_each(|frame| self.put_frame(frame));
        // what others changed meanwhile may have left room, and if not there are other blocks
        !moved.is_empty() || changed
    }

    /// Charges the budget for what the store needs for itself, whoever's blocks have to leave memory for it. The caller holds no
    /// lock of a map.
    pub(crate) fn charge_or_spill(&self, bytes: u64) -> bool {
        let charge = || if self.charge(bytes) { Ok(()) } else { Err(Refused::Full) };
        self.with_room(|_| true, charge).is_ok()
    }

    /// Does it again as long as it is refused for want of room and some can be made.
    #[inline]
    pub(crate) fn with_room<T, E>(
        &self,
        lacks_room: impl Fn(&E) -> bool,
        mut once: impl FnMut() -> Result<T, E>,
    ) -> Result<T, E> {
        let mut again = false;
        loop {
            match once() {
                Err(refused) if lacks_room(&refused) && self.make_room(again) => again = true,
                result => return result,
            }
        }
    }

    /// Whether some frames fit, and what goes with them.
    fn has_room(&self) -> bool {
        const SOME: usize = BATCH / 2;
        self.budget.charged() + (SOME * BLOCK) as u64 <= self.budget.limit() || self.frames.pool.kept() >= SOME
    }

    /// Blocks that were not in use since the hand came by last. They may not be dropped until they are sent.
    fn choose(&self, spill: &Spill, hand: &mut Hand) -> Vec<Leaving> {
        hand.maps.append(&mut spill.newcomers.lock());
        hand.maps.retain(|map| map.strong_count() > 0);
        let most = BATCH.min(spill.limit.saturating_sub(self.frames.marks.counts().0) as usize);
        let (mut chosen, mut turns) = (Vec::with_capacity(most), 0);
        // twice around: the first time everything may have been in use
        while chosen.len() < most && turns <= 2 * hand.maps.len() {
            let Some(map) = hand.maps.get(hand.map).and_then(Weak::upgrade) else {
                (hand.map, hand.leaf, turns) = (0, 0, turns + 1);
                if hand.maps.is_empty() {
                    break;
                }
                continue;
            };
            match self.choose_from(spill, &map, hand.leaf, most, &mut chosen) {
                Some(leaf) => hand.leaf = leaf,
                None => {
                    (hand.map, hand.leaf, turns) = (hand.map + 1, 0, turns + 1);
                    if hand.map >= hand.maps.len() {
                        hand.map = 0;
                    }
                }
            }
        }
        chosen
    }

    /// Goes over the leaves of a map from `leaf` on until `most` are chosen; the leaf to go on with.
    fn choose_from(
        &self,
        spill: &Spill,
        map: &Arc<Map>,
        leaf: u64,
        most: usize,
        chosen: &mut Vec<Leaving>,
    ) -> Option<u64> {
        let leaves = map.size().div_ceil(BLOCK as u64).div_ceil(LEAF_BLOCKS);
        let account = &map.account;
        let mut may_leave = account.may_leave();
        if may_leave == 0 && account.counts_on_blocks() >= map.mapped() {
            return None;
        }
        for leaf in leaf..leaves {
            self.for_each_alone(map, leaf, |at, frame| {
                let counted = account.counts_on(leaf, 1 << at);
                let may = chosen.len() < most && (may_leave > 0 || !counted);
                if may && self.frames.marks.get(frame) == Mark::Here && !spill.was_used(frame) {
                    self.retain_frame(frame);
                    chosen.push(Leaving { map: Arc::clone(map), leaf, at, frame, to: 0 });
                    may_leave -= u64::from(counted);
                }
            });
            if chosen.len() == most {
                return Some(leaf);
            }
        }
        None
    }

    /// Writes what was chosen to the file and has the maps name it there. Those that moved, whose frames are the caller's; and
    /// whether some did not because they were changed meanwhile.
    fn send(&self, spill: &Spill, buffer: &mut Vec<u8>, chosen: Vec<Leaving>) -> (Vec<Leaving>, bool) {
        buffer.resize((BATCH + 1) * BLOCK, 0);
        // O_DIRECT wants memory that is aligned as blocks are
        let start = buffer.as_ptr().align_offset(BLOCK);
        let (mut sound, mut stay) = self.copy_sound(&mut buffer[start..], chosen);
        // those are not chosen again
        let mut changed = !stay.is_empty();
        // where others were, rather than take more of the disk than it may
        let again = spill.is_full(sound.len());
        let small = |numbers| self.frames.blocks.use_small(numbers);
        let numbers = self.frames.pool.take_hollow(sound.len(), again, &self.budget, small);
        stay.extend(sound.split_off(numbers.len()));
        sound.iter_mut().zip(numbers).for_each(|(one, to)| one.to = to);
        let mut written = Vec::with_capacity(sound.len());
        let mut at = start;
        for run in sound.chunk_by(|one, next| one.to + 1 == next.to) {
            let len = run.len() * BLOCK;
            // when the disk is full or broken nothing happened, and the writer is refused if nobody else makes room
            let done = spill.write(&self.frames.marks, run, &buffer[at..at + len]);
            if done { &mut written } else { &mut stay }.extend_from_slice(run);
            at += len;
        }
        // some of those numbers were new to the file
        if spill.is_full(0) {
            spill.make_holes(&self.frames.marks, 1, BATCH);
        }
        let (moved, still) = self.name_all_anew(&written);
        changed |= !still.is_empty();
        stay.into_iter().chain(still).for_each(|one| self.call_back(&one));
        (moved, changed)
    }

    /// Copies the blocks that are what was stored, one after the other; and those that are not, now marked.
    fn copy_sound(&self, buffer: &mut [u8], chosen: Vec<Leaving>) -> (Vec<Leaving>, Vec<Leaving>) {
        let (blocks, _) = buffer.as_chunks_mut::<BLOCK>();
        let (mut sound, mut damaged) = (Vec::with_capacity(chosen.len()), Vec::new());
        for one in chosen {
            let block = &mut blocks[sound.len()];
            self.frames.blocks.read(one.frame, 0, block);
            if self.is_of(one.frame, block) {
                sound.push(one);
            } else {
                // it stays where whoever looks for damage finds it
                self.is_damaged(one.frame);
                damaged.push(one);
            }
        }
        (sound, damaged)
    }

    /// Has the maps name blocks in the file. Those that moved, and those that did not because they were changed meanwhile.
    fn name_all_anew(&self, written: &[Leaving]) -> (Vec<Leaving>, Vec<Leaving>) {
        let (mut moved, mut still) = (Vec::with_capacity(written.len()), Vec::new());
        for of_leaf in written.chunk_by(|one, next| one.leaf == next.leaf && Arc::ptr_eq(&one.map, &next.map)) {
            self.change_alone(&of_leaf[0].map, of_leaf[0].leaf, |entries| {
                for one in of_leaf {
                    if self.name_anew(one, entries) { &mut moved } else { &mut still }.push(one.clone());
                }
            });
        }
        (moved, still)
    }

    /// Has the leaf's entry name the block in the file; false when it changed meanwhile, or somebody else has the block now.
    fn name_anew(&self, one: &Leaving, entries: &[AtomicU32]) -> bool {
        let Some(entry) = entries.get(one.at).filter(|entry| entry.load(Relaxed) == one.frame) else { return false };
        let (account, bit) = (&one.map.account, 1 << one.at);
        let counted = account.counts_on(one.leaf, bit);
        if !account.leave(one.leaf, bit) {
            return false;
        }
        if !self.renumber(one.frame, one.to) {
            if counted {
                account.found_fresh(one.leaf, bit);
            }
            return false;
        }
        entry.store(one.to, Release);
        true
    }

    /// The block stays where it is.
    fn call_back(&self, one: &Leaving) {
        if one.to != 0 {
            if self.frames.marks.get(one.to) == Mark::Away {
                self.frames.marks.set(one.to, Mark::Here);
            }
            self.frames.pool.put_hollow(one.to);
        }
        self.release_frames(&one.map.account, &[one.frame]);
    }
}

#[cfg(test)]
mod tests {
    use muster_block::{BlockDevice, WriteFlags, conformance::Random};
    use muster_common::{ByteLen, VolumeId};
    use proptest::prelude::*;

    use super::*;
    use crate::{Pages, Store, StoreConfig, VolumeSpec, WhenFull};

    /// A store that spills, and a volume with so many blocks, each of which is `block(n)`.
    fn store(place: &std::path::Path, blocks: u64, reservation: Option<ByteLen>) -> (Store, Arc<crate::Volume>) {
        let spill = Some(SpillConfig { file: place.join("spilled"), limit: ByteLen::mib(16) });
        let config = StoreConfig { pages: Pages::Small, spill, ..StoreConfig::new(ByteLen::mib(8)) };
        let store = Store::open(config).unwrap();
        let spec = VolumeSpec::blank(VolumeId::random(), ByteLen::mib(16));
        let volume = store.create_volume(VolumeSpec { when_full: WhenFull::Spill, reservation, ..spec }).unwrap();
        (0..blocks).for_each(|n| volume.write_at(n * 4096, &block(n), WriteFlags::default()).unwrap());
        (store, volume)
    }

    fn block(n: u64) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        Random(n).fill(&mut block);
        block
    }

    /// The block as it is read.
    fn read(volume: &crate::Volume, n: u64) -> Option<[u8; BLOCK]> {
        let mut found = [0; BLOCK];
        volume.read_at(n * 4096, &mut found).ok().map(|()| found)
    }

    #[test]
    fn damage_is_not_taken_to_the_disk_and_not_dealt_to_others() {
        let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/../../target").unwrap();
        let (store, volume) = store(place.path(), 200, None);
        let engine = store.engine();
        let spill = engine.spill.as_ref().unwrap();
        let mut hand = spill.hand.lock();
        // one is damaged before it is looked at, one found while it is on its way
        let chosen = engine.choose(spill, &mut hand);
        assert_eq!(chosen.len(), BATCH);
        let (unseen, seen) = (&chosen[3], &chosen[5]);
        let blocks = [unseen, seen].map(|one| (one.frame, one.leaf * LEAF_BLOCKS + one.at as u64));
        engine.frames.flip_a_bit(unseen.frame);
        engine.frames.flip_a_bit(seen.frame);
        assert!(engine.is_damaged(seen.frame));
        let (moved, changed) = engine.send(spill, &mut hand.buffer, chosen);
        assert!(changed && moved.len() == BATCH - 2, "{}", moved.len());
        moved.iter().for_each(|one| engine.put_frame(one.frame));
        drop(hand);
        for (frame, n) in blocks {
            assert_eq!((engine.frames.marks.get(frame), read(&volume, n)), (Mark::Damaged, None));
        }
        assert!(
            (0..200).filter(|n| *n != blocks[0].1 && *n != blocks[1].1).all(|n| read(&volume, n) == Some(block(n)))
        );
        let mut damage = Vec::new();
        let mut from = 0;
        loop {
            let step = store.scrub(from, 1000, &mut |places| match places[0] {
                crate::Place::Volume(_, at) => Some(Box::new(block(at / 4096))),
                _ => None,
            });
            damage.extend(step.damage);
            from = step.next;
            if from == 0 {
                break;
            }
        }
        assert!(damage.len() == 2 && damage.iter().all(|one| one.repaired), "{damage:?}");
        assert!((0..200).all(|n| read(&volume, n) == Some(block(n))));
        assert!(store.audit().is_exact(), "{:?}", store.audit().faults);
    }

    #[test]
    fn a_block_that_is_damaged_in_the_file_has_memory_again_when_it_is_repaired() {
        let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/../../target").unwrap();
        let (store, volume) = store(place.path(), 100, None);
        let engine = store.engine();
        assert!(engine.make_room(true));
        let away = |n: &u32| engine.frames.marks.get(*n) == Mark::Away;
        let frames: Vec<u32> = (1..engine.frames.pool.stats().next).filter(away).collect();
        assert_eq!(frames.len(), BATCH);
        let charged = engine.budget.charged();
        let spill = engine.spill.as_ref().unwrap();
        spill.file.write_all_at(&vec![1; BLOCK * 2][..BLOCK], u64::from(frames[0]) * BLOCK as u64).unwrap_or_else(
            |_| {
                // O_DIRECT
                let file = OpenOptions::new().write(true).open(&spill.path).unwrap();
                file.write_all_at(&[1; BLOCK], u64::from(frames[0]) * BLOCK as u64).unwrap();
                file.sync_all().unwrap();
            },
        );
        let lost: Vec<u64> = (0..100).filter(|n| read(&volume, *n).is_none()).collect();
        assert_eq!((lost.len(), engine.frames.marks.get(frames[0])), (1, Mark::Gone));
        assert_eq!((store.stats().damaged_blocks, engine.budget.charged()), (1, charged));
        let step = store.scrub(0, 10_000, &mut |_| Some(Box::new(block(lost[0]))));
        assert!(step.damage.len() == 1 && step.damage[0].repaired, "{step:?}");
        assert_eq!(engine.budget.charged(), charged + BLOCK as u64);
        assert!((0..100).all(|n| read(&volume, n) == Some(block(n))));
        assert!(store.audit().is_exact(), "{:?}", store.audit().faults);
        // what is dropped while it is damaged and without memory has none in the pool either
        let mut hand = spill.hand.lock();
        let chosen = engine.choose(spill, &mut hand);
        let (moved, _) = engine.send(spill, &mut hand.buffer, chosen);
        drop(hand);
        moved.iter().for_each(|one| engine.put_frame(one.frame));
        engine.frames.marks.set(moved[0].to, Mark::Gone);
        let (kept, hollow) = (engine.frames.pool.kept(), engine.frames.marks.counts().0);
        let n = moved[0].leaf * LEAF_BLOCKS + moved[0].at as u64;
        volume.trim(n * 4096, 4096).unwrap();
        assert_eq!((engine.frames.pool.kept(), engine.frames.marks.counts().0), (kept, hollow - 1));
        assert!(store.audit().is_exact(), "{:?}", store.audit().faults);
    }

    #[test]
    fn nothing_is_kept_for_a_volume_that_is_deleted_while_its_blocks_are_on_their_way() {
        let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/../../target").unwrap();
        for before in [true, false] {
            let (store, volume) = store(place.path(), 1000, Some(ByteLen::kib(64)));
            let engine = store.engine();
            let spill = engine.spill.as_ref().unwrap();
            let mut hand = spill.hand.lock();
            let chosen = engine.choose(spill, &mut hand);
            assert!(!chosen.is_empty());
            let delete = |volume: Arc<crate::Volume>| {
                store.delete_volume(volume.id()).unwrap();
                drop(volume);
            };
            let moved = if before {
                delete(volume);
                let (moved, changed) = engine.send(spill, &mut hand.buffer, chosen);
                assert!(moved.is_empty() && changed);
                moved
            } else {
                let (moved, _) = engine.send(spill, &mut hand.buffer, chosen);
                delete(volume);
                moved
            };
            moved.iter().for_each(|one| engine.put_frame(one.frame));
            drop((moved, hand));
            assert!(store.audit().is_exact(), "{:?}", store.audit().faults);
            assert_eq!(store.stats().unique_blocks, 0);
        }
    }

    proptest! {
        #[test]
        fn what_is_stored_and_unused_is_found_in_rows(
            spans in prop::collection::vec((0..900u32, 1..90u32, any::<bool>()), 1..40),
            least in 1..70u32,
            next in 0..1000u32,
        ) {
            let mut stored = Stored { next, ..Stored::default() };
            let (mut model, mut used) = (vec![false; 1024], vec![false; 1024]);
            for (first, count, remove) in spans {
                let span = first..first + count;
                if remove {
                    stored.remove(span.clone());
                } else {
                    span.clone().for_each(|number| stored.insert(number));
                }
                span.clone().for_each(|number| model[number as usize] = !remove);
                used[span.end as usize] = true;
            }
            prop_assert!((0..1024).all(|number| stored.has(number) == model[number as usize]));
            let unused = |number: u32| !used[number as usize];
            // one search may begin inside a row, the next ones do not
            for _ in 0..2 {
                while let Some(run) = stored.find(least, unused) {
                    prop_assert!(run.len() >= least as usize);
                    for number in run.clone() {
                        prop_assert!(model[number as usize] && unused(number));
                        model[number as usize] = false;
                    }
                    stored.remove(run);
                }
            }
            let left = (0..1024).map(|number| model[number as usize] && unused(number)).collect::<Vec<_>>();
            let longest = left.split(|left| !left).map(<[bool]>::len).max().unwrap_or_default();
            prop_assert!(longest < least as usize, "{longest} in a row are left");
        }
    }
}
