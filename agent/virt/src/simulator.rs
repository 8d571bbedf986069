//! A hypervisor without guests: the same trait, hundreds of VMs in one process, one seed.
//!
//! Time is a [`Clock`]: with the machine's clock (`sim:///` URIs) a thread `sim-ticker` moves things on; with a virtual
//! clock nothing waits, ever: advance the clock, call [`Simulator::tick`]. Calls return at once; what takes time on a
//! real hypervisor (boot, shutdown, save) is a transition that becomes due. Transitions that are due are also done by any
//! call, so a reader never sees the past.
//!
//! Failures are injected per VM ([`Simulator::inject`]) or drawn from the seed ([`Chances`]).
//!
//! ```text
//!  start ---> Running (booting) --boot--> Running, agent connected
//!  shutdown -> Running (asked) --shutdown--> Off           StuckShutdown: stays Running
//!  suspend --> Running --save--> Saved
//!  reboot ---> Running (booting), agent disconnected
//! ```
//!
//! Lock: one mutex over everything, a leaf except for the subscribers' list.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use muster_common::clock::{Clock, SystemClock};
use muster_common::id::VmId;
use muster_common::units::ByteLen;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::error::{HypervisorError, HypervisorErrorKind, Result};
use crate::hypervisor::{Capabilities, Hypervisor, HypervisorInfo, HypervisorKind, ShutdownMode};
use crate::libvirt::xml;
use crate::screenshot::Screenshot;
use crate::spec::DomainSpec;
use crate::state::{
    BlockStats, DomainState, DomainStats, DomainStatus, ExecRequest, ExecResult, HypervisorEvent, NetStats, StateReason,
};
use crate::subscribers::Subscribers;

/// How long things take. Each is multiplied by a seeded factor of 1 to `1 + jitter`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Latencies {
    /// From start to an answering guest agent.
    pub boot: Duration,
    /// From the power button or the agent's shutdown to off.
    pub shutdown: Duration,
    /// Writing the memory to disk.
    pub save: Duration,
    /// From start of a saved domain to an answering agent.
    pub restore: Duration,
    pub jitter: f64,
}

impl Default for Latencies {
    /// What GUEST.md measured with a trimmed Debian under TCG.
    fn default() -> Self {
        Self {
            boot: Duration::from_millis(4000),
            shutdown: Duration::from_millis(2500),
            save: Duration::from_millis(1900),
            restore: Duration::from_millis(640),
            jitter: 0.3,
        }
    }
}

/// Chances of failures, each 0 to 1, drawn from the seed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Chances {
    pub start_fails: f64,
    pub shutdown_sticks: f64,
    /// The guest dies at the end of its boot.
    pub boot_crashes: f64,
    pub agent_missing: f64,
}

/// What goes wrong with one VM until it is cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// `start` fails and the domain stays off.
    StartFails,
    /// The guest ignores both ways of shutdown and reboot.
    StuckShutdown,
    /// The guest agent never comes.
    AgentMissing,
    /// The guest dies at the end of each boot.
    CrashAtBoot,
    /// Calls for this VM block until the fault is cleared: a monitor that hangs. Power-off passes.
    CallsHang,
}

/// How to make a [`Simulator`].
pub struct SimulatorConfig {
    pub seed: u64,
    pub latencies: Latencies,
    pub chances: Chances,
    pub clock: Arc<dyn Clock>,
}

impl SimulatorConfig {
    /// No chances of failure, usual latencies.
    pub fn new(seed: u64, clock: Arc<dyn Clock>) -> Self {
        Self { seed, latencies: Latencies::default(), chances: Chances::default(), clock }
    }
}

/// What becomes due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    AgentUp,
    Crash,
    Off,
    Saved,
    Rebooted,
}

