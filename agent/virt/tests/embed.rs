//! Real guests under the embedded driver and TCG. One test: a process can open one embedded root only.

use std::path::{Path, PathBuf};

use muster_common::id::VmId;
use muster_common::units::ByteLen;
use muster_virt::{Accel, Boot, Console, DomainSpec, conformance};

fn spec(guest: &Path, dir: &Path, vm: VmId, name: &str) -> DomainSpec {
    let boot = Boot::Direct {
        kernel: guest.join("vmlinux"),
        initrd: Some(guest.join("initramfs.gz")),
        cmdline: "console=tty0 console=ttyS0 quiet mitigations=off nokaslr apparmor=0 audit=0 cryptomgr.notests".into(),
    };
    let mut spec = DomainSpec::new(vm, name, ByteLen::mib(256), boot, Accel::Tcg);
    spec.vnc_socket = Some(dir.join(format!("{}.vnc", vm.short())));
    spec.console = Console::Socket {
        path: dir.join(format!("{}.con", vm.short())),
        log: Some(dir.join("console.log")),
    };
    spec
}

#[test]
fn the_embedded_driver_conforms_with_a_real_guest() {
    let guest = PathBuf::from("/tmp/e5");
    let dir = tempfile::Builder::new()
        .prefix("mv")
        .tempdir_in("/tmp")
        .unwrap();
    let uri = format!("qemu:///embed?root={}", dir.path().display());
    let hypervisor = muster_virt::open(&uri).unwrap();
    println!("{:?}", hypervisor.info());
    let spec = |vm: VmId, name: &str| spec(&guest, dir.path(), vm, name);
    let options = conformance::Options::real_time("embed", &spec);
    let report = conformance::run(hypervisor.as_ref(), &options);
    println!(
        "{}",
        std::fs::read_to_string(dir.path().join("console.log")).unwrap_or_default()
    );
    let report = report.unwrap();
    for (step, took) in report.steps {
        println!("{:8.3} s  {step}", took.as_secs_f64());
    }
    println!("skipped: {:?}", report.skipped);
}
