//! This export over vhost-user-blk against `qemu-storage-daemon` (raw file on a private tmpfs; qcow2 on disk with
//! O_DIRECT) and against a plain piece of memory served by this same code (as it lies, and with its blocks anywhere: what a
//! device can reach that keeps blocks one by one), with one client: the frontend and driver of
//! the tests, which polls.
//!
//! ```text
//! cargo bench -p muster-export --bench vhost_peers [-- --rounds 25 --millis 60 --size 256MiB --only store,ram --cells '128K']
//! ```
//!
//! Every server gets the same contents first, each block unlike the others. The cells are interleaved (round by round,
//! cell by cell, server by server); of the IOPS and of the ratios in each round the medians are shown: on a shared machine
//! only ratios of the same round mean anything, and many short rounds more than a few long ones. Writes are of data never
//! written before, so after the first round blocks lie anywhere: `--cells 128K` alone reads the disk as it was filled.
//! Prints a Markdown table. Not a test: exits with an error only when something could not be run.

#[path = "../tests/frontend/mod.rs"]
mod frontend;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use frontend::{Client, Driver, OK, Options, READ, WRITE};
use muster_block::BlockDevice;
use muster_block::conformance::Random;
use muster_common::{ByteLen, VolumeId};
use muster_export::Registry;
use muster_export::vhost::{VhostConfig, VhostServer};
use muster_store::{Store, StoreConfig, VolumeSpec};
use parking_lot::RwLock;

mod peers;
#[path = "peers/ram.rs"]
mod ram;

use peers::{Peer, Tmpfs};
use ram::{Ram, Strewn};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Cell {
    name: &'static str,
    kind: u32,
    bytes: u32,
    depth: usize,
    random: bool,
}

const CELLS: [Cell; 5] = [
    Cell { name: "4K randread QD32", kind: READ, bytes: 4 << 10, depth: 32, random: true },
    Cell { name: "4K randwrite QD32", kind: WRITE, bytes: 4 << 10, depth: 32, random: true },
    Cell { name: "128K seqread QD8", kind: READ, bytes: 128 << 10, depth: 8, random: false },
    Cell { name: "4K randread QD1", kind: READ, bytes: 4 << 10, depth: 1, random: true },
    Cell { name: "4K randwrite QD1", kind: WRITE, bytes: 4 << 10, depth: 1, random: true },
];

const SERVERS: [(&str, &str); 5] = [
    ("store", "muster"),
    ("ram", "memory, same code"),
    ("strewn", "its blocks anywhere"),
    ("raw", "qsd raw tmpfs"),
    ("qcow2", "qsd qcow2 O_DIRECT"),
];

/// One measurement.
#[derive(Clone, Copy, Debug)]
struct Figure {
    iops: f64,
    p50_us: f64,
}

struct Settings {
    rounds: usize,
    time: Duration,
    size: ByteLen,
    only: String,
    /// Part of the names of the cells to measure.
    cells: String,
}

fn settings() -> Result<Settings> {
    let mut settings = Settings {
        rounds: 25,
        time: Duration::from_millis(60),
        size: ByteLen::mib(256),
        only: String::new(),
        cells: String::new(),
    };
    // cargo adds --bench.
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--rounds" => settings.rounds = value.parse()?,
            "--millis" => settings.time = Duration::from_millis(value.parse()?),
            "--size" => settings.size = value.parse()?,
            "--only" => settings.only = value,
            "--cells" => settings.cells = value,
            _ => return Err(format!("unknown argument {argument}").into()),
        }
    }
    Ok(settings)
}

