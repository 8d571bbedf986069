//! Real guests under the embedded driver and TCG. One test does it all: a process can open one embedded root only.

// helpers of tests may panic like the tests
#![allow(clippy::unwrap_used)]

mod guest;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use guest::{DiskServer, Root, SerialPort, wait_for};
use muster_common::id::VmId;
use muster_common::units::ByteLen;
use muster_virt::{
    Accel, Boot, Console, DiskSpec, DiskTransport, DomainSpec, DomainState, Hypervisor, HypervisorErrorKind,
    HypervisorEvent, StateReason, conformance,
};

const ROOT_VARIABLE: &str = "MUSTER_VIRT_TEST_ROOT";
const BOOT: Duration = Duration::from_secs(60);
/// Fixed, so that the process that was killed and its successor agree. One on a disk over NBD, one over vhost-user.
const ADOPTED: [&str; 2] = ["7d3f6a0e-3c58-4a55-9f0e-5f1c0a7c0a11", "8d3f6a0e-3c58-4a55-9f0e-5f1c0a7c0a11"];
/// More than the guest has processors, so that not every queue is used.
const QUEUES: u16 = 2;

fn adopted(index: usize) -> VmId {
    ADOPTED[index].parse().unwrap()
}

fn disk(transport: &DiskTransport) -> DiskSpec {
    DiskSpec {
        target: "vda".into(),
        transport: transport.clone(),
        read_only: false,
        serial: Some("muster-test.1".into()),
    }
}

fn spec(images: &Path, root: &Path, tiny: bool, vm: VmId, name: &str, transport: &DiskTransport) -> DomainSpec {
    let prefix = if tiny { "tiny-" } else { "" };
    let cmdline = fs::read_to_string(images.join(format!("{prefix}cmdline"))).unwrap();
    let boot = Boot::Direct {
        kernel: images.join("vmlinuz"),
        initrd: Some(images.join(format!("{prefix}initramfs"))),
        cmdline: cmdline.trim().to_owned(),
    };
    let mut spec = DomainSpec::new(vm, name, ByteLen::mib(256), boot, Accel::Tcg);
    spec.disks.push(disk(transport));
    spec.vnc_socket = Some(root.join(format!("{}.vnc", vm.short())));
    let log = Some(root.join(format!("{}.log", vm.short())));
    spec.console = Console::Socket { path: root.join(format!("{}.con", vm.short())), log };
    spec
}

fn transports(root: &Path) -> [DiskTransport; 2] {
    let nbd = DiskTransport::Nbd { socket: root.join("tiny.nbd"), export_name: DiskServer::EXPORT.into() };
    [nbd, DiskTransport::VhostUser { socket: root.join("tiny.vu"), queues: QUEUES }]
}

/// The process that is going to be killed: starts two guests and dies with signal 9. Only with the variable set.
#[test]
fn a_process_that_starts_guests_and_is_killed() {
    let Some(root) = std::env::var_os(ROOT_VARIABLE) else { return };
    let root = Path::new(&root);
    let images = guest::images().unwrap();
    let hypervisor = muster_virt::open(&format!("qemu:///embed?root={}", root.display())).unwrap();
    for (index, transport) in transports(root).iter().enumerate() {
        let vm = adopted(index);
        hypervisor.define(&spec(&images, root, true, vm, &format!("adopted-{index}"), transport)).unwrap();
        hypervisor.start(vm).unwrap();
    }
    let me = std::process::id().to_string();
    Command::new("kill").args(["-9", &me]).status().unwrap();
    unreachable!("killed");
}

