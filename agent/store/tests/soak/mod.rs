//! Many writers against an oracle, with snapshots, clones, resets and deletes going on and audits in between. Used by
//! the test `writers` (small) and the example `soak` (as large as asked).
//!
//! The oracle keeps eight seeds a block, one for each sector; a sector's bytes follow from its seed. So it takes 1/64 of
//! the memory of what it checks.
#![allow(clippy::unwrap_used)]

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use muster_block::{BlockDevice, WriteFlags, ZeroFlags, conformance::Random};
use muster_common::{ByteLen, VolumeId};
use muster_store::{AuditReport, Snapshot, Store, StoreConfig, StoreStats, Volume, VolumeSpec};

const BLOCK: usize = 4096;
const SECTOR: usize = 512;
/// Seeds below this are drawn by all writers, so that blocks are shared between them; above, each is used once.
const COMMON: u64 = 2000;

type Sectors = [u64; 8];

#[derive(Clone)]
struct Oracle(Vec<Sectors>);

pub struct Plan {
    /// Unique data, over all writers.
    pub unique: ByteLen,
    pub writers: usize,
    /// Operations of each writer after its disk is full.
    pub churn: usize,
    pub audit_every: Duration,
}

pub struct Outcome {
    pub stats: StoreStats,
    pub audit: AuditReport,
    pub audits: usize,
    pub distinct: u64,
    pub checked: ByteLen,
    pub written: ByteLen,
    pub filling: Duration,
    pub churning: Duration,
    pub checking: Duration,
}

fn fill_sector(seed: u64, sector: &mut [u8]) {
    if seed == 0 {
        sector.fill(0);
    } else {
        Random(seed).fill(sector);
    }
}

fn sectors_of(seed: u64) -> Sectors {
    std::array::from_fn(|n| if seed == 0 { 0 } else { seed << 3 | n as u64 })
}

struct Writer<'a> {
    store: &'a Store,
    random: Random,
    next_seed: u64,
    written: &'a AtomicU64,
    buf: Vec<u8>,
}

