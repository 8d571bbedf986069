//! The hot paths, each beside what it is measured against: a plain copy of the same bytes, and a file on tmpfs.
//!
//! `cargo bench -p muster-store`. For ratios run the groups together: the machine drifts.
#![allow(clippy::unwrap_used)]

use std::{
    fs::File,
    hint::black_box,
    io::Write,
    os::unix::fs::FileExt,
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use muster_block::{BlockDevice, WriteFlags, conformance::Random};
use muster_common::{ByteLen, Digest, VolumeId};
use muster_store::{Pages, Store, StoreConfig, Volume, VolumeSpec};

const BLOCK: usize = 4096;
/// Larger than any cache here.
const MIB: u64 = 512;
const BLOCKS: u64 = MIB << 8;

fn open(pages: Pages) -> (Store, Arc<Volume>) {
    let store = Store::open(StoreConfig { pages, ..StoreConfig::new(ByteLen::mib(MIB * 3)) }).unwrap();
    let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(MIB))).unwrap();
    (store, volume)
}

fn fill(write: impl Fn(u64, &[u8])) {
    let mut random = Random(1);
    let mut data = vec![0; 1 << 20];
    for n in 0..MIB {
        random.fill(&mut data);
        write(n << 20, &data);
    }
}

fn read(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("random_read_4k");
    group.throughput(Throughput::Bytes(BLOCK as u64));
    let mut buf = [0; BLOCK];
    let mut random = Random(2);
    let mut at = move || random.below(BLOCKS) * BLOCK as u64;

    let mut plain = vec![0u8; (MIB << 20) as usize];
    Random(3).fill(&mut plain);
    group.bench_function("memcpy", |bench| {
        bench.iter(|| {
            let at = at() as usize;
            buf.copy_from_slice(black_box(&plain[at..at + BLOCK]));
            black_box(&buf);
        });
    });
    drop(plain);
    for pages in [Pages::Small, Pages::Transparent] {
        let (_store, volume) = open(pages);
        fill(|at, data| volume.write_at(at, data, WriteFlags::default()).unwrap());
        group.bench_function(BenchmarkId::new("store", format!("{pages:?}")), |bench| {
            bench.iter(|| {
                volume.read_at(at(), &mut buf).unwrap();
                black_box(&buf);
            });
        });
    }
    let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
    fill(|_, data| (&file).write_all(data).unwrap());
    file.flush().unwrap();
    group.bench_function("pread_tmpfs", |bench| {
        bench.iter(|| {
            file.read_exact_at(&mut buf, at()).unwrap();
            black_box(&buf);
        });
    });
    group.finish();
}

/// Blocks that differ from all before: a counter in each.
struct Unique {
    block: Box<[u8; BLOCK]>,
    next: u64,
}

impl Unique {
    fn new(seed: u64) -> Self {
        let mut block = Box::new([0; BLOCK]);
        Random(seed).fill(&mut *block);
        Unique { block, next: seed << 40 }
    }
    fn next(&mut self) -> &[u8; BLOCK] {
        self.next += 1;
        self.block[..8].copy_from_slice(&self.next.to_le_bytes());
        &self.block
    }
}

