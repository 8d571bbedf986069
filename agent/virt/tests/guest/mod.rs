//! Real guests for tests: the images `cargo xtask guest` builds, a disk server, a root that leaves nothing behind.

#![allow(dead_code)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use muster_virt::DiskTransport;

/// Where the guest images are, or `None` when there are none and skipping is allowed.
///
/// # Panics
/// When there are none and skipping is not allowed: a test that silently does nothing proves nothing.
pub fn images() -> Option<PathBuf> {
    let dir = std::env::var_os("MUSTER_GUEST_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest"), PathBuf::from);
    let needed = ["vmlinuz", "initramfs", "cmdline", "tiny-initramfs", "tiny-cmdline", "tiny.raw", "debian.raw"];
    let missing: Vec<_> = needed.iter().filter(|name| !dir.join(name).exists()).collect();
    if missing.is_empty() {
        return Some(dir.canonicalize().unwrap());
    }
    assert!(
        may_skip(),
        "no {missing:?} in {}: run `cargo xtask guest` (or set MUSTER_GUEST_DIR, or MUSTER_ALLOW_SKIP=1 to skip)",
        dir.display()
    );
    println!("skipped: no guest images");
    None
}

/// A developer's machine may lack something; continuous integration may not.
pub fn may_skip() -> bool {
    std::env::var_os("MUSTER_ALLOW_SKIP").is_some_and(|value| value == "1")
}

/// Polls until it holds.
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < until, "waited {limit:?} for {what}");
        let _ = crossbeam_channel::after(Duration::from_millis(20)).recv();
    }
}

/// A hypervisor root; dropping it ends every QEMU that was started under it, also those of a killed process.
pub struct Root {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Root {
    /// As long as a root may be, so that every test shows that the unix sockets below it fit.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("mv").tempdir_in("/tmp").unwrap();
        let room = muster_virt::libvirt::MAX_ROOT_LENGTH - dir.path().as_os_str().len() - 1;
        let path = dir.path().join("r".repeat(room));
        fs::create_dir(&path).unwrap();
        Self { _dir: dir, path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn uri(&self) -> String {
        format!("qemu:///embed?root={}", self.path().display())
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let ours = self.path().to_string_lossy().into_owned();
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command);
            if command.split('\0').next().is_some_and(|program| program.contains("qemu-system"))
                && command.contains(&ours)
            {
                let _ = Command::new("kill").arg("-9").arg(process.file_name()).status();
            }
        }
    }
}

/// Ends the QEMU of every pid file in a directory whose command line contains a text that only ours have.
pub fn end_all(pid_files: &Path, ours: &str) {
    for entry in fs::read_dir(pid_files).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|e| e != "pid") || path.file_stem().is_some_and(|s| s == "driver") {
            continue;
        }
        let Ok(pid) = fs::read_to_string(&path) else { continue };
        let pid = pid.trim();
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(ours) {
            let _ = Command::new("kill").args(["-9", pid]).status();
        }
    }
}

/// A disk served by QEMU's own servers, dead with this value.
pub struct DiskServer {
    pub transport: DiskTransport,
    pub program: &'static str,
    arguments: Vec<String>,
    child: Option<Child>,
}

impl DiskServer {
    pub const EXPORT: &'static str = "5e1f9a52-0000-4000-8000-000000000001.1";

    /// `qemu-nbd`.
    pub fn nbd(image: &Path, socket: PathBuf) -> Self {
        let name = Self::EXPORT;
        let socket_text = socket.to_str().unwrap();
        let arguments = ["-f", "raw", "-t", "-e", "8", "-x", name, "-k", socket_text, image.to_str().unwrap()];
        let transport = DiskTransport::Nbd { socket: socket.clone(), export_name: name.into() };
        Self::start(transport, "qemu-nbd", &arguments)
    }

    /// `qemu-storage-daemon`.
    pub fn vhost_user(image: &Path, socket: PathBuf, queues: u16) -> Self {
        let file = format!("driver=file,node-name=f,filename={}", image.display());
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
            socket.display()
        );
        let arguments = ["--blockdev", &file, "--blockdev", "driver=raw,node-name=d,file=f", "--export", &export];
        Self::start(DiskTransport::VhostUser { socket, queues }, "qemu-storage-daemon", &arguments)
    }

    fn start(transport: DiskTransport, program: &'static str, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&word| word.to_owned()).collect();
        let mut server = Self { transport, program, arguments, child: None };
        server.restart();
        server
    }

    pub fn restart(&mut self) {
        self.kill();
        let child = Command::new(self.program).args(&self.arguments).stdin(Stdio::null()).spawn();
        self.child = Some(child.unwrap_or_else(|e| panic!("start {} (package qemu-utils): {e}", self.program)));
        // a connection would be the one client the server has
        let socket = self.transport.socket().to_owned();
        wait_for("the disk server", Duration::from_secs(20), || listens(&socket).then_some(()));
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
            let _ = fs::remove_file(self.transport.socket());
        }
    }
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// By the kernel's list: flag 0x10000 is a socket that accepts.
fn listens(socket: &Path) -> bool {
    let list = fs::read_to_string("/proc/net/unix").unwrap();
    let path = socket.to_str().unwrap();
    list.lines().any(|line| line.ends_with(path) && line.split_whitespace().nth(3) == Some("00010000"))
}

/// A guest's serial port on its unix socket.
pub struct SerialPort {
    stream: UnixStream,
    seen: Vec<u8>,
    /// How much of it was waited for already.
    at: usize,
}

impl SerialPort {
    pub fn connect(path: &Path) -> Self {
        let stream = wait_for("the console socket", Duration::from_secs(10), || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        Self { stream, seen: Vec::new(), at: 0 }
    }

    pub fn send(&mut self, line: &str) {
        self.stream.write_all(line.as_bytes()).unwrap();
        self.stream.write_all(b"\n").unwrap();
    }

    /// Reads until the text came, after what was waited for before.
    pub fn expect(&mut self, text: &str, limit: Duration) {
        let until = Instant::now() + limit;
        loop {
            let new = &self.seen[self.at..];
            if let Some(at) = new.windows(text.len()).position(|w| w == text.as_bytes()) {
                self.at += at + text.len();
                return;
            }
            assert!(
                Instant::now() < until,
                "waited {limit:?} for {text:?} on the console, got {:?}",
                String::from_utf8_lossy(new)
            );
            self.read();
        }
    }

    /// Whether nothing comes for this long.
    pub fn is_silent(&mut self, time: Duration) -> bool {
        let (until, before) = (Instant::now() + time, self.seen.len());
        while Instant::now() < until && self.seen.len() == before {
            self.read();
        }
        self.seen.len() == before
    }

    /// What came up to now is not waited for any more.
    pub fn skip(&mut self) {
        self.at = self.seen.len();
    }

    /// All it said since it was connected.
    pub fn everything(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    fn read(&mut self) {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => panic!("the console closed"),
            Ok(count) => self.seen.extend_from_slice(&buffer[..count]),
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(e) => panic!("read console: {e}"),
        }
    }
}
