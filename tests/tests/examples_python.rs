//! The Python examples against our bus on loopback: another vendor's program subscribes, commands and counts.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use muster_bus::testing::{Domain, free_domain, wait_until};
use muster_idl::{
    samples,
    v1::{
        Event, GroupCommand, Heartbeat, HostMetrics, Outcome, PhysicalHost, StoreHealth, StoreState, Verdict,
        VirtualSystem, VmMetrics, VolumeMetrics,
    },
};

const LIMIT: Duration = Duration::from_secs(30);

struct Script {
    child: Child,
    lines: Receiver<String>,
}

impl Script {
    fn start(name: &str, domain: &Domain, arguments: &[&str]) -> Self {
        let root: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .find(|p| p.join("Cargo.lock").exists())
            .unwrap()
            .to_path_buf();
        let venv = root.join("target/venv/bin/python");
        let python = if venv.exists() { venv } else { "python3".into() };
        let mut child = Command::new(python)
            .arg(root.join("examples/python").join(name))
            .args(["--cell", &domain.cell().to_string(), "--interface", "127.0.0.1"])
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("run {name}: {e}; `cargo xtask setup` installs Cyclone DDS for Python"));
        let out = child.stdout.take().unwrap();
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    /// The next line that begins so; `meanwhile` is done while waiting.
    fn line(&self, start: &str, mut meanwhile: impl FnMut()) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.lines.recv_timeout(Duration::from_millis(100)) {
                Ok(line) if line.starts_with(start) => return line,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => meanwhile(),
                Err(RecvTimeoutError::Disconnected) => panic!("it ended without a line {start:?}"),
            }
            assert!(Instant::now() < deadline, "waited {LIMIT:?} for a line {start:?}");
        }
    }

    fn exit_code(&mut self) -> Option<i32> {
        let mut status = None;
        wait_until("the script ends", LIMIT, || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.and_then(|s| s.code())
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn another_vendors_subscriber_prints_hosts_and_vms() {
    let domain = free_domain();
    let bus = domain.bus().unwrap();
    let hosts = bus.publisher::<PhysicalHost>().unwrap();
    let loads = bus.publisher::<HostMetrics>().unwrap();
    let stores = bus.publisher::<StoreState>().unwrap();
    let health = bus.publisher::<StoreHealth>().unwrap();
    let systems = bus.publisher::<VirtualSystem>().unwrap();
    let vm_loads = bus.publisher::<VmMetrics>().unwrap();
    let disk_loads = bus.publisher::<VolumeMetrics>().unwrap();
    let events = bus.publisher::<Event>().unwrap();
    // state is there before the subscriber comes
    hosts.publish(&samples::physical_host()).unwrap();
    stores.publish(&samples::store_state()).unwrap();
    health.publish(&samples::store_health()).unwrap();
    systems.publish(&samples::virtual_system()).unwrap();
    let script = Script::start("subscribe.py", &domain, &[]);
    script.line("reading", || {});
    let late: Vec<String> =
        ["host     ", "store    ", "health   ", "vm       "].iter().map(|start| start.to_string()).collect();
    let mut missing = late;
    let deadline = Instant::now() + LIMIT;
    while !missing.is_empty() {
        let line = script.lines.recv_timeout(LIMIT).unwrap();
        missing.retain(|start| !line.starts_with(start));
        assert!(Instant::now() < deadline, "{missing:?}");
    }
    let again = || {
        loads.publish(&samples::host_metrics()).unwrap();
        vm_loads.publish(&samples::vm_metrics()).unwrap();
        disk_loads.publish(&samples::volume_metrics()).unwrap();
        events.publish(&samples::event()).unwrap();
    };
    let line = script.line("load     ", again);
    assert!(line.ends_with("cpu 12 %, memory 32.0 GiB, 6 VMs running"), "{line}");
    script.line("vm load  ", again);
    script.line("disk     ", again);
    script.line("event    ", again);
    systems.dispose(&muster_idl::Topic::key(&samples::virtual_system())).unwrap();
    script.line("gone     an instance of muster_v1_virtual_system", || {});
}

/// A stand-in for an agent obeys a command published by Cyclone; an independent reader counts the samples: one.
#[test]
fn another_vendors_command_is_one_sample_and_gets_a_verdict() {
    let domain = free_domain();
    let agent = domain.bus().unwrap();
    let systems = agent.publisher::<VirtualSystem>().unwrap();
    let hearts = agent.publisher::<Heartbeat>().unwrap();
    let verdicts = agent.publisher::<Verdict>().unwrap();
    let mut commands = agent.subscriber::<GroupCommand>(64).unwrap();
    let system = samples::virtual_system();
    systems.publish(&system).unwrap();
    let beat = || {
        hearts.publish(&Heartbeat { participant: agent.participant_guid(), ..samples::heartbeat() }).unwrap();
    };
    let mut counter = Script::start("count_commands.py", &domain, &[]);
    counter.line("counting", || {});
    let mut script =
        Script::start("command.py", &domain, &["reset-session", &system.name, "--argument", "policy=fail"]);
    script.line("published", beat);
    let command = commands.recv_timeout(LIMIT).unwrap().value().unwrap();
    assert_eq!(command.verb.as_str(), "reset-session");
    assert_eq!((command.members[0].vm.as_str(), command.arguments[0].value.as_str()), (system.vm.as_str(), "fail"));
    assert!(command.id.parse::<uuid::Uuid>().is_ok_and(|id| id.get_version_num() == 7), "{}", command.id);
    verdicts
        .publish(&Verdict {
            command: command.id.clone(),
            outcome: Outcome::Done,
            enabled_state: 2,
            ..samples::verdict()
        })
        .unwrap();
    let line = script.line(&system.name, || {});
    assert!(line.contains("done after 0.0 s, enabled"), "{line}");
    assert_eq!(script.exit_code(), Some(0));
    counter.line(&format!("1 {}", command.id), || {});
    rustix::process::kill_process(rustix::process::Pid::from_child(&counter.child), rustix::process::Signal::TERM)
        .unwrap();
    counter.line("total 1", || {});
    assert_eq!(counter.exit_code(), Some(0));
}
