//! Boot storm and virus-scan storm: many clients at once, each on its own clone of one image.
//!
//!     cargo bench -p muster-tests --bench storm [-- ROUNDS [CLIENTS,CLIENTS,... [boot,scan [MUSTER,...]]]]
//!
//! First a real guest (Debian of `cargo xtask guest`) boots from a store volume behind a [`Recorder`]. What it asked of
//! its disk until its guest agent answered is the trace; it goes through its file format. Then clients replay it, all
//! at once, each over its own connection and on its own clone, with no think time: the next request is sent when the
//! last was answered. The scan reads each client's whole disk in requests of 128 KiB, from the first to the last byte.
//!
//! The clients are in this process, driven by one thread that waits for whichever is answered. They are the same for every
//! server of a transport: over vhost-user a driver with memory of its own that kicks and is called, as a guest's does; over
//! NBD (unix sockets) one that sends and receives.
//!
//! | server | what |
//! |---|---|
//! | muster, vhost-user | `VhostServer` in this process over clones in a memory-resident store, as local VMs have it; the image is there, as on a host that runs it |
//! | muster, NBD | the same over `NbdServer` |
//! | plain memory, vhost-user | `VhostServer` over one array with the image's bytes that all clients share, and no store: what the transport and the machine's memory allow |
//! | qcow2, vhost-user | for each client a qcow2 overlay on disk with the raw image as backing file, and a `qemu-storage-daemon`, both past the page cache |
//! | qcow2, NBD | the same with a `qemu-nbd --cache=none` |
//! | nbd-server | one `nbd-server` with `copyonwrite` on the raw image: a process and a difference file for each client |
//!
//! All files are taken out of the page cache before each run. Runs are interleaved; a row is the round with the median
//! rate. A run that takes longer than [`LIMIT`] is cut, and the row says how much of it was done. "Slowest/fastest" divides
//! the longest time a client took by the shortest. Disk bytes are those the server processes caused to be read
//! (`/proc/<pid>/io`), "busy" is the part of all processors' time that was not idle.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use muster_common::{ByteLen, Digest, VolumeId};
use muster_export::{
    NbdConfig, NbdServer, Registry,
    trace::{Kind, Record, Recorder, Trace},
    vhost::{VhostConfig, VhostServer},
};
use muster_store::{Store, StoreConfig, VolumeSpec};
use muster_tests::{source_root, wait_for};

mod clients;
#[path = "../../../agent/export/tests/frontend/mod.rs"]
mod frontend;
#[path = "../guest/mod.rs"]
mod guest;
#[path = "../nbd/mod.rs"]
mod nbd;
mod peers;
#[path = "../../../agent/export/benches/peers/ram.rs"]
#[allow(dead_code)]
mod ram;

use clients::{Client, drive};
use peers::Peer;
use ram::Ram;

/// A boot takes a tenth of it under TCG.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// A client that has not come to its end by then is cut.
const LIMIT: Duration = Duration::from_secs(120);
const SCAN_REQUEST: u64 = 128 << 10;
const START_LIMIT: Duration = Duration::from_secs(20);

/// What everybody shares.
struct Bench {
    dir: tempfile::TempDir,
    image: PathBuf,
    store: Store,
    digest: Digest,
    registry: Arc<Registry>,
    socket: PathBuf,
    vhost: VhostServer,
    memory: OnceLock<Arc<Ram>>,
}

struct Load {
    name: &'static str,
    requests: Vec<Record>,
}

/// One run.
struct Figures {
    rate: f64,
    spread: f64,
    p50: Duration,
    p99: Duration,
    disk: u64,
    busy: f64,
    seconds: f64,
    /// Of all requests.
    done: f64,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let rounds = arguments.first().map_or(Ok(3), |a| a.parse::<usize>())?;
    let counts = arguments.get(1).map_or("1,8,64", String::as_str);
    let counts = counts.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>()?;

