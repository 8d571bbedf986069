//! The bounded hand-over from the thread that receives to the task or thread that reads.

use std::{
    any::Any,
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

/// A received sample whose type only its reader knows.
pub(crate) struct Arrived {
    pub payload: Erased,
    pub writer: String,
    pub received_us: u64,
}

pub(crate) enum Erased {
    Value(Box<dyn Any + Send>),
    Disposed(Box<dyn Any + Send>),
}

/// What a full queue does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overflow {
    /// The oldest goes: the next reading replaces it anyway.
    DropOldest,
    /// The new one is refused and stays where it came from, until there is room.
    Refuse,
}

pub(crate) struct Queue {
    items: Mutex<Items>,
    capacity: usize,
    overflow: Overflow,
    dropped: AtomicU64,
    missed: AtomicU64,
    matched: AtomicU64,
    arrived: Notify,
    arrived_blocking: Condvar,
    /// Called after an item was taken from a queue that had refused one.
    room: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
}

struct Items {
    list: VecDeque<Arrived>,
    closed: bool,
    refused: bool,
}

impl Queue {
    pub fn new(capacity: usize, overflow: Overflow) -> Self {
        Self {
            items: Mutex::new(Items { list: VecDeque::new(), closed: false, refused: false }),
            capacity: capacity.max(1),
            overflow,
            dropped: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            matched: AtomicU64::new(0),
            arrived: Notify::new(),
            arrived_blocking: Condvar::new(),
            room: Mutex::new(None),
        }
    }

    pub fn on_room(&self, callback: Box<dyn Fn() + Send + Sync>) {
        *self.room.lock() = Some(callback);
    }

    /// How many more it takes now; what is asked for before samples are taken out of a DDS cache. A full queue
    /// remembers that it was asked and calls back when there is room.
    pub fn room(&self) -> usize {
        if self.overflow == Overflow::DropOldest {
            return self.capacity;
        }
        let mut items = self.items.lock();
        let room = self.capacity.saturating_sub(items.list.len());
        items.refused |= room == 0;
        room
    }

    /// Hands a sample over. Gives it back when the queue is full and may not drop.
    pub fn push(&self, item: Arrived) -> Result<(), Arrived> {
        {
            let mut items = self.items.lock();
            if items.closed {
                return Ok(());
            }
            if items.list.len() >= self.capacity {
                match self.overflow {
                    Overflow::DropOldest => {
                        items.list.pop_front();
                        self.dropped.fetch_add(1, Ordering::Relaxed);
                    }
                    Overflow::Refuse => {
                        items.refused = true;
                        return Err(item);
                    }
                }
            }
            items.list.push_back(item);
        }
        self.arrived.notify_one();
        self.arrived_blocking.notify_one();
        Ok(())
    }

    pub fn pop(&self) -> Option<Arrived> {
        let (item, call) = {
            let mut items = self.items.lock();
            let item = items.list.pop_front();
            // half empty before the sender is woken: not once a sample
            let call = items.refused && items.list.len() <= self.capacity / 2;
            if call {
                items.refused = false;
            }
            (item, call)
        };
        if call && let Some(callback) = self.room.lock().as_ref() {
            callback();
        }
        item
    }

    pub async fn recv(&self) -> Option<Arrived> {
        loop {
            if let Some(item) = self.pop() {
                return Some(item);
            }
            if self.items.lock().closed {
                return None;
            }
            // a push between the pop above and here has left a permit: this returns at once
            self.arrived.notified().await;
        }
    }

    pub fn recv_timeout(&self, timeout: Duration) -> Option<Arrived> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(item) = self.pop() {
                return Some(item);
            }
            let mut items = self.items.lock();
            if !items.list.is_empty() {
                continue;
            }
            if items.closed || self.arrived_blocking.wait_until(&mut items, deadline).timed_out() {
                let empty = items.list.is_empty();
                drop(items);
                return if empty { None } else { self.pop() };
            }
        }
    }

    pub fn close(&self) {
        self.items.lock().closed = true;
        self.arrived.notify_one();
        self.arrived_blocking.notify_all();
    }

    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    pub fn add_missed(&self, count: u64) {
        self.missed.fetch_add(count, Ordering::Relaxed);
    }

    pub fn matched(&self) -> usize {
        self.matched.load(Ordering::Relaxed) as usize
    }

    pub fn set_matched(&self, count: usize) {
        self.matched.store(count as u64, Ordering::Relaxed);
    }
}