fn write(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("random_write_4k");
    group.throughput(Throughput::Bytes(BLOCK as u64));
    let mut random = Random(4);
    let mut at = move || random.below(BLOCKS) * BLOCK as u64;
    let mut unique = Unique::new(1);

    let mut plain = vec![0u8; (MIB << 20) as usize];
    Random(3).fill(&mut plain);
    group.bench_function("memcpy", |bench| {
        bench.iter(|| {
            let at = at() as usize;
            plain[at..at + BLOCK].copy_from_slice(unique.next());
            black_box(&plain);
        });
    });
    drop(plain);
    for pages in [Pages::Small, Pages::Transparent] {
        let (_store, volume) = open(pages);
        fill(|at, data| volume.write_at(at, data, WriteFlags::default()).unwrap());
        group.bench_function(BenchmarkId::new("unique", format!("{pages:?}")), |bench| {
            bench.iter(|| volume.write_at(at(), unique.next(), WriteFlags::default()).unwrap());
        });
        let copies: Vec<u8> = {
            let mut copies = vec![0; 64 << 20];
            volume.read_at(0, &mut copies).unwrap();
            copies
        };
        let mut random = Random(5);
        group.bench_function(BenchmarkId::new("duplicate", format!("{pages:?}")), |bench| {
            bench.iter(|| {
                let from = random.below(64 << 8) as usize * BLOCK;
                volume.write_at(at(), &copies[from..from + BLOCK], WriteFlags::default()).unwrap();
            });
        });
    }
    let file: File = tempfile::tempfile_in("/dev/shm").unwrap();
    fill(|_, data| (&file).write_all(data).unwrap());
    group.bench_function("pwrite_tmpfs", |bench| {
        bench.iter(|| file.write_all_at(unique.next(), at()).unwrap());
    });
    drop(file);
    for threads in [1, 2] {
        let (store, volume) = open(Pages::Transparent);
        fill(|at, data| volume.write_at(at, data, WriteFlags::default()).unwrap());
        let _ = store;
        group.throughput(Throughput::Bytes((threads * BLOCK) as u64));
        group.bench_function(BenchmarkId::new("unique_same_volume_threads", threads), |bench| {
            bench.iter_custom(|rounds| {
                let start = Instant::now();
                std::thread::scope(|scope| {
                    for thread in 0..threads {
                        let volume = &volume;
                        scope.spawn(move || {
                            let nonce = std::time::SystemTime::now()
                                .duration_since(std::time::UNIX_EPOCH)
                                .map_or(0, |now| now.as_nanos() as u64);
                            let mut random = Random(nonce ^ thread as u64);
                            let mut unique = Unique::new(2 + thread as u64);
                            unique.next = random.next_u64();
                            for _ in 0..rounds {
                                let at = random.below(BLOCKS) * BLOCK as u64;
                                volume.write_at(at, unique.next(), WriteFlags::default()).unwrap();
                            }
                        });
                    }
                });
                start.elapsed()
            });
        });
    }
    group.finish();
}

fn import(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("import_1m_chunks");
    group.sample_size(10).measurement_time(Duration::from_secs(6));
    let mut source = vec![0; 256 << 20];
    Random(9).fill(&mut source);
    group.throughput(Throughput::Bytes(source.len() as u64));
    for (name, pages, threads) in
        [("4k", Pages::Small, 1), ("thp", Pages::Transparent, 1), ("thp_2_threads", Pages::Transparent, 2)]
    {
        group.bench_function(BenchmarkId::new("cold_arena", name), |bench| {
            bench.iter_custom(|rounds| {
                let mut total = Duration::ZERO;
                for _ in 0..rounds {
                    let store = Store::open(StoreConfig { pages, ..StoreConfig::new(ByteLen::mib(400)) }).unwrap();
                    let size = ByteLen(source.len() as u64);
                    let builder = store.image_builder(Digest::from_bytes([1; 32]), "bench", size).unwrap();
                    let start = Instant::now();
                    std::thread::scope(|scope| {
                        for thread in 0..threads {
                            let (builder, source) = (&builder, &source);
                            scope.spawn(move || {
                                for (n, chunk) in source.chunks(1 << 20).enumerate().skip(thread).step_by(threads) {
                                    builder.write_chunk((n as u64) << 20, chunk).unwrap();
                                }
                            });
                        }
                    });
                    black_box(builder.finish().unwrap());
                    total += start.elapsed();
                }
                total
            });
        });
    }
    group.finish();
}

fn clone(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("clone");
    let store = Store::open(StoreConfig::new(ByteLen::gib(1))).unwrap();
    let builder = store.image_builder(Digest::from_bytes([1; 32]), "40 GiB", ByteLen::gib(40)).unwrap();
    let mut unique = Unique::new(1);
    for n in 0..10_240 {
        builder.write_chunk(n << 22, unique.next()).unwrap();
    }
    let image = builder.finish().unwrap();
    group.bench_function("create_and_delete_40_gib", |bench| {
        bench.iter(|| {
            let volume = store.create_volume(VolumeSpec::clone_of(VolumeId::random(), image.digest())).unwrap();
            store.delete_volume(volume.id()).unwrap();
        });
    });
    let volume = store.create_volume(VolumeSpec::clone_of(VolumeId::random(), image.digest())).unwrap();
    group.bench_function("snapshot", |bench| bench.iter(|| volume.snapshot().unwrap()));
    group.bench_function("first_write_after_snapshot", |bench| {
        bench.iter_custom(|rounds| {
            let mut total = Duration::ZERO;
            for n in 0..rounds {
                let snapshot = volume.snapshot().unwrap();
                let start = Instant::now();
                volume.write_at(n % 10_240 * (4 << 20), unique.next(), WriteFlags::default()).unwrap();
                total += start.elapsed();
                drop(snapshot);
            }
            total
        });
    });
    group.finish();
}

criterion_group!(benches, read, write, import, clone);
criterion_main!(benches);
