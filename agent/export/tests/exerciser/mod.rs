//! Random requests on a disk against bytes in memory, in the manner of fsx: reads and writes of any alignment, plain and
//! through a mapping, trims, zeroes, flushes, closing and opening. All is drawn from one seed; what differs ends it with
//! the seed, the place, and the last requests.
#![allow(dead_code, reason = "each test program uses its part")]
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use muster_block::conformance::Random;
use muster_block::{BlockDevice, WriteFlags, ZeroFlags};
use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Requests that are shown when something differs.
const SHOWN: usize = 40;
/// Most requests are shorter than this, as fsx's are; some are as long as `LONGEST`.
const USUAL: u64 = 64 << 10;
const LONGEST: u64 = 512 << 10;
/// After so many requests everything is compared.
const COMPARE_EVERY: u64 = 5_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Read,
    Write,
    MapRead,
    MapWrite,
    Trim,
    Zero,
    Flush,
    Reopen,
    Compare,
}

#[derive(Clone, Copy, Debug)]
pub struct Request {
    number: u64,
    kind: Kind,
    at: u64,
    len: u64,
}

/// What is exercised.
pub trait Target {
    fn read(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()>;
    fn write(&mut self, at: u64, data: &[u8]) -> io::Result<()>;
    fn trim(&mut self, at: u64, len: u64) -> io::Result<()>;
    fn zero(&mut self, at: u64, len: u64) -> io::Result<()>;
    fn flush(&mut self) -> io::Result<()>;
    fn reopen(&mut self) -> io::Result<()>;
    /// The disk as a mapping, where it can be mapped.
    fn mapping(&mut self) -> Option<&MmapRegion<()>> {
        None
    }
}

pub struct Exerciser<T> {
    target: T,
    /// What the disk should hold.
    model: Vec<u8>,
    seed: u64,
    random: Random,
    /// Where requests begin and how long they are is a multiple of this.
    unit: u64,
    number: u64,
    last: VecDeque<Request>,
    counts: BTreeMap<Kind, u64>,
}

impl<T: Target> Exerciser<T> {
    /// `model` is what the disk holds now.
    pub fn new(target: T, model: Vec<u8>, seed: u64) -> Exerciser<T> {
        let random = Random(seed);
        Exerciser { target, model, seed, random, unit: 1, number: 0, last: VecDeque::new(), counts: BTreeMap::new() }
    }

    /// For what takes sectors only. Mapped ones are pages anyway.
    pub fn in_units_of(self, unit: u64) -> Exerciser<T> {
        Exerciser { unit, ..self }
    }

    /// Does so many requests and compares everything at the end. What the disk holds then, and how often what was done.
    ///
    /// # Panics
    /// When anything differs or fails.
    pub fn run(mut self, requests: u64) -> (Vec<u8>, BTreeMap<Kind, u64>) {
        for _ in 0..requests {
            let request = self.draw();
            self.do_one(request);
            if self.number.is_multiple_of(COMPARE_EVERY) {
                self.compare();
            }
        }
        self.number += 1;
        self.do_one(Request { number: self.number, kind: Kind::Reopen, at: 0, len: 0 });
        self.compare();
        eprintln!("seed {}: {requests} requests: {:?}", self.seed, self.counts);
        (self.model, self.counts)
    }

    fn draw(&mut self) -> Request {
        self.number += 1;
        let kind = match self.random.below(100) {
            0..30 => Kind::Read,
            30..60 => Kind::Write,
            60..68 => Kind::MapRead,
            68..76 => Kind::MapWrite,
            76..86 => Kind::Trim,
            86..95 => Kind::Zero,
            95..98 => Kind::Flush,
            _ => Kind::Reopen,
        };
        if matches!(kind, Kind::Flush | Kind::Reopen) {
            return Request { number: self.number, kind, at: 0, len: 0 };
        }
        let unit = self.unit.max([1, 512, 4096][self.random.below(3) as usize]);
        let size = self.model.len() as u64;
        let most = if self.random.below(20) == 0 { LONGEST } else { USUAL };
        let at = self.random.below(size) / unit * unit;
        let len = (1 + self.random.below(most)).next_multiple_of(unit).min(size - at);
        Request { number: self.number, kind, at, len }
    }

    /// What a write writes: of one byte, so that blocks are alike or zero, or of many.
    fn contents(&mut self, len: u64) -> Vec<u8> {
        let mut data = vec![self.random.below(3) as u8; len as usize];
        if self.random.below(4) > 0 {
            self.random.fill(&mut data);
        }
        data
    }

    fn compare(&mut self) {
        let len = self.model.len() as u64;
        self.do_one(Request { number: self.number, kind: Kind::Compare, at: 0, len });
    }

    fn do_one(&mut self, request: Request) {
        if self.last.len() == SHOWN {
            self.last.pop_front();
        }
        self.last.push_back(request);
        *self.counts.entry(request.kind).or_default() += 1;
        if let Err(error) = self.apply(request) {
            self.fail(&format!("{request:?}: {error}"));
        }
    }

