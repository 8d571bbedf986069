//! libvirt's mock driver.

// helpers of tests may panic like the tests
#![allow(clippy::unwrap_used)]

use muster_common::id::VmId;
use muster_common::units::ByteLen;
use muster_virt::{Accel, Boot, DomainSpec, HypervisorErrorKind, conformance};

#[test]
fn the_mock_driver_conforms() {
    let hypervisor = muster_virt::open("test:///default").unwrap();
    let spec = |vm: VmId, name: &str| {
        let boot = Boot::Direct { kernel: "/k".into(), initrd: None, cmdline: String::new() };
        DomainSpec::new(vm, name, ByteLen::mib(256), boot, Accel::Tcg)
    };
    // the mock comes with a domain of its own
    let foreign = hypervisor.list().unwrap().into_iter().find(|row| !row.ours).unwrap();
    let refused = hypervisor.power_off(foreign.vm).unwrap_err();
    assert_eq!(refused.kind(), HypervisorErrorKind::NotFound, "nobody else's domain is touched");
    assert_eq!(hypervisor.define(&spec(foreign.vm, "x")).unwrap_err().kind(), HypervisorErrorKind::AlreadyExists);
    assert_eq!(hypervisor.status(foreign.vm).unwrap(), foreign);
    let report = conformance::run(hypervisor.as_ref(), &conformance::Options::real_time("mock", &spec)).unwrap();
    println!("skipped: {:?}", report.skipped);
}