struct Guest {
    spec: DomainSpec,
    state: DomainState,
    reason: StateReason,
    agent: bool,
    /// At most one transition is under way; a later verb replaces it (a boot ends where a power-off begins).
    pending: Option<(u64, Due)>,
    /// The remaining time of what was under way when it was paused or saved.
    held: Option<(u64, Due)>,
    started_us: u64,
    run_us: u64,
    resumed_us: Option<u64>,
    frozen: bool,
    /// Files of the disk.
    disk: BTreeMap<String, Vec<u8>>,
    /// Files under `/run` and `/tmp`: gone with a boot.
    memory: BTreeMap<String, Vec<u8>>,
    faults: Vec<Fault>,
}

struct State {
    guests: HashMap<VmId, Guest>,
    random: Random,
}

struct Inner {
    config: SimulatorConfig,
    state: Mutex<State>,
    subscribers: Subscribers,
    /// Wakes calls held by [`Fault::CallsHang`] when a fault is cleared.
    released: Condvar,
    /// Wakes the ticker when something new is under way.
    wake: (Sender<()>, Receiver<()>),
    stopped: AtomicBool,
}

/// See the module.
pub struct Simulator {
    inner: Arc<Inner>,
    ticker: Option<thread::JoinHandle<()>>,
}

/// SplitMix64: tiny, seedable, good enough for jitter; a dependency on a generator would tie seeds to its version.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to 1, 1 excluded.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl Simulator {
    /// On the given clock; nothing moves by itself: call [`Simulator::tick`].
    pub fn new(config: SimulatorConfig) -> Self {
        let random = Random(config.seed);
        let inner = Inner {
            config,
            state: Mutex::new(State { guests: HashMap::new(), random }),
            subscribers: Subscribers::default(),
            released: Condvar::new(),
            wake: bounded(1),
            stopped: AtomicBool::new(false),
        };
        Self { inner: Arc::new(inner), ticker: None }
    }

    /// On the machine's clock, with a thread that publishes transitions when they are due.
    pub fn real_time(seed: u64, latencies: Latencies, chances: Chances) -> Result<Self> {
        let config = SimulatorConfig { seed, latencies, chances, clock: Arc::new(SystemClock) };
        let mut simulator = Self::new(config);
        let inner = simulator.inner.clone();
        let ticker = thread::Builder::new()
            .name("sim-ticker".into())
            .spawn(move || inner.run_ticker())
            .map_err(|e| HypervisorError::with_source(HypervisorErrorKind::Other, "start the simulator's ticker", e))?;
        simulator.ticker = Some(ticker);
        Ok(simulator)
    }

    /// From `sim:///?seed=N&speed=F`: speed divides every latency.
    pub(crate) fn from_uri(uri: &str) -> Result<Self> {
        let invalid = |text: &str| {
            HypervisorError::new(HypervisorErrorKind::InvalidSpec, format!("open hypervisor {uri}: {text}"))
        };
        let mut seed = 0;
        let mut latencies = Latencies::default();
        let query = uri.split_once('?').map(|(_, query)| query).unwrap_or_default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("seed", value)) => seed = value.parse().map_err(|_| invalid("seed is not a number"))?,
                Some(("speed", value)) => {
                    let speed: f64 = value.parse().map_err(|_| invalid("speed is not a number"))?;
                    if !(0.01..=10_000.0).contains(&speed) {
                        return Err(invalid("speed is not between 0.01 and 10000"));
                    }
                    for latency in
                        [&mut latencies.boot, &mut latencies.shutdown, &mut latencies.save, &mut latencies.restore]
                    {
                        *latency = latency.div_f64(speed);
                    }
                }
                _ => return Err(invalid("only seed and speed are known")),
            }
        }
        Self::real_time(seed, latencies, Chances::default())
    }

    /// Does everything that is due and publishes its events.
    pub fn tick(&self) {
        drop(self.inner.settled());
    }

    /// When the next transition is due, in the clock's microseconds.
    pub fn next_due_us(&self) -> Option<u64> {
        next_due(&self.inner.state.lock())
    }

    /// Adds a fault to a VM.
    pub fn inject(&self, vm: VmId, fault: Fault) -> Result<()> {
        let mut state = self.inner.settled();
        let guest = state.guests.get_mut(&vm).ok_or_else(|| HypervisorError::not_found(vm))?;
        if !guest.faults.contains(&fault) {
            guest.faults.push(fault);
        }
        if fault == Fault::AgentMissing && guest.agent {
            guest.agent = false;
            self.inner.subscribers.publish(&HypervisorEvent::GuestAgent { vm, connected: false });
        }
        Ok(())
    }

    /// Takes a fault away; a guest whose agent was missing gets it back at its next boot.
    pub fn clear(&self, vm: VmId, fault: Fault) -> Result<()> {
        let mut state = self.inner.settled();
        let guest = state.guests.get_mut(&vm).ok_or_else(|| HypervisorError::not_found(vm))?;
        guest.faults.retain(|present| *present != fault);
        self.inner.released.notify_all();
        Ok(())
    }

    /// The guest dies now.
    pub fn crash(&self, vm: VmId) -> Result<()> {
        let mut state = self.inner.settled();
        let now = self.inner.now();
        let guest = active(&mut state, vm, "crash")?;
        guest.stop(now, DomainState::Crashed, StateReason::Crashed);
        self.inner.lifecycle(vm, guest);
        Ok(())
    }

    /// A disk of the guest fails: paused with that reason, as with our error policy. `no_space`: because its server has no
    /// room.
    pub fn fail_disk(&self, vm: VmId, no_space: bool) -> Result<()> {
        let mut state = self.inner.settled();
        let now = self.inner.now();
        let guest = active(&mut state, vm, "fail a disk of")?;
        guest.hold(now);
        (guest.state, guest.reason) = (DomainState::Paused, StateReason::IoError);
        let disk = guest.spec.disks.first().map_or_else(String::new, |disk| disk.target.clone());
        self.inner.subscribers.publish(&HypervisorEvent::IoError { vm, disk, no_space });
        self.inner.lifecycle(vm, guest);
        Ok(())
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.inner.stopped.store(true, Ordering::Release);
        // full means a wake-up is under way already
        let _ = self.inner.wake.0.try_send(());
        if let Some(ticker) = self.ticker.take()
            && ticker.join().is_err()
        {
            tracing::error!("the simulator's ticker panicked");
        }
    }
}

