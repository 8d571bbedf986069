//! Writes, reads, discards and zeroes a disk at random, past every cache, by several threads, each in a part of its own, and
//! compares what it reads. It is two things: a program without dependencies that runs inside a guest (the test compiles it),
//! and a part of that test, which draws the same requests to know what the disk holds at the end. What is discarded must read
//! as zeroes: a disk need not promise that, ours does.
//!
//! ```text
//! verify DISK REQUESTS THREADS SEED         so many requests by each thread, then all of the disk is compared
//! verify DISK REQUESTS THREADS SEED again   the disk is only compared with what these requests left on it
//! ```

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Command, ExitCode};

const SECTOR: usize = 512;
/// Longest request, in sectors: more than one segment of a queue.
const LONGEST: u64 = 400;
#[cfg(not(target_arch = "aarch64"))]
const O_DIRECT: i32 = 0o40000;
#[cfg(target_arch = "aarch64")]
const O_DIRECT: i32 = 0o200000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Write,
    Read,
    Discard,
    Zero,
}

/// In sectors of the disk.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    kind: Kind,
    at: u64,
    len: u64,
}

/// What one thread has written where.
pub struct Part {
    first: u64,
    /// Which request wrote each sector; 0 for none.
    written: Vec<u32>,
    requests: u32,
    random: u64,
}

impl Part {
    pub fn new(disk_bytes: u64, threads: u64, thread: u64, seed: u64) -> Part {
        let sectors = disk_bytes / SECTOR as u64 / threads;
        let random = (seed << 16 | thread).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Part { first: thread * sectors, written: vec![0; sectors as usize], requests: 0, random }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 16) % bound
    }

    /// The next request, as if it were done.
    pub fn draw(&mut self) -> Request {
        let sectors = self.written.len() as u64;
        let kind = match self.below(100) {
            0..50 => Kind::Write,
            50..96 => Kind::Read,
            96..98 => Kind::Discard,
            _ => Kind::Zero,
        };
        // half of them in whole blocks
        let unit = if self.below(2) == 0 { 8 } else { 1 };
        let at = self.below(sectors) / unit * unit;
        let len = (1 + self.below(LONGEST)).next_multiple_of(unit).min(sectors - at);
        self.requests += 1;
        let value = match kind {
            Kind::Read => None,
            Kind::Write => Some(self.requests),
            Kind::Discard | Kind::Zero => Some(0),
        };
        if let Some(value) = value {
            self.written[at as usize..(at + len) as usize].fill(value);
        }
        Request { kind, at: self.first + at, len }
    }

    /// What sectors of the disk hold.
    pub fn contents(&self, at: u64, out: &mut [u8]) {
        for (sector, bytes) in (at..).zip(out.chunks_mut(SECTOR)) {
            let written = self.written[(sector - self.first) as usize];
            // some requests write the same blocks everywhere
            let place = if written.is_multiple_of(5) { sector % 8 } else { sector };
            let mut word = (u64::from(written) << 32 ^ place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            for bytes in bytes.chunks_mut(8) {
                word = word.wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ word >> 29;
                bytes.copy_from_slice(&if written == 0 { 0 } else { word }.to_le_bytes());
            }
        }
    }

    /// All of the part.
    pub fn all(&self) -> (u64, Vec<u8>) {
        let mut bytes = vec![0; self.written.len() * SECTOR];
        self.contents(self.first, &mut bytes);
        (self.first * SECTOR as u64, bytes)
    }
}

/// Memory that direct requests take.
struct Buffer {
    bytes: Vec<u8>,
    skip: usize,
}

impl Buffer {
    fn new(len: usize) -> Buffer {
        let bytes = vec![0; len + 4096];
        let skip = bytes.as_ptr().align_offset(4096);
        Buffer { bytes, skip }
    }
    fn get(&mut self, len: u64) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + len as usize * SECTOR]
    }
}

