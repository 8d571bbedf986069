//! How long a new process takes to attach to what an earlier one left, and what that costs a GiB.
//!
//! `cargo run --release -p muster-store --example attach -- --gib 4 --rounds 5`
//!
//! Fills volumes with unique blocks (and as many clones of them as make every frame referred to three times), drops the
//! store as a killed process would, and attaches. Prints the median, the rate, and what 64 GiB would take at that rate: the
//! work is a walk over nodes, counts and tags, so it grows with the number of blocks.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use muster_block::{BlockDevice, WriteFlags, conformance::Random};
use muster_common::{ByteLen, VolumeId};
use muster_store::{Attached, Pages, Store, StoreConfig, VolumeSpec};

fn argument(name: &str, default: u64) -> u64 {
    let mut arguments = std::env::args().skip_while(|argument| argument != name).skip(1);
    arguments.next().map_or(default, |value| value.parse().unwrap())
}

fn main() {
    let (gib, rounds) = (argument("--gib", 4), argument("--rounds", 5));
    let directory = std::path::PathBuf::from(format!("/dev/shm/muster-attach-{}", VolumeId::random().short()));
    let config = StoreConfig {
        directory: Some(directory.clone()),
        pages: Pages::Auto,
        ..StoreConfig::new(ByteLen::mib(gib * 1024 * 23 / 20 + 64))
    };
    let store = Store::open(config.clone()).unwrap();
    println!("pages: {}, shared: {}", store.stats().pages.as_str(), store.stats().shared);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let store = &store;
            scope.spawn(move || {
                let size = ByteLen(gib << 29);
                let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), size)).unwrap();
                let mut data = vec![0; 1 << 20];
                Random(thread).fill(&mut data);
                for at in (0..size.bytes()).step_by(1 << 20) {
                    for (n, block) in data.chunks_mut(4096).enumerate() {
                        block[..8].copy_from_slice(&(thread << 56 | at << 8 | n as u64).to_le_bytes());
                    }
                    volume.write_at(at, &data, WriteFlags::default()).unwrap();
                }
                // two more that name every frame from leaves of their own
                for _ in 0..2 {
                    let copy = store.create_volume(VolumeSpec::blank(VolumeId::random(), size)).unwrap();
                    let mut data = vec![0; 1 << 20];
                    for at in (0..size.bytes()).step_by(1 << 20) {
                        volume.read_at(at, &mut data).unwrap();
                        copy.write_at(at, &data, WriteFlags::default()).unwrap();
                    }
                }
            });
        }
    });
    let stats = store.stats();
    let frames = stats.unique_blocks;
    println!("{frames} frames, {} logical, {} resident", stats.logical_bytes, stats.resident_bytes);
    drop(store);
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        let (store, attached) = Store::open_or_attach(config.clone()).unwrap();
        times.push(start.elapsed());
        let Attached::Warm(report) = attached else { panic!("{attached:?}") };
        assert_eq!((report.frames, report.faults.len()), (frames, 0));
        assert!(times.len() > 1 || store.audit().is_exact());
    }
    times.sort_unstable();
    let median = times[times.len() / 2];
    let full = median.as_secs_f64() * 64.0 / gib as f64;
    println!(
        "attached in {median:.0?} (fastest {:.0?}, slowest {:.0?}): {:.0} ns a frame; 64 GiB at that rate: {full:.2} s",
        times[0],
        times[times.len() - 1],
        median.as_nanos() as f64 / frames as f64
    );
    Store::open(config).unwrap().discard();
    assert!(!directory.exists());
}