#[test]
fn the_embedded_driver_runs_adopts_and_repairs_real_guests() {
    let Some(images) = guest::images() else { return };
    let root = Root::new();
    // before the guard's end of all guests: their disks
    let copy = |name: &str, to: &str| {
        let path = root.path().join(to);
        let status = Command::new("cp").arg("--sparse=always").arg(images.join(name)).arg(&path).status().unwrap();
        assert!(status.success());
        path
    };
    let (one, two) = (copy("tiny.raw", "nbd.raw"), copy("tiny.raw", "vu.raw"));
    let mut nbd = DiskServer::nbd(&one, root.path().join("tiny.nbd"));
    let mut vhost_user = DiskServer::vhost_user(&two, root.path().join("tiny.vu"), QUEUES);
    assert_eq!([nbd.transport.clone(), vhost_user.transport.clone()], transports(root.path()));

    let died = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_that_starts_guests_and_is_killed", "--nocapture"])
        .env(ROOT_VARIABLE, root.path())
        .output()
        .unwrap();
    assert!(died.status.code().is_none(), "killed by signal: {}", String::from_utf8_lossy(&died.stderr));

    let hypervisor = muster_virt::open(&root.uri()).unwrap();
    println!("{:?}", hypervisor.info());
    let hypervisor = hypervisor.as_ref();
    adopts_the_guests_of_a_killed_process(hypervisor, root.path());
    survives_the_death_of_its_nbd_server(hypervisor, root.path(), &mut nbd);
    goes_on_without_noticing_the_death_of_its_vhost_user_server(hypervisor, root.path(), &mut vhost_user);
    is_not_started_without_its_vhost_user_server(hypervisor, &mut vhost_user);
    for index in 0..2 {
        hypervisor.undefine(adopted(index)).unwrap();
    }

    let (one, two) = (copy("debian.raw", "nbd.raw"), copy("debian.raw", "vu.raw"));
    let nbd = DiskServer::nbd(&one, root.path().join("debian.nbd"));
    let vhost_user = DiskServer::vhost_user(&two, root.path().join("debian.vu"), 1);
    for server in [&nbd, &vhost_user] {
        // every character that could break out of the XML
        let prefix = format!("R&D <'lab'> \"{}\"", server.program);
        let make = |vm: VmId, name: &str| spec(&images, root.path(), false, vm, name, &server.transport);
        let options = conformance::Options { boot: BOOT, ..conformance::Options::real_time(&prefix, &make) };
        let report = conformance::run(hypervisor, &options).unwrap();
        println!("{}", server.program);
        for (step, took) in &report.steps {
            println!("{:8.3} s  {step}", took.as_secs_f64());
        }
        assert!(report.skipped.is_empty(), "{:?}", report.skipped);
    }
    assert!(hypervisor.list().unwrap().is_empty());
}

fn console(root: &Path, vm: VmId) -> SerialPort {
    SerialPort::connect(&root.join(format!("{}.con", vm.short())))
}

fn adopts_the_guests_of_a_killed_process(hypervisor: &dyn Hypervisor, root: &Path) {
    assert_eq!(hypervisor.list().unwrap().len(), 2);
    for index in 0..2 {
        let vm = adopted(index);
        let row = hypervisor.status(vm).unwrap();
        assert_eq!((row.vm, row.state, row.ours), (vm, DomainState::Running, true));
        assert_eq!(row.agent_connected, Some(false));
        assert!(!hypervisor.guest_ping(vm, Duration::from_secs(1)).unwrap(), "the tiny guest has no agent");

        let log = root.join(format!("{}.log", vm.short()));
        wait_for("the tiny guest", BOOT, || {
            fs::read_to_string(&log).ok()?.contains("MUSTER-TINY up boot=1").then_some(())
        });
        let mut port = console(root, vm);
        port.send("echo answer-$((40 + 2))");
        port.expect("answer-42", Duration::from_secs(20));
    }
    let stats = hypervisor.stats(adopted(0)).unwrap();
    assert_eq!(stats.block.len(), 1);
    assert!(stats.block[0].read_bytes > 0 && stats.block[0].write_bytes > 0, "{stats:?}");
    let stats = hypervisor.stats(adopted(1)).unwrap();
    assert_eq!(stats.block, [], "what nobody counts is absent, not zero");
}

