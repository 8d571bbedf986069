//! What every [`Hypervisor`] does, as one suite. An implementation's tests call [`run`]; what it declares absent in its
//! capabilities must answer `Unsupported`, everything else is exercised.

use std::time::{Duration, Instant};

use muster_common::id::VmId;

use crate::error::{HypervisorErrorKind, Result};
use crate::hypervisor::{Hypervisor, ShutdownMode};
use crate::spec::DomainSpec;
use crate::state::{DomainState, DomainStatus, ExecRequest, HypervisorEvent};

/// How to run the suite against one implementation.
pub struct Options<'a> {
    /// A bootable guest with a guest agent, a shell at `/bin/sh`, and a power button that works.
    pub spec: &'a dyn Fn(VmId, &str) -> DomainSpec,
    /// Prefix of the domains' names: unique among suites that share a hypervisor.
    pub prefix: String,
    /// Longest time from start to an answering guest agent.
    pub boot: Duration,
    /// Longest time for everything else.
    pub settle: Duration,
    /// Passes a little time: waits, or turns a virtual clock forward.
    pub idle: &'a dyn Fn(Duration),
    /// The same clock the idling moves.
    pub now: &'a dyn Fn() -> Duration,
}

impl<'a> Options<'a> {
    /// On the machine's clock.
    pub fn real_time(prefix: &str, spec: &'a dyn Fn(VmId, &str) -> DomainSpec) -> Self {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        Self {
            spec,
            prefix: prefix.to_owned(),
            boot: Duration::from_secs(60),
            settle: Duration::from_secs(60),
            idle: &|time| {
                // only the timer can end this
                let _ = crossbeam_channel::after(time).recv();
            },
            now: &|| START.get_or_init(Instant::now).elapsed(),
        }
    }
}

/// The first promise that did not hold.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {what}")]
pub struct Failure {
    step: &'static str,
    what: String,
}

/// What was run, and how long each step took.
#[derive(Debug, Default)]
pub struct Report {
    pub steps: Vec<(&'static str, Duration)>,
    /// Left out by declared capabilities.
    pub skipped: Vec<&'static str>,
}

struct Suite<'a> {
    hypervisor: &'a dyn Hypervisor,
    options: &'a Options<'a>,
    vm: VmId,
    step: &'static str,
    began: Duration,
    report: Report,
}

type Checked<T = ()> = Result<T, Failure>;

/// Runs everything. Whatever happens, the domains of the suite are gone afterwards.
pub fn run(hypervisor: &dyn Hypervisor, options: &Options<'_>) -> Result<Report, Failure> {
    let mut suite = Suite {
        hypervisor,
        options,
        vm: VmId::random(),
        step: "begin",
        began: (options.now)(),
        report: Report::default(),
    };
    let result = suite.everything();
    // the suite's verdict counts, not the clean-up's
    let _ = hypervisor.power_off(suite.vm);
    let _ = hypervisor.undefine(suite.vm);
    result?;
    Ok(suite.report)
}

