//! Blocking hypervisor calls on their own threads, each with a deadline.
//!
//! ```text
//!  submit -> waiting --(its VM is free, a thread is idle)--> running --> done(result)
//!               | deadline                                     | deadline
//!               v                                              v
//!         done(Busy): never started                   done(Unknown): thread goes on, counted as stuck
//! ```
//! Calls of one VM never overlap (except on [`Lane::Urgent`]) and start in the order they came. A stuck call keeps its
//! VM occupied until it returns, so everything later for that VM ends `Busy` by its own deadline: only an urgent call
//! (power off) passes. While calls are stuck, spare threads are started up to `threads_max`, so other VMs go on.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use muster_common::id::VmId;
use parking_lot::{Condvar, Mutex};

use crate::error::{HypervisorError, HypervisorErrorKind, Result};
use crate::hypervisor::Hypervisor;

/// What a call must not overlap with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// One call at a time for this VM.
    Vm(VmId),
    /// Ahead of everything, beside a running call of the same VM: power-off of a VM whose call is stuck.
    Urgent,
    /// Whole-host calls (list, statistics): beside anything.
    Host,
}

/// Sizes of a [`Pool`].
#[derive(Debug, Clone, Copy)]
pub struct PoolConfig {
    /// Threads when nothing is stuck. A start takes 0.3 to 0.5 s of waiting for QEMU, so four start ten VMs a second.
    pub threads: usize,
    /// Ceiling while calls are stuck.
    pub threads_max: usize,
    /// Calls waiting, all VMs together; beyond it `Busy` at once.
    pub queue: usize,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self { threads: 4, threads_max: 32, queue: 4096 }
    }
}

type Run = Box<dyn FnOnce(&dyn Hypervisor) + Send>;
type GiveUp = Box<dyn FnOnce(HypervisorError) + Send>;

struct Job {
    lane: Lane,
    label: &'static str,
    deadline: Instant,
    run: Run,
    give_up: GiveUp,
}

struct Running {
    label: &'static str,
    lane: Lane,
    deadline: Instant,
    /// Taken at the deadline.
    give_up: Option<GiveUp>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    running: HashMap<u64, Running>,
    occupied: HashSet<VmId>,
    next_id: u64,
    threads: usize,
    /// Running calls whose deadline passed.
    stuck: usize,
    closed: bool,
    handles: Vec<thread::JoinHandle<()>>,
}

struct Shared {
    hypervisor: Arc<dyn Hypervisor>,
    config: PoolConfig,
    state: Mutex<State>,
    work: Condvar,
    deadlines: Condvar,
    idle: Condvar,
}

