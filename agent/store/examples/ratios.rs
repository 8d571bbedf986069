//! The store's hot paths as ratios to what they cannot beat, all in one run, interleaved, medians of nine rounds. Times are
//! of the thread's processor use (schedstat), so that a busy machine distorts them less; for quiet-machine figures see
//! `cargo bench -p muster-store`.
//!
//! `cargo run --release -p muster-store --example ratios`
#![allow(clippy::unwrap_used)]

use std::{hint::black_box, io::Write, os::unix::fs::FileExt, sync::Arc, time::Instant};

use muster_block::{BlockDevice, WriteFlags, conformance::Random};
use muster_common::{ByteLen, Digest, VolumeId};
use muster_store::{Pages, Store, StoreConfig, Volume, VolumeSpec};

const BLOCK: usize = 4096;
const MIB: u64 = 512;
const BLOCKS: u64 = MIB << 8;
const ROUNDS: usize = 9;
/// The kernel brings the time of a running thread up to date every 4 ms: that is 13 ns an operation.
const OPERATIONS: u64 = 300_000;

/// Nanoseconds this thread has been on a processor.
fn on_processor() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

fn nanoseconds(operations: u64, mut operation: impl FnMut()) -> f64 {
    let start = on_processor();
    for _ in 0..operations {
        operation();
    }
    (on_processor() - start) as f64 / operations as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn volume(pages: Pages) -> (Store, Arc<Volume>) {
    let store = Store::open(StoreConfig { pages, ..StoreConfig::new(ByteLen::mib(2 * MIB)) }).unwrap();
    let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(MIB))).unwrap();
    fill(|at, data| volume.write_at(at, data, WriteFlags::default()).unwrap());
    (store, volume)
}

fn fill(mut write: impl FnMut(u64, &[u8])) {
    let mut random = Random(1);
    let mut data = vec![0; 1 << 20];
    for n in 0..MIB {
        random.fill(&mut data);
        write(n << 20, &data);
    }
}

/// A plain arena of the same pages: a volume whose blocks are copied without looking.
fn plain(pages: Pages) -> memory::Plain {
    let mut plain = memory::Plain::new((MIB << 20) as usize, pages == Pages::Transparent);
    fill(|at, data| plain.bytes()[at as usize..at as usize + data.len()].copy_from_slice(data));
    plain
}

mod memory {
    /// Bytes on a 2 MiB boundary; whether they get huge pages is asked of the kernel as the store asks it.
    pub struct Plain {
        bytes: Vec<u8>,
        skip: usize,
        len: usize,
    }

    impl Plain {
        pub fn new(len: usize, huge: bool) -> Plain {
            let bytes = vec![0u8; len + (2 << 20)];
            let skip = bytes.as_ptr().align_offset(2 << 20);
            if huge {
                #[allow(unsafe_code)]
                // SAFETY: the range is ours and this advice does not change contents.
                let _ = unsafe {
                    let start = bytes.as_ptr().add(skip).cast_mut();
                    rustix::mm::madvise(start.cast(), len, rustix::mm::Advice::LinuxHugepage)
                };
            }
            Plain { bytes, skip, len }
        }

        pub fn bytes(&mut self) -> &mut [u8] {
            &mut self.bytes[self.skip..self.skip + self.len]
        }
    }
}

fn main() {
    let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
    fill(|_, data| file.write_all(data).unwrap());
    let mut random = Random(2);
    let mut at = move || random.below(BLOCKS) * BLOCK as u64;
    let mut buf = [0; BLOCK];
    let mut unique = [0; BLOCK];
    Random(3).fill(&mut unique);
    let mut count = 0u64;
    for pages in [Pages::Small, Pages::Transparent] {
        let (_store, volume) = volume(pages);
        let mut plain = plain(pages);
        let mut times = [const { Vec::new() }; 6];
        for _ in 0..ROUNDS {
            times[0].push(nanoseconds(OPERATIONS, || {
                let at = at() as usize;
                buf.copy_from_slice(&plain.bytes()[at..at + BLOCK]);
                black_box(&buf);
            }));
            times[1].push(nanoseconds(OPERATIONS, || volume.read_at(at(), black_box(&mut buf)).unwrap()));
            times[2].push(nanoseconds(OPERATIONS, || file.read_exact_at(black_box(&mut buf), at()).unwrap()));
            times[3].push(nanoseconds(OPERATIONS, || {
                count += 1;
                unique[..8].copy_from_slice(&count.to_le_bytes());
                let at = at() as usize;
                plain.bytes()[at..at + BLOCK].copy_from_slice(&unique);
            }));
            times[4].push(nanoseconds(OPERATIONS, || {
                count += 1;
                unique[..8].copy_from_slice(&count.to_le_bytes());
                volume.write_at(at(), &unique, WriteFlags::default()).unwrap();
            }));
            times[5].push(nanoseconds(OPERATIONS, || {
                count += 1;
                unique[..8].copy_from_slice(&count.to_le_bytes());
                file.write_all_at(&unique, at()).unwrap();
            }));
        }
        let [copy, read, pread, plain_write, write, pwrite] = times.map(median);
        println!("{pages:?} pages, {MIB} MiB, one thread, ns an operation");
        println!("  4K random read   copy {copy:.0}  store {read:.0}  pread tmpfs {pread:.0}");
        println!("    {:.2} x copy, {:.2} x pread", copy / read, pread / read);
        println!("  4K unique write  copy {plain_write:.0}  store {write:.0}  pwrite tmpfs {pwrite:.0}");
        println!("    {:.2} x copy, {:.2} x pwrite", plain_write / write, pwrite / write);
    }
    let mut source = vec![0; 256 << 20];
    Random(9).fill(&mut source);
    for (pages, threads) in [(Pages::Small, 1), (Pages::Transparent, 1), (Pages::Transparent, 2)] {
        let (mut wall, mut busy) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let store = Store::open(StoreConfig { pages, ..StoreConfig::new(ByteLen::mib(400)) }).unwrap();
            let size = ByteLen(source.len() as u64);
            let builder = store.image_builder(Digest::from_bytes([1; 32]), "image", size).unwrap();
            let start = Instant::now();
            let used: u64 = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..threads)
                    .map(|thread| {
                        let (builder, source) = (&builder, &source);
                        scope.spawn(move || {
                            for (n, chunk) in source.chunks(1 << 20).enumerate().skip(thread).step_by(threads) {
                                builder.write_chunk((n as u64) << 20, chunk).unwrap();
                            }
                            on_processor()
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            builder.finish().unwrap();
            wall.push(source.len() as f64 / start.elapsed().as_secs_f64() / 1e9);
            busy.push(source.len() as f64 / used as f64 * threads as f64);
        }
        println!(
            "import of unique data into a cold arena, {pages:?} pages, {threads} threads: {:.2} GB/s on the clock, {:.2} of processor time",
            median(wall),
            median(busy)
        );
    }
}
