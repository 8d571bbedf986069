//! The threads that serve queues, any thread any queue: look at all that may have something, do it, look again for a
//! short time, then sleep until a kick.
//!
//! ```text
//!            kick (epoll, edge-triggered), change by a session
//!  Resting ---------------------------------------------------> Active: in the list, looked at again and again
//!     ^                                                            |
//!     '--- nothing for a while: the driver is asked to kick, <-----'
//!          and there is nothing still
//! ```
//!
//! A host has more disks than processors: with a thread for each disk those that spin take the processors from those that
//! have something to do, and who comes next is the scheduler's choice, milliseconds at a time. Few threads that go round
//! serve every disk in turn, and as long as they find work nobody needs to kick them.
//!
//! A thread that finds nothing while others are awake leaves the list to them and sleeps; the last one asks the drivers to
//! kick first. One of those asleep looks up now and then, in case that the others are held up inside of a device.
//!
//! Locks: the list of queues (held for moments), then a queue's, which is only tried.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use super::Names;
use super::event::Event;
use super::queue::{Armed, Queue, Step};
use crate::registry::{Export, panic_text};

/// A spin shorter than this cannot see the answer to anything.
const SHORTEST_SPIN: Duration = Duration::from_micros(4);
/// How often a queue is looked at whose driver gave no descriptor to kick.
const NO_KICK: Duration = Duration::from_millis(1);
/// Looks in a row that found nothing, among others that did, before a queue is left to rest.
const QUIET_LOOKS: u32 = 64;
/// How often a thread that has work looks for kicks and for help, at most.
const ROUND: Duration = Duration::from_micros(20);
/// How often one that sleeps looks whether others are held up.
const WATCH: Duration = Duration::from_millis(1);
/// The key of what wakes a thread.
const WAKE: u64 = u64::MAX;

/// A queue shared by the pool's threads and the session that sets it up.
pub(crate) struct Slot {
    key: u64,
    queue: Mutex<Queue>,
    export: Arc<Export>,
    /// The queue's own [`Queue::wanted`].
    wanted: Arc<AtomicU32>,
    /// Whether a thread need look at it.
    running: AtomicBool,
    /// In the list; changed under its lock.
    active: AtomicBool,
    quiet: AtomicU32,
}

impl Slot {
    /// Changes the queue while no request of it is being done.
    fn change<R>(&self, change: impl FnOnce(&mut Queue) -> R) -> R {
        self.wanted.fetch_add(1, Ordering::AcqRel);
        let mut queue = self.queue.lock();
        self.wanted.fetch_sub(1, Ordering::AcqRel);
        let result = change(&mut queue);
        self.running.store(queue.is_running(), Ordering::Release);
        result
    }

    /// The queue, if it is served and no other thread has it.
    fn take(&self) -> Option<MutexGuard<'_, Queue>> {
        self.running.load(Ordering::Acquire).then(|| self.queue.try_lock()).flatten()
    }

    fn give_back(&self, queue: MutexGuard<'_, Queue>) {
        if self.wanted.load(Ordering::Acquire) > 0 {
            MutexGuard::unlock_fair(queue);
        }
    }

    /// Serves a turn of the queue. A panic of the device is caught where it is called; this one catches our own mistakes.
    fn run(&self, queue: &mut Queue) -> Step {
        catch_unwind(AssertUnwindSafe(|| queue.run())).unwrap_or_else(|panic| {
            self.export.fence(&format!("serving a queue panicked: {}", panic_text(&*panic)));
            // nobody answers any more: let the frontend see it
            self.running.store(false, Ordering::Release);
            Step::Idle
        })
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

/// Threads, and the queues they serve. Ends them when dropped.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Where kicks arrive.
    events: OwnedFd,
    wake: OwnedFd,
    stop: AtomicBool,
    spin: Duration,
    next_key: AtomicU64,
    slots: Mutex<Slots>,
    /// Of the list of active ones.
    generation: AtomicU64,
    threads: usize,
    sleepers: AtomicUsize,
    /// One of the sleepers looks up now and then.
    watched_over: AtomicBool,
}

#[derive(Default)]
struct Slots {
    /// All that may be kicked.
    watched: BTreeMap<u64, Arc<Slot>>,
    active: Vec<Arc<Slot>>,
}

/// What a thread has of the list of active slots.
struct View {
    generation: u64,
    slots: Vec<Arc<Slot>>,
}

/// What a look at all active slots led to.
#[derive(Default)]
struct Pass {
    /// Slots that had something.
    worked: usize,
    /// Slots that may have something soon.
    idle: usize,
    /// When the first of those that wait is to be looked at again.
    until: Option<Instant>,
}

