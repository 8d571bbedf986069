//! How fast a cold image becomes resident, and how fast it goes into the repository.
//!
//!     cargo bench -p muster-tests --bench import [-- ROUNDS [MIB [DIRECTORY]]]
//!
//! A file of MIB (1024) MiB that holds nothing twice is made in DIRECTORY (the system's for temporary files), and taken out
//! of the page cache before each measurement. One run, everything interleaved, medians of ROUNDS (5); GB are 10^9 bytes. The processor
//! time tells on a busy machine what the speed does not: seconds of it a GB, all cores together.
//!
//! | row | what |
//! |---|---|
//! | plain direct read | `O_DIRECT`, 1 MiB at a time, eight threads: the source's speed |
//! | BLAKE3, 4 KiB and 64 KiB | bytes in memory, all cores: the hash rate times the cores |
//! | cold file -> store | the file read by `source::read_data` into a new, empty `muster-store` |
//! | cold file, read only | the same reader, the bytes thrown away: what reading costs us beyond a plain read |
//! | cold file -> repository | an ingest with estimate into a repository on DIRECTORY, durable |
//! | plain copy | read, written to files of 32 MiB and synced: what the disk lets any ingest do |

use std::{
    fs::File,
    io::Write,
    ops::ControlFlow,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use muster_common::{ByteLen, Digest};
use muster_repository::{
    IngestOptions, Repository, digest_of,
    source::{ImageFormat, open_image, read_data},
    storage::DirectoryStorage,
};
use muster_store::{Store, StoreConfig};

const MIB: u64 = 1 << 20;
const READERS: u64 = 8;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let number = |at: usize, default: u64| arguments.get(at).map_or(Ok(default), |a| a.parse::<u64>());
    let (rounds, mib) = (number(0, 5)?, number(1, 1024)?);
    let base = arguments.get(2).map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::Builder::new().prefix("muster-import").tempdir_in(base)?;
    let file = dir.path().join("source.raw");
    make(&file, mib)?;
    let cores = std::thread::available_parallelism()?.get() as u64;

    let names = [
        "plain direct read",
        "BLAKE3, 4 KiB, all cores",
        "BLAKE3, 64 KiB, all cores",
        "cold file, read only",
        "cold file -> store",
        "cold file -> repository",
        "plain copy: read, write, fsync",
    ];
    let mut seconds = vec![Vec::new(); names.len()];
    let mut processor = vec![Vec::new(); names.len()];
    for _ in 0..rounds {
        let mut measure = |row: usize, act: &mut dyn FnMut() -> Result<()>| -> Result<()> {
            cool(&file)?;
            let (start, before) = (Instant::now(), processor_seconds()?);
            act()?;
            seconds[row].push(start.elapsed().as_secs_f64());
            processor[row].push(processor_seconds()? - before);
            Ok(())
        };
        measure(0, &mut || plain_read(&file, mib))?;
        measure(1, &mut || hash(cores, mib, 4096))?;
        measure(2, &mut || hash(cores, mib, 65_536))?;
        measure(3, &mut || read_only(&file))?;
        measure(4, &mut || into_store(&file, mib))?;
        measure(5, &mut || into_repository(&file, dir.path()))?;
        measure(6, &mut || plain_copy(&file, mib, dir.path()))?;
    }
    let bytes = (mib * MIB) as f64;
    let speed: Vec<f64> = seconds.iter_mut().map(|s| bytes / 1e9 / median(s)).collect();
    let limit = |hash: usize| speed[0].min(speed[hash]);
    println!("{mib} MiB, {cores} cores, {rounds} rounds, load {}", load());
    println!("| | GB/s | of min(plain direct read, hash) | of plain copy | processor s a GB |");
    println!("|---|---|---|---|---|");
    for (row, name) in names.iter().enumerate() {
        let ratio = match row {
            3 | 4 => format!("{:.2}", speed[row] / limit(1)),
            5 => format!("{:.2}", speed[row] / limit(2)),
            _ => String::new(),
        };
        let copy = if row == 5 { format!("{:.2}", speed[row] / speed[6]) } else { String::new() };
        let cost = median(&mut processor[row]) / (bytes / 1e9);
        println!("| {name} | {:.2} | {ratio} | {copy} | {cost:.2} |", speed[row]);
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_string()
}

/// What this process has taken of the processors so far.
fn processor_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // behind the name, which may hold blanks: user and system time are fields 14 and 15, in hundredths
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|f| f.parse::<f64>().ok()).unwrap_or_default();
    Ok((ticks(11) + ticks(12)) / 100.0)
}

