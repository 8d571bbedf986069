//! Small things for many threads: cache-line padding, a slot number per thread, and the lock that stops the world. And the
//! locks and atomics of everything threads share, so that they can be others where schedules are tried out
//! (`schedules/mod.rs`).

#[cfg(not(feature = "shuttle"))]
pub(crate) use std::sync::atomic;

#[cfg(not(feature = "shuttle"))]
pub(crate) use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

#[cfg(feature = "shuttle")]
pub(crate) use crate::schedules::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic, slot};

use atomic::{AtomicU64, Ordering::Relaxed};

/// How many ways per-thread things are split. More threads than this share.
pub(crate) const SLOTS: usize = if cfg!(feature = "shuttle") { 2 } else { 16 };

/// Keeps neighbours in an array off each other's cache line.
#[derive(Default)]
#[repr(align(64))]
pub(crate) struct Padded<T>(pub(crate) T);

/// The calling thread's slot, dealt out in turn.
#[cfg(not(feature = "shuttle"))]
pub(crate) fn slot() -> usize {
    use std::{cell::Cell, sync::atomic::AtomicUsize};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    MINE.with(|mine| {
        if mine.get() == usize::MAX {
            mine.set(NEXT.fetch_add(1, Relaxed) % SLOTS);
        }
        mine.get()
    })
}

/// Everything that changes references is inside the world; an audit stops it. Entering touches one cache line of the
/// thread's own slot, so threads do not disturb each other.
#[derive(Default)]
pub(crate) struct World {
    slots: [Padded<Slot>; SLOTS],
}

#[derive(Default)]
struct Slot {
    lock: RwLock<()>,
    zero_blocks: AtomicU64,
    no_space: AtomicU64,
}

pub(crate) type Inside<'a> = RwLockReadGuard<'a, ()>;

impl World {
    /// Waits while an audit runs. Must not be called by a thread that is inside already: an audit waiting in between
    /// would deadlock it.
    pub(crate) fn enter(&self) -> Inside<'_> {
        self.slots[slot()].0.lock.read()
    }

    /// For destructors, which may run inside: never waits for an audit that waits for this very thread.
    pub(crate) fn enter_again(&self) -> Inside<'_> {
        self.slots[slot()].0.lock.read_recursive()
    }

    /// Waits until everybody is outside and keeps them there.
    pub(crate) fn stop(&self) -> Vec<RwLockWriteGuard<'_, ()>> {
        self.slots.iter().map(|slot| slot.0.lock.write()).collect()
    }

    pub(crate) fn count_zero_blocks(&self, blocks: u64) {
        self.slots[slot()].0.zero_blocks.fetch_add(blocks, Relaxed);
    }

    pub(crate) fn count_no_space(&self) {
        self.slots[slot()].0.no_space.fetch_add(1, Relaxed);
    }

    /// All-zero blocks written, and requests refused for want of memory.
    pub(crate) fn counts(&self) -> (u64, u64) {
        self.slots.iter().fold((0, 0), |(zero, full), slot| {
            (zero + slot.0.zero_blocks.load(Relaxed), full + slot.0.no_space.load(Relaxed))
        })
    }
}
