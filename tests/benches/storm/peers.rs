//! The servers that are measured, each with one clone or overlay for each client.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use muster_common::VolumeId;
use muster_store::VolumeSpec;
use muster_tests::{Process, wait_for};
use parking_lot::RwLock;

use crate::{Bench, START_LIMIT, clients::Place, guest, ram::Ram};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    Muster,
    MusterNbd,
    Memory,
    Qcow2,
    Qcow2Nbd,
    NbdServer,
}

impl Peer {
    pub const ALL: [Peer; 6] =
        [Peer::Muster, Peer::MusterNbd, Peer::Memory, Peer::Qcow2, Peer::Qcow2Nbd, Peer::NbdServer];

    pub fn as_str(self) -> &'static str {
        match self {
            Peer::Muster => "muster, vhost-user",
            Peer::MusterNbd => "muster, NBD",
            Peer::Memory => "plain memory, vhost-user",
            Peer::Qcow2 => "qcow2, vhost-user",
            Peer::Qcow2Nbd => "qcow2, NBD",
            Peer::NbdServer => "nbd-server",
        }
    }

    /// What must be installed for it.
    pub fn program(self) -> Option<&'static str> {
        match self {
            Peer::Muster | Peer::MusterNbd | Peer::Memory => None,
            Peer::Qcow2 => Some("qemu-storage-daemon"),
            Peer::Qcow2Nbd => Some("qemu-nbd"),
            Peer::NbdServer => Some("nbd-server"),
        }
    }
}

/// A server that is up, with one clone for each client. Ends with the value.
pub struct Served<'a> {
    bench: &'a Bench,
    /// Where client n connects.
    pub places: Vec<Place>,
    /// Names of exports of ours, and the volumes behind them.
    exports: Vec<(String, Option<VolumeId>)>,
    processes: Vec<Process>,
    /// A server that puts itself into the background, by its pid.
    daemon: Option<u32>,
    pub files: Vec<PathBuf>,
}

impl Served<'_> {
    /// The server's processes: those started and their children. None when it is this one.
    fn pids(&self) -> Vec<u32> {
        let mut pids: Vec<u32> = self.processes.iter().map(Process::id).chain(self.daemon).collect();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            // behind the name, which may hold blanks: the state, then the parent
            let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)).and_then(|p| p.parse().ok());
            if self.daemon.is_some() && parent == self.daemon {
                pids.push(pid);
            }
        }
        pids
    }

    /// Bytes its processes have caused to be read from block devices.
    pub fn disk_bytes(&self) -> Result<u64> {
        let pids = if self.exports.is_empty() { self.pids() } else { vec![std::process::id()] };
        pids.into_iter().map(guest::read_bytes).sum()
    }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        self.processes.clear();
        if let Some(pid) = self.daemon {
            let end = |pid: u32| {
                let pid = rustix::process::Pid::from_raw(pid as i32);
                // one that has ended by itself is what is wanted
                let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM));
            };
            let all = self.pids();
            end(pid);
            all.into_iter().for_each(end);
            wait_for("nbd-server to end", START_LIMIT, || {
                (!Path::new(&format!("/proc/{pid}/exe")).exists()).then_some(())
            });
        }
        for (name, volume) in &self.exports {
            // those served over NBD are not known there
            let _ = self.bench.vhost.withdraw(name, Duration::from_secs(5));
            let gone = self.bench.registry.remove(name, Duration::from_secs(5)).is_ok();
            let gone = gone && volume.is_none_or(|id| self.bench.store.delete_volume(id).is_ok());
            assert!(gone, "take {name} away");
        }
        for file in &self.files {
            let _ = fs::remove_file(file);
        }
    }
}

