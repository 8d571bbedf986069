//! A host without QEMU, or without libvirt's driver: a typed error that says what to install. Each case is a process of
//! its own, because libvirt looks once.

// helpers of tests may panic like the tests
#![allow(clippy::unwrap_used)]

use std::process::Command;

use muster_virt::HypervisorErrorKind;

const ROOT_VARIABLE: &str = "MUSTER_VIRT_TEST_MISSING";

/// Only with the variable set: prints what opening says.
#[test]
fn a_process_on_such_a_host() {
    let Ok(root) = std::env::var(ROOT_VARIABLE) else { return };
    match muster_virt::open(&format!("qemu:///embed?root={root}")) {
        Ok(_) => println!("<opened>"),
        Err(e) => println!("<{:?}: {}>", e.kind(), muster_common::error::Chain(&e)),
    }
}

fn open_with(variable: &str, value: &str) -> String {
    let root = tempfile::Builder::new().prefix("mv").tempdir_in("/tmp").unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_on_such_a_host", "--nocapture"])
        .env(ROOT_VARIABLE, root.path())
        .env(variable, value)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let begin = text.find('<').unwrap_or_else(|| panic!("{text} {}", String::from_utf8_lossy(&output.stderr)));
    text[begin + 1..].split('>').next().unwrap().to_owned()
}

#[test]
fn without_qemu_the_package_is_named() {
    let told = open_with("PATH", "/nonexistent");
    assert!(told.starts_with("NotInstalled") && told.contains("qemu-system-x86"), "{told}");
}

#[test]
fn without_the_driver_the_package_is_named() {
    let told = open_with("LIBVIRT_DRIVER_DIR", "/nonexistent");
    assert!(told.starts_with("NotInstalled") && told.contains("libvirt-daemon-driver-qemu"), "{told}");
}

#[test]
fn a_daemon_that_is_not_there_is_a_connection_error_and_a_wrong_uri_an_invalid_one() {
    let kind = |uri: &str| muster_virt::open(uri).err().unwrap().kind();
    assert_eq!(kind("qemu+unix:///system?socket=/nonexistent/socket"), HypervisorErrorKind::Connection);
    assert_eq!(kind("xen:///system"), HypervisorErrorKind::InvalidSpec);
    assert_eq!(kind("qemu:///embed"), HypervisorErrorKind::InvalidSpec);
    assert_eq!(kind("sim:///?speed=0"), HypervisorErrorKind::InvalidSpec);
}