fn main() -> Result<()> {
    let settings = settings()?;
    let wanted = |key: &str| settings.only.is_empty() || settings.only.split(',').any(|one| one == key);
    let cells: Vec<Cell> = CELLS.into_iter().filter(|cell| cell.name.contains(&settings.cells)).collect();
    // Dropped last: clients, then servers, then what they have open.
    let directory = tempfile::tempdir()?;
    let tmpfs = Tmpfs::new(&directory.path().join("tmpfs"))?;
    let disk =
        tempfile::tempdir_in(std::env::var_os("CARGO_TARGET_TMPDIR").map_or(std::env::temp_dir(), PathBuf::from))?;

    let store = Store::open(StoreConfig::new(ByteLen(settings.size.bytes() * 3 + ByteLen::mib(256).bytes())))?;
    let registry = Arc::new(Registry::new());
    let server = VhostServer::start(VhostConfig::new(directory.path().join("vu")), registry.clone())?;
    let mut peers = Vec::new();
    let mut clients = Vec::new();
    for (key, name) in SERVERS {
        if !wanted(key) {
            continue;
        }
        let socket = match key {
            "store" => {
                registry.add(key, store.create_volume(VolumeSpec::blank(VolumeId::random(), settings.size))?)?;
                server.serve(key)?
            }
            "ram" | "strewn" => {
                let memory = Ram(RwLock::new(vec![0; settings.size.bytes() as usize]));
                let device: Arc<dyn BlockDevice> =
                    if key == "ram" { Arc::new(memory) } else { Arc::new(Strewn(memory)) };
                registry.add(key, device)?;
                server.serve(key)?
            }
            "raw" => {
                let file = tmpfs.path.join("disk.raw");
                std::fs::File::create(&file)?.set_len(settings.size.bytes())?;
                let options = format!("driver=file,filename={},node-name=disk", file.display());
                daemon(directory.path().join("raw.sock"), &[&options], &mut peers)?
            }
            _ => {
                let file = disk.path().join("disk.qcow2");
                let made = Command::new("qemu-img")
                    .args(["create", "-q", "-f", "qcow2"])
                    .arg(&file)
                    .arg(settings.size.bytes().to_string())
                    .status()?;
                if !made.success() {
                    return Err("qemu-img create failed".into());
                }
                let below = format!("driver=file,filename={},node-name=file,cache.direct=on", file.display());
                let above = "driver=qcow2,file=file,node-name=disk,cache.direct=on";
                daemon(directory.path().join("qcow2.sock"), &[&below, above], &mut peers)?
            }
        };
        let options = Options { slot_bytes: 128 << 10, inflight: true, ..Options::default() };
        let client = Client::connect(&socket, options);
        client.queues[0].lock().polls = true;
        client.queues[0].lock().want_call(false);
        clients.push((key, name, client));
    }

    let mut unique = 1;
    for (_, name, client) in &clients {
        let start = Instant::now();
        fill(&mut client.queues[0].lock(), settings.size.bytes());
        eprintln!("filled {name} in {:.1?}", start.elapsed());
    }
    let mut figures: BTreeMap<(usize, usize), Vec<Figure>> = BTreeMap::new();
    for round in 0..settings.rounds {
        for (row, cell) in cells.iter().enumerate() {
            for (index, (_, name, client)) in clients.iter().enumerate() {
                let mut driver = client.queues[0].lock();
                let seed = (round * 100 + row) as u64;
                let figure = measure(&mut driver, *cell, settings.size.bytes(), settings.time, seed, &mut unique)?;
                eprintln!("round {round} {} {name}: {:.0} IOPS, p50 {:.1} us", cell.name, figure.iops, figure.p50_us);
                figures.entry((row, index)).or_default().push(figure);
            }
        }
    }

    println!(
        "\nown client, {} of unlike blocks, {} rounds of {:?} a cell, medians\n",
        settings.size, settings.rounds, settings.time
    );
    let names: Vec<&str> = clients.iter().map(|(_, name, _)| *name).collect();
    println!("| | {} | muster / {} | p50 us, each |", names.join(" | "), names[1..].join(" | muster / "));
    println!("|---|{}", "---|".repeat(names.len() * 2));
    for (row, cell) in cells.iter().enumerate() {
        let of = |index: usize, what: fn(&Figure) -> f64| median(figures[&(row, index)].iter().map(what));
        let iops: Vec<f64> = (0..clients.len()).map(|index| of(index, |figure| figure.iops)).collect();
        let p50: Vec<String> =
            (0..clients.len()).map(|index| format!("{:.1}", of(index, |figure| figure.p50_us))).collect();
        let all: Vec<String> = iops.iter().map(|one| format!("{:.1}k", one / 1000.0)).collect();
        // Of the same round each: what else the machine did then was the same for both.
        let ratio = |index: usize| {
            let both = figures[&(row, 0)].iter().zip(&figures[&(row, index)]);
            median(both.map(|(ours, theirs)| ours.iops / theirs.iops))
        };
        let ratios: Vec<String> = (1..clients.len()).map(|index| format!("{:.2}", ratio(index))).collect();
        println!("| {} | {} | {} | {} |", cell.name, all.join(" | "), ratios.join(" | "), p50.join(" · "));
    }
    drop(clients);
    server.stop();
    Ok(())
}

