//! This export against `nbdkit memory` and `qemu-nbd` on a raw file in a private tmpfs, with fio as the client.
//!
//! ```text
//! cargo bench -p muster-export --bench nbd_peers [-- --rounds 5 --seconds 2 --size 512MiB --device store|memory --spin-us 50
//!     --cells 'randread QD1 ']
//! ```
//!
//! Needs `fio`, `nbdkit`, `qemu-nbd`, `nbdcopy`; `nbdinfo` is not used. Every server gets the same random contents
//! first. The cells are interleaved (round by round, cell by cell, server by server), the medians are compared: on a
//! shared machine only ratios of the same run mean anything. Prints a Markdown table. Not a test: exits with an error
//! only when something could not be run.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_block::BlockDevice;
use muster_block::model::MemoryDevice;
use muster_common::{ByteLen, VolumeId};
use muster_export::{NbdConfig, NbdServer, Registry};
use muster_store::{Store, StoreConfig, VolumeSpec};

mod peers;

use peers::{Peer, Tmpfs};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Cell {
    rw: &'static str,
    block: &'static str,
    depth: u32,
    jobs: u32,
}

const CELLS: [Cell; 10] = [
    Cell { rw: "randread", block: "4k", depth: 32, jobs: 1 },
    Cell { rw: "randread", block: "4k", depth: 32, jobs: 2 },
    Cell { rw: "randread", block: "4k", depth: 1, jobs: 1 },
    Cell { rw: "randread", block: "4k", depth: 1, jobs: 2 },
    Cell { rw: "randwrite", block: "4k", depth: 32, jobs: 1 },
    Cell { rw: "randwrite", block: "4k", depth: 32, jobs: 2 },
    Cell { rw: "randwrite", block: "4k", depth: 1, jobs: 1 },
    Cell { rw: "randwrite", block: "4k", depth: 1, jobs: 2 },
    Cell { rw: "read", block: "1m", depth: 4, jobs: 1 },
    Cell { rw: "write", block: "1m", depth: 4, jobs: 1 },
];

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} QD{} × {}", self.block, self.rw, self.depth, self.jobs)
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
struct Figure {
    iops: f64,
    p50_us: f64,
}

struct Settings {
    rounds: usize,
    seconds: u32,
    size: ByteLen,
    device: String,
    spin: Option<Duration>,
    /// Part of the names of the cells to measure.
    cells: String,
}

fn settings() -> Result<Settings> {
    let mut settings = Settings {
        rounds: 5,
        seconds: 2,
        size: ByteLen::mib(512),
        device: "store".into(),
        spin: None,
        cells: String::new(),
    };
    // cargo adds --bench.
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--rounds" => settings.rounds = value.parse()?,
            "--seconds" => settings.seconds = value.parse()?,
            "--size" => settings.size = value.parse()?,
            "--device" => settings.device = value,
            "--cells" => settings.cells = value,
            "--spin-us" => settings.spin = Some(Duration::from_micros(value.parse()?)),
            _ => return Err(format!("unknown argument {argument}").into()),
        }
    }
    Ok(settings)
}

