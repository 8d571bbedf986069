//! Reads a source on all cores and gives what it found in order: digests of non-zero chunks, hashes of 4 KiB blocks.
//!
//! ```text
//! planner (one lock): next unit of at most 1 MiB that is not a hole
//!    -> worker threads: read, skip zeros, hash  -> caller's thread: puts units in order, calls back
//! ```
//! At most `WINDOW` units are between planner and callback, so memory is bounded.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::mpsc::sync_channel,
};

use muster_common::Digest;
use parking_lot::{Condvar, Mutex};

use crate::{
    CHUNK_SIZE,
    buffer::Buffer,
    error::RepositoryError,
    source::{ReadAt, SourceError, Span},
};

/// Bytes read at once: long enough for the disk, short enough to share a small image among the cores.
const UNIT: u64 = 1 << 20;
/// Units in flight.
const WINDOW: u64 = 32;
/// Reads that wait for a cold source's disk beside those whose threads compute: two cores and a virtual disk of 2 GB/s are
/// both busy from four on; more cost a stack each.
const WAITING: usize = 6;
const CHUNK: u64 = CHUNK_SIZE as u64;
/// Frame size of the store that the estimate is for.
pub(crate) const BLOCK: usize = 4096;

/// One stretch of the source, scanned.
pub(crate) struct Unit<'a> {
    /// Offset behind its last byte.
    pub end: u64,
    pub bytes: &'a [u8],
    /// Zero chunks are left out.
    pub chunks: &'a [ScannedChunk],
    /// Keyed hashes of the blocks that are not zero.
    pub blocks: &'a [u64],
}

/// A chunk that is not zero.
pub(crate) struct ScannedChunk {
    /// In the image.
    pub index: u64,
    pub digest: Digest,
    /// Its place in the unit's `bytes`.
    pub range: Range<usize>,
    /// Its blocks among the unit's `blocks`.
    pub blocks: Range<usize>,
}

struct Scanned {
    start: u64,
    end: u64,
    bytes: Buffer,
    chunks: Vec<ScannedChunk>,
    blocks: Vec<u64>,
}

/// One thread a core.
pub(crate) fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(32))
}

/// Threads that read a source: one a core, and more when they mostly wait.
fn readers(source: &dyn ReadAt) -> usize {
    workers() + if source.is_cold() { WAITING } else { 0 }
}

struct Planner {
    size: u64,
    /// First chunk boundary not planned yet.
    next: u64,
    /// Data is known up to here.
    data_end: u64,
    /// Spans are known up to here.
    scanned: u64,
    spans: VecDeque<Span>,
    sequence: u64,
}

impl Planner {
    fn new(size: u64) -> Self {
        Self { size, next: 0, data_end: 0, scanned: 0, spans: VecDeque::new(), sequence: 0 }
    }

    /// Sequence number, start and end of the next unit.
    fn next(&mut self, source: &dyn ReadAt) -> Result<Option<(u64, u64, u64)>, SourceError> {
        loop {
            if self.next < self.data_end {
                let start = self.next;
                let end = (start + UNIT).min(self.data_end.div_ceil(CHUNK) * CHUNK).min(self.size);
                self.next = end;
                self.sequence += 1;
                return Ok(Some((self.sequence - 1, start, end)));
            }
            if self.scanned >= self.size {
                return Ok(None);
            }
            let Some(span) = self.spans.pop_front() else {
                let mut spans = Vec::new();
                source.spans(self.scanned, (self.size - self.scanned).min(1 << 30), &mut spans)?;
                spans.retain(|s| s.len > 0);
                if spans.is_empty() {
                    spans.push(Span { len: self.size - self.scanned, zero: false });
                }
                self.spans = spans.into();
                continue;
            };
            let end = self.scanned.saturating_add(span.len).min(self.size);
            if !span.zero {
                self.next = self.next.max(self.scanned / CHUNK * CHUNK);
                self.data_end = end;
            }
            self.scanned = end;
        }
    }
}

struct Shared {
    planner: Planner,
    /// Units the callback has had.
    emitted: u64,
    stop: bool,
}