    let guest = source_root().join("target/guest");
    let image = guest.join("debian.raw");
    ensure!(image.exists(), "{} is missing: run cargo xtask guest", image.display());
    // difference files are made beside what is served
    let dir = tempfile::Builder::new().prefix("storm").tempdir()?;
    let store = Store::open(StoreConfig::new(ByteLen::gib(4)))?;
    let digest = guest::load(&store, &image)?;
    let registry = Arc::new(Registry::new());
    let socket = dir.path().join("muster.sock");
    let server = NbdServer::start(NbdConfig::unix(&socket), registry.clone())?;
    let vhost = VhostServer::start(VhostConfig::new(dir.path().join("vu")), registry.clone())?;
    let bench = Bench { dir, image, store, digest, registry, socket, vhost, memory: OnceLock::new() };

    let trace = bench.record(&guest)?;
    let bytes = trace.to_bytes();
    let trace = Trace::from_bytes(&bytes)?;
    ensure!(trace.left_out == 0, "the recorder was full");
    describe(&trace, bytes.len());

    let size = trace.size.bytes();
    let scan = (0..size).step_by(SCAN_REQUEST as usize).map(|offset| {
        let len = SCAN_REQUEST.min(size - offset);
        Record { at: Duration::ZERO, kind: Kind::Read, fua: false, offset, len }
    });
    let wanted = arguments.get(2).map_or("boot,scan", String::as_str);
    let loads =
        [Load { name: "boot", requests: trace.records.clone() }, Load { name: "scan", requests: scan.collect() }];
    let loads = loads.into_iter().filter(|load| wanted.contains(load.name)).collect::<Vec<_>>();
    let only = arguments.get(3).map_or("", String::as_str);
    let mut peers = Peer::ALL.to_vec();
    peers.retain(|peer| peer.as_str().contains(only));
    peers.retain(|peer| {
        let Some(program) = peer.program() else { return true };
        let there = Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
        if !there {
            println!("{program} is not installed: left out");
        }
        there
    });
    println!("{rounds} rounds, load at the start {}", load_average());
    println!(
        "| storm | clients | server | requests/s | the first is | slowest/fastest | p50, µs | p99, µs | read from disk | busy | s | done |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for load in &loads {
        for clients in &counts {
            let mut results: Vec<Vec<Figures>> = peers.iter().map(|_| Vec::new()).collect();
            for _ in 0..rounds {
                for (peer, results) in peers.iter().zip(&mut results) {
                    let one = bench.run(*peer, *clients, load);
                    results.push(one.with_context(|| format!("{} {} {clients}", load.name, peer.as_str()))?);
                }
            }
            let mut ours = 0.0;
            for (peer, mut results) in peers.iter().zip(results) {
                results.sort_by(|a, b| a.rate.total_cmp(&b.rate));
                let f = &results[results.len() / 2];
                ours = if *peer == peers[0] { f.rate } else { ours };
                println!(
                    "| {} | {clients} | {} | {:.0} | {:.1} x | {:.2} | {} | {} | {} | {:.0} % | {:.2} | {:.0} % |",
                    load.name,
                    peer.as_str(),
                    f.rate,
                    ours / f.rate,
                    f.spread,
                    f.p50.as_micros(),
                    f.p99.as_micros(),
                    ByteLen(f.disk),
                    f.busy * 100.0,
                    f.seconds,
                    f.done * 100.0
                );
            }
        }
    }
    println!("load at the end {}", load_average());
    server.stop();
    Ok(())
}

fn describe(trace: &Trace, file: usize) {
    println!("trace: {} requests, {} bytes as a file", trace.records.len(), file);
    for kind in [Kind::Read, Kind::Write, Kind::WriteZeroes, Kind::Trim, Kind::Flush] {
        let of_kind = trace.records.iter().filter(|r| r.kind == kind);
        let (count, bytes) = of_kind.fold((0, 0), |(count, bytes), r| (count + 1, bytes + r.len));
        println!("  {kind:?}: {count}, {}", ByteLen(bytes));
    }
}

fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_string()
}

impl Bench {
    fn record(&self, images: &Path) -> Result<Trace> {
        let id = VolumeId::random();
        let name = format!("{id}.0");
        let volume = self.store.create_volume(VolumeSpec::clone_of(id, self.digest))?;
        let recorder = Arc::new(Recorder::new(volume, 1 << 20));
        self.registry.add(&name, recorder.clone())?;
        let agent = self.dir.path().join("agent.sock");
        let process = guest::start(images, &agent, &guest::nbd_disk(&self.socket, &name))?;
        wait_for("the guest's agent to answer", BOOT_LIMIT, || guest::agent_answers(&agent).then_some(()));
        let trace = recorder.trace();
        drop(process);
        self.registry.remove(&name, Duration::from_secs(5))?;
        self.store.delete_volume(id)?;
        Ok(trace)
    }

    fn run(&self, peer: Peer, clients: usize, load: &Load) -> Result<Figures> {
        let served = self.serve(peer, clients)?;
        let longest = load.requests.iter().filter(|r| r.kind != Kind::Trim).map(|r| r.len).max().unwrap_or_default();
        let mut connections = Vec::new();
        for (n, place) in served.places.iter().enumerate() {
            let client = Client::connect(place, longest.max(4096) as usize, n as u64 + 1, START_LIMIT)?;
            ensure!(client.size() == self.size(), "the server's disk is not the image: {} bytes", client.size());
            connections.push(client);
        }
        let files = served.files.iter().filter(|file| file.extension().is_some_and(|e| e == "qcow2"));
        for file in files.chain([&self.image]) {
            cool(file)?;
        }
        let (disk, processors) = (served.disk_bytes()?, processor_times()?);
        let started = Instant::now();
        let outcomes = drive(&mut connections, &load.requests, LIMIT)?;
        let seconds = started.elapsed().as_secs_f64();
        let (disk, after) = (served.disk_bytes()? - disk, processor_times()?);
        let done: usize = outcomes.iter().map(|o| o.latencies.len()).sum();
        let times = || outcomes.iter().map(|o| o.took);
        let (slowest, fastest) = (times().max().unwrap_or_default(), times().min().unwrap_or_default());
        let whole = outcomes.iter().map(|o| o.reached).sum::<usize>() as f64;
        let mut latencies: Vec<u32> = outcomes.iter().flat_map(|o| o.latencies.iter().copied()).collect();
        latencies.sort_unstable();
        let quantile = |q: f64| Duration::from_nanos(latencies[(q * (latencies.len() - 1) as f64) as usize].into());
        Ok(Figures {
            rate: done as f64 / seconds,
            spread: slowest.as_secs_f64() / fastest.as_secs_f64(),
            p50: quantile(0.5),
            p99: quantile(0.99),
            disk,
            busy: (after.0 - processors.0) as f64 / ((after.1 - processors.1).max(1)) as f64,
            seconds,
            done: whole / (clients * load.requests.len()) as f64,
        })
    }

    fn size(&self) -> u64 {
        self.store.image(&self.digest).map_or(0, |image| image.size().bytes())
    }
}

/// Takes the file out of the page cache.
fn cool(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    rustix::fs::fsync(&file)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// Busy and all time of all processors so far, in ticks.
fn processor_times() -> Result<(u64, u64)> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("the first line of /proc/stat")?;
    let ticks: Vec<u64> = line.split_whitespace().skip(1).take(8).map(str::parse).collect::<Result<_, _>>()?;
    ensure!(ticks.len() == 8, "/proc/stat has eight numbers");
    let all = ticks.iter().sum::<u64>();
    // idle and waiting for I/O
    Ok((all - ticks[3] - ticks[4], all))
}