fn survives_the_death_of_its_nbd_server(hypervisor: &dyn Hypervisor, root: &Path, disk: &mut DiskServer) {
    let vm = adopted(0);
    let events = hypervisor.events();
    let mut port = console(root, vm);
    disk.kill();
    port.send("dd if=/dev/vda of=/dev/null bs=4k count=4 skip=300 && echo read-$((1 + 1))-done");
    let status = wait_for("the pause", Duration::from_secs(20), || {
        Some(hypervisor.status(vm).unwrap()).filter(|status| status.state == DomainState::Paused)
    });
    assert_eq!(status.reason, StateReason::IoError);
    let mut seen = Vec::new();
    wait_for("the events of a disk failure", Duration::from_secs(20), || {
        seen.extend(events.try_iter());
        let paused = HypervisorEvent::Lifecycle { vm, state: DomainState::Paused, reason: StateReason::IoError };
        let failed = seen.iter().any(|e| matches!(e, HypervisorEvent::IoError { vm: of, .. } if *of == vm));
        (failed && seen.contains(&paused)).then_some(())
    });
    disk.restart();
    // a resume right after the server's return may pause again
    wait_for("a resume that lasts", Duration::from_secs(20), || {
        let paused = hypervisor.status(vm).unwrap().state == DomainState::Paused;
        if paused {
            hypervisor.resume(vm).unwrap();
        }
        (!paused).then_some(())
    });
    port.expect("read-2-done", Duration::from_secs(20));
    hypervisor.power_off(vm).unwrap();
}

/// Three writers, each comparing what it reads back, while the server is killed four times.
fn goes_on_without_noticing_the_death_of_its_vhost_user_server(
    hypervisor: &dyn Hypervisor,
    root: &Path,
    disk: &mut DiskServer,
) {
    let vm = adopted(1);
    let events = hypervisor.events();
    let mut port = console(root, vm);
    port.send("dd if=/dev/urandom of=/r bs=64k count=1 2>/dev/null");
    // 3 MiB each, from 4 MiB on; a dd that fails or reads other bytes says so
    port.send(
        "writer() { n=0; while [ ! -e /enough ]; do at=$((64 + $1 * 48 + n % 48)); n=$((n + 1)); \
         dd if=/r of=/dev/vda bs=64k seek=$at oflag=direct conv=notrunc 2>/dev/null || echo LO''ST; \
         dd if=/dev/vda bs=64k skip=$at count=1 iflag=direct 2>/dev/null | cmp -s - /r || echo OTH''ER; \
         echo w-$1-$n; done; echo writer-$1-ends; }",
    );
    port.send("writer 0 & writer 1 & writer 2 &");
    let limit = Duration::from_secs(60);
    for round in 1..=4 {
        port.expect("w-2-", limit);
        disk.kill();
        // so that requests are under way and wait; the guest keeps running
        let began = std::time::Instant::now();
        wait_for("the guest to wait for its disk", limit, || port.is_silent(Duration::from_millis(300)).then_some(()));
        assert_eq!(hypervisor.status(vm).unwrap().state, DomainState::Running);
        disk.restart();
        port.skip();
        let back = std::time::Instant::now();
        port.expect("w-0-", limit);
        println!("round {round}: away {:?}, going on {:?} after its return", back - began, back.elapsed());
        port.expect("w-1-", limit);
    }
    port.send("echo > /enough; wait; echo all-$((3 * 3))");
    port.expect("all-9", limit);
    let said = port.everything();
    assert!(!said.contains("LOST") && !said.contains("OTHER") && !said.contains("I/O error"), "{said}");
    for event in events.try_iter() {
        assert!(!matches!(event, HypervisorEvent::IoError { .. } | HypervisorEvent::Rebooted { .. }), "{event:?}");
    }
    hypervisor.power_off(vm).unwrap();
}

fn is_not_started_without_its_vhost_user_server(hypervisor: &dyn Hypervisor, disk: &mut DiskServer) {
    let vm = adopted(1);
    disk.kill();
    let error = hypervisor.start(vm).unwrap_err();
    assert_eq!(error.kind(), HypervisorErrorKind::DiskUnavailable);
    assert!(error.context().contains("tiny.vu"), "{}", error.context());
    assert_eq!(hypervisor.status(vm).unwrap().state, DomainState::Off);
    disk.restart();
    hypervisor.start(vm).unwrap();
    hypervisor.power_off(vm).unwrap();
}