fn next_due(state: &State) -> Option<u64> {
    state.guests.values().filter_map(|guest| guest.pending.map(|(at, _)| at)).min()
}

fn invalid_state(what: &str, vm: VmId, state: DomainState) -> HypervisorError {
    HypervisorError::new(HypervisorErrorKind::InvalidState, format!("{what} domain {vm}: its state is {state:?}"))
}

fn active<'a>(state: &'a mut State, vm: VmId, what: &str) -> Result<&'a mut Guest> {
    let guest = state.guests.get_mut(&vm).ok_or_else(|| HypervisorError::not_found(vm))?;
    if guest.state.is_active() { Ok(guest) } else { Err(invalid_state(what, vm, guest.state)) }
}

fn running<'a>(state: &'a mut State, vm: VmId, what: &str) -> Result<&'a mut Guest> {
    let guest = active(state, vm, what)?;
    if guest.state == DomainState::Running { Ok(guest) } else { Err(invalid_state(what, vm, guest.state)) }
}

fn in_memory(path: &str) -> bool {
    path.starts_with("/run/") || path.starts_with("/tmp/")
}

impl Guest {
    fn has(&self, fault: Fault) -> bool {
        self.faults.contains(&fault)
    }

    fn run(&mut self, now: u64) {
        (self.state, self.reason) = (DomainState::Running, StateReason::None);
        self.resumed_us = Some(now);
        if let Some((rest, due)) = self.held.take() {
            self.pending = Some((now + rest, due));
        }
    }

    /// The processors stop: time under way is kept for later.
    fn hold(&mut self, now: u64) {
        self.run_us += self.resumed_us.take().map_or(0, |since| now.saturating_sub(since));
        if let Some((at, due)) = self.pending.take() {
            self.held = Some((at.saturating_sub(now), due));
        }
    }