/// Scans `source` and calls `each` in ascending order, on this thread.
pub(crate) fn scan(
    source: &dyn ReadAt,
    chunks: bool,
    block_key: Option<[u8; 32]>,
    each: &mut dyn FnMut(Unit<'_>) -> Result<(), RepositoryError>,
) -> Result<(), RepositoryError> {
    let planner = Planner::new(source.size().0);
    let shared = Mutex::new(Shared { planner, emitted: 0, stop: false });
    let room = Condvar::new();
    let spare = Mutex::new(Vec::<Buffer>::new());
    let readers = readers(source);
    std::thread::scope(|scope| {
        // as large as the window: a send never waits
        let (send, receive) = sync_channel::<Result<(u64, Scanned), SourceError>>(WINDOW as usize + readers);
        for _ in 0..readers {
            let (send, shared, room, spare) = (send.clone(), &shared, &room, &spare);
            scope.spawn(move || {
                loop {
                    let planned = {
                        let mut s = shared.lock();
                        while !s.stop && s.planner.sequence >= s.emitted + WINDOW {
                            room.wait(&mut s);
                        }
                        if s.stop {
                            return;
                        }
                        s.planner.next(source)
                    };
                    let found = match planned {
                        Ok(None) => return,
                        Ok(Some((sequence, start, end))) => {
                            let buffer = spare.lock().pop().unwrap_or_default();
                            look(source, start, end, buffer, chunks, block_key.as_ref()).map(|unit| (sequence, unit))
                        }
                        Err(e) => Err(e),
                    };
                    let failed = found.is_err();
                    if send.send(found).is_err() || failed {
                        return;
                    }
                }
            });
        }
        drop(send);
        let result = (|| {
            let mut waiting = BTreeMap::new();
            let mut next = 0u64;
            while let Ok(found) = receive.recv() {
                let (sequence, unit) = found?;
                waiting.insert(sequence, unit);
                while let Some(mut unit) = waiting.remove(&next) {
                    debug_assert!(unit.start < unit.end);
                    let shown =
                        Unit { end: unit.end, bytes: unit.bytes.bytes(), chunks: &unit.chunks, blocks: &unit.blocks };
                    each(shown)?;
                    spare.lock().push(std::mem::take(&mut unit.bytes));
                    next += 1;
                    shared.lock().emitted = next;
                    room.notify_all();
                }
            }
            Ok(())
        })();
        shared.lock().stop = true;
        room.notify_all();
        result
    })
}

/// See [`crate::source::read_data`].
pub(crate) fn read_data<E, F>(source: &dyn ReadAt, each: F) -> Result<(), E>
where
    E: From<SourceError> + Send,
    F: Fn(u64, &[u8]) -> Result<(), E> + Sync,
{
    let planner = Mutex::new(Planner::new(source.size().0));
    let failed = Mutex::new(None::<E>);
    let work = || {
        let mut buffer = Buffer::default();
        loop {
            if failed.lock().is_some() {
                return;
            }
            let planned = planner.lock().next(source);
            let done = match planned {
                Ok(None) => return,
                Ok(Some((_, start, end))) => {
                    buffer.resize((end - start) as usize);
                    source
                        .read_at(start, buffer.bytes_mut())
                        .map_err(E::from)
                        .and_then(|()| each(start, buffer.bytes()))
                }
                Err(e) => Err(e.into()),
            };
            if let Err(e) = done {
                failed.lock().get_or_insert(e);
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..readers(source) {
            scope.spawn(work);
        }
        work();
    });
    failed.into_inner().map_or(Ok(()), Err)
}

fn look(
    source: &dyn ReadAt,
    start: u64,
    end: u64,
    mut bytes: Buffer,
    want_chunks: bool,
    block_key: Option<&[u8; 32]>,
) -> Result<Scanned, SourceError> {
    bytes.resize((end - start) as usize);
    source.read_at(start, bytes.bytes_mut())?;
    let mut chunks = Vec::new();
    let mut blocks = Vec::new();
    for (i, chunk) in bytes.bytes().chunks(CHUNK_SIZE).enumerate() {
        if crate::is_zero(chunk) {
            continue;
        }
        let first = blocks.len();
        if let Some(key) = block_key {
            blocks.extend(chunk.chunks(BLOCK).filter(|b| !crate::is_zero(b)).map(|b| block_hash(key, b)));
        }
        if want_chunks {
            let at = i * CHUNK_SIZE;
            chunks.push(ScannedChunk {
                index: start / CHUNK + i as u64,
                digest: crate::digest_of(chunk),
                range: at..at + chunk.len(),
                blocks: first..blocks.len(),
            });
        }
    }
    Ok(Scanned { start, end, bytes, chunks, blocks })
}

fn block_hash(key: &[u8; 32], block: &[u8]) -> u64 {
    let hash = if block.len() == BLOCK {
        blake3::keyed_hash(key, block)
    } else {
        // the store pads the last frame of a volume with zeros
        let mut padded = [0; BLOCK];
        padded[..block.len()].copy_from_slice(block);
        blake3::keyed_hash(key, &padded)
    };
    let mut short = [0; 8];
    short.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(short)
}
