//! What a host's operator may count on, measured: metadata, memory taken, what deleting costs, two writers against one, and
//! what a full store does to those who have their memory. For the hot paths see `ratios`.
//!
//! `cargo run --release -p muster-store --example targets [-- PART]` with PART one of threads, metadata, memory, delete, full.
#![allow(clippy::unwrap_used)]

use std::{
    hint::black_box,
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use muster_block::{BlockDevice, WriteFlags, conformance::Random};
use muster_common::{ByteLen, Digest, VolumeId};
use muster_store::{Pages, SpillConfig, Store, StoreConfig, Volume, VolumeSpec, WhenFull};

const BLOCK: usize = 4096;

fn main() {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    let parts: [(&str, fn()); 5] =
        [("threads", threads), ("metadata", metadata), ("memory", memory), ("delete", delete), ("full", full)];
    for (name, part) in parts.iter().filter(|(name, _)| wanted.is_empty() || wanted == *name) {
        println!("## {name}");
        part();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn store(budget: ByteLen, pages: Pages) -> Store {
    Store::open(StoreConfig { pages, ..StoreConfig::new(budget) }).unwrap()
}

fn blank(store: &Store, size: ByteLen) -> Arc<Volume> {
    store.create_volume(VolumeSpec::blank(VolumeId::random(), size)).unwrap()
}

/// Blocks never seen before, by number.
struct Unique([u8; BLOCK], u64);

impl Unique {
    fn new(seed: u64) -> Unique {
        let mut block = [0; BLOCK];
        Random(seed).fill(&mut block);
        Unique(block, seed << 40)
    }

    fn next(&mut self) -> &[u8; BLOCK] {
        self.1 += 1;
        self.0[..8].copy_from_slice(&self.1.to_le_bytes());
        &self.0
    }
}

/// Operations a second of `threads` threads together, each with what `make` gives it.
fn rate<W: FnMut(u64)>(threads: usize, time: Duration, make: impl Fn(usize) -> W + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let rates: Vec<f64> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|thread| {
                let (make, barrier) = (&make, &barrier);
                scope.spawn(move || {
                    let mut work = make(thread);
                    barrier.wait();
                    let start = Instant::now();
                    let mut done = 0;
                    while start.elapsed() < time {
                        (done..done + 64).for_each(&mut work);
                        done += 64;
                    }
                    done as f64 / start.elapsed().as_secs_f64()
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    rates.iter().sum()
}

/// Two threads against one: overwrites with unique data, and reads; with BLAKE3 of each block before it is written.
fn threads() {
    const MIB: u64 = 256;
    let time = Duration::from_millis(150);
    println!("| 4K | pages | one thread, thousand/s | two threads | two / one |\n|---|---|---|---|---|");
    for pages in [Pages::Small, Pages::Transparent] {
        let store = store(ByteLen::mib(1200), pages);
        let volumes = [blank(&store, ByteLen::mib(MIB)), blank(&store, ByteLen::mib(MIB))];
        for (n, volume) in volumes.iter().enumerate() {
            let mut unique = Unique::new(100 + n as u64);
            (0..MIB << 8).for_each(|n| volume.write_at(n << 12, unique.next(), WriteFlags::default()).unwrap());
        }
        let plain: [std::sync::Mutex<Vec<u8>>; 2] =
            [0, 1].map(|_| std::sync::Mutex::new(vec![1; (MIB << 20) as usize]));
        let mut seed = 1000;
        let mut figures = [const { (Vec::new(), Vec::new()) }; 5];
        for _ in 0..7 {
            for (row, figure) in figures.iter_mut().enumerate() {
                for count in [1, 2] {
                    seed += 10;
                    let rate = rate(count, time, |thread| {
                        // one disk for both in the second row
                        let volume = &volumes[if row == 1 { 0 } else { thread }];
                        let (mut random, mut unique) =
                            (Random(seed + thread as u64), Unique::new(seed + thread as u64));
                        let (mut buffer, plain) = ([0; BLOCK], &plain[thread]);
                        let mut plain = plain.lock().unwrap();
                        move |_| {
                            let at = random.below(MIB << 8) << 12;
                            match row {
                                0 | 1 => volume.write_at(at, unique.next(), WriteFlags::default()).unwrap(),
                                2 => {
                                    black_box(blake3::hash(unique.next()));
                                    volume.write_at(at, &unique.0, WriteFlags::default()).unwrap();
                                }
                                3 => volume.read_at(at, black_box(&mut buffer)).unwrap(),
                                _ => plain[at as usize..at as usize + BLOCK].copy_from_slice(unique.next()),
                            }
                        }
                    });
                    if count == 1 { figure.0.push(rate) } else { figure.1.push(rate) }
                }
            }
        }
        let rows = ["unique overwrite", "the same, one volume", "the same, BLAKE3 first", "read", "plain copy"];
        for (what, (one, two)) in rows.iter().zip(figures) {
            let ratio = median(one.iter().zip(&two).map(|(one, two)| two / one).collect());
            println!("| {what} | {pages:?} | {:.0} | {:.0} | {ratio:.2} |", median(one) / 1e3, median(two) / 1e3);
        }
    }
}

fn metadata() {
    println!(
        "| pages | data | B of metadata a unique frame, its first mapping apart | B a mapped block |\n|---|---|---|---|"
    );
    for pages in [Pages::Small, Pages::Transparent] {
        for mib in [1024u64, 4096] {
            let store = store(ByteLen::mib(mib + mib / 16 + 128), pages);
            let bytes = || store.stats().metadata_bytes.bytes() as f64;
            let empty = bytes();
            let write = |volume: &Volume| {
                let mut unique = Unique::new(7);
                (0..mib << 8).for_each(|n| volume.write_at(n << 12, unique.next(), WriteFlags::default()).unwrap());
            };
            write(&blank(&store, ByteLen::mib(mib)));
            let first = bytes();
            // the same blocks once more, each mapped by itself
            write(&blank(&store, ByteLen::mib(mib)));
            let (second, stats) = (bytes(), store.stats());
            let blocks = (mib << 8) as f64;
            assert_eq!(stats.unique_blocks, mib << 8);
            let mapping = (second - first) / blocks;
            let frame = (first - empty) / blocks - mapping;
            let fixed = empty / blocks;
            println!("| {pages:?} | {mib} MiB | {frame:.1} (and {fixed:.1} of fixed tables) | {mapping:.2} |");
            let audit = store.audit();
            assert!(audit.is_exact() && audit.frames == stats.unique_blocks, "{audit:?}");
        }
    }
}

/// Memory of this process, its own and of files in memory.
fn taken() -> f64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let of = |name: &str| {
        let line = rollup.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    (of("Anonymous:") + of("Pss_Shmem:") + of("Shared_Hugetlb:") + of("Private_Hugetlb:")) as f64
}

fn memory() {
    println!(
        "| pages | after | taken from the machine / (frames + metadata) as reported | / (frames in use + metadata) | given back in parts of huge pages, µs a block |\n|---|---|---|---|---|"
    );
    for pages in [Pages::Small, Pages::Transparent] {
        let before = taken();
        let store = store(ByteLen::gib(2), pages);
        let volumes: Vec<_> = (0..4).map(|_| blank(&store, ByteLen::gib(8))).collect();
        let say = |what: &str| {
            // as the agent does four times a second
            let started = Instant::now();
            let parts: u64 = std::iter::from_fn(|| Some(store.give_back().bytes()).filter(|bytes| *bytes > 0)).sum();
            let each = started.elapsed().as_secs_f64() * 1e6 / (parts / BLOCK as u64).max(1) as f64;
            let (taken, stats) = (taken() - before, store.stats());
            let metadata = stats.metadata_bytes.bytes() as f64;
            let reported = taken / (stats.frame_bytes.bytes() as f64 + metadata);
            let used = taken / (stats.used_bytes.bytes() as f64 + metadata);
            let parts = if parts == 0 { String::new() } else { format!("{}, {each:.1}", ByteLen(parts)) };
            println!("| {pages:?} | {what} | {reported:.4} | {used:.4} | {parts} |");
        };
        for (n, volume) in volumes.iter().enumerate() {
            let (mut random, mut unique) = (Random(n as u64 + 1), Unique::new(n as u64 + 20));
            for _ in 0..64 << 8 {
                // runs of 64 KiB anywhere
                let at = random.below(8 << 14) << 16;
                (0..4).for_each(|k| volume.write_at(at + k * 4096, unique.next(), WriteFlags::default()).unwrap());
            }
        }
        say("256 MiB in runs of 16 KiB, all over 32 GiB");
        volumes.iter().for_each(|volume| volume.trim(0, 4 << 30).unwrap());
        say("half of each disk trimmed");
        store.delete_volume(volumes[3].id()).unwrap();
        say("one of four deleted");
        let unique = &mut Unique::new(99);
        for n in 0..64 << 8 {
            volumes[0].write_at(n << 12, unique.next(), WriteFlags::default()).unwrap();
        }
        say("64 MiB written again");
    }
}

fn delete() {
    println!(
        "| changed by the session | make the clone, ms | delete it, ms | delete and make anew, ms |\n|---|---|---|---|"
    );
    let store = store(ByteLen::gib(6), Pages::Auto);
    let digest = Digest::from_bytes([1; 32]);
    let builder = store.image_builder(digest, "image", ByteLen::gib(40)).unwrap();
    let mut data = vec![0; 1 << 20];
    let mut random = Random(5);
    for n in 0..512 {
        random.fill(&mut data);
        builder.write_chunk(n << 26, &data).unwrap();
    }
    builder.finish().unwrap();
    for mib in [0u64, 64, 1024, 4096] {
        let mut times = [const { Vec::new() }; 3];
        for round in 0..5 {
            let mut made = Instant::now();
            let mut spec = VolumeSpec::clone_of(VolumeId::random(), digest);
            let mut volume = store.create_volume(spec.clone()).unwrap();
            times[0].push(made.elapsed().as_secs_f64() * 1e3);
            for reset in [false, true] {
                let mut unique = Unique::new(mib * 100 + round * 2 + u64::from(reset) + 1);
                (0..mib << 8).for_each(|n| volume.write_at(n << 13, unique.next(), WriteFlags::default()).unwrap());
                made = Instant::now();
                store.delete_volume(volume.id()).unwrap();
                drop(volume);
                times[1 + usize::from(reset)].push(made.elapsed().as_secs_f64() * 1e3);
                spec.generation += 1;
                volume = store.create_volume(spec.clone()).unwrap();
                if reset {
                    *times[2].last_mut().unwrap() = made.elapsed().as_secs_f64() * 1e3;
                }
            }
            store.delete_volume(volume.id()).unwrap();
        }
        let [make, delete, reset] = times.map(median);
        println!("| {mib} MiB, every other block | {make:.4} | {delete:.1} | {reset:.1} |");
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Neighbour {
    None,
    HasRoom,
    Refused,
    Spills,
}

/// Latencies of one volume's reads and writes while another one writes 10,000 blocks: with room, refused, spilling.
fn full() {
    const FILLS: u64 = 10_000;
    println!(
        "| the neighbour | its fills, done/refused | read p50, p99, µs | write p50, p99, µs | slowest, ms |\n|---|---|---|---|---|"
    );
    let mut all: Vec<(Neighbour, Vec<[f64; 5]>, u64, u64)> =
        [Neighbour::None, Neighbour::HasRoom, Neighbour::Refused, Neighbour::Spills].map(|n| (n, vec![], 0, 0)).into();
    for _ in 0..5 {
        for (neighbour, figures, done, refused) in &mut all {
            let dir = tempfile::tempdir().unwrap();
            let spill = SpillConfig { file: dir.path().join("spill"), limit: ByteLen::gib(1) };
            let spill = (*neighbour == Neighbour::Spills).then_some(spill);
            let budget = ByteLen::mib(if *neighbour == Neighbour::HasRoom { 1024 } else { 256 });
            let store = Store::open(StoreConfig { spill, ..StoreConfig::new(budget) }).unwrap();
            // it has its memory: what it writes needs a frame each time
            let mut spec = VolumeSpec::blank(VolumeId::random(), ByteLen::mib(64));
            spec.reservation = Some(ByteLen::mib(64));
            let mine = store.create_volume(spec).unwrap();
            let mut unique = Unique::new(1);
            (0..64 << 8).for_each(|n| mine.write_at(n << 12, unique.next(), WriteFlags::default()).unwrap());
            let mut spec = VolumeSpec::blank(VolumeId::random(), ByteLen::gib(4));
            spec.when_full = if *neighbour == Neighbour::Spills { WhenFull::Spill } else { WhenFull::Refuse };
            let other = store.create_volume(spec).unwrap();
            let mut filler = Unique::new(2);
            let mut at = Random(3);
            let mut fill = move |other: &Volume| {
                other.write_at(at.below(1 << 20) << 12, filler.next(), WriteFlags::default()).is_ok()
            };
            if *neighbour != Neighbour::None {
                // until nothing is left, or as much
                for _ in 0..60_000 {
                    let _ = fill(&other);
                }
            }
            let over = AtomicBool::new(*neighbour == Neighbour::None);
            let ((mut reads, mut writes), filled) = std::thread::scope(|scope| {
                let filling = scope.spawn(|| {
                    let goes_on = if *neighbour == Neighbour::None { 0 } else { FILLS };
                    let done = (0..goes_on).filter(|_| fill(&other)).count() as u64;
                    over.store(true, Relaxed);
                    done
                });
                let (mut random, mut buffer) = (Random(4), [0; BLOCK]);
                let (mut reads, mut writes) = (Vec::new(), Vec::new());
                let started = Instant::now();
                while !over.load(Relaxed) || reads.len() < 20_000 {
                    assert!(started.elapsed() < Duration::from_secs(60), "it hangs");
                    let at = random.below(64 << 8) << 12;
                    let start = Instant::now();
                    mine.read_at(at, black_box(&mut buffer)).unwrap();
                    reads.push(start.elapsed().as_nanos() as f64 / 1e3);
                    let start = Instant::now();
                    mine.write_at(at, unique.next(), WriteFlags::default()).unwrap();
                    writes.push(start.elapsed().as_nanos() as f64 / 1e3);
                }
                ((reads, writes), filling.join().unwrap())
            });
            reads.sort_by(f64::total_cmp);
            writes.sort_by(f64::total_cmp);
            let of = |values: &[f64], q: f64| values[(q * (values.len() - 1) as f64) as usize];
            let slowest = of(&reads, 1.0).max(of(&writes, 1.0)) / 1e3;
            figures.push([of(&reads, 0.5), of(&reads, 0.99), of(&writes, 0.5), of(&writes, 0.99), slowest]);
            (*done, *refused) = (filled, if *neighbour == Neighbour::None { 0 } else { FILLS - filled });
            assert!(store.audit().is_exact());
        }
    }
    for (neighbour, figures, done, refused) in all {
        let [r50, r99, w50, w99, slowest] = [0, 1, 2, 3, 4].map(|i| median(figures.iter().map(|f| f[i]).collect()));
        println!("| {neighbour:?} | {done}/{refused} | {r50:.2}, {r99:.2} | {w50:.2}, {w99:.2} | {slowest:.1} |");
    }
}
