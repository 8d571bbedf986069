//! Boot of 1 and of 6 real guests: from the memory-resident store over vhost-user and over NBD, against qcow2 overlays on
//! disk (cache=none, so every read is the disk's). One run, all interleaved, median of the rounds.
//!
//!     cargo bench -p muster-tests --bench boot [-- ROUNDS]
//!
//! Prints a Markdown table: time from the start of QEMU until the guest agent of the first and of the last guest
//! answers, and the bytes QEMU read from a block device meanwhile. Under TCG the processor hides most of what the disk
//! costs; the disk bytes show it.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use muster_common::{ByteLen, Digest, VolumeId};
use muster_export::{
    NbdConfig, NbdServer, Registry,
    vhost::{VhostConfig, VhostServer},
};
use muster_store::{Store, StoreConfig, VolumeSpec};
use muster_tests::{Process, source_root};

mod guest;

/// No guest takes longer than this on two cores, six at once.
const DEADLINE: Duration = Duration::from_secs(180);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    VhostUser,
    Nbd,
    Qcow2,
}

impl Source {
    const ALL: [Source; 3] = [Source::VhostUser, Source::Nbd, Source::Qcow2];

    fn as_str(self) -> &'static str {
        match self {
            Source::VhostUser => "memory-resident store, vhost-user",
            Source::Nbd => "memory-resident store, NBD",
            Source::Qcow2 => "qcow2 overlay on disk, cache=none",
        }
    }
}

/// What everybody shares.
struct Bench {
    guest: PathBuf,
    dir: tempfile::TempDir,
    store: Store,
    digest: Digest,
    registry: Arc<Registry>,
    socket: PathBuf,
    vhost: VhostServer,
}

struct Round {
    first: Duration,
    last: Duration,
    disk_bytes: u64,
}

fn main() -> Result<()> {
    let rounds = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(3);
    let guest = source_root().join("target/guest");
    let image = guest.join("debian.raw");
    ensure!(image.exists(), "{} is missing: run cargo xtask guest", image.display());
    let dir = tempfile::tempdir()?;

    let store = Store::open(StoreConfig::new(ByteLen::gib(2)))?;
    let digest = guest::load(&store, &image)?;
    let registry = Arc::new(Registry::new());
    let socket = dir.path().join("nbd.sock");
    let server = NbdServer::start(NbdConfig::unix(&socket), registry.clone())?;

    let vhost = VhostServer::start(VhostConfig::new(dir.path().join("vu")), registry.clone())?;
    let bench = Bench { guest, dir, store, digest, registry, socket, vhost };

    println!("| guests | disk | first up, s | last up, s | read from disk |");
    println!("|---|---|---|---|---|");
    for guests in [1, 6] {
        let mut results = Source::ALL.map(|source| (source, Vec::new()));
        for _ in 0..rounds {
            for (source, rounds) in &mut results {
                rounds.push(bench.round(*source, guests)?);
            }
        }
        for (source, mut rounds) in results {
            rounds.sort_by_key(|r| r.last);
            let middle = &rounds[rounds.len() / 2];
            println!(
                "| {guests} | {} | {:.1} | {:.1} | {} |",
                source.as_str(),
                middle.first.as_secs_f64(),
                middle.last.as_secs_f64(),
                ByteLen(middle.disk_bytes)
            );
        }
    }
    server.stop();
    Ok(())
}

impl Bench {
    fn round(&self, source: Source, guests: usize) -> Result<Round> {
        let mut volumes = Vec::new();
        let mut running = Vec::new();
        let started = Instant::now();
        for n in 0..guests {
            let disk = match source {
                Source::VhostUser | Source::Nbd => {
                    let id = VolumeId::random();
                    let name = format!("{id}.0");
                    let volume = self.store.create_volume(VolumeSpec::clone_of(id, self.digest))?;
                    self.registry.add(&name, volume)?;
                    volumes.push((id, name.clone()));
                    self.disk_of(source, &name)?
                }
                Source::Qcow2 => self.overlay(n)?,
            };
            running.push(self.start(n, &disk)?);
        }
        let up = self.wait_for_agents(guests, started)?;
        let mut disk_bytes = 0;
        for process in &running {
            disk_bytes += guest::read_bytes(process.id())?;
        }
        drop(running);
        for (id, name) in volumes {
            // those over NBD are not known there
            let _ = self.vhost.withdraw(&name, Duration::from_secs(5));
            self.registry.remove(&name, Duration::from_secs(5))?;
            self.store.delete_volume(id)?;
        }
        Ok(Round { first: up[0], last: up[up.len() - 1], disk_bytes })
    }

    /// QEMU's words for a disk of the store.
    fn disk_of(&self, source: Source, name: &str) -> Result<Vec<String>> {
        if source == Source::Nbd {
            return Ok(guest::nbd_disk(&self.socket, name));
        }
        let socket = self.vhost.serve(name)?;
        Ok(vec![
            "-object".into(),
            "memory-backend-memfd,id=ram,size=256M,share=on".into(),
            "-machine".into(),
            "memory-backend=ram".into(),
            "-chardev".into(),
            format!("socket,id=disk,path={}", socket.display()),
            "-device".into(),
            "vhost-user-blk-pci,chardev=disk,num-queues=1".into(),
        ])
    }

    fn overlay(&self, n: usize) -> Result<Vec<String>> {
        let overlay = self.dir.path().join(format!("overlay{n}.qcow2"));
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&self.guest.join("debian.raw"), &overlay])
            .status()?;
        ensure!(made.success(), "qemu-img create failed");
        let file = format!("file.driver=file,file.cache.direct=on,file.filename={}", overlay.display());
        Ok(guest::block_device(&format!("driver=qcow2,{file}")))
    }

    fn wait_for_agents(&self, guests: usize, started: Instant) -> Result<Vec<Duration>> {
        let mut up = Vec::new();
        let mut waiting: Vec<usize> = (0..guests).collect();
        while !waiting.is_empty() {
            ensure!(started.elapsed() < DEADLINE, "guests {waiting:?} did not come up within {DEADLINE:?}");
            waiting.retain(|n| {
                let answers = guest::agent_answers(&self.agent_socket(*n));
                if answers {
                    up.push(started.elapsed());
                }
                !answers
            });
        }
        Ok(up)
    }

    fn agent_socket(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("agent{n}.sock"))
    }

    fn start(&self, n: usize, disk: &[String]) -> Result<Process> {
        let socket = self.agent_socket(n);
        let _ = fs::remove_file(&socket);
        guest::start(&self.guest, &socket, disk)
    }
}
