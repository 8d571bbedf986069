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
    Accel, Boot, Console, DiskSpec, DomainSpec, DomainState, Hypervisor, HypervisorEvent, StateReason, conformance,
};

const ROOT_VARIABLE: &str = "MUSTER_VIRT_TEST_ROOT";
const BOOT: Duration = Duration::from_secs(60);
/// Fixed, so that the process that was killed and its successor agree.
const ADOPTED: &str = "7d3f6a0e-3c58-4a55-9f0e-5f1c0a7c0a11";

fn disk(socket: &Path) -> DiskSpec {
    DiskSpec {
        target: "vda".into(),
        export_socket: socket.to_owned(),
        export_name: DiskServer::EXPORT.into(),
        read_only: false,
        serial: Some("muster-test.1".into()),
    }
}

fn spec(images: &Path, root: &Path, tiny: bool, vm: VmId, name: &str, socket: &Path) -> DomainSpec {
    let prefix = if tiny { "tiny-" } else { "" };
    let cmdline = fs::read_to_string(images.join(format!("{prefix}cmdline"))).unwrap();
    let boot = Boot::Direct {
        kernel: images.join("vmlinuz"),
        initrd: Some(images.join(format!("{prefix}initramfs"))),
        cmdline: cmdline.trim().to_owned(),
    };
    let mut spec = DomainSpec::new(vm, name, ByteLen::mib(256), boot, Accel::Tcg);
    spec.disks.push(disk(socket));
    spec.vnc_socket = Some(root.join(format!("{}.vnc", vm.short())));
    let log = Some(root.join(format!("{}.log", vm.short())));
    spec.console = Console::Socket { path: root.join(format!("{}.con", vm.short())), log };
    spec
}

/// The process that is going to be killed: starts a guest and dies with signal 9. Only with the variable set.
#[test]
fn a_process_that_starts_a_guest_and_is_killed() {
    let Some(root) = std::env::var_os(ROOT_VARIABLE) else { return };
    let root = Path::new(&root);
    let images = guest::images().unwrap();
    let hypervisor = muster_virt::open(&format!("qemu:///embed?root={}", root.display())).unwrap();
    let vm: VmId = ADOPTED.parse().unwrap();
    hypervisor.define(&spec(&images, root, true, vm, "adopted", &root.join("tiny.nbd"))).unwrap();
    hypervisor.start(vm).unwrap();
    let me = std::process::id().to_string();
    Command::new("kill").args(["-9", &me]).status().unwrap();
    unreachable!("killed");
}

#[test]
fn the_embedded_driver_runs_adopts_and_repairs_real_guests() {
    let Some(images) = guest::images() else { return };
    let root = Root::new();
    // before the guard's end of all guests: their disks
    let tiny_image = root.path().join("tiny.raw");
    fs::copy(images.join("tiny.raw"), &tiny_image).unwrap();
    let mut tiny_disk = DiskServer::start(&tiny_image, root.path().join("tiny.nbd"), false);

    let died = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_that_starts_a_guest_and_is_killed", "--nocapture"])
        .env(ROOT_VARIABLE, root.path())
        .output()
        .unwrap();
    assert!(died.status.code().is_none(), "killed by signal: {}", String::from_utf8_lossy(&died.stderr));

    let hypervisor = muster_virt::open(&root.uri()).unwrap();
    println!("{:?}", hypervisor.info());
    adopts_the_guest_of_a_killed_process(hypervisor.as_ref(), root.path());
    survives_the_death_of_its_disk_server(hypervisor.as_ref(), root.path(), &mut tiny_disk);

    let debian_disk = DiskServer::start(&images.join("debian.raw"), root.path().join("debian.nbd"), true);
    // every character that could break out of the XML
    let prefix = "R&D <'lab'> \"1\"";
    let make = |vm: VmId, name: &str| spec(&images, root.path(), false, vm, name, &debian_disk.socket);
    let options = conformance::Options { boot: BOOT, ..conformance::Options::real_time(prefix, &make) };
    let report = conformance::run(hypervisor.as_ref(), &options).unwrap();
    for (step, took) in &report.steps {
        println!("{:8.3} s  {step}", took.as_secs_f64());
    }
    assert!(report.skipped.is_empty(), "{:?}", report.skipped);
    assert!(hypervisor.list().unwrap().is_empty());
}

fn adopts_the_guest_of_a_killed_process(hypervisor: &dyn Hypervisor, root: &Path) {
    let vm: VmId = ADOPTED.parse().unwrap();
    let rows = hypervisor.list().unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].vm, rows[0].state, rows[0].ours), (vm, DomainState::Running, true));
    assert_eq!(rows[0].agent_connected, Some(false));
    assert!(!hypervisor.guest_ping(vm, Duration::from_secs(1)).unwrap(), "the tiny guest has no agent");

    let log = root.join(format!("{}.log", vm.short()));
    wait_for("the tiny guest", BOOT, || fs::read_to_string(&log).ok()?.contains("MUSTER-TINY up boot=1").then_some(()));
    let mut port = SerialPort::connect(&root.join(format!("{}.con", vm.short())));
    port.send("echo answer-$((40 + 2))");
    port.expect("answer-42", Duration::from_secs(20));
    let stats = hypervisor.stats(vm).unwrap();
    assert_eq!(stats.block.len(), 1);
    assert!(stats.block[0].read_bytes > 0 && stats.block[0].write_bytes > 0, "{stats:?}");
}

fn survives_the_death_of_its_disk_server(hypervisor: &dyn Hypervisor, root: &Path, disk: &mut DiskServer) {
    let vm: VmId = ADOPTED.parse().unwrap();
    let events = hypervisor.events();
    let mut port = SerialPort::connect(&root.join(format!("{}.con", vm.short())));
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
    hypervisor.undefine(vm).unwrap();
}
