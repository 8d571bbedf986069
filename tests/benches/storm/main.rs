//! Boot storm and virus-scan storm: many clients at once, each on its own clone of one image.
//!
//!     cargo bench -p muster-tests --bench storm [-- ROUNDS [CLIENTS,CLIENTS,...]]
//!
//! First a real guest (Debian of `cargo xtask guest`) boots from a store volume behind a [`Recorder`]. What it asked of
//! its disk until its guest agent answered is the trace; it goes through its file format. Then clients replay it, all
//! at once, each over its own connection and on its own clone, with no think time: the next request is sent when the
//! last was answered. The scan reads each client's whole disk in requests of 128 KiB, from the first to the last byte.
//!
//! The clients are threads of this process and the same for every server (NBD over unix sockets):
//!
//! | server | what |
//! |---|---|
//! | muster | `NbdServer` in this process over clones in a memory-resident store; the image is there, as on a host that runs it |
//! | qcow2 | for each client a qcow2 overlay on disk with the raw image as backing file, and a `qemu-nbd --cache=none` |
//! | nbd-server | one `nbd-server` with `copyonwrite` on the raw image: a process and a difference file for each client |
//!
//! All files are taken out of the page cache before each run. Runs are interleaved; a row is the round with the median
//! rate. A scan stops after [`SCAN_LIMIT`] (slow peers would take minutes), the row then says how much of it was read;
//! its rate is then that of the disk's front part, which may hold more data than the rest. "Slowest/fastest" divides the best client's rate by the
//! worst one's. Disk bytes are those the server processes caused to be read (`/proc/<pid>/io`), "busy" is the part of
//! all processors' time that was not idle.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Barrier},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use muster_common::{ByteLen, Digest, VolumeId};
use muster_export::{
    NbdConfig, NbdServer, Registry,
    trace::{Kind, Record, Recorder, Trace},
};
use muster_store::{Store, StoreConfig, VolumeSpec};
use muster_tests::{Process, source_root, wait_for};

mod nbd;

/// A boot takes a tenth of it under TCG.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// A replay that has not come to its end by then is cut, as a scan.
const REPLAY_LIMIT: Duration = Duration::from_secs(60);
const SCAN_LIMIT: Duration = Duration::from_secs(8);
const SCAN_REQUEST: u64 = 128 << 10;
const START_LIMIT: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    Muster,
    Qcow2,
    NbdServer,
}

impl Peer {
    fn as_str(self) -> &'static str {
        match self {
            Peer::Muster => "muster",
            Peer::Qcow2 => "qcow2",
            Peer::NbdServer => "nbd-server",
        }
    }
}

/// What everybody shares.
struct Bench {
    dir: tempfile::TempDir,
    image: PathBuf,
    store: Store,
    digest: Digest,
    registry: Arc<Registry>,
    socket: PathBuf,
}

struct Load {
    name: &'static str,
    requests: Vec<Record>,
    limit: Duration,
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
    let digest = load(&store, &image)?;
    let registry = Arc::new(Registry::new());
    let socket = dir.path().join("muster.sock");
    let server = NbdServer::start(NbdConfig::unix(&socket), registry.clone())?;
    let bench = Bench { dir, image, store, digest, registry, socket };

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
    let loads = [
        Load { name: "boot", requests: trace.records.clone(), limit: REPLAY_LIMIT },
        Load { name: "scan", requests: scan.collect(), limit: SCAN_LIMIT },
    ];
    let mut peers = vec![Peer::Muster];
    for (program, peer) in [("qemu-nbd", Peer::Qcow2), ("nbd-server", Peer::NbdServer)] {
        match Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status() {
            Ok(_) => peers.push(peer),
            Err(_) => println!("{program} is not installed: left out"),
        }
    }
    println!("{rounds} rounds, load at the start {}", load_average());
    println!(
        "| storm | clients | server | requests/s | muster is | slowest/fastest | p50, µs | p99, µs | read from disk | busy | s | done |"
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
                ours = if *peer == Peer::Muster { f.rate } else { ours };
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

/// Fills the store with a raw image. Its digest is not that of the bytes: it only names it here.
fn load(store: &Store, image: &Path) -> Result<Digest> {
    let bytes = fs::read(image)?;
    let digest = Digest::from_bytes([7; 32]);
    let builder = store.image_builder(digest, "debian", ByteLen(bytes.len() as u64))?;
    for (i, chunk) in bytes.chunks(1 << 20).enumerate() {
        builder.write_chunk((i as u64) << 20, chunk)?;
    }
    builder.finish()?;
    Ok(digest)
}

/// A server that is up, with one clone for each client. Ends with the value.
struct Served<'a> {
    bench: &'a Bench,
    /// Where client n connects, and the export it asks for.
    places: Vec<(PathBuf, String)>,
    volumes: Vec<(VolumeId, String)>,
    processes: Vec<Process>,
    /// A server that puts itself into the background, by its pid.
    daemon: Option<u32>,
    files: Vec<PathBuf>,
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

    fn disk_bytes(&self) -> Result<u64> {
        let pids = if self.volumes.is_empty() { self.pids() } else { vec![std::process::id()] };
        pids.into_iter().map(read_bytes).sum()
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
        for (id, name) in &self.volumes {
            let gone = self.bench.registry.remove(name, Duration::from_secs(5)).is_ok();
            let gone = gone && self.bench.store.delete_volume(*id).is_ok();
            assert!(gone, "take {name} away");
        }
        for file in &self.files {
            let _ = fs::remove_file(file);
        }
    }
}

impl Bench {
    fn record(&self, guest: &Path) -> Result<Trace> {
        let id = VolumeId::random();
        let name = format!("{id}.0");
        let volume = self.store.create_volume(VolumeSpec::clone_of(id, self.digest))?;
        let recorder = Arc::new(Recorder::new(volume, 1 << 20));
        self.registry.add(&name, recorder.clone())?;
        let agent = self.dir.path().join("agent.sock");
        let process = start_guest(guest, &agent, &self.socket, &name)?;
        wait_for("the guest's agent to answer", BOOT_LIMIT, || agent_answers(&agent).then_some(()));
        let trace = recorder.trace();
        drop(process);
        self.registry.remove(&name, Duration::from_secs(5))?;
        self.store.delete_volume(id)?;
        Ok(trace)
    }

