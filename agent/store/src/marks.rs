//! Frames whose bytes are not in their place: spilled to a file, or found damaged.
//!
//! Two bits a frame, in memory that outlives the process. Nobody looks at them until the store spills, or damage was
//! found: then [`Marks::armed`] is true for good.
//!
//! A reader holds no lock that a spiller waits for. It asks [`Marks::begin`], copies the bytes, and asks
//! [`Marks::unchanged`]: when the frame was marked meanwhile, what it copied is worth nothing and it asks again. Whoever
//! marks a frame does so before it takes the frame's memory away, and whoever puts the memory back does so before it takes
//! the mark away; both count the frame's sequence up.

use std::io;

use crate::{
    arena::Words,
    memory::Memory,
    sync::{
        Padded,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, SeqCst},
            fence,
        },
    },
};

/// Ways the sequence is split.
const SEQUENCES: usize = 64;
/// Frames whose marks share a word.
const PER_WORD: u32 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// The bytes are in the frame.
    Here,
    /// They are in the spill file.
    Away,
    /// They are not what was stored.
    Damaged,
    /// They are not what was stored, and the frame has no memory: they were away when that was found.
    Gone,
}

impl Mark {
    /// The frame has no memory.
    pub(crate) fn is_away(self) -> bool {
        matches!(self, Mark::Away | Mark::Gone)
    }

    pub(crate) fn is_damaged(self) -> bool {
        matches!(self, Mark::Damaged | Mark::Gone)
    }

    fn of(bits: u32) -> Mark {
        [Mark::Here, Mark::Away, Mark::Damaged, Mark::Gone][bits as usize & 3]
    }
}

pub(crate) struct Marks {
    words: Words,
    sequences: [Padded<AtomicU64>; SEQUENCES],
    armed: AtomicBool,
    away: AtomicU64,
    damaged: AtomicU64,
}

impl Marks {
    pub(crate) fn reserve(capacity: u32, memory: &Memory) -> io::Result<Marks> {
        let file = memory.file("marks", crate::PageKind::Small)?;
        Ok(Marks {
            words: Words::reserve((capacity / PER_WORD + 1) as usize, file.as_ref())?,
            sequences: std::array::from_fn(|_| Padded::default()),
            armed: AtomicBool::new(false),
            away: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
        })
    }

    /// Whether anybody has to look at marks.
    #[inline]
    pub(crate) fn armed(&self) -> bool {
        self.armed.load(Relaxed)
    }

    /// To be called before there are readers, when frames may be spilled.
    pub(crate) fn arm(&self) {
        self.armed.store(true, SeqCst);
    }

    #[inline]
    fn sequence(&self, frame: u32) -> &AtomicU64 {
        &self.sequences[frame as usize % SEQUENCES].0
    }

    #[inline]
    pub(crate) fn get(&self, frame: u32) -> Mark {
        Mark::of(self.words.all()[(frame / PER_WORD) as usize].load(Acquire) >> (frame % PER_WORD * 2))
    }

    /// The frame's mark, and what [`Marks::unchanged`] wants to know afterwards.
    #[inline]
    pub(crate) fn begin(&self, frame: u32) -> (Mark, u64) {
        let sequence = self.sequence(frame).load(Acquire);
        (self.get(frame), sequence)
    }

    #[inline]
    pub(crate) fn unchanged(&self, frame: u32, sequence: u64) -> bool {
        // the copy is done before the sequence is read again
        fence(Acquire);
        self.sequence(frame).load(Relaxed) == sequence
    }

    /// Marks a frame, or takes its mark away. One at a time for one frame.
    pub(crate) fn set(&self, frame: u32, mark: Mark) {
        if mark.is_damaged() {
            self.arm();
        }
        let word = &self.words.all()[(frame / PER_WORD) as usize];
        let shift = frame % PER_WORD * 2;
        let before = word
            .fetch_update(SeqCst, SeqCst, |bits| Some(bits & !(3 << shift) | (mark as u32) << shift))
            .unwrap_or_default();
        let before = Mark::of(before >> shift);
        self.away.fetch_add(mark.is_away().into(), Relaxed);
        self.damaged.fetch_add(mark.is_damaged().into(), Relaxed);
        self.away.fetch_sub(before.is_away().into(), Relaxed);
        self.damaged.fetch_sub(before.is_damaged().into(), Relaxed);
        self.sequence(frame).fetch_add(1, SeqCst);
    }

    /// Frames without memory, and frames damaged.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.away.load(Relaxed), self.damaged.load(Relaxed))
    }

    /// Counts what an earlier process left below `next`.
    pub(crate) fn adopt(&self, next: u32) {
        let (mut away, mut damaged) = (0, 0);
        for word in &self.words.all()[..=(next / PER_WORD) as usize] {
            let bits = word.load(Relaxed);
            if bits != 0 {
                for mark in (0..PER_WORD).map(|at| Mark::of(bits >> (at * 2))) {
                    away += u64::from(mark.is_away());
                    damaged += u64::from(mark.is_damaged());
                }
            }
        }
        self.away.store(away, Relaxed);
        self.damaged.store(damaged, Relaxed);
        if away + damaged > 0 {
            self.arm();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_marks_equal_a_list(steps in prop::collection::vec((0..200u32, 0..4u32), 1..400)) {
            let marks = Marks::reserve(200, &Memory::Private).unwrap();
            let mut model = [Mark::Here; 200];
            for (frame, mark) in steps {
                let mark = Mark::of(mark);
                let (_, sequence) = marks.begin(frame);
                prop_assert!(marks.unchanged(frame, sequence));
                marks.set(frame, mark);
                prop_assert!(!marks.unchanged(frame, sequence), "a reader would not notice");
                model[frame as usize] = mark;
                let count = |wanted: fn(Mark) -> bool| model.iter().filter(|mark| wanted(**mark)).count() as u64;
                prop_assert_eq!(marks.counts(), (count(Mark::is_away), count(Mark::is_damaged)));
            }
            prop_assert!((0..).zip(model).all(|(frame, mark)| marks.get(frame) == mark));
            let counts = marks.counts();
            marks.adopt(199);
            prop_assert_eq!(marks.counts(), counts);
            prop_assert!(marks.armed() || counts == (0, 0));
        }
    }

    #[test]
    fn a_mark_is_its_frames_alone_and_is_counted() {
        let marks = Marks::reserve(100, &Memory::Private).unwrap();
        assert!(!marks.armed());
        let (mark, sequence) = marks.begin(17);
        assert_eq!(mark, Mark::Here);
        marks.set(16, Mark::Away);
        assert!(marks.unchanged(17, sequence));
        marks.set(17, Mark::Damaged);
        assert!(marks.armed() && !marks.unchanged(17, sequence));
        assert_eq!((marks.get(15), marks.get(16), marks.get(17)), (Mark::Here, Mark::Away, Mark::Damaged));
        assert_eq!(marks.counts(), (1, 1));
        marks.adopt(100);
        assert_eq!(marks.counts(), (1, 1));
        marks.set(16, Mark::Here);
        marks.set(17, Mark::Away);
        assert_eq!(marks.counts(), (1, 0));
    }
}
