//! The arena where schedules are tried out: memory of the heap, of atomics at each use of which another thread may come in,
//! and of frames that notice when the frame rule of the real one is broken.

use std::{
    fs::File,
    io,
    ops::Range,
    sync::{Mutex, PoisonError, atomic::Ordering::Relaxed},
};

use crate::{PageKind, sync::atomic::AtomicU32};

pub(crate) const BLOCK: usize = 4096;

pub(crate) fn prefetch(_: usize) {}

pub(crate) struct Words(Box<[AtomicU32]>);

impl Words {
    pub(crate) fn reserve(count: usize, _: Option<&File>) -> io::Result<Words> {
        Ok(Words((0..count).map(|_| AtomicU32::new(0)).collect()))
    }
    pub(crate) fn all(&self) -> &[AtomicU32] {
        &self.0
    }
    pub(crate) fn populate(&self, _: Range<usize>) {}
    pub(crate) fn give_back(&self, words: Range<usize>) {
        self.0[words].iter().for_each(|word| word.store(0, Relaxed));
    }
    pub(crate) fn addresses(&self) -> Range<usize> {
        0..0
    }
}

#[derive(Default)]
struct Frame {
    /// `None` is zero.
    bytes: Option<Box<[u8; BLOCK]>>,
    readers: u32,
    filling: bool,
}

pub(crate) struct Blocks {
    /// Locked for moments in which no other thread can come in.
    frames: Box<[Mutex<Frame>]>,
    step: AtomicU32,
}

impl Blocks {
    pub(crate) fn reserve(frames: usize, _: PageKind, _: Option<&File>) -> io::Result<Blocks> {
        let frames = (0..frames).map(|_| Mutex::default()).collect();
        Ok(Blocks { frames, step: AtomicU32::new(0) })
    }

    fn at<R>(&self, frame: u32, look: impl FnOnce(&mut Frame) -> R) -> R {
        look(&mut self.frames[frame as usize].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Another thread may come in.
    fn step(&self) {
        self.step.load(Relaxed);
    }

    fn check(is: bool, rule: &str, frame: u32) {
        assert!(is, "frame {frame} {rule}");
    }

    pub(crate) fn fill(&self, frame: u32, block: &[u8; BLOCK]) {
        self.at(frame, |at| {
            Self::check(!at.filling && at.readers == 0, "is filled while somebody uses it", frame);
            at.filling = true;
            at.bytes.get_or_insert_with(|| Box::new([0; BLOCK]))[..BLOCK / 2].copy_from_slice(&block[..BLOCK / 2]);
        });
        self.step();
        self.at(frame, |at| {
            at.bytes.get_or_insert_with(|| Box::new([0; BLOCK]))[BLOCK / 2..].copy_from_slice(&block[BLOCK / 2..]);
            at.filling = false;
        });
    }

    pub(crate) fn read(&self, frame: u32, from: usize, buf: &mut [u8]) {
        let half = buf.len() / 2;
        let (first, second) = buf.split_at_mut(half);
        let copy = |at: &Frame, from: usize, to: &mut [u8]| match &at.bytes {
            Some(bytes) => to.copy_from_slice(&bytes[from..from + to.len()]),
            None => to.fill(0),
        };
        self.at(frame, |at| {
            Self::check(!at.filling, "is read while it is filled", frame);
            at.readers += 1;
            copy(at, from, first);
        });
        self.step();
        self.at(frame, |at| {
            at.readers -= 1;
            copy(at, from + half, second);
        });
    }

    pub(crate) fn with<R>(&self, frame: u32, look: impl FnOnce(&[u8; BLOCK]) -> R) -> R {
        let mut block = [0; BLOCK];
        self.read(frame, 0, &mut block);
        look(&block)
    }

    pub(crate) fn prefetch(&self, _: u32) {}

    pub(crate) fn with_run<R>(&self, frame: u32, frames: usize, look: impl FnOnce(&[u8]) -> R) -> R {
        let mut run = vec![0; frames * BLOCK];
        for (frame, block) in (frame..).zip(run.chunks_mut(BLOCK)) {
            self.read(frame, 0, block);
        }
        look(&run)
    }

    pub(crate) fn populate(&self, _: Range<u32>) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn use_small(&self, _: Range<u32>) {}

    pub(crate) fn give_back(&self, frames: Range<u32>) {
        for frame in frames {
            self.at(frame, |at| {
                Self::check(!at.filling && at.readers == 0, "is given back while somebody uses it", frame);
                at.bytes = None;
            });
        }
    }

    pub(crate) fn addresses(&self) -> Range<usize> {
        0..0
    }
}