    fn serve(&self, peer: Peer, clients: usize) -> Result<Served<'_>> {
        let mut served = Served {
            bench: self,
            places: Vec::new(),
            volumes: Vec::new(),
            processes: Vec::new(),
            daemon: None,
            files: Vec::new(),
        };
        let dir = self.dir.path();
        match peer {
            Peer::Muster => {
                for _ in 0..clients {
                    let id = VolumeId::random();
                    let name = format!("{id}.0");
                    self.registry.add(&name, self.store.create_volume(VolumeSpec::clone_of(id, self.digest))?)?;
                    served.places.push((self.socket.clone(), name.clone()));
                    served.volumes.push((id, name));
                }
            }
            Peer::Qcow2 => {
                for n in 0..clients {
                    let (overlay, socket) = (dir.join(format!("o{n}.qcow2")), dir.join(format!("o{n}.sock")));
                    let made = Command::new("qemu-img")
                        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
                        .args([&self.image, &overlay])
                        .status()?;
                    ensure!(made.success(), "qemu-img create failed");
                    let mut command = Command::new("qemu-nbd");
                    command.args([
                        "--persistent",
                        "--cache=none",
                        "--discard=unmap",
                        "-f",
                        "qcow2",
                        "-x",
                        "disk",
                        "-k",
                    ]);
                    command.args([&socket, &overlay]).stdin(Stdio::null());
                    served.processes.push(Process::spawn(&mut command).context("start qemu-nbd")?);
                    served.files.extend([overlay, socket.clone()]);
                    served.places.push((socket, "disk".into()));
                }
            }
            Peer::NbdServer => {
                let (config, socket, pid) = (dir.join("nbd.conf"), dir.join("n.sock"), dir.join("n.pid"));
                // it listens on TCP too, whatever one wants: where nobody else does
                let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
                let served_image = dir.join("debian.raw");
                if !served_image.exists() {
                    std::os::unix::fs::symlink(&self.image, &served_image)?;
                }
                let text = format!(
                    "[generic]\nunixsock = {}\nlistenaddr = 127.0.0.1\nport = {port}\n[disk]\nexportname = {}\ncopyonwrite = true\nflush = true\nfua = true\n",
                    socket.display(),
                    served_image.display(),
                );
                fs::write(&config, text)?;
                let mut command = Command::new("nbd-server");
                command.arg("-C").arg(&config).arg("-p").arg(&pid).stdin(Stdio::null());
                command.stdout(Stdio::null()).stderr(Stdio::null());
                ensure!(command.status()?.success(), "nbd-server did not start");
                let number = || fs::read_to_string(&pid).ok()?.trim().parse().ok();
                served.daemon = Some(wait_for("nbd-server's pid file", START_LIMIT, number));
                served.files.extend([socket.clone(), pid]);
                served.places.extend((0..clients).map(|_| (socket.clone(), "disk".to_string())));
            }
        }
        Ok(served)
    }