/// Starts a `qemu-storage-daemon` that serves node `disk`, and waits until it listens.
fn daemon(socket: PathBuf, nodes: &[&str], peers: &mut Vec<Peer>) -> Result<PathBuf> {
    let mut command = Command::new("qemu-storage-daemon");
    for node in nodes {
        command.args(["--blockdev", node]);
    }
    let export =
        format!("type=vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix,addr.path={}", socket.display());
    peers.push(Peer(command.args(["--export", &export]).spawn()?));
    let deadline = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        if Instant::now() > deadline {
            return Err(format!("nobody listens on {}", socket.display()).into());
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
    Ok(socket)
}

/// Blocks unlike each other, the same for every server.
fn fill(driver: &mut Driver, size: u64) {
    let mut random = Random(1);
    let mut piece = vec![0; 128 << 10];
    for at in (0..size).step_by(piece.len()) {
        random.fill(&mut piece);
        assert_eq!(driver.write(at / 512, &piece), OK, "fill at {at}");
    }
}

fn measure(driver: &mut Driver, cell: Cell, size: u64, time: Duration, seed: u64, unique: &mut u64) -> Result<Figure> {
    let mut random = Random(seed);
    let places = size / u64::from(cell.bytes);
    let sectors = u64::from(cell.bytes / 512);
    let mut next = 0;
    let mut place = || {
        next = if cell.random { random.below(places) } else { (next + 1) % places };
        next * sectors
    };
    let mut begun = vec![Instant::now(); Driver::slots(driver.size)];
    let mut latencies = Vec::with_capacity(1 << 20);
    let mut submit = |driver: &mut Driver, begun: &mut [Instant], now: Instant| {
        let slot = driver.slot().expect("as many slots as the depth");
        if cell.kind == WRITE {
            // The rest of the slot is noise from the filling; this makes it a block never seen before.
            *unique += 1;
            driver.put(driver.data(slot), &unique.to_le_bytes());
        }
        driver.prepare(slot, cell.kind, place(), cell.bytes);
        begun[usize::from(slot)] = now;
    };
    let start = Instant::now();
    for _ in 0..cell.depth {
        submit(driver, &mut begun, start);
    }
    driver.publish();
    let (mut done, mut left) = (0u64, cell.depth);
    let mut stopped = false;
    let mut now = start;
    while left > 0 {
        let mut offered = false;
        while let Some(answer) = driver.take() {
            if answer.status != OK {
                return Err(format!("{}: status {}", cell.name, answer.status).into());
            }
            now = Instant::now();
            latencies.push(now.duration_since(begun[usize::from(answer.slot)]).as_nanos() as u32);
            done += 1;
            stopped |= now.duration_since(start) > time;
            if stopped {
                left -= 1;
            } else {
                submit(driver, &mut begun, now);
                offered = true;
            }
        }
        if offered {
            driver.publish();
        } else {
            std::hint::spin_loop();
            if now.elapsed() > Duration::from_secs(20) {
                return Err(format!("{}: no answer for 20 s", cell.name).into());
            }
        }
    }
    driver.want_call(false);
    let elapsed = now.duration_since(start);
    latencies.sort_unstable();
    let p50_us = f64::from(latencies[latencies.len() / 2]) / 1000.0;
    Ok(Figure { iops: done as f64 / elapsed.as_secs_f64(), p50_us })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