    fn stop(&mut self, now: u64, state: DomainState, reason: StateReason) {
        self.hold(now);
        (self.state, self.reason) = (state, reason);
        self.agent = false;
        self.held = None;
        self.frozen = false;
        self.run_us = 0;
        self.memory.clear();
    }
}

impl Inner {
    fn now(&self) -> u64 {
        self.config.clock.now_us()
    }

    fn lifecycle(&self, vm: VmId, guest: &Guest) {
        self.subscribers.publish(&HypervisorEvent::Lifecycle { vm, state: guest.state, reason: guest.reason });
    }

    /// The state with everything done that is due, in order of time, then of id: the same seed gives the same events.
    fn settled(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        let now = self.now();
        loop {
            let due = state.guests.iter().filter_map(|(vm, guest)| guest.pending.map(|(at, due)| (at, *vm, due)));
            let Some((at, vm, due)) = due.filter(|(at, ..)| *at <= now).min_by_key(|(at, vm, _)| (*at, *vm)) else {
                return state;
            };
            if let Some(guest) = state.guests.get_mut(&vm) {
                guest.pending = None;
                self.happen(vm, guest, at, due);
            }
            if due == Due::Rebooted {
                self.boot(&mut state, vm, at);
            }
        }
    }

    fn happen(&self, vm: VmId, guest: &mut Guest, at: u64, due: Due) {
        match due {
            Due::AgentUp => {
                guest.agent = guest.spec.guest_agent && !guest.has(Fault::AgentMissing);
                if guest.agent {
                    self.subscribers.publish(&HypervisorEvent::GuestAgent { vm, connected: true });
                }
            }
            Due::Crash => {
                guest.stop(at, DomainState::Crashed, StateReason::Crashed);
                self.lifecycle(vm, guest);
            }
            Due::Off => {
                guest.stop(at, DomainState::Off, StateReason::GuestShutdown);
                self.lifecycle(vm, guest);
            }
            Due::Saved => {
                guest.hold(at);
                (guest.state, guest.reason, guest.agent) = (DomainState::Saved, StateReason::User, false);
                self.lifecycle(vm, guest);
            }
            Due::Rebooted => {
                guest.memory.clear();
                guest.agent = false;
                self.subscribers.publish(&HypervisorEvent::GuestAgent { vm, connected: false });
                self.subscribers.publish(&HypervisorEvent::Rebooted { vm });
            }
        }
    }

    fn after(&self, state: &mut State, now: u64, latency: Duration) -> u64 {
        let factor = 1.0 + self.config.latencies.jitter * state.random.unit();
        now + latency.mul_f64(factor).as_micros() as u64
    }

    fn chance(&self, state: &mut State, chance: f64) -> bool {
        // always drawn, so that one chance does not shift the others
        state.random.unit() < chance
    }

    /// Puts a boot under way.
    fn boot(&self, state: &mut State, vm: VmId, now: u64) {
        let at = self.after(state, now, self.config.latencies.boot);
        let crashes = self.chance(state, self.config.chances.boot_crashes);
        let missing = self.chance(state, self.config.chances.agent_missing);
        if let Some(guest) = state.guests.get_mut(&vm) {
            let crashes = crashes || guest.has(Fault::CrashAtBoot);
            guest.pending = match () {
                () if crashes => Some((at, Due::Crash)),
                () if missing => None,
                () => Some((at, Due::AgentUp)),
            };
        }
        self.wake();
    }

    fn wake(&self) {
        // full means a wake-up is under way already
        let _ = self.wake.0.try_send(());
    }

    fn run_ticker(&self) {
        while !self.stopped.load(Ordering::Acquire) {
            let next = next_due(&self.settled());
            let timer = match next {
                Some(at) => crossbeam_channel::after(Duration::from_micros(at.saturating_sub(self.now()))),
                None => crossbeam_channel::never(),
            };
            crossbeam_channel::select! {
                recv(timer) -> _ => {}
                recv(self.wake.1) -> _ => {}
            }
        }
    }