impl Bench {
    pub fn serve(&self, peer: Peer, clients: usize) -> Result<Served<'_>> {
        let mut served = Served {
            bench: self,
            places: Vec::new(),
            exports: Vec::new(),
            processes: Vec::new(),
            daemon: None,
            files: Vec::new(),
        };
        match peer {
            Peer::Muster | Peer::MusterNbd => {
                for _ in 0..clients {
                    let id = VolumeId::random();
                    let name = format!("{id}.0");
                    self.registry.add(&name, self.store.create_volume(VolumeSpec::clone_of(id, self.digest))?)?;
                    served.places.push(if peer == Peer::Muster {
                        Place::VhostUser { socket: self.vhost.serve(&name)? }
                    } else {
                        Place::Nbd { socket: self.socket.clone(), export: name.clone() }
                    });
                    served.exports.push((name, Some(id)));
                }
            }
            Peer::Memory => {
                let device = match self.memory.get() {
                    Some(device) => device.clone(),
                    None => {
                        let device = Arc::new(Ram(RwLock::new(fs::read(&self.image)?)));
                        self.memory.get_or_init(|| device).clone()
                    }
                };
                for n in 0..clients {
                    let name = format!("memory{n}");
                    self.registry.add(&name, device.clone())?;
                    served.places.push(Place::VhostUser { socket: self.vhost.serve(&name)? });
                    served.exports.push((name, None));
                }
            }
            Peer::Qcow2 | Peer::Qcow2Nbd => {
                for n in 0..clients {
                    self.serve_overlay(peer, n, &mut served)?;
                }
            }
            Peer::NbdServer => self.serve_copies_on_write(clients, &mut served)?,
        }
        Ok(served)
    }

    /// A qcow2 overlay of its own on the image, past the page cache, and a server for it.
    fn serve_overlay(&self, peer: Peer, n: usize, served: &mut Served<'_>) -> Result<()> {
        let (overlay, socket) =
            (self.dir.path().join(format!("o{n}.qcow2")), self.dir.path().join(format!("o{n}.sock")));
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&self.image, &overlay])
            .status()?;
        ensure!(made.success(), "qemu-img create failed");
        let mut command;
        if peer == Peer::Qcow2Nbd {
            command = Command::new("qemu-nbd");
            command.args(["--persistent", "--cache=none", "--discard=unmap", "-f", "qcow2", "-x", "disk", "-k"]);
            command.args([&socket, &overlay]);
            served.places.push(Place::Nbd { socket: socket.clone(), export: "disk".into() });
        } else {
            let file =
                |name, path: &Path| format!("driver=file,node-name={name},filename={},cache.direct=on", path.display());
            command = Command::new("qemu-storage-daemon");
            command.args(["--blockdev", &(file("base-file", &self.image) + ",read-only=on")]);
            command.args(["--blockdev", "driver=raw,node-name=base,file=base-file,read-only=on"]);
            command.args(["--blockdev", &file("overlay-file", &overlay)]);
            command.args(["--blockdev", "driver=qcow2,node-name=disk,file=overlay-file,backing=base,discard=unmap"]);
            let export = "type=vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix";
            command.args(["--export", &format!("{export},addr.path={}", socket.display())]);
            served.places.push(Place::VhostUser { socket: socket.clone() });
        }
        served.processes.push(Process::spawn(command.stdin(Stdio::null())).context("start an overlay's server")?);
        served.files.extend([overlay, socket]);
        Ok(())
    }

    /// One nbd-server: a process and a file for the differences for each client.
    fn serve_copies_on_write(&self, clients: usize, served: &mut Served<'_>) -> Result<()> {
        let dir = self.dir.path();
        let (config, socket, pid) = (dir.join("nbd.conf"), dir.join("n.sock"), dir.join("n.pid"));
        // it listens on TCP too, whatever one wants: where nobody else does
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        // difference files are made beside what is served
        let image = dir.join("debian.raw");
        if !image.exists() {
            std::os::unix::fs::symlink(&self.image, &image)?;
        }
        let text = format!(
            "[generic]\nunixsock = {}\nlistenaddr = 127.0.0.1\nport = {port}\n[disk]\nexportname = {}\ncopyonwrite = true\nflush = true\nfua = true\n",
            socket.display(),
            image.display(),
        );
        fs::write(&config, text)?;
        let mut command = Command::new("nbd-server");
        command.arg("-C").arg(&config).arg("-p").arg(&pid).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        ensure!(command.status()?.success(), "nbd-server did not start");
        let number = || fs::read_to_string(&pid).ok()?.trim().parse().ok();
        served.daemon = Some(wait_for("nbd-server's pid file", START_LIMIT, number));
        served.files.extend([socket.clone(), pid]);
        served.places.extend((0..clients).map(|_| Place::Nbd { socket: socket.clone(), export: "disk".to_string() }));
        Ok(())
    }
}