impl Pool {
    pub(crate) fn start(threads: u16, spin: Duration, names: &Names) -> std::io::Result<Pool> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&events, &wake, epoll::EventData::new_u64(WAKE), flags)?;
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            events,
            wake,
            stop: AtomicBool::new(false),
            spin,
            next_key: AtomicU64::new(0),
            slots: Mutex::default(),
            generation: AtomicU64::new(0),
            threads: usize::from(threads),
            sleepers: AtomicUsize::new(0),
            watched_over: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, threads: Vec::new() };
        for _ in 0..threads {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(names.next("vu")).spawn(move || shared.work())?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Takes a queue on; nobody looks at it before it is changed.
    pub(crate) fn enlist(&self, queue: Queue, export: Arc<Export>) -> Arc<Slot> {
        let wanted = Arc::clone(&queue.wanted);
        Arc::new(Slot {
            key: self.shared.next_key.fetch_add(1, Ordering::Relaxed),
            queue: Mutex::new(queue),
            export,
            wanted,
            running: AtomicBool::new(false),
            active: AtomicBool::new(false),
            quiet: AtomicU32::new(0),
        })
    }

    /// Changes a queue while no request of it is being done, and has a thread look at it.
    pub(crate) fn change<R>(&self, slot: &Arc<Slot>, change: impl FnOnce(&mut Queue) -> R) -> R {
        let result = slot.change(change);
        if slot.running.load(Ordering::Acquire) {
            self.shared.activate(&mut self.shared.slots.lock(), slot);
            self.shared.poke();
        }
        result
    }

    /// Changes where the driver kicks. A queue without such a place is looked at from time to time.
    pub(crate) fn set_kick(&self, slot: &Arc<Slot>, kick: Option<Event>) -> std::io::Result<()> {
        self.unwatch(slot);
        if let Some(kick) = &kick {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            self.shared.slots.lock().watched.insert(slot.key, Arc::clone(slot));
            if let Err(error) = epoll::add(&self.shared.events, kick, epoll::EventData::new_u64(slot.key), flags) {
                self.shared.slots.lock().watched.remove(&slot.key);
                return Err(error.into());
            }
        }
        self.change(slot, |queue| queue.kick = kick);
        Ok(())
    }

    /// Ends what is done for the queue; afterwards no thread uses its device or the guest's memory.
    pub(crate) fn close(&self, slot: &Arc<Slot>) {
        self.unwatch(slot);
        slot.change(Queue::close);
        let mut slots = self.shared.slots.lock();
        self.shared.rest(&mut slots, slot);
    }

    /// Stops the queue; returns where to go on.
    pub(crate) fn stop(&self, slot: &Arc<Slot>) -> u16 {
        self.unwatch(slot);
        slot.change(Queue::stop)
    }

    fn unwatch(&self, slot: &Arc<Slot>) {
        slot.change(|queue| {
            if let Some(kick) = queue.kick.take() {
                // It lives on in the frontend, so closing ours would not take it out. Nobody counts kicks here, but who
                // has it next may ask whether there was one.
                let _ = epoll::delete(&self.shared.events, &kick);
                kick.clear();
            }
        });
        self.shared.slots.lock().watched.remove(&slot.key);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.poke();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that serves queues panicked");
            }
        }
    }
}