    /// The settled state for a call on one VM, after any hang.
    fn enter(&self, vm: VmId) -> MutexGuard<'_, State> {
        let mut state = self.settled();
        while state.guests.get(&vm).is_some_and(|guest| guest.has(Fault::CallsHang)) {
            self.released.wait(&mut state);
        }
        drop(state);
        self.settled()
    }

    fn start(&self, vm: VmId, paused: bool) -> Result<()> {
        let mut state = self.enter(vm);
        let now = self.now();
        let guest = state.guests.get_mut(&vm).ok_or_else(|| HypervisorError::not_found(vm))?;
        if guest.state.is_active() {
            return Err(invalid_state("start", vm, guest.state));
        }
        let faulty = guest.has(Fault::StartFails);
        let saved = guest.state == DomainState::Saved;
        if self.chance(&mut state, self.config.chances.start_fails) || faulty {
            if let Some(guest) = state.guests.get_mut(&vm) {
                guest.reason = StateReason::Failed;
            }
            return Err(HypervisorError::new(
                HypervisorErrorKind::Other,
                format!("start domain {vm}: simulated failure of QEMU"),
            ));
        }
        if saved {
            let at = self.after(&mut state, now, self.config.latencies.restore);
            if let Some(guest) = state.guests.get_mut(&vm) {
                guest.held = None;
                guest.pending = Some((at, Due::AgentUp));
            }
            self.wake();
        } else {
            self.boot(&mut state, vm, now);
        }
        if let Some(guest) = state.guests.get_mut(&vm) {
            guest.started_us = now;
            guest.run(now);
            self.lifecycle(vm, guest);
            if paused {
                guest.hold(now);
                (guest.state, guest.reason) = (DomainState::Paused, StateReason::User);
                self.lifecycle(vm, guest);
            }
        }
        Ok(())
    }

    fn ask(&self, vm: VmId, mode: ShutdownMode, what: &str, latency: Duration, due: Due) -> Result<()> {
        let mut state = self.enter(vm);
        let now = self.now();
        let guest = running(&mut state, vm, what)?;
        if mode == ShutdownMode::Agent && !guest.agent {
            return Err(agent_unavailable(vm));
        }
        let stuck = guest.has(Fault::StuckShutdown);
        // a guest that is booting does not hear the button yet
        let deaf = matches!(guest.pending, Some((_, Due::AgentUp | Due::Crash)));
        if self.chance(&mut state, self.config.chances.shutdown_sticks) || stuck || deaf {
            return Ok(());
        }
        let at = self.after(&mut state, now, latency);
        if let Some(guest) = state.guests.get_mut(&vm) {
            guest.pending = Some((at, due));
        }
        self.wake();
        Ok(())
    }

    fn status(&self, guest: &Guest) -> DomainStatus {
        DomainStatus {
            vm: guest.spec.vm,
            name: guest.spec.name.clone(),
            state: guest.state,
            reason: guest.reason,
            persistent: true,
            ours: true,
            agent_connected: Some(guest.agent),
        }
    }

    /// Plausible numbers: a busy boot, then five percent of a processor; counters grow with running time.
    fn stats(&self, guest: &Guest) -> DomainStats {
        let now = self.now();
        let run_us = guest.run_us + guest.resumed_us.map_or(0, |since| now.saturating_sub(since));
        let boot_us = self.config.latencies.boot.as_micros() as u64;
        let busy_us = run_us.min(boot_us) + run_us.saturating_sub(boot_us) / 20 + 1;
        let resident = ByteLen(guest.spec.memory.bytes() / 2);
        DomainStats {
            vm: guest.spec.vm,
            state: guest.state,
            cpu_time_ns: busy_us * 1000,
            vcpus: guest.spec.vcpus,
            memory: Some(guest.spec.memory),
            memory_maximum: Some(guest.spec.memory),
            memory_resident: Some(resident),
            memory_usable: guest.agent.then_some(resident),
            block: (guest.spec.disks.iter())
                .filter(|disk| !disk.transport.is_vhost_user())
                .map(|disk| BlockStats {
                    target: disk.target.clone(),
                    read_requests: busy_us / 1000,
                    read_bytes: busy_us / 1000 * 4096,
                    write_requests: busy_us / 4000,
                    write_bytes: busy_us / 4000 * 4096,
                    flush_requests: busy_us / 100_000,
                })
                .collect(),
            net: (0..guest.spec.nics.len())
                .map(|n| NetStats { device: format!("sim{n}"), ..NetStats::default() })
                .collect(),
        }
    }

    /// The guest, if its agent would answer.
    fn agent<'a>(&self, state: &'a mut State, vm: VmId) -> Result<&'a mut Guest> {
        let guest = running(state, vm, "talk to the guest agent of")?;
        if guest.agent { Ok(guest) } else { Err(agent_unavailable(vm)) }
    }
}