fn make(path: &Path, mib: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let mut block = vec![0; MIB as usize];
    let mut state = 0x6d75_7374_6572_u64;
    for _ in 0..mib {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}

/// Takes the file out of the page cache.
fn cool(path: &Path) -> Result<()> {
    rustix::fs::fadvise(File::open(path)?, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// Does `work` for each number below `count` on some threads.
fn share(threads: u64, count: u64, work: impl Fn(&mut Vec<u8>, u64) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let run = || {
            let mut buffer = vec![1; MIB as usize + 4096];
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= count {
                    return Ok(());
                }
                work(&mut buffer, at)?;
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a worker does not panic"))
    })
}

fn plain_read(path: &Path, mib: u64) -> Result<()> {
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let file = File::options().read(true).custom_flags(direct).open(path).context("open with O_DIRECT")?;
    share(READERS, mib, |buffer, at| {
        let start = buffer.as_ptr().align_offset(4096);
        Ok(file.read_exact_at(&mut buffer[start..start + MIB as usize], at * MIB)?)
    })
}

fn hash(cores: u64, mib: u64, size: usize) -> Result<()> {
    share(cores, mib, |buffer, at| {
        let sum = buffer[..MIB as usize].chunks(size).fold(0, |sum, block| sum ^ digest_of(block).as_bytes()[0]);
        buffer[0] = sum ^ at as u8;
        Ok(())
    })
}

fn read_only(path: &Path) -> Result<()> {
    let source = open_image(path, ImageFormat::Raw)?;
    ensure!(source.is_cold(), "the source is not read directly: give a DIRECTORY on a disk");
    read_data(&*source, |_, _| Ok::<_, anyhow::Error>(()))
}

fn into_store(path: &Path, mib: u64) -> Result<()> {
    let store = Store::open(StoreConfig::new(ByteLen::mib(mib * 2 + 256)))?;
    let source = open_image(path, ImageFormat::Raw)?;
    let builder = store.image_builder(Digest::from_bytes([1; 32]), "image", source.size())?;
    read_data(&*source, |offset, bytes| Ok::<_, anyhow::Error>(builder.write_chunk(offset, bytes)?))?;
    let image = builder.finish()?;
    ensure!(store.stats().used_bytes.0 == mib * MIB, "every block is there once");
    drop(image);
    Ok(())
}

fn into_repository(path: &Path, dir: &Path) -> Result<()> {
    let place = dir.join("repository");
    let repository = Repository::open(Arc::new(DirectoryStorage::open(&place)?))?;
    let source = open_image(path, ImageFormat::Raw)?;
    repository.ingest(&*source, &IngestOptions { estimate: true }, &mut |_| ControlFlow::Continue(()))?;
    drop(repository);
    Ok(std::fs::remove_dir_all(place)?)
}

fn plain_copy(path: &Path, mib: u64, dir: &Path) -> Result<()> {
    let place = dir.join("copy");
    std::fs::create_dir(&place)?;
    let source = File::open(path)?;
    let mut buffer = vec![0; 32 << 20];
    let mut at = 0;
    while at < mib * MIB {
        let len = ((mib * MIB) - at).min(buffer.len() as u64) as usize;
        source.read_exact_at(&mut buffer[..len], at)?;
        let mut out = File::create(place.join(at.to_string()))?;
        out.write_all(&buffer[..len])?;
        out.sync_all()?;
        at += len as u64;
    }
    Ok(std::fs::remove_dir_all(place)?)
}
