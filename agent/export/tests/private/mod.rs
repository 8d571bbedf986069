//! Tests that mount: each in namespaces of its own, so that nothing stays mounted and no process is left when it ends. (One
//! that is killed from outside while it waits for a mount that it serves itself hangs until its nbdfuse is killed.)
#![allow(dead_code, reason = "each test program uses its part")]
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};

use crate::common::{tool, wait_for};

/// Set for the process inside.
const INSIDE: &str = "MUSTER_TEST_INSIDE";

/// Runs `body` in a second process of this test program, which is the first process of its own namespace: with it all it
/// started ends and all it mounted goes. `name` is the calling test's.
pub fn privately(name: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let Some(mut unshare) = tool("unshare", "util-linux") else { return };
    // a user namespace only where it is needed: there is none below a chroot, and as root there need not be
    let who: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--map-root-user"] };
    // in a chroot whose root is no mount point the propagation cannot be changed
    let flags = ["private", "unchanged"].map(|propagation| {
        [who, &["--mount", "--pid", "--fork", "--kill-child", "--propagation", propagation]].concat()
    });
    let may = |flags: &&Vec<&str>| {
        let tried = Command::new("unshare").args(*flags).arg("true").stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    };
    let Some(flags) = flags.iter().find(may) else {
        return skip("namespaces of one's own are not allowed here: run as root");
    };
    let status = unshare
        .args(flags)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{name} in namespaces of its own: {status}");
}

/// Fails, or says what is not tested where `MUSTER_ALLOW_SKIP=1` allows that.
pub fn skip(why: &str) {
    assert!(
        std::env::var_os("MUSTER_ALLOW_SKIP").is_some_and(|value| value == "1"),
        "{why} (or set MUSTER_ALLOW_SKIP=1)"
    );
    eprintln!("SKIPPED: {why}");
}

/// An NBD export as a file, by `nbdfuse`.
pub struct Nbdfuse {
    child: Child,
    place: PathBuf,
}

impl Nbdfuse {
    /// False where it is missing and that is allowed.
    pub fn is_here() -> bool {
        if tool("nbdfuse", "libnbd-bin fuse3").is_none() {
            return false;
        }
        let fuse = Path::new("/dev/fuse").exists();
        if !fuse {
            skip("this kernel has no FUSE");
        }
        fuse
    }

    /// `place` is a directory that is made.
    pub fn mount(place: &Path, uri: &str) -> Nbdfuse {
        Nbdfuse::mount_with(place, &[uri])
    }

    /// `export` is how nbdfuse finds it.
    pub fn mount_with(place: &Path, export: &[&str]) -> Nbdfuse {
        std::fs::create_dir_all(place).unwrap();
        let ready = place.with_extension("pid");
        let _ = std::fs::remove_file(&ready);
        let mut child =
            Command::new("nbdfuse").arg("-P").arg(&ready).arg(place.join("disk")).args(export).spawn().unwrap();
        wait_for("nbdfuse to serve", || {
            assert!(child.try_wait().unwrap().is_none(), "nbdfuse ended");
            ready.exists()
        });
        Nbdfuse { child, place: place.to_owned() }
    }

    pub fn file(&self) -> PathBuf {
        self.place.join("disk")
    }
}

impl Drop for Nbdfuse {
    fn drop(&mut self) {
        // it ends when it is unmounted; what still hangs after a while is ended
        let _ = unmount(&self.place, UnmountFlags::DETACH);
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline && self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            std::thread::park_timeout(Duration::from_millis(2));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
