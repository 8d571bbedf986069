//! The simulator: conformance on a virtual clock, fleets, faults, repeatability.

// helpers of tests may panic like the tests
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use muster_common::clock::Clock;
use muster_common::id::VmId;
use muster_common::units::ByteLen;
use muster_virt::simulator::{Chances, Fault, Latencies, Simulator, SimulatorConfig};
use muster_virt::{
    Accel, Boot, DiskSpec, DiskTransport, DomainSpec, DomainState, Hypervisor, HypervisorErrorKind, HypervisorEvent,
    ShutdownMode, StateReason, conformance,
};

#[derive(Default)]
struct VirtualClock(AtomicU64);

impl VirtualClock {
    fn advance(&self, time: Duration) {
        self.0.fetch_add(time.as_micros() as u64, Ordering::SeqCst);
    }
}

impl Clock for VirtualClock {
    fn now_us(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

fn vm(number: u128) -> VmId {
    VmId::from_uuid(uuid::Uuid::from_u128(number))
}

fn spec(vm: VmId, name: &str) -> DomainSpec {
    let boot = Boot::Direct { kernel: "/k".into(), initrd: None, cmdline: String::new() };
    let mut spec = DomainSpec::new(vm, name, ByteLen::mib(256), boot, Accel::Tcg);
    spec.disks.push(DiskSpec {
        target: "vda".into(),
        transport: DiskTransport::Nbd { socket: "/s".into(), export_name: "v.1".into() },
        read_only: false,
        serial: None,
    });
    spec.vnc_socket = Some("/v".into());
    spec
}

fn simulator(seed: u64, chances: Chances) -> (Simulator, Arc<VirtualClock>) {
    let clock = Arc::new(VirtualClock::default());
    let config = SimulatorConfig { chances, ..SimulatorConfig::new(seed, clock.clone()) };
    (Simulator::new(config), clock)
}

#[test]
fn the_simulator_conforms_on_a_virtual_clock() {
    let (simulator, clock) = simulator(1, Chances::default());
    let began = std::time::Instant::now();
    let options = conformance::Options {
        idle: &|time| {
            clock.advance(time);
            simulator.tick();
        },
        now: &|| Duration::from_micros(clock.now_us()),
        ..conformance::Options::real_time("sim", &spec)
    };
    let report = conformance::run(&simulator, &options).unwrap();
    assert!(report.skipped.is_empty(), "{:?}", report.skipped);
    let simulated: Duration = report.steps.iter().map(|(_, took)| *took).sum();
    assert!(simulated > Duration::from_secs(15), "{simulated:?}");
    assert!(began.elapsed() < simulated, "virtual time is not waited for");
}

#[test]
fn the_simulator_conforms_on_the_machines_clock() {
    let hypervisor = muster_virt::open("sim:///?seed=2&speed=100").unwrap();
    conformance::run(hypervisor.as_ref(), &conformance::Options::real_time("sim", &spec)).unwrap();
}

#[test]
fn the_ticker_tells_of_a_boot_without_being_asked() {
    let latencies = Latencies { boot: Duration::from_millis(20), ..Latencies::default() };
    let simulator = Simulator::real_time(3, latencies, Chances::default()).unwrap();
    let events = simulator.events();
    simulator.define(&spec(vm(1), "one")).unwrap();
    simulator.start(vm(1)).unwrap();
    let wanted = HypervisorEvent::GuestAgent { vm: vm(1), connected: true };
    while events.recv_timeout(Duration::from_secs(20)).unwrap() != wanted {}
}

/// Everything that is told, when it is told, of a fleet that starts, works and stops.
fn history(seed: u64, count: u128, chances: Chances) -> Vec<(u64, HypervisorEvent)> {
    let (simulator, clock) = simulator(seed, chances);
    let events = simulator.events();
    let mut told = Vec::new();
    for number in 0..count {
        simulator.define(&spec(vm(number), &format!("vm{number}"))).unwrap();
        // a failed start is part of the history
        let _ = simulator.start(vm(number));
    }
    for step in 0..200 {
        if step == 100 {
            for row in simulator.list().unwrap() {
                let mode = if row.agent_connected == Some(true) { ShutdownMode::Agent } else { ShutdownMode::Acpi };
                let _ = simulator.shutdown(row.vm, mode);
            }
        }
        clock.advance(Duration::from_millis(100));
        simulator.tick();
        told.extend(events.try_iter().map(|event| (clock.now_us(), event)));
    }
    told
}

#[test]
fn a_fleet_of_five_hundred_starts_and_stops_and_one_seed_gives_one_history() {
    let calm = history(7, 500, Chances::default());
    let off = |event: &HypervisorEvent| matches!(event, HypervisorEvent::Lifecycle { state: DomainState::Off, .. });
    assert_eq!(calm.iter().filter(|(_, event)| off(event)).count(), 500);

    let chances = Chances { start_fails: 0.1, shutdown_sticks: 0.1, boot_crashes: 0.1, agent_missing: 0.1 };
    let stormy = history(7, 500, chances);
    let stopped = stormy.iter().filter(|(_, event)| off(event)).count();
    assert!((250..450).contains(&stopped), "{stopped}");
    assert_eq!(stormy, history(7, 500, chances));
    assert_ne!(stormy, history(8, 500, chances));
}

#[test]
fn injected_faults_do_what_they_say_until_they_are_cleared() {
    let (simulator, clock) = simulator(1, Chances::default());
    let minute = || {
        clock.advance(Duration::from_secs(60));
        simulator.tick();
    };
    let state = || simulator.status(vm(1)).unwrap().state;
    simulator.define(&spec(vm(1), "one")).unwrap();

    simulator.inject(vm(1), Fault::StartFails).unwrap();
    assert_eq!(simulator.start(vm(1)).unwrap_err().kind(), HypervisorErrorKind::Other);
    assert_eq!(simulator.status(vm(1)).unwrap().reason, StateReason::Failed);
    simulator.clear(vm(1), Fault::StartFails).unwrap();

    simulator.inject(vm(1), Fault::AgentMissing).unwrap();
    simulator.start(vm(1)).unwrap();
    minute();
    assert!(!simulator.guest_ping(vm(1), Duration::ZERO).unwrap());
    let by_agent = simulator.shutdown(vm(1), ShutdownMode::Agent);
    assert_eq!(by_agent.unwrap_err().kind(), HypervisorErrorKind::AgentUnavailable);
    simulator.clear(vm(1), Fault::AgentMissing).unwrap();

    simulator.inject(vm(1), Fault::StuckShutdown).unwrap();
    simulator.shutdown(vm(1), ShutdownMode::Acpi).unwrap();
    minute();
    assert_eq!(state(), DomainState::Running);
    simulator.clear(vm(1), Fault::StuckShutdown).unwrap();
    simulator.shutdown(vm(1), ShutdownMode::Acpi).unwrap();
    minute();
    assert_eq!(state(), DomainState::Off);

    simulator.inject(vm(1), Fault::CrashAtBoot).unwrap();
    simulator.start(vm(1)).unwrap();
    minute();
    assert_eq!(state(), DomainState::Crashed);
    simulator.clear(vm(1), Fault::CrashAtBoot).unwrap();

    simulator.start(vm(1)).unwrap();
    simulator.fail_disk(vm(1), false).unwrap();
    assert_eq!(simulator.status(vm(1)).unwrap().reason, StateReason::IoError);
    simulator.resume(vm(1)).unwrap();
    minute();
    assert!(simulator.guest_ping(vm(1), Duration::ZERO).unwrap(), "a boot goes on where it was paused");
    simulator.crash(vm(1)).unwrap();
    assert_eq!(state(), DomainState::Crashed);
}
