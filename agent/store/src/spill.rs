//! Frames that went to a file on a local disk because memory was full, and back.
//!
//! Only volumes that say so ([`crate::WhenFull::Spill`]) spill, and only blocks that are theirs alone: frames with one
//! reference, below nodes with one reference. So nobody else ever waits for a disk because of them. Which ones: a clock hand
//! goes over the leaves of those volumes; a frame read or written since it last came by is passed over once.
//!
//! A frame keeps its number while it is away; its block lies at that number in the (sparse) file, so there is no table to
//! keep. The file is read and written with `O_DIRECT` where that works: pages of it in the kernel's cache would be memory
//! that nobody counts.
//!
//! ```text
//!   here --- spill: write to the file, mark away, give the memory back, credit -----------> away
//!   away --- second read in a row, and there is room (made, if it must): fill, mark here -> here
//!   away --- last reference dropped: mark here, number free without memory ---------------> free
//! ```
//!
//! Of one frame these exclude each other by the lock of its slot ([`LOCKS`]); whoever spills also holds the stripe of the
//! leaf that names the frame, so that it is not dropped meanwhile. Readers take no lock to read what is here (`marks.rs`).

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::PathBuf,
    sync::{Arc, Weak},
};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use crate::{
    arena::{BLOCK, Words},
    config::SpillConfig,
    frames::{Engine, Failed},
    map::Map,
    marks::{Mark, Marks},
    sync::{
        Mutex, Padded,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

const LOCKS: usize = 64;
/// Frames spilled at a time: few enough that a writer waits a millisecond, enough that the next ones do not wait.
const BATCH: usize = 64;
/// Blocks of the file given back together (8 MiB): a hole costs the file system a millisecond on a busy disk, whether it is
/// of one block or of a thousand.
const UNUSED: usize = 2048;
/// Holes made while all who read or write the file wait.
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
    /// Frames whose blocks in the file are not given back yet. One of them that is away again is left out then.
    unused: Mutex<Vec<u32>>,
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
        let was_empty = file.metadata()?.len() == 0;
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
            unused: Mutex::default(),
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
        let mut hand = self.hand.lock();
        hand.maps.retain(|map| map.strong_count() > 0);
        hand.maps.push(Arc::downgrade(map));
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

    /// Gives the disk's blocks back, many at a time.
    fn forget(&self, marks: &Marks, frame: u32) {
        let mut unused = self.unused.lock();
        unused.push(frame);
        if unused.len() >= UNUSED {
            let frames = std::mem::take(&mut *unused);
            drop(unused);
            self.punch(marks, frames);
        }
    }

    /// A hole for each run of frames that are not away. Blocks are written anew before they are read again, so an error only
    /// costs space.
    fn punch(&self, marks: &Marks, mut frames: Vec<u32>) {
        fn neighbours(one: &u32, next: &u32) -> bool {
            one + 1 == *next
        }
        frames.sort_unstable();
        frames.dedup();
        let runs: Vec<&[u32]> = frames.chunk_by(neighbours).collect();
        for some in runs.chunks(HOLES) {
            // nobody spills meanwhile, so what is not away now stays so. Who holds one of these locks waits for no other
            let _alone: Vec<_> = self.locks.iter().map(|lock| lock.0.lock()).collect();
            let unused = some.iter().copied().flatten().copied().filter(|frame| marks.get(*frame) != Mark::Away);
            for run in unused.collect::<Vec<_>>().chunk_by(neighbours) {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let (first, len) = (u64::from(run[0]), run.len() as u64);
                let _ = fallocate(&self.file, hole, first * BLOCK as u64, len * BLOCK as u64);
            }
        }
    }

    /// Blocks written to the file and read from it since the start.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.written.load(Relaxed), self.read.load(Relaxed))
    }
}

impl Engine {
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
                self.frames.marks.set(frame, Mark::Damaged);
                return Err(Failed::Lost);
            }
            buf.copy_from_slice(&block.0[from..from + buf.len()]);
            let again = spill.was_used(frame);
            spill.touch(frame);
            if !again || !self.budget.charge(BLOCK as u64) {
                return Ok(());
            }
            self.frames.blocks.fill(frame, &block.0);
            self.frames.marks.set(frame, Mark::Here);
        }
        spill.forget(&self.frames.marks, frame);
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
        if mark != Mark::Away {
            return true;
        }
        if let Some(spill) = &self.spill {
            spill.forget(&self.frames.marks, frame);
        }
        self.frames.pool.put_hollow(frame);
        false
    }

    /// Spills some frames; false when there is nothing to spill, or no room for it.
    #[cold]
    pub(crate) fn make_room(&self) -> bool {
        let Some(spill) = &self.spill else { return false };
        // who waits here finds room made by whom it waited for
        let mut hand = spill.hand.lock();
        if self.budget.charged() + (BATCH / 2 * BLOCK) as u64 <= self.budget.limit() {
            return true;
        }
        hand.maps.retain(|map| map.strong_count() > 0);
        let (mut spilled, mut turns) = (0, 0);
        // twice around: the first time everything may have been in use
        while spilled < BATCH && turns <= 2 * hand.maps.len() {
            let Some(map) = hand.maps.get(hand.map).and_then(Weak::upgrade) else {
                (hand.map, hand.leaf, turns) = (0, 0, turns + 1);
                if hand.maps.is_empty() {
                    break;
                }
                continue;
            };
            match self.spill_from(spill, &map, hand.leaf, BATCH, &mut spilled) {
                Some(leaf) => hand.leaf = leaf,
                None => {
                    (hand.map, hand.leaf, turns) = (hand.map + 1, 0, turns + 1);
                    if hand.map >= hand.maps.len() {
                        hand.map = 0;
                    }
                }
            }
        }
        spilled > 0
    }

    /// Goes over the leaves of a map from `leaf` on until `wanted` are spilled; the leaf to go on with.
    fn spill_from(&self, spill: &Spill, map: &Map, leaf: u64, wanted: usize, spilled: &mut usize) -> Option<u64> {
        let leaves = map.size().div_ceil(BLOCK as u64).div_ceil(64);
        for leaf in leaf..leaves {
            self.for_each_alone(map, leaf, |_, frame| {
                let here = self.frames.marks.get(frame) == Mark::Here;
                if here && !spill.was_used(frame) && self.spill_one(spill, frame) {
                    *spilled += 1;
                }
            });
            if *spilled >= wanted {
                return Some(leaf + 1);
            }
        }
        None
    }

    /// The caller keeps others from dropping the frame.
    fn spill_one(&self, spill: &Spill, frame: u32) -> bool {
        if self.frames.marks.counts().0 >= spill.limit {
            return false;
        }
        let mut block = Aligned([0; BLOCK]);
        let _alone = spill.lock(frame).lock();
        if self.frames.marks.get(frame) != Mark::Here {
            return false;
        }
        self.frames.blocks.read(frame, 0, &mut block.0);
        if spill.file.write_all_at(&block.0, u64::from(frame) * BLOCK as u64).is_err() {
            // the disk is full or broken: nothing happened, and the writer is refused if nobody else makes room
            return false;
        }
        spill.written.fetch_add(1, Relaxed);
        self.frames.marks.set(frame, Mark::Away);
        self.frames.blocks.give_back(frame..frame + 1);
        self.budget.credit(BLOCK as u64);
        true
    }
}