impl Writer<'_> {
    fn unique(&mut self) -> u64 {
        self.next_seed += 1;
        self.next_seed
    }

    /// Writes blocks `first..` with these seeds, in one request.
    fn write(&mut self, device: &Volume, oracle: &mut Oracle, first: usize, seeds: &[u64]) {
        let len = seeds.len() * BLOCK;
        for (n, &seed) in seeds.iter().enumerate() {
            let sectors = sectors_of(seed);
            for (sector, bytes) in sectors.iter().zip(self.buf[n * BLOCK..(n + 1) * BLOCK].chunks_mut(SECTOR)) {
                fill_sector(*sector, bytes);
            }
            oracle.0[first + n] = sectors;
        }
        device.write_at((first * BLOCK) as u64, &self.buf[..len], WriteFlags::default()).unwrap();
        self.written.fetch_add(len as u64, Relaxed);
    }

    fn write_sector(&mut self, device: &Volume, oracle: &mut Oracle, block: usize, sector: usize) {
        let seed = self.unique() << 3;
        fill_sector(seed, &mut self.buf[..SECTOR]);
        oracle.0[block][sector] = seed;
        let at = block * BLOCK + sector * SECTOR;
        device.write_at(at as u64, &self.buf[..SECTOR], WriteFlags::default()).unwrap();
        self.written.fetch_add(SECTOR as u64, Relaxed);
    }

    fn read(&mut self, device: &dyn BlockDevice, oracle: &Oracle, first: usize, count: usize, what: &str) {
        let len = count * BLOCK;
        device.read_at((first * BLOCK) as u64, &mut self.buf[..len]).unwrap();
        let mut expected = [0; SECTOR];
        for (n, sectors) in oracle.0[first..first + count].iter().enumerate() {
            for (sector, &seed) in sectors.iter().enumerate() {
                fill_sector(seed, &mut expected);
                let at = n * BLOCK + sector * SECTOR;
                assert!(self.buf[at..at + SECTOR] == expected, "{what}: block {} sector {sector} differs", first + n);
            }
        }
    }

    fn churn(&mut self, device: &Volume, oracle: &mut Oracle, snapshots: &mut Vec<(Snapshot, Oracle)>) {
        let blocks = oracle.0.len();
        let at = self.random.below(blocks as u64) as usize;
        let run = (1 + self.random.below(32) as usize).min(blocks - at);
        match self.random.below(100) {
            0..35 => {
                let seeds: Vec<u64> = (0..run).map(|_| self.unique()).collect();
                self.write(device, oracle, at, &seeds);
            }
            35..50 => {
                let seeds: Vec<u64> = (0..run).map(|_| self.random.below(COMMON)).collect();
                self.write(device, oracle, at, &seeds);
            }
            50..60 => {
                let sector = self.random.below(8) as usize;
                self.write_sector(device, oracle, at, sector);
            }
            60..80 => self.read(device, oracle, at, run, "volume"),
            80..90 => {
                device.trim((at * BLOCK) as u64, (run * BLOCK) as u64).unwrap();
                oracle.0[at..at + run].fill([0; 8]);
            }
            90..95 => {
                let long = (run * 64).min(blocks - at);
                device.write_zeroes((at * BLOCK) as u64, (long * BLOCK) as u64, ZeroFlags::default()).unwrap();
                oracle.0[at..at + long].fill([0; 8]);
            }
            95..97 => {
                snapshots.push((device.snapshot().unwrap(), oracle.clone()));
                if snapshots.len() > 2 {
                    snapshots.swap_remove(self.random.below(2) as usize);
                }
            }
            97 => {
                if let Some((snapshot, then)) = snapshots.last() {
                    device.revert(snapshot).unwrap();
                    *oracle = then.clone();
                }
            }
            _ => {
                let Some((snapshot, then)) = snapshots.first().cloned() else { return };
                let spec = VolumeSpec::blank(VolumeId::random(), snapshot.size());
                let clone = self.store.create_volume_from(spec, &snapshot).unwrap();
                let mut mine = then.clone();
                for _ in 0..20 {
                    let at = self.random.below(blocks as u64) as usize;
                    let seeds = [self.unique()];
                    self.write(&clone, &mut mine, at, &seeds);
                    self.read(&clone, &mine, at, 1, "clone");
                    self.read(&snapshot, &then, at, 1, "snapshot");
                }
                if self.random.below(2) == 0 {
                    clone.reset().unwrap();
                    let at = self.random.below((blocks - run) as u64 + 1) as usize;
                    self.read(&*clone, &then, at, run, "clone after reset");
                }
                self.store.delete_volume(clone.id()).unwrap();
            }
        }
    }
}