impl Suite<'_> {
    fn step(&mut self, name: &'static str) {
        let now = (self.options.now)();
        if self.step != "begin" {
            self.report.steps.push((self.step, now.saturating_sub(self.began)));
        }
        self.step = name;
        self.began = now;
    }

    fn fail<T>(&self, what: impl Into<String>) -> Checked<T> {
        Err(Failure { step: self.step, what: what.into() })
    }

    fn check(&self, holds: bool, what: &str) -> Checked {
        if holds { Ok(()) } else { self.fail(what) }
    }

    fn ok<T>(&self, what: &str, result: Result<T>) -> Checked<T> {
        result.or_else(|e| self.fail(format!("{what}: {}", muster_common::error::Chain(&e))))
    }

    fn refused<T>(&self, what: &str, kind: HypervisorErrorKind, result: Result<T>) -> Checked {
        match result {
            Ok(_) => self.fail(format!("{what}: accepted, expected {kind:?}")),
            Err(e) if e.kind() == kind => Ok(()),
            Err(e) => {
                self.fail(format!("{what}: {:?} ({}), expected {kind:?}", e.kind(), muster_common::error::Chain(&e)))
            }
        }
    }

    fn wait(&self, what: &str, limit: Duration, mut holds: impl FnMut() -> Checked<bool>) -> Checked {
        let until = (self.options.now)() + limit;
        loop {
            if holds()? {
                return Ok(());
            }
            if (self.options.now)() >= until {
                return self.fail(format!("waited {limit:?} for {what}"));
            }
            (self.options.idle)(Duration::from_millis(50));
        }
    }

    fn status(&self) -> Checked<DomainStatus> {
        self.ok("status", self.hypervisor.status(self.vm))
    }

    fn wait_state(&self, state: DomainState) -> Checked {
        self.wait(&format!("state {state:?}"), self.options.settle, || Ok(self.status()?.state == state))
    }

    fn wait_agent(&self) -> Checked {
        self.wait("the guest agent", self.options.boot, || {
            self.ok("guest_ping", self.hypervisor.guest_ping(self.vm, Duration::from_secs(2)))
        })
    }

    /// Waits for an answering agent of a guest that booted anew: the marker file of the former boot is gone.
    fn wait_new_boot(&self) -> Checked {
        self.wait("a fresh boot", self.options.boot, || {
            // a short question first: one that the old boot took to its grave is waited for until its own limit
            if !self.ok("guest_ping", self.hypervisor.guest_ping(self.vm, Duration::from_secs(2)))? {
                return Ok(false);
            }
            match self.hypervisor.guest_read_file(self.vm, MARKER, MARKER_LIMIT) {
                Ok(_) => Ok(false),
                Err(e) => Ok(e.kind() == HypervisorErrorKind::GuestFailed),
            }
        })?;
        self.wait_agent()
    }

    fn everything(&mut self) -> Checked {
        let hv = self.hypervisor;
        let vm = self.vm;
        let capabilities = hv.info().capabilities;
        let events = hv.events();
        let name = format!("{}-one", self.options.prefix);
        let spec = (self.options.spec)(vm, &name);

        self.step("an unknown domain is not found");
        let kind = HypervisorErrorKind::NotFound;
        self.refused("status", kind, hv.status(vm))?;
        self.refused("start", kind, hv.start(vm))?;
        self.refused("power_off", kind, hv.power_off(vm))?;
        self.refused("undefine", kind, hv.undefine(vm))?;
        self.refused("shutdown", kind, hv.shutdown(vm, ShutdownMode::Acpi))?;
        self.refused("stats", kind, hv.stats(vm))?;

        self.step("define makes it known and off, twice is once");
        self.ok("define", hv.define(&spec))?;
        self.ok("define again", hv.define(&spec))?;
        let rows = self.ok("list", hv.list())?;
        let mine: Vec<_> = rows.iter().filter(|row| row.vm == vm).collect();
        self.check(mine.len() == 1, "list has one row for it")?;
        self.check(mine[0].state == DomainState::Off, "it is off")?;
        self.check(mine[0].ours && mine[0].persistent && mine[0].name == name, "it is ours, persistent, of that name")?;
        let twin = (self.options.spec)(VmId::random(), &name);
        self.refused("define another of that name", HypervisorErrorKind::AlreadyExists, hv.define(&twin))?;

        self.step("a domain that is off refuses what needs a running one");
        let kind = HypervisorErrorKind::InvalidState;
        self.refused("power_off", kind, hv.power_off(vm))?;
        self.refused("pause", kind, hv.pause(vm))?;
        self.refused("resume", kind, hv.resume(vm))?;
        self.refused("shutdown", kind, hv.shutdown(vm, ShutdownMode::Acpi))?;
        self.refused("reboot", kind, hv.reboot(vm, ShutdownMode::Acpi))?;
        self.refused("suspend", kind, hv.suspend(vm))?;
        self.refused("discard_saved", kind, hv.discard_saved(vm))?;
        if capabilities.guest_agent {
            self.refused("guest_exec", kind, hv.guest_exec(vm, &ExecRequest::new(["/bin/true"])))?;
        }

        self.step("start runs it");
        self.ok("start", hv.start(vm))?;
        self.wait_state(DomainState::Running)?;
        self.refused("start again", kind, hv.start(vm))?;
        self.refused("undefine while running", kind, hv.undefine(vm))?;
        self.refused("resume while running", kind, hv.resume(vm))?;

        self.step("the guest agent answers");
        if capabilities.guest_agent {
            self.wait_agent()?;
            self.guest()?;
        } else {
            self.report.skipped.push("guest agent");
            self.refused("guest_ping", HypervisorErrorKind::Unsupported, hv.guest_ping(vm, Duration::from_secs(1)))?;
            let unsupported = hv.shutdown(vm, ShutdownMode::Agent);
            self.refused("shutdown by agent", HypervisorErrorKind::Unsupported, unsupported)?;
        }

        self.step("statistics count");
        let stats = self.ok("stats", hv.stats(vm))?;
        self.check(stats.state == DomainState::Running, "statistics know the state")?;
        self.check(stats.cpu_time_ns > 0, "processor time counts")?;
        self.check(stats.vcpus == spec.vcpus, "processors are as specified")?;
        self.check(stats.memory.is_some_and(|m| m.bytes() > 0), "memory is told")?;
        if capabilities.device_stats {
            let counted = spec.disks.iter().filter(|disk| !disk.transport.is_vhost_user()).map(|disk| &disk.target);
            let counters = stats.block.iter().map(|block| &block.target);
            self.check(counters.eq(counted), "each disk has counters, but for those whose server counts")?;
        }
        let all = self.ok("all_stats", hv.all_stats())?;
        self.check(all.iter().any(|row| row.vm == vm), "statistics of all include it")?;

        self.step("a screenshot is a picture");
        if capabilities.screenshot && spec.vnc_socket.is_some() {
            let shot = self.ok("screenshot", hv.screenshot(vm))?;
            let png = self.ok("convert", shot.to_png())?;
            self.check(png.starts_with(b"\x89PNG"), "it converts to PNG")?;
        } else {
            self.report.skipped.push("screenshot");
        }

        self.step("pause stops it and resume goes on");
        self.ok("pause", hv.pause(vm))?;
        self.wait_state(DomainState::Paused)?;
        self.refused("pause again", kind, hv.pause(vm))?;
        if capabilities.guest_agent {
            self.refused("guest_ping while paused", kind, hv.guest_ping(vm, Duration::from_secs(1)))?;
        }
        self.refused("start while paused", kind, hv.start(vm))?;
        self.ok("resume", hv.resume(vm))?;
        self.wait_state(DomainState::Running)?;

        self.step("suspend keeps the memory, start brings it back");
        if capabilities.guest_agent {
            self.ok("write marker", hv.guest_write_file(vm, MARKER, b"kept"))?;
        }
        self.ok("suspend", hv.suspend(vm))?;
        self.wait_state(DomainState::Saved)?;
        self.refused("suspend again", kind, hv.suspend(vm))?;
        self.ok("start", hv.start(vm))?;
        self.wait_state(DomainState::Running)?;
        if capabilities.guest_agent {
            self.wait_agent()?;
            let marker = self.ok("read marker", hv.guest_read_file(vm, MARKER, MARKER_LIMIT))?;
            self.check(marker == b"kept", "the memory is as before")?;
        }

        self.step("saved memory can be thrown away");
        self.ok("suspend", hv.suspend(vm))?;
        self.wait_state(DomainState::Saved)?;
        self.ok("discard_saved", hv.discard_saved(vm))?;
        self.wait_state(DomainState::Off)?;
        self.ok("start", hv.start(vm))?;
        self.wait_state(DomainState::Running)?;

        self.step("reset boots anew");
        if capabilities.reset {
            if capabilities.guest_agent {
                self.wait_agent()?;
                self.ok("write marker", hv.guest_write_file(vm, MARKER, b"lost"))?;
            }
            self.ok("reset", hv.reset(vm))?;
            self.wait_state(DomainState::Running)?;
            if capabilities.guest_agent {
                self.wait_new_boot()?;
            }
        } else {
            self.report.skipped.push("reset");
            self.refused("reset", HypervisorErrorKind::Unsupported, hv.reset(vm))?;
        }

        self.step("reboot and shutdown through the agent");
        if capabilities.guest_agent {
            self.ok("write marker", hv.guest_write_file(vm, MARKER, b"lost"))?;
            self.ok("reboot", hv.reboot(vm, ShutdownMode::Agent))?;
            self.wait_new_boot()?;
            self.wait_state(DomainState::Running)?;
            self.ok("shutdown", hv.shutdown(vm, ShutdownMode::Agent))?;
            self.wait_state(DomainState::Off)?;
            self.ok("start", hv.start(vm))?;
            self.wait_agent()?;
        } else {
            self.report.skipped.push("agent reboot and shutdown");
        }

        self.step("the power button shuts down");
        self.ok("shutdown", hv.shutdown(vm, ShutdownMode::Acpi))?;
        self.wait_state(DomainState::Off)?;

        self.step("start_paused waits for resume");
        if capabilities.start_paused {
            self.ok("start_paused", hv.start_paused(vm))?;
            self.wait_state(DomainState::Paused)?;
            self.ok("resume", hv.resume(vm))?;
        } else {
            self.report.skipped.push("start_paused");
            self.ok("start", hv.start(vm))?;
        }
        self.wait_state(DomainState::Running)?;

        self.step("power_off ends it at once");
        self.ok("power_off", hv.power_off(vm))?;
        self.wait_state(DomainState::Off)?;

        self.step("a new definition may change the name");
        let renamed = format!("{}-renamed", self.options.prefix);
        self.ok("define", hv.define(&(self.options.spec)(vm, &renamed)))?;
        self.check(self.status()?.name == renamed, "the name is new")?;

        self.step("undefine forgets it");
        self.ok("undefine", hv.undefine(vm))?;
        self.refused("status", HypervisorErrorKind::NotFound, hv.status(vm))?;
        let rows = self.ok("list", hv.list())?;
        self.check(rows.iter().all(|row| row.vm != vm), "list has no row for it")?;

        self.step("events told of it");
        let mut seen = Vec::new();
        self.wait("events running, paused, off", self.options.settle, || {
            seen.extend(events.try_iter());
            let told = |wanted: DomainState| {
                seen.iter().any(|event| {
                    matches!(event, HypervisorEvent::Lifecycle { vm: of, state, .. } if *of == vm && *state == wanted)
                })
            };
            Ok(told(DomainState::Running) && told(DomainState::Paused) && told(DomainState::Off))
        })?;
        if capabilities.guest_agent {
            let told = |wanted: bool| seen.contains(&HypervisorEvent::GuestAgent { vm, connected: wanted });
            self.check(told(true), "an event told that the guest agent came")?;
        }
        self.step("end");
        Ok(())
    }

    fn guest(&self) -> Checked {
        let hv = self.hypervisor;
        let vm = self.vm;
        self.wait("agent_connected in the status", self.options.settle, || {
            Ok(self.status()?.agent_connected == Some(true))
        })?;
        let script = "read line; echo \"got $line\"; echo problem >&2; exit 3";
        let request = ExecRequest { input: b"input\n".to_vec(), ..ExecRequest::new(["/bin/sh", "-c", script]) };
        let result = self.ok("guest_exec", hv.guest_exec(vm, &request))?;
        self.check(result.exit == Some(3), "the exit status arrives")?;
        self.check(result.stdout == b"got input\n", "standard input reached it and its output arrives")?;
        self.check(result.stderr == b"problem\n", "standard error arrives")?;
        let missing = hv.guest_exec(vm, &ExecRequest::new(["/no/such/program"]));
        self.refused("run a missing program", HypervisorErrorKind::GuestFailed, missing)?;

        let content: Vec<u8> = (0..150_001u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        self.ok("guest_write_file", hv.guest_write_file(vm, "/tmp/muster file", &content))?;
        let back = self.ok("guest_read_file", hv.guest_read_file(vm, "/tmp/muster file", 1 << 20))?;
        self.check(back == content, "the file comes back as it was")?;
        let limited = hv.guest_read_file(vm, "/tmp/muster file", 1000);
        self.refused("read beyond the limit", HypervisorErrorKind::GuestFailed, limited)?;
        self.ok("write nothing", hv.guest_write_file(vm, "/tmp/muster file", b""))?;
        let back = self.ok("read nothing", hv.guest_read_file(vm, "/tmp/muster file", 10))?;
        self.check(back.is_empty(), "an empty file is empty")?;
        let absent = hv.guest_read_file(vm, "/no/such/file", 10);
        self.refused("read a missing file", HypervisorErrorKind::GuestFailed, absent)?;

        let frozen = self.ok("fs_freeze", hv.fs_freeze(vm))?;
        let thawed = self.ok("fs_thaw", hv.fs_thaw(vm))?;
        self.check(thawed == frozen, "as many file systems thaw as froze")
    }
}

/// On a file system in memory: gone with a boot.
const MARKER: &str = "/run/muster-marker";
const MARKER_LIMIT: usize = 4096;