    fn run(&self, peer: Peer, clients: usize, load: &Load) -> Result<Figures> {
        let served = self.serve(peer, clients)?;
        let mut connections = Vec::new();
        for (socket, export) in &served.places {
            let client = nbd::Client::connect(socket, export, START_LIMIT)?;
            ensure!(client.size == self.size(), "the server's disk is not the image: {} bytes", client.size);
            connections.push(client);
        }
        let files = served.files.iter().filter(|file| file.extension().is_some_and(|e| e == "qcow2"));
        for file in files.chain([&self.image]) {
            cool(file)?;
        }
        let (disk, processors) = (served.disk_bytes()?, processor_times()?);
        let barrier = Barrier::new(clients);
        let started = Instant::now();
        let outcomes = std::thread::scope(|scope| {
            let threads: Vec<_> = connections
                .into_iter()
                .enumerate()
                .map(|(n, client)| {
                    let barrier = &barrier;
                    scope.spawn(move || replay(n as u64, client, load, barrier))
                })
                .collect();
            threads.into_iter().map(|t| t.join().expect("a client does not panic")).collect::<Result<Vec<_>>>()
        })?;
        let seconds = started.elapsed().as_secs_f64();
        let (disk, after) = (served.disk_bytes()? - disk, processor_times()?);
        let done: usize = outcomes.iter().map(|o| o.latencies.len()).sum();
        let rates = outcomes.iter().map(|o| o.latencies.len() as f64 / o.took.as_secs_f64());
        let (slowest, fastest) = rates.fold((f64::MAX, 0f64), |(low, high), rate| (low.min(rate), high.max(rate)));
        let whole = outcomes.iter().map(|o| o.reached).sum::<usize>() as f64;
        let mut latencies: Vec<u32> = outcomes.iter().flat_map(|o| o.latencies.iter().copied()).collect();
        latencies.sort_unstable();
        let quantile = |q: f64| Duration::from_nanos(latencies[(q * (latencies.len() - 1) as f64) as usize].into());
        Ok(Figures {
            rate: done as f64 / seconds,
            spread: fastest / slowest,
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

struct Outcome {
    took: Duration,
    /// Nanoseconds of each request that was answered.
    latencies: Vec<u32>,
    /// How many of the load's requests were come to.
    reached: usize,
    /// Connected until all is counted: a server's process goes with its client.
    _client: nbd::Client,
}

fn replay(n: u64, mut client: nbd::Client, load: &Load, barrier: &Barrier) -> Result<Outcome> {
    let longest = load.requests.iter().filter(|r| r.kind != Kind::Trim).map(|r| r.len).max().unwrap_or_default();
    let (mut read, mut noise) = (vec![0; longest as usize], vec![0; longest as usize]);
    fill(&mut noise, n + 1);
    let mut latencies = Vec::with_capacity(load.requests.len());
    let mut reached = 0;
    barrier.wait();
    let started = Instant::now();
    let mut failed = None;
    for (i, record) in load.requests.iter().enumerate() {
        if started.elapsed() > load.limit {
            break;
        }
        reached += 1;
        let buffer = match record.kind {
            Kind::Write => {
                let data = &mut noise[..record.len as usize];
                // no block is another's, of this client or of any
                data.chunks_mut(4096).for_each(|block| {
                    let stamp = (i as u32).to_le_bytes();
                    let len = block.len().min(4);
                    block[..len].copy_from_slice(&stamp[..len]);
                });
                data
            }
            Kind::Trim => {
                read.resize(read.len().max(record.len as usize), 0);
                &mut read[..record.len as usize]
            }
            _ => &mut read[..record.len as usize],
        };
        let asked = Instant::now();
        match client.request(record.kind, record.fua, record.offset, buffer) {
            Ok(true) => latencies.push(u32::try_from(asked.elapsed().as_nanos()).unwrap_or(u32::MAX)),
            Ok(false) => {}
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    failed.map_or_else(|| Ok(Outcome { took: started.elapsed(), latencies, reached, _client: client }), Err)
}

/// Noise (xorshift).
fn fill(buffer: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in buffer.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
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

/// Bytes a process has caused to be read from block devices (proc(5), /proc/pid/io).
fn read_bytes(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/io"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("read_bytes: ")).context("read_bytes in /proc/pid/io")?;
    Ok(line.trim().parse()?)
}

fn start_guest(guest: &Path, agent: &Path, socket: &Path, export: &str) -> Result<Process> {
    let cmdline = fs::read_to_string(guest.join("cmdline"))?;
    let disk = format!(
        "driver=raw,node-name=disk,cache.direct=on,discard=unmap,file.driver=nbd,file.server.type=unix,file.server.path={},file.export={export}",
        socket.display()
    );
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-display", "none", "-nodefaults"])
        .args(["-no-user-config", "-serial", "null", "-monitor", "none", "-blockdev", &disk])
        .args(["-device", "virtio-blk-pci,drive=disk", "-append", cmdline.trim(), "-device", "virtio-serial"])
        .arg("-kernel")
        .arg(guest.join("vmlinuz"))
        .arg("-initrd")
        .arg(guest.join("initramfs"))
        .arg("-chardev")
        .arg(format!("socket,id=agent,server=on,wait=off,path={}", agent.display()))
        .args(["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    Process::spawn(&mut command).context("start qemu-system-x86_64")
}

/// One `guest-ping`, answered within a quarter of a second.
fn agent_answers(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    let asked = stream
        .set_read_timeout(Some(Duration::from_millis(250)))
        .and_then(|()| stream.write_all(b"{\"execute\":\"guest-ping\"}\n"));
    let mut line = String::new();
    asked.is_ok() && BufReader::new(stream).read_line(&mut line).is_ok_and(|n| n > 0) && line.contains("return")
}