pub fn run(plan: &Plan) -> Outcome {
    let blocks = (plan.unique.bytes() as usize / BLOCK / plan.writers).max(64);
    // room for what snapshots and clones hold on to, and for metadata
    let churned = (plan.churn * plan.writers * 10 * BLOCK) as u64;
    let budget =
        ByteLen(plan.unique.bytes() + plan.unique.bytes() / 20 + churned.min(plan.unique.bytes()) + (64 << 20));
    let store = Store::open(StoreConfig::new(budget)).unwrap();
    // one disk all writers share, each its own blocks of it (every n-th): they meet in every leaf and every sector
    let shared = store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(16))).unwrap();
    let shared_blocks = (16 << 20) / BLOCK;
    let written = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    let start = Instant::now();
    let mut audits = 0;
    let filled = AtomicU64::new(0);
    let filling = std::sync::OnceLock::new();
    let results: Vec<_> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..plan.writers)
            .map(|number| {
                let (store, shared, written, filled, filling) = (&store, &shared, &written, &filled, &filling);
                scope.spawn(move || {
                    let mut writer = Writer {
                        store,
                        random: Random(number as u64 * 7919),
                        next_seed: COMMON + ((number as u64 + 1) << 40),
                        written,
                        buf: vec![0; 64 * BLOCK],
                    };
                    let spec = VolumeSpec::blank(VolumeId::random(), ByteLen((blocks * BLOCK) as u64));
                    let device: Arc<Volume> = store.create_volume(spec).unwrap();
                    let mut oracle = Oracle(vec![[0; 8]; blocks]);
                    for first in (0..blocks).step_by(64) {
                        let seeds: Vec<u64> = (first..blocks.min(first + 64)).map(|_| writer.unique()).collect();
                        writer.write(&device, &mut oracle, first, &seeds);
                    }
                    if filled.fetch_add(1, Relaxed) + 1 == plan.writers as u64 {
                        let _ = filling.set(start.elapsed());
                    }
                    let mut common = Oracle(vec![[0; 8]; shared_blocks]);
                    let mut snapshots = Vec::new();
                    for _ in 0..plan.churn {
                        writer.churn(&device, &mut oracle, &mut snapshots);
                        // blocks of the shared disk: whole ones of my own, and my own sectors of block 0
                        let turn = writer.random.below((shared_blocks / plan.writers) as u64 - 1) as usize + 1;
                        let mine = turn * plan.writers + number;
                        if mine < shared_blocks {
                            let seeds = [writer.unique()];
                            writer.write(shared, &mut common, mine, &seeds);
                            writer.read(&**shared, &common, mine, 1, "shared disk");
                        }
                        if number < 8 {
                            writer.write_sector(shared, &mut common, 0, number);
                        }
                    }
                    (device, oracle, snapshots, common)
                })
            })
            .collect();
        let auditor = scope.spawn(|| {
            let mut audits = 0;
            let mut last = Instant::now();
            while !done.load(Relaxed) {
                if last.elapsed() >= plan.audit_every {
                    let audit = store.audit();
                    assert!(audit.is_exact(), "audit {audits}: {:?}", audit.faults);
                    audits += 1;
                    last = Instant::now();
                }
                std::thread::park_timeout(Duration::from_millis(5));
            }
            audits
        });
        let results = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        done.store(true, Relaxed);
        audits += auditor.join().unwrap();
        results
    });
    let filling = *filling.get().unwrap();
    let churning = start.elapsed() - filling;

    let start = Instant::now();
    let audit = store.audit();
    let mut distinct: HashSet<[u8; 16]> = HashSet::new();
    let mut checked = 0;
    let mut common = Oracle(vec![[0; 8]; shared_blocks]);
    {
        let mut see = |oracle: &Oracle| {
            for sectors in oracle.0.iter().filter(|sectors| **sectors != [0; 8]) {
                let mut bytes = [0; 64];
                for (sector, chunk) in sectors.iter().zip(bytes.chunks_mut(8)) {
                    chunk.copy_from_slice(&sector.to_le_bytes());
                }
                let hash = twox_hash::XxHash3_128::oneshot(&bytes);
                distinct.insert(hash.to_le_bytes());
            }
        };
        let mut reader =
            Writer { store: &store, random: Random(0), next_seed: 0, written: &written, buf: vec![0; 64 * BLOCK] };
        let mut compare = |device: &dyn BlockDevice, oracle: &Oracle, what: &str| {
            for first in (0..oracle.0.len()).step_by(64) {
                let count = 64.min(oracle.0.len() - first);
                reader.read(device, oracle, first, count, what);
                checked += (count * BLOCK) as u64;
            }
        };
        for (number, (device, oracle, snapshots, mine)) in results.iter().enumerate() {
            compare(&**device, oracle, "volume at the end");
            see(oracle);
            for (snapshot, oracle) in snapshots {
                compare(snapshot, oracle, "snapshot at the end");
                see(oracle);
            }
            for block in (number..shared_blocks).step_by(plan.writers).skip(1) {
                common.0[block] = mine.0[block];
            }
            if number < 8 {
                common.0[0][number] = mine.0[0][number];
            }
        }
        compare(&*shared, &common, "shared disk at the end");
        see(&common);
    }
    Outcome {
        stats: store.stats(),
        audit,
        audits,
        distinct: distinct.len() as u64,
        checked: ByteLen(checked),
        written: ByteLen(written.into_inner()),
        filling,
        churning,
        checking: start.elapsed(),
    }
}