fn agent_unavailable(vm: VmId) -> HypervisorError {
    HypervisorError::new(HypervisorErrorKind::AgentUnavailable, format!("guest agent of domain {vm} is not connected"))
}

fn guest_failed(what: String) -> HypervisorError {
    HypervisorError::new(HypervisorErrorKind::GuestFailed, what)
}

/// The few programs a simulated guest has.
fn emulate(guest: &mut Guest, request: &ExecRequest) -> Result<ExecResult> {
    let argv: Vec<&str> = request.argv.iter().map(String::as_str).collect();
    let program = argv.first().map(|path| path.rsplit('/').next().unwrap_or(path));
    let (exit, stdout, stderr) = match (program, argv.get(1..).unwrap_or_default()) {
        (Some("true" | "sync"), _) => (0, Vec::new(), Vec::new()),
        (Some("false"), _) => (1, Vec::new(), Vec::new()),
        (Some("echo"), words) => (0, format!("{}\n", words.join(" ")).into_bytes(), Vec::new()),
        (Some("cat"), []) => (0, request.input.clone(), Vec::new()),
        (Some("cat"), [path]) => match read(guest, path) {
            Some(content) => (0, content.clone(), Vec::new()),
            None => (1, Vec::new(), format!("cat: {path}: No such file or directory\n").into_bytes()),
        },
        // what the conformance suite runs
        (Some("sh"), ["-c", script]) if script.starts_with("read line") => {
            let line = String::from_utf8_lossy(&request.input).trim_end().to_owned();
            (3, format!("got {line}\n").into_bytes(), b"problem\n".to_vec())
        }
        (Some("sh"), _) => (0, Vec::new(), Vec::new()),
        _ => {
            return Err(guest_failed(format!(
                "run {:?} in the guest: no such program",
                argv.first().copied().unwrap_or_default()
            )));
        }
    };
    Ok(ExecResult { exit: Some(exit), signal: None, stdout, stderr, truncated: false })
}

fn read<'a>(guest: &'a Guest, path: &str) -> Option<&'a Vec<u8>> {
    if in_memory(path) { guest.memory.get(path) } else { guest.disk.get(path) }
}

impl Hypervisor for Simulator {
    fn info(&self) -> HypervisorInfo {
        HypervisorInfo {
            kind: HypervisorKind::Simulator,
            uri: format!("sim:///?seed={}", self.inner.config.seed),
            library_version: env!("CARGO_PKG_VERSION").to_owned(),
            hypervisor_version: env!("CARGO_PKG_VERSION").to_owned(),
            guest_arch: std::env::consts::ARCH.to_owned(),
            capabilities: Capabilities {
                guest_agent: true,
                screenshot: true,
                managed_save: true,
                reset: true,
                start_paused: true,
                device_stats: true,
                survives_restart: false,
                migration_destination: false,
            },
        }
    }