    fn apply(&mut self, request: Request) -> io::Result<()> {
        let Request { kind, at, len, .. } = request;
        let range = at as usize..(at + len) as usize;
        match kind {
            Kind::Read | Kind::Compare => {
                let mut found = vec![0xee; len as usize];
                self.target.read(at, &mut found)?;
                self.check(request, &found);
            }
            Kind::MapRead => {
                let mut found = vec![0xee; len as usize];
                match self.target.mapping() {
                    Some(map) => {
                        map.as_volatile_slice().read_slice(&mut found, at as usize).map_err(io::Error::other)?
                    }
                    None => self.target.read(at, &mut found)?,
                }
                self.check(request, &found);
            }
            Kind::Write | Kind::MapWrite => {
                let data = self.contents(len);
                self.model[range].copy_from_slice(&data);
                match self.target.mapping().filter(|_| kind == Kind::MapWrite) {
                    Some(map) => map.as_volatile_slice().write_slice(&data, at as usize).map_err(io::Error::other)?,
                    None => self.target.write(at, &data)?,
                }
            }
            Kind::Trim | Kind::Zero => {
                self.model[range].fill(0);
                if kind == Kind::Trim { self.target.trim(at, len)? } else { self.target.zero(at, len)? }
            }
            Kind::Flush => self.target.flush()?,
            Kind::Reopen => self.target.reopen()?,
        }
        Ok(())
    }

    fn check(&self, request: Request, found: &[u8]) {
        let wanted = &self.model[request.at as usize..][..found.len()];
        if found == wanted {
            return;
        }
        let differs = |n: &usize| found[*n] != wanted[*n];
        let count = (0..found.len()).filter(differs).count();
        let Some(first) = (0..found.len()).find(differs) else { return };
        self.fail(&format!(
            "{request:?}: byte {} is {:#x}, should be {:#x}; {count} bytes differ",
            request.at + first as u64,
            found[first],
            wanted[first]
        ));
    }

    fn fail(&self, what: &str) -> ! {
        let mut last = String::new();
        for Request { number, kind, at, len } in &self.last {
            last += &format!("\n  {number:>8} {kind:?} {at:#x}..{:#x} ({len})", at + len);
        }
        panic!("seed {}, request {}: {what}\nthe last requests:{last}", self.seed, self.number);
    }
}

/// A file, or whatever a kernel shows as one.
pub struct FileTarget {
    path: PathBuf,
    file: File,
    map: Option<MmapRegion<()>>,
}

impl FileTarget {
    pub fn open(path: &Path) -> FileTarget {
        let (file, map) = Self::open_both(path).unwrap();
        if map.is_none() {
            eprintln!("{} cannot be mapped: plain reads and writes instead", path.display());
        }
        FileTarget { path: path.to_owned(), file, map }
    }

    fn open_both(path: &Path) -> io::Result<(File, Option<MmapRegion<()>>)> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let len = file.metadata()?.len() as usize;
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), len).ok();
        Ok((file, map))
    }
}

impl Target for FileTarget {
    fn read(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, at)
    }
    fn write(&mut self, at: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, at)
    }
    fn trim(&mut self, at: u64, len: u64) -> io::Result<()> {
        Ok(fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, len)?)
    }
    fn zero(&mut self, at: u64, len: u64) -> io::Result<()> {
        Ok(fallocate(&self.file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, at, len)?)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }
    fn reopen(&mut self) -> io::Result<()> {
        self.flush()?;
        self.map = None;
        (self.file, self.map) = Self::open_both(&self.path)?;
        Ok(())
    }
    fn mapping(&mut self) -> Option<&MmapRegion<()>> {
        self.map.as_ref()
    }
}

/// A device that is opened anew by `open`.
pub struct DeviceTarget<F> {
    device: Option<Arc<dyn BlockDevice>>,
    open: F,
}

impl<F: Fn() -> Arc<dyn BlockDevice>> DeviceTarget<F> {
    pub fn new(open: F) -> DeviceTarget<F> {
        DeviceTarget { device: Some(open()), open }
    }
    fn device(&self) -> &dyn BlockDevice {
        &**self.device.as_ref().unwrap()
    }
}

impl<F: Fn() -> Arc<dyn BlockDevice>> Target for DeviceTarget<F> {
    fn read(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.device().read_at(at, buf).map_err(io::Error::other)
    }
    fn write(&mut self, at: u64, data: &[u8]) -> io::Result<()> {
        self.device().write_at(at, data, WriteFlags { fua: at.is_multiple_of(7) }).map_err(io::Error::other)
    }
    fn trim(&mut self, at: u64, len: u64) -> io::Result<()> {
        self.device().trim(at, len).map_err(io::Error::other)
    }
    fn zero(&mut self, at: u64, len: u64) -> io::Result<()> {
        let flags = ZeroFlags { no_hole: at.is_multiple_of(3), ..ZeroFlags::default() };
        self.device().write_zeroes(at, len, flags).map_err(io::Error::other)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.device().flush().map_err(io::Error::other)
    }
    fn reopen(&mut self) -> io::Result<()> {
        self.device = None;
        self.device = Some((self.open)());
        Ok(())
    }
}
