//! The threads that serve queues: look, do, look again for a short time, then sleep until a kick.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::queue::{Queue, Step};
use crate::registry::{Export, panic_text};

/// A spin shorter than this cannot see the answer to anything.
const SHORTEST_SPIN: Duration = Duration::from_micros(4);
/// How often a queue is looked at whose driver gave no descriptor to kick.
const NO_KICK: Duration = Duration::from_millis(1);

/// A queue shared by its worker, who has it nearly always, and the session that sets it up.
pub(crate) struct Slot {
    queue: Mutex<Queue>,
    /// The queue's own [`Queue::wanted`].
    wanted: Arc<AtomicU32>,
    /// Whether the worker need look at it.
    running: AtomicBool,
}

impl Slot {
    pub(crate) fn new(queue: Queue) -> Slot {
        let wanted = Arc::clone(&queue.wanted);
        Slot { queue: Mutex::new(queue), wanted, running: AtomicBool::new(false) }
    }

    /// Changes the queue while no request of it is being done.
    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut Queue) -> R) -> R {
        self.wanted.fetch_add(1, Ordering::AcqRel);
        let mut queue = self.queue.lock();
        self.wanted.fetch_sub(1, Ordering::AcqRel);
        let result = change(&mut queue);
        self.running.store(queue.is_running(), Ordering::Release);
        result
    }

    /// For the worker: the queue, if there may be something to do.
    fn look(&self) -> Option<MutexGuard<'_, Queue>> {
        self.running.load(Ordering::Acquire).then(|| self.queue.lock())
    }

    fn give_back(&self, queue: MutexGuard<'_, Queue>) {
        if self.wanted.load(Ordering::Acquire) > 0 {
            MutexGuard::unlock_fair(queue);
        }
    }
}

/// How long to look before sleeping. Decides without a clock.
#[derive(Debug)]
struct Spin {
    longest: Duration,
    now: Duration,
}

impl Spin {
    fn new(longest: Duration) -> Spin {
        Spin { longest, now: longest }
    }

    /// Nothing came while looking.
    fn in_vain(&mut self) {
        self.now /= 2;
        if self.now < SHORTEST_SPIN {
            self.now = Duration::ZERO;
        }
    }

    /// A kick came after so long a sleep.
    fn kicked_after(&mut self, slept: Duration) {
        // Looking for that long would have been cheaper than sleeping.
        if slept < self.longest {
            self.now = (self.now * 2).max(SHORTEST_SPIN).min(self.longest);
        }
    }
}

/// A running worker.
pub(crate) struct Worker {
    thread: JoinHandle<()>,
    wake: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    /// Starts a thread for these queues.
    pub(crate) fn start(
        name: String,
        slots: Vec<Arc<Slot>>,
        export: Arc<Export>,
        spin: Duration,
    ) -> std::io::Result<Worker> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name(name).spawn({
            let (wake, stop) = (Arc::clone(&wake), Arc::clone(&stop));
            move || {
                // A panic of the device is caught where it is called. This one catches our own mistakes.
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(&slots, &wake, &stop, spin))) {
                    export.fence(&format!("a queue's thread panicked: {}", panic_text(&*panic)));
                    // Nobody answers any more: let the frontend see it.
                    slots.iter().for_each(|slot| slot.running.store(false, Ordering::Release));
                }
            }
        })?;
        Ok(Worker { thread, wake, stop })
    }

    /// Has it look at its queues again.
    pub(crate) fn wake(&self) {
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    /// Ends it after the request it is at, and waits for that.
    pub(crate) fn join(self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
        let _ = self.thread.join();
    }
}

fn work(slots: &[Arc<Slot>], wake: &OwnedFd, stop: &AtomicBool, spin: Duration) {
    let mut spin = Spin::new(spin);
    let mut idle_since = None;
    while !stop.load(Ordering::Acquire) {
        let mut worked = false;
        let mut until: Option<Instant> = None;
        for slot in slots {
            let Some(mut queue) = slot.look() else { continue };
            match queue.run() {
                Step::Idle => {}
                Step::Worked => worked = true,
                Step::Until(at) => until = Some(until.map_or(at, |until| until.min(at))),
            }
            slot.give_back(queue);
        }
        if worked {
            idle_since = None;
            continue;
        }
        if !spin.now.is_zero() {
            let now = Instant::now();
            if now.duration_since(*idle_since.get_or_insert(now)) < spin.now {
                std::hint::spin_loop();
                continue;
            }
            spin.in_vain();
        }
        idle_since = None;
        let slept_from = Instant::now();
        match sleep(slots, wake, until) {
            Woken::Kick => spin.kicked_after(slept_from.elapsed()),
            Woken::Other => {}
        }
    }
}

enum Woken {
    Kick,
    Other,
}

/// Sleeps until a driver kicks, the session wakes us, or `until`.
fn sleep(slots: &[Arc<Slot>], wake: &OwnedFd, mut until: Option<Instant>) -> Woken {
    let mut kicks = Vec::with_capacity(slots.len());
    for slot in slots {
        let Some(mut queue) = slot.look() else { continue };
        if queue.arm() {
            return Woken::Other;
        }
        match &queue.kick {
            Some(kick) => kicks.push(Arc::clone(kick)),
            None if queue.is_running() => {
                let soon = Instant::now() + NO_KICK;
                until = Some(until.map_or(soon, |until| until.min(soon)));
            }
            None => {}
        }
        slot.give_back(queue);
    }
    let mut fds = Vec::with_capacity(kicks.len() + 1);
    fds.push(PollFd::new(wake, PollFlags::IN));
    fds.extend(kicks.iter().map(|kick| PollFd::new(&**kick, PollFlags::IN)));
    let timeout = until.map(|until| {
        let left = until.saturating_duration_since(Instant::now());
        Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
    });
    if poll(&mut fds, timeout.as_ref()).is_err() {
        return Woken::Other;
    }
    let mut woken = Woken::Other;
    let mut count = [0; 8];
    if fds[0].revents().intersects(PollFlags::IN) {
        let _ = rustix::io::read(wake, &mut count);
    }
    for (fd, kick) in fds[1..].iter().zip(&kicks) {
        if fd.revents().intersects(PollFlags::IN) {
            // Not blocking: the session saw to that.
            let _ = rustix::io::read(kick, &mut count);
            woken = Woken::Kick;
        } else if !fd.revents().is_empty() {
            // No eventfd. Without it the queue is looked at from time to time.
            for slot in slots {
                slot.change(|queue| {
                    if queue.kick.as_ref().is_some_and(|one| Arc::ptr_eq(one, kick)) {
                        queue.kick = None;
                    }
                });
            }
        }
    }
    woken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spin_shrinks_to_nothing_when_in_vain_and_grows_back_when_kicks_come_soon() {
        let us = Duration::from_micros;
        let mut spin = Spin::new(us(50));
        assert_eq!(spin.now, us(50));
        for _ in 0..4 {
            spin.in_vain();
        }
        assert_eq!(spin.now, Duration::ZERO);
        spin.kicked_after(us(50));
        assert_eq!(spin.now, Duration::ZERO, "that sleep was worth it");
        spin.kicked_after(us(49));
        assert_eq!(spin.now, SHORTEST_SPIN);
        for _ in 0..9 {
            spin.kicked_after(us(1));
        }
        assert_eq!(spin.now, us(50));
        let mut off = Spin::new(Duration::ZERO);
        off.kicked_after(us(0));
        off.in_vain();
        assert_eq!(off.now, Duration::ZERO);
    }
}