    fn define(&self, spec: &DomainSpec) -> Result<()> {
        // the same refusals as with the real one
        xml::domain_xml(spec, xml::Flavour::Qemu { agent_sockets: None })?;
        let mut state = self.inner.enter(spec.vm);
        if state.guests.values().any(|guest| guest.spec.name == spec.name && guest.spec.vm != spec.vm) {
            return Err(HypervisorError::new(
                HypervisorErrorKind::AlreadyExists,
                format!("define domain {} ({}): another domain has that name", spec.vm, spec.name),
            ));
        }
        match state.guests.get_mut(&spec.vm) {
            Some(guest) => guest.spec = spec.clone(),
            None => {
                let guest = Guest {
                    spec: spec.clone(),
                    state: DomainState::Off,
                    reason: StateReason::None,
                    agent: false,
                    pending: None,
                    held: None,
                    started_us: 0,
                    run_us: 0,
                    resumed_us: None,
                    frozen: false,
                    disk: BTreeMap::new(),
                    memory: BTreeMap::new(),
                    faults: Vec::new(),
                };
                state.guests.insert(spec.vm, guest);
            }
        }
        Ok(())
    }

    fn undefine(&self, vm: VmId) -> Result<()> {
        let mut state = self.inner.enter(vm);
        let guest = state.guests.get(&vm).ok_or_else(|| HypervisorError::not_found(vm))?;
        if guest.state.is_active() {
            return Err(invalid_state("undefine", vm, guest.state));
        }
        state.guests.remove(&vm);
        Ok(())
    }

    fn list(&self) -> Result<Vec<DomainStatus>> {
        let state = self.inner.settled();
        let mut rows: Vec<_> = state.guests.values().map(|guest| self.inner.status(guest)).collect();
        rows.sort_by_key(|row| row.vm);
        Ok(rows)
    }

    fn status(&self, vm: VmId) -> Result<DomainStatus> {
        let state = self.inner.settled();
        state.guests.get(&vm).map(|guest| self.inner.status(guest)).ok_or_else(|| HypervisorError::not_found(vm))
    }

    fn start(&self, vm: VmId) -> Result<()> {
        self.inner.start(vm, false)
    }

    fn start_paused(&self, vm: VmId) -> Result<()> {
        self.inner.start(vm, true)
    }

    fn shutdown(&self, vm: VmId, mode: ShutdownMode) -> Result<()> {
        self.inner.ask(vm, mode, "shut down", self.inner.config.latencies.shutdown, Due::Off)
    }

    fn power_off(&self, vm: VmId) -> Result<()> {
        // not `enter`: killing QEMU needs no answer from it
        let mut state = self.inner.settled();
        let now = self.inner.now();
        let guest = active(&mut state, vm, "power off")?;
        guest.stop(now, DomainState::Off, StateReason::Destroyed);
        self.inner.lifecycle(vm, guest);
        Ok(())
    }

    fn reset(&self, vm: VmId) -> Result<()> {
        let mut state = self.inner.enter(vm);
        let now = self.inner.now();
        let guest = active(&mut state, vm, "reset")?;
        let paused = guest.state == DomainState::Paused;
        self.inner.happen(vm, guest, now, Due::Rebooted);
        guest.held = None;
        self.inner.boot(&mut state, vm, now);
        if paused && let Some(guest) = state.guests.get_mut(&vm) {
            guest.hold(now);
        }
        Ok(())
    }

    fn reboot(&self, vm: VmId, mode: ShutdownMode) -> Result<()> {
        self.inner.ask(vm, mode, "reboot", self.inner.config.latencies.shutdown, Due::Rebooted)
    }

    fn pause(&self, vm: VmId) -> Result<()> {
        let mut state = self.inner.enter(vm);
        let now = self.inner.now();
        let guest = running(&mut state, vm, "pause")?;
        guest.hold(now);
        (guest.state, guest.reason) = (DomainState::Paused, StateReason::User);
        self.inner.lifecycle(vm, guest);
        Ok(())
    }

    fn resume(&self, vm: VmId) -> Result<()> {
        let mut state = self.inner.enter(vm);
        let now = self.inner.now();
        let guest = active(&mut state, vm, "resume")?;
        if guest.state != DomainState::Paused {
            return Err(invalid_state("resume", vm, guest.state));
        }
        guest.run(now);
        self.inner.lifecycle(vm, guest);
        self.inner.wake();
        Ok(())
    }