fn compare(part: &Part, request: Request, found: &[u8]) -> Result<(), String> {
    let mut wanted = vec![0; found.len()];
    part.contents(request.at, &mut wanted);
    match found.iter().zip(&wanted).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(n) => Err(format!(
            "{request:?} (request {}): byte {} of the disk is {:#x}, should be {:#x}",
            part.requests,
            request.at * SECTOR as u64 + n as u64,
            found[n],
            wanted[n]
        )),
    }
}

fn discard(disk: &str, request: Request) -> Result<(), String> {
    let (at, len) = (request.at * SECTOR as u64, request.len * SECTOR as u64);
    let mut command = Command::new("/usr/sbin/blkdiscard");
    command.args(["-f", "-o", &at.to_string(), "-l", &len.to_string()]);
    if request.kind == Kind::Zero {
        command.arg("-z");
    }
    let ended = command.arg(disk).output().map_err(|error| format!("blkdiscard: {error}"))?;
    if ended.status.success() {
        return Ok(());
    }
    // it says "operation forced" of every one that goes well, too
    Err(format!("{request:?}: blkdiscard: {}: {}", ended.status, String::from_utf8_lossy(&ended.stderr)))
}

fn exercise(disk: &str, file: &File, mut part: Part, requests: u32, again: bool) -> Result<String, String> {
    let mut buffer = Buffer::new(LONGEST as usize * SECTOR + SECTOR * 8);
    let mut counts = [0u64; 4];
    let mut one = |part: &Part, request: Request| {
        counts[request.kind as usize] += 1;
        let offset = request.at * SECTOR as u64;
        let buffer = buffer.get(request.len);
        let failed = |error| format!("{request:?}: {error}");
        match request.kind {
            Kind::Write => {
                part.contents(request.at, buffer);
                file.write_all_at(buffer, offset).map_err(failed)
            }
            Kind::Read => {
                file.read_exact_at(buffer, offset).map_err(failed)?;
                compare(part, request, buffer)
            }
            Kind::Discard | Kind::Zero => discard(disk, request),
        }
    };
    while part.requests < requests {
        let request = part.draw();
        if !again {
            one(&part, request)?;
        }
    }
    file.sync_all().map_err(|error| format!("sync: {error}"))?;
    let end = part.first + part.written.len() as u64;
    let mut at = part.first;
    while at < end {
        let len = LONGEST.min(end - at);
        one(&part, Request { kind: Kind::Read, at, len })?;
        at += len;
    }
    let [writes, reads, discards, zeroes] = counts;
    Ok(format!("{writes} writes, {reads} reads, {discards} discards, {zeroes} zeroes"))
}

fn run(words: &[String]) -> Result<(), String> {
    let (disk, requests, threads, seed, again) = match words {
        [disk, requests, threads, seed] => (disk, requests, threads, seed, false),
        [disk, requests, threads, seed, again] if again == "again" => (disk, requests, threads, seed, true),
        _ => return Err("usage: verify DISK REQUESTS THREADS SEED [again]".to_owned()),
    };
    let number = |word: &str| word.parse::<u64>().map_err(|error| format!("{word}: {error}"));
    let (requests, threads, seed) = (number(requests)?, number(threads)?, number(seed)?);
    let failed = |error| format!("{disk}: {error}");
    let mut options = OpenOptions::new();
    let mut file = options.read(true).write(true).custom_flags(O_DIRECT).open(disk).map_err(failed)?;
    let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
    if !again {
        discard(disk, Request { kind: Kind::Zero, at: 0, len: size / SECTOR as u64 })?;
    }
    let file = &file;
    std::thread::scope(|scope| {
        let start = |thread| {
            let part = Part::new(size, threads, thread, seed);
            scope.spawn(move || exercise(disk, file, part, requests as u32, again))
        };
        let all: Vec<_> = (0..threads).map(start).collect();
        for one in all {
            println!("{}", one.join().map_err(|_| "a thread panicked")??);
        }
        Ok(())
    })
}

pub fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