/// See the module. Dropping it gives up what waits (`Busy`) and does not wait for running calls; [`Pool::close`] does.
pub struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    /// Starts the threads.
    pub fn start(hypervisor: Arc<dyn Hypervisor>, config: PoolConfig) -> Result<Self> {
        let shared = Arc::new(Shared {
            hypervisor,
            config: PoolConfig {
                threads: config.threads.max(1),
                threads_max: config.threads_max.max(config.threads),
                ..config
            },
            state: Mutex::new(State::default()),
            work: Condvar::new(),
            deadlines: Condvar::new(),
            idle: Condvar::new(),
        });
        let pool = Self { shared: shared.clone() };
        let spawned = |e| HypervisorError::with_source(HypervisorErrorKind::Other, "start hypervisor call threads", e);
        let mut state = shared.state.lock();
        for _ in 0..shared.config.threads {
            Shared::spawn_worker_locked(&shared, &mut state).map_err(spawned)?;
        }
        let watcher = shared.clone();
        let handle = thread::Builder::new()
            .name("libvirt-deadline".into())
            .spawn(move || watcher.watch_deadlines())
            .map_err(spawned)?;
        state.handles.push(handle);
        drop(state);
        Ok(pool)
    }

    /// The hypervisor behind it, for calls that never block (`info`, `events`).
    pub fn hypervisor(&self) -> &Arc<dyn Hypervisor> {
        &self.shared.hypervisor
    }

    /// Calls waiting or running.
    pub fn depth(&self) -> usize {
        let state = self.shared.state.lock();
        state.waiting.len() + state.running.len()
    }

    /// Running calls whose deadline passed.
    pub fn stuck(&self) -> usize {
        self.shared.state.lock().stuck
    }

    /// Runs `operation` on a pool thread; `done` is called exactly once, from some thread, with its result, or with
    /// `Unknown` when `timeout` passed while it ran, or with `Busy` when it never started. `done` must not block.
    pub fn submit<T, F, D>(&self, lane: Lane, label: &'static str, timeout: Duration, operation: F, done: D)
    where
        T: Send + 'static,
        F: FnOnce(&dyn Hypervisor) -> Result<T> + Send + 'static,
        D: FnOnce(Result<T>) + Send + 'static,
    {
        let slot = Arc::new(Mutex::new(Some(done)));
        let give_up_slot = slot.clone();
        let job = Job {
            lane,
            label,
            deadline: Instant::now() + timeout,
            run: Box::new(move |hypervisor| {
                let result = catch_unwind(AssertUnwindSafe(|| operation(hypervisor))).unwrap_or_else(|_| {
                    Err(HypervisorError::new(HypervisorErrorKind::Other, format!("{label}: the call panicked")))
                });
                let done = slot.lock().take();
                match (done, result) {
                    (Some(done), result) => done(result),
                    (None, Ok(_)) => tracing::info!(call = label, "late hypervisor call succeeded"),
                    (None, Err(e)) => {
                        tracing::info!(call = label, err = %e, "late hypervisor call failed")
                    }
                }
            }),
            give_up: Box::new(move |error| {
                let done = give_up_slot.lock().take();
                if let Some(done) = done {
                    done(Err(error));
                }
            }),
        };
        let refused = {
            let mut state = self.shared.state.lock();
            if state.closed || state.waiting.len() >= self.shared.config.queue {
                Some((job, if state.closed { "the pool is closed" } else { "the queue is full" }))
            } else {
                if lane == Lane::Urgent {
                    let behind_urgent = state.waiting.iter().take_while(|j| j.lane == Lane::Urgent).count();
                    state.waiting.insert(behind_urgent, job);
                } else {
                    state.waiting.push_back(job);
                }
                None
            }
        };
        if let Some((job, why)) = refused {
            (job.give_up)(HypervisorError::new(HypervisorErrorKind::Busy, format!("{label}: {why}")));
            return;
        }
        self.shared.work.notify_one();
        self.shared.deadlines.notify_one();
    }

    /// As [`Pool::submit`], the result arrives in the returned channel.
    pub fn call<T, F>(&self, lane: Lane, label: &'static str, timeout: Duration, operation: F) -> Receiver<Result<T>>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Hypervisor) -> Result<T> + Send + 'static,
    {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        self.submit(lane, label, timeout, operation, move |result| {
            // a receiver that went away does not want to know
            let _ = sender.send(result);
        });
        receiver
    }

    /// Gives up what waits, waits up to `grace` for running calls, joins the threads that are free. How many calls are
    /// still running (their threads are left to the end of the process).
    pub fn close(&self, grace: Duration) -> usize {
        let until = Instant::now() + grace;
        let abandoned: Vec<Job> = {
            let mut state = self.shared.state.lock();
            state.closed = true;
            state.waiting.drain(..).collect()
        };
        self.shared.work.notify_all();
        self.shared.deadlines.notify_all();
        for job in abandoned {
            (job.give_up)(HypervisorError::new(
                HypervisorErrorKind::Busy,
                format!("{}: the pool is closed", job.label),
            ));
        }
        let (left, handles) = {
            let mut state = self.shared.state.lock();
            while !state.running.is_empty() {
                if self.shared.idle.wait_until(&mut state, until).timed_out() {
                    break;
                }
            }
            (state.running.len(), std::mem::take(&mut state.handles))
        };
        if left == 0 {
            let me = thread::current().id();
            for handle in handles {
                if handle.thread().id() != me && handle.join().is_err() {
                    tracing::error!("a hypervisor call thread panicked");
                }
            }
        }
        left
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close(Duration::ZERO);
    }
}

impl Shared {
    fn spawn_worker_locked(self: &Arc<Self>, state: &mut State) -> std::io::Result<()> {
        let name = format!("libvirt-{}", state.next_id);
        state.next_id += 1;
        let shared = self.clone();
        let handle = thread::Builder::new().name(name).spawn(move || shared.work_loop())?;
        state.threads += 1;
        state.handles.retain(|h| !h.is_finished());
        state.handles.push(handle);
        Ok(())
    }

    fn work_loop(self: Arc<Self>) {
        let mut state = self.state.lock();
        loop {
            let free = |job: &Job| match job.lane {
                Lane::Vm(vm) => !state.occupied.contains(&vm),
                Lane::Urgent | Lane::Host => true,
            };
            let Some(index) = state.waiting.iter().position(free) else {
                if state.closed {
                    break;
                }
                self.work.wait(&mut state);
                continue;
            };
            let Some(job) = state.waiting.remove(index) else {
                continue;
            };
            let id = state.next_id;
            state.next_id += 1;
            if let Lane::Vm(vm) = job.lane {
                state.occupied.insert(vm);
            }
            let running =
                Running { label: job.label, lane: job.lane, deadline: job.deadline, give_up: Some(job.give_up) };
            state.running.insert(id, running);
            drop(state);
            self.deadlines.notify_one();
            (job.run)(self.hypervisor.as_ref());
            state = self.state.lock();
            let Some(finished) = state.running.remove(&id) else {
                continue;
            };
            if let Lane::Vm(vm) = finished.lane {
                state.occupied.remove(&vm);
            }
            // the VM's next call may be one an idle thread has skipped
            self.work.notify_all();
            self.idle.notify_all();
            if state.closed {
                self.deadlines.notify_one();
            }
            if finished.give_up.is_none() {
                state.stuck -= 1;
                tracing::info!(call = finished.label, "stuck hypervisor call returned");
                if state.threads - state.stuck > self.config.threads {
                    break;
                }
            }
        }
        state.threads -= 1;
    }

    fn watch_deadlines(self: Arc<Self>) {
        let mut state = self.state.lock();
        loop {
            if state.closed && state.running.is_empty() {
                return;
            }
            let now = Instant::now();
            let mut expired: Vec<(GiveUp, HypervisorError)> = Vec::new();
            while let Some(index) = state.waiting.iter().position(|job| job.deadline <= now) {
                if let Some(job) = state.waiting.remove(index) {
                    let text = format!("{}: not started before its deadline", job.label);
                    expired.push((job.give_up, HypervisorError::new(HypervisorErrorKind::Busy, text)));
                }
            }
            let mut newly_stuck = 0;
            for call in state.running.values_mut().filter(|call| call.deadline <= now) {
                if let Some(give_up) = call.give_up.take() {
                    newly_stuck += 1;
                    tracing::warn!(call = call.label, "hypervisor call passed its deadline");
                    let text = format!("{}: still running at its deadline", call.label);
                    expired.push((give_up, HypervisorError::new(HypervisorErrorKind::Unknown, text)));
                }
            }
            state.stuck += newly_stuck;
            while !state.closed
                && state.threads - state.stuck < self.config.threads
                && state.threads < self.config.threads_max
            {
                if let Err(e) = self.spawn_worker_locked(&mut state) {
                    tracing::error!(err = %e, "cannot start a spare hypervisor call thread");
                    break;
                }
            }
            if !expired.is_empty() {
                drop(state);
                for (give_up, error) in expired {
                    give_up(error);
                }
                state = self.state.lock();
                continue;
            }
            let next = (state.waiting.iter().map(|job| job.deadline))
                .chain(state.running.values().filter(|call| call.give_up.is_some()).map(|call| call.deadline))
                .min();
            match next {
                Some(at) => {
                    self.deadlines.wait_until(&mut state, at);
                }
                None => self.deadlines.wait(&mut state),
            }
        }
    }
}