impl Shared {
    fn activate(&self, slots: &mut Slots, slot: &Arc<Slot>) {
        slot.quiet.store(0, Ordering::Relaxed);
        if !slot.active.swap(true, Ordering::AcqRel) {
            slots.active.push(Arc::clone(slot));
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    fn rest(&self, slots: &mut Slots, slot: &Arc<Slot>) {
        if slot.active.swap(false, Ordering::AcqRel) {
            slots.active.retain(|one| one.key != slot.key);
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    /// Wakes a thread, if one sleeps.
    fn poke(&self) {
        // nobody reads it: each write is an edge, and it is never full
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn work(&self) {
        let mut spin = Spin::new(self.spin);
        let mut view = View { generation: u64::MAX, slots: Vec::new() };
        let mut idle_since = None;
        let mut round = Instant::now();
        while !self.stop.load(Ordering::Acquire) {
            self.refresh(&mut view);
            let pass = self.pass(&view);
            if pass.worked > 0 {
                idle_since = None;
                let now = Instant::now();
                if now.duration_since(round) > ROUND {
                    round = now;
                    match self.sleepers.load(Ordering::Acquire) {
                        // nobody else hears kicks
                        0 => {
                            self.listen(Some(Duration::ZERO));
                        }
                        _ if pass.worked > 1 => self.poke(),
                        _ => {}
                    }
                }
                continue;
            }
            if pass.idle > 0 && !spin.now.is_zero() {
                let now = Instant::now();
                if now.duration_since(*idle_since.get_or_insert(now)) < spin.now {
                    std::hint::spin_loop();
                    continue;
                }
                spin.in_vain();
            }
            idle_since = None;
            let slept_from = Instant::now();
            if self.sleep(&mut view, pass.until, slept_from) > 0 {
                spin.kicked_after(slept_from.elapsed());
            }
        }
        // the next one
        self.poke();
    }

    /// Sleeps until a kick, a poke or the moment something is to be looked at; counts kicks.
    fn sleep(&self, view: &mut View, mut until: Option<Instant>, now: Instant) -> usize {
        let others = self.threads - 1 - self.sleepers.fetch_add(1, Ordering::AcqRel);
        let mut watches = false;
        let ready = if others == 0 {
            self.rest_all(view, &mut until)
        } else {
            watches = !view.slots.is_empty() && !self.watched_over.swap(true, Ordering::AcqRel);
            until = watches.then(|| until.map_or(now + WATCH, |until| until.min(now + WATCH)));
            true
        };
        // no guest's memory is held on to
        (view.generation, _) = (u64::MAX, view.slots.clear());
        let mut kicks = 0;
        if ready && !self.stop.load(Ordering::Acquire) {
            kicks = self.listen(until.map(|until| until.saturating_duration_since(now)));
        }
        if watches {
            self.watched_over.store(false, Ordering::Release);
        }
        self.sleepers.fetch_sub(1, Ordering::AcqRel);
        if watches || kicks > 1 {
            // Another one watches while this one is perhaps held up, and takes what would wait behind a long request.
            self.poke();
        }
        kicks
    }

    fn refresh(&self, view: &mut View) {
        if self.generation.load(Ordering::Acquire) != view.generation {
            let slots = self.slots.lock();
            view.generation = self.generation.load(Ordering::Acquire);
            view.slots.clone_from(&slots.active);
        }
    }

    /// A turn of every active queue that no other thread has.
    fn pass(&self, view: &View) -> Pass {
        let mut pass = Pass::default();
        for slot in &view.slots {
            let Some(mut queue) = slot.take() else { continue };
            match slot.run(&mut queue) {
                Step::Worked => {
                    pass.worked += 1;
                    slot.quiet.store(0, Ordering::Relaxed);
                }
                Step::Idle => pass.idle += 1,
                Step::Until(at) => pass.until = Some(pass.until.map_or(at, |until| until.min(at))),
            }
            slot.give_back(queue);
        }
        if pass.worked > 0 && pass.worked < view.slots.len() {
            self.rest_quiet(view);
        }
        pass
    }

    /// Leaves those to rest that had nothing for long, while others have.
    fn rest_quiet(&self, view: &View) {
        for slot in &view.slots {
            if slot.quiet.fetch_add(1, Ordering::Relaxed) % QUIET_LOOKS == QUIET_LOOKS - 1 {
                self.let_rest(&mut self.slots.lock(), slot);
            }
        }
    }

    /// Leaves all to rest that can be kicked, before a sleep; `false` when one has something after all. `until` becomes
    /// when to look at those that cannot.
    fn rest_all(&self, view: &View, until: &mut Option<Instant>) -> bool {
        let mut all = true;
        let mut slots = self.slots.lock();
        for slot in &view.slots {
            match self.let_rest(&mut slots, slot) {
                Some(Armed::Pending) => all = false,
                Some(Armed::NoKick) => {
                    let soon = Instant::now() + NO_KICK;
                    *until = Some(until.map_or(soon, |until| until.min(soon)));
                }
                // another thread may have found out since our look, and be asleep
                Some(Armed::Waits) if until.is_none() => *until = Some(Instant::now() + NO_KICK),
                // when another thread has it, that one is awake and sees to it
                Some(Armed::Kick | Armed::Waits) | None => {}
            }
        }
        all
    }

    /// Under the list's lock, so that a kick that comes meanwhile finds it out of the list and puts it back.
    fn let_rest(&self, slots: &mut Slots, slot: &Arc<Slot>) -> Option<Armed> {
        if !slot.running.load(Ordering::Acquire) {
            self.rest(slots, slot);
            return None;
        }
        let mut queue = slot.queue.try_lock()?;
        let armed = queue.arm();
        slot.give_back(queue);
        if armed == Armed::Kick {
            self.rest(slots, slot);
        }
        Some(armed)
    }

    /// Waits for kicks, makes active what was kicked, and counts it.
    fn listen(&self, timeout: Option<Duration>) -> usize {
        let mut come: Vec<epoll::Event> = Vec::with_capacity(32);
        let timeout =
            timeout.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
        // interrupted: nothing came
        let _ = epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut come), timeout.as_ref());
        if come.is_empty() {
            return 0;
        }
        let mut slots = self.slots.lock();
        let mut kicks = 0;
        for event in &come {
            let slot = slots.watched.get(&event.data.u64()).cloned();
            if let Some(slot) = slot {
                self.activate(&mut slots, &slot);
                kicks += 1;
            }
        }
        kicks
    }
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