    fn suspend(&self, vm: VmId) -> Result<()> {
        let mut state = self.inner.enter(vm);
        let now = self.inner.now();
        active(&mut state, vm, "suspend to disk")?;
        let at = self.inner.after(&mut state, now, self.inner.config.latencies.save);
        if let Some(guest) = state.guests.get_mut(&vm) {
            guest.held = None;
            guest.pending = Some((at, Due::Saved));
        }
        self.inner.wake();
        Ok(())
    }

    fn discard_saved(&self, vm: VmId) -> Result<()> {
        let mut state = self.inner.enter(vm);
        let now = self.inner.now();
        let guest = state.guests.get_mut(&vm).ok_or_else(|| HypervisorError::not_found(vm))?;
        if guest.state != DomainState::Saved {
            return Err(invalid_state("discard saved memory of", vm, guest.state));
        }
        guest.stop(now, DomainState::Off, StateReason::None);
        Ok(())
    }

    fn guest_ping(&self, vm: VmId, _timeout: Duration) -> Result<bool> {
        let mut state = self.inner.enter(vm);
        Ok(running(&mut state, vm, "ping the guest agent of")?.agent)
    }

    fn guest_exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecResult> {
        let mut state = self.inner.enter(vm);
        emulate(self.inner.agent(&mut state, vm)?, request)
    }

    fn guest_write_file(&self, vm: VmId, path: &str, content: &[u8]) -> Result<()> {
        let mut state = self.inner.enter(vm);
        let guest = self.inner.agent(&mut state, vm)?;
        let files = if in_memory(path) { &mut guest.memory } else { &mut guest.disk };
        files.insert(path.to_owned(), content.to_vec());
        Ok(())
    }

    fn guest_read_file(&self, vm: VmId, path: &str, limit: usize) -> Result<Vec<u8>> {
        let mut state = self.inner.enter(vm);
        let guest = self.inner.agent(&mut state, vm)?;
        match read(guest, path) {
            None => Err(guest_failed(format!("read {path:?} in the guest: no such file"))),
            Some(content) if content.len() > limit => {
                Err(guest_failed(format!("read {path:?} in the guest: longer than {limit} bytes")))
            }
            Some(content) => Ok(content.clone()),
        }
    }

    fn fs_freeze(&self, vm: VmId) -> Result<u32> {
        let mut state = self.inner.enter(vm);
        let guest = self.inner.agent(&mut state, vm)?;
        guest.frozen = true;
        Ok(guest.spec.disks.len() as u32)
    }

    fn fs_thaw(&self, vm: VmId) -> Result<u32> {
        let mut state = self.inner.enter(vm);
        let guest = self.inner.agent(&mut state, vm)?;
        let thawed = if std::mem::take(&mut guest.frozen) { guest.spec.disks.len() } else { 0 };
        Ok(thawed as u32)
    }

    fn screenshot(&self, vm: VmId) -> Result<Screenshot> {
        let mut state = self.inner.enter(vm);
        active(&mut state, vm, "take a screenshot of")?;
        // a tint per VM, so that a wall of screens is not one grey
        let id = vm.uuid().into_bytes();
        let mut bytes = b"P6\n64 48\n255\n".to_vec();
        bytes.extend(std::iter::repeat_n([id[0], id[1], id[2]], 64 * 48).flatten());
        Ok(Screenshot { mime: "image/x-portable-pixmap".to_owned(), bytes })
    }

    fn stats(&self, vm: VmId) -> Result<DomainStats> {
        let state = self.inner.settled();
        state.guests.get(&vm).map(|guest| self.inner.stats(guest)).ok_or_else(|| HypervisorError::not_found(vm))
    }

    fn all_stats(&self) -> Result<Vec<DomainStats>> {
        let state = self.inner.settled();
        let mut rows: Vec<_> = state
            .guests
            .values()
            .filter(|guest| guest.state.is_active())
            .map(|guest| self.inner.stats(guest))
            .collect();
        rows.sort_by_key(|row| row.vm);
        Ok(rows)
    }

    fn events(&self) -> Receiver<HypervisorEvent> {
        self.inner.subscribers.subscribe()
    }
}