fn main() -> Result<()> {
    let settings = settings()?;
    let directory = tempfile::tempdir()?;
    let tmpfs = Tmpfs::new(&directory.path().join("tmpfs"))?;

    // Ours.
    let store;
    let device: Arc<dyn BlockDevice> = match settings.device.as_str() {
        "store" => {
            // Room for the contents, for blocks that differ while they are overwritten, and for the metadata.
            store = Store::open(StoreConfig::new(ByteLen(settings.size.bytes() * 3)))?;
            store.create_volume(VolumeSpec::blank(VolumeId::random(), settings.size))?
        }
        "memory" => Arc::new(MemoryDevice::new(settings.size)),
        other => return Err(format!("no device {other}").into()),
    };
    let registry = Arc::new(Registry::new());
    let export = registry.add("bench", device)?;
    let ours = directory.path().join("muster.sock");
    let mut config = NbdConfig::unix(&ours);
    config.spin = settings.spin.unwrap_or(config.spin);
    let server = NbdServer::start(config, registry)?;

    // The peers.
    let nbdkit = directory.path().join("nbdkit.sock");
    let _nbdkit = Peer(
        Command::new("nbdkit")
            .args(["-f", "-U"])
            .arg(&nbdkit)
            .args(["memory", &settings.size.bytes().to_string()])
            .spawn()?,
    );
    let raw = tmpfs.path.join("disk.raw");
    std::fs::File::create(&raw)?.set_len(settings.size.bytes())?;
    let qemu = directory.path().join("qemu.sock");
    let _qemu = Peer(
        Command::new("qemu-nbd")
            .args(["-f", "raw", "--persistent", "--shared=8", "--discard=unmap", "-x", "bench", "-k"])
            .args([&qemu, &raw])
            .spawn()?,
    );
    let uri = |name: &str, socket: &Path| format!("nbd+unix:///{name}?socket={}", socket.display());
    let servers =
        [("muster", uri("bench", &ours)), ("nbdkit memory", uri("", &nbdkit)), ("qemu-nbd tmpfs", uri("bench", &qemu))];
    for socket in [&nbdkit, &qemu] {
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            if Instant::now() > deadline {
                return Err(format!("nobody listens on {}", socket.display()).into());
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }

    fill(&directory.path().join("contents"), settings.size, &servers)?;

    let cells: Vec<Cell> = CELLS.into_iter().filter(|cell| cell.to_string().contains(&settings.cells)).collect();
    let mut figures: BTreeMap<(Cell, usize), Vec<Figure>> = BTreeMap::new();
    for round in 0..settings.rounds {
        for &cell in &cells {
            for (index, (name, uri)) in servers.iter().enumerate() {
                let figure = measure(directory.path(), uri, cell, &settings)?;
                eprintln!("round {round} {cell} {name}: {:.0} IOPS, p50 {:.1} us", figure.iops, figure.p50_us);
                figures.entry((cell, index)).or_default().push(figure);
            }
        }
    }

    println!(
        "fio nbd engine, {} random contents, {} rounds of {} s a cell, median [min-max]; device: {}\n",
        settings.size, settings.rounds, settings.seconds, settings.device
    );
    println!("| | muster | nbdkit memory | qemu-nbd tmpfs | / nbdkit | / qemu-nbd | p50 us, each | p50 / nbdkit |");
    println!("|---|---|---|---|---|---|---|---|");
    for cell in cells {
        let of = |index: usize| &figures[&(cell, index)];
        let iops: Vec<f64> = (0..3).map(|index| median(of(index).iter().map(|figure| figure.iops))).collect();
        let p50: Vec<f64> = (0..3).map(|index| median(of(index).iter().map(|figure| figure.p50_us))).collect();
        let text = |index: usize| {
            let all = of(index).iter().map(|figure| figure.iops / 1000.0);
            let (min, max) = all.fold((f64::MAX, 0f64), |(min, max), one| (min.min(one), max.max(one)));
            format!("{:.1}k [{min:.1}-{max:.1}]", iops[index] / 1000.0)
        };
        println!(
            "| {cell} | {} | {} | {} | {:.2} | {:.2} | {:.1} · {:.1} · {:.1} | {:.2} |",
            text(0),
            text(1),
            text(2),
            iops[0] / iops[1],
            iops[0] / iops[2],
            p50[0],
            p50[1],
            p50[2],
            p50[0] / p50[1],
        );
    }
    println!();
    for operation in muster_export::Operation::ALL {
        let statistics = export.statistics();
        let counted = statistics.of(operation);
        if let (Some(p50), Some(p99)) = (counted.quantile(0.5), counted.quantile(0.99)) {
            println!(
                "export {operation:?}: {} requests, {} errors, p50 <= {p50:?}, p99 <= {p99:?}",
                counted.requests, counted.errors
            );
        }
    }
    server.stop();
    Ok(())
}

/// The same random bytes for every server.
fn fill(path: &Path, size: ByteLen, servers: &[(&str, String)]) -> Result<()> {
    let mut file = BufWriter::new(std::fs::File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..size.bytes() / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes())?;
    }
    file.flush()?;
    for (name, uri) in servers {
        let status = Command::new("nbdcopy").arg(path).arg(uri).status()?;
        if !status.success() {
            return Err(format!("fill {name}: nbdcopy failed").into());
        }
    }
    std::fs::remove_file(path)?;
    Ok(())
}

fn measure(directory: &Path, uri: &str, cell: Cell, settings: &Settings) -> Result<Figure> {
    let output = Command::new("fio")
        .current_dir(directory)
        .args(["--name=peers", "--ioengine=nbd", "--time_based", "--group_reporting", "--output-format=json"])
        .args(["--randrepeat=0", "--norandommap", "--thread"])
        .arg(format!("--uri={uri}"))
        .arg(format!("--rw={}", cell.rw))
        .arg(format!("--bs={}", cell.block))
        .arg(format!("--iodepth={}", cell.depth))
        .arg(format!("--numjobs={}", cell.jobs))
        .arg(format!("--runtime={}", settings.seconds))
        .arg(format!("--size={}", settings.size.bytes()))
        .output()?;
    if !output.status.success() {
        return Err(format!("fio {cell:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    // fio may print notes before its JSON.
    let text = String::from_utf8(output.stdout)?;
    let json: serde_json::Value = serde_json::from_str(&text[text.find('{').ok_or("fio printed no JSON")?..])?;
    let side = if cell.rw.contains("read") { "read" } else { "write" };
    let job = &json["jobs"][0][side];
    let number = |value: &serde_json::Value| value.as_f64().ok_or("fio's JSON has another shape");
    Ok(Figure { iops: number(&job["iops"])?, p50_us: number(&job["clat_ns"]["percentile"]["50.000000"])? / 1000.0 })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
