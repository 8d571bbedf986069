//! The system daemon's QEMU driver: a libvirtd of our own in a mount namespace, killed and started again under a guest.
//! Needs root.

// helpers of tests may panic like the tests
#![allow(clippy::unwrap_used)]

mod guest;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use guest::wait_for;
use muster_common::id::VmId;
use muster_common::units::ByteLen;
use muster_virt::{
    Accel, Boot, Console, DomainSpec, DomainState, HypervisorErrorKind, HypervisorEvent, HypervisorKind, StateReason,
};

const LIMIT: Duration = Duration::from_secs(60);

/// A libvirtd that sees its own directories in the places the package uses, and nothing of the host's.
struct Daemon {
    dir: PathBuf,
    /// Its guest.
    vm: VmId,
    child: Option<Child>,
}

impl Daemon {
    fn start(dir: &Path) -> Self {
        for name in ["etc", "lib", "cache", "log", "run", "sock"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        let sockets = dir.join("sock");
        let conf = format!(
            "unix_sock_dir = \"{}\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\nlisten_tls = 0\nhost_uuid = \"{}\"\n",
            sockets.display(),
            VmId::random()
        );
        fs::write(dir.join("etc/libvirtd.conf"), conf).unwrap();
        let qemu = "stdio_handler = \"file\"\nsecurity_driver = \"none\"\nuser = \"root\"\ngroup = \"root\"\n\
                    cgroup_controllers = []\nnamespaces = []\n";
        fs::write(dir.join("etc/qemu.conf"), qemu).unwrap();
        let mut daemon = Self { dir: dir.to_owned(), vm: VmId::random(), child: None };
        daemon.restart();
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("sock/libvirt-sock")
    }

    fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.socket().display())
    }

    fn restart(&mut self) {
        self.kill();
        let script = "mount --bind $1/run /run && mount --bind $1/etc /etc/libvirt && mount --bind $1/lib /var/lib/libvirt \
                      && mount --bind $1/cache /var/cache/libvirt && mount --bind $1/log /var/log/libvirt \
                      && exec libvirtd -f $1/etc/libvirtd.conf";
        let child = Command::new("unshare")
            .args(["--mount", "--uts", "--propagation", "private", "sh", "-c", script, "sh"])
            .arg(&self.dir)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
        let socket = self.socket();
        wait_for("the daemon's socket", LIMIT, || UnixStream::connect(&socket).ok());
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
            let _ = fs::remove_file(self.socket());
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        guest::end_all(&self.dir.join("run/libvirt/qemu"), &self.vm.to_string());
    }
}

#[test]
fn a_guest_outlives_its_daemon_and_the_loss_of_the_connection_is_told() {
    let Some(images) = guest::images() else { return };
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        assert!(guest::may_skip(), "run as root (or set MUSTER_ALLOW_SKIP=1 to skip): a daemon needs its own mounts");
        println!("skipped: not root");
        return;
    }
    let dir = tempfile::Builder::new().prefix("ms").tempdir_in("/tmp").unwrap();
    let mut daemon = Daemon::start(dir.path());
    let hypervisor = muster_virt::open(&daemon.uri()).unwrap();
    assert_eq!(hypervisor.info().kind, HypervisorKind::QemuSystem);
    let events = hypervisor.events();

    let vm = daemon.vm;
    let cmdline = fs::read_to_string(images.join("tiny-cmdline")).unwrap();
    let boot = Boot::Direct {
        kernel: images.join("vmlinuz"),
        initrd: Some(images.join("tiny-initramfs")),
        cmdline: cmdline.trim().to_owned(),
    };
    let mut spec = DomainSpec::new(vm, "system", ByteLen::mib(256), boot, Accel::Tcg);
    let log = dir.path().join("console.log");
    spec.console = Console::Pty { log: Some(log.clone()) };
    hypervisor.define(&spec).unwrap();
    hypervisor.start(vm).unwrap();
    wait_for("the tiny guest", LIMIT, || fs::read_to_string(&log).ok()?.contains("MUSTER-TINY up").then_some(()));
    assert!(hypervisor.stats(vm).unwrap().cpu_time_ns > 0);

    daemon.kill();
    wait_for("the event", LIMIT, || events.try_iter().find(|event| *event == HypervisorEvent::ConnectionLost));
    let kind = hypervisor.status(vm).unwrap_err().kind();
    assert_eq!(kind, HypervisorErrorKind::Connection);

    daemon.restart();
    let hypervisor = muster_virt::open(&daemon.uri()).unwrap();
    let status = wait_for("the guest in the new daemon", LIMIT, || hypervisor.status(vm).ok());
    assert_eq!((status.state, status.ours), (DomainState::Running, true));
    hypervisor.pause(vm).unwrap();
    assert_eq!(hypervisor.status(vm).unwrap().reason, StateReason::User);
    hypervisor.power_off(vm).unwrap();
    hypervisor.undefine(vm).unwrap();
    assert!(hypervisor.list().unwrap().is_empty());
}
