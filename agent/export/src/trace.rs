//! What was asked of a device, and when: a [`Recorder`] around it, and the file its [`Trace`] is kept in.
//!
//! ```
//! use std::sync::Arc;
//! use muster_block::{BlockDevice, model::MemoryDevice};
//! use muster_common::ByteLen;
//! use muster_export::{Registry, trace::{Kind, Recorder, Trace}};
//!
//! let recorder = Arc::new(Recorder::new(Arc::new(MemoryDevice::new(ByteLen::mib(1))), 1000));
//! Registry::new().add("volume.1", recorder.clone())?;
//! recorder.read_at(4096, &mut [0; 512])?;
//! let bytes = recorder.trace().to_bytes();
//! assert_eq!(Trace::from_bytes(&bytes)?.records[0].kind, Kind::Read);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Format
//! All numbers little endian. A header, records, a checksum; nothing behind it.
//!
//! | offset | size | header |
//! |---|---|---|
//! | 0 | 8 | magic `MSTTRACE` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | 0 |
//! | 16 | 8 | size of the device in bytes |
//! | 24 | 8 | number of records |
//! | 32 | 8 | requests that were left out because the recorder was full |
//!
//! | offset | size | record |
//! |---|---|---|
//! | 0 | 8 | µs since the recorder was made; never less than in the record before |
//! | 8 | 8 | offset |
//! | 16 | 8 | length |
//! | 24 | 1 | kind: 1 read, 2 write, 3 write zeroes, 4 trim, 5 flush (offset and length 0) |
//! | 25 | 1 | 1 when durability was asked for with it (FUA; writes and zeroes), else 0 |
//! | 26 | 6 | 0 |
//!
//! The last 8 bytes are the FNV-1a hash (64 bit) of all before them: against torn and mixed up files, not against malice.
//!
//! # Invariants
//! 1. What the device answers is not changed. A request is recorded before it is passed on, whether it succeeds or not.
//! 2. Memory is bounded: 40 bytes a request and no more requests than said.
//! 3. The reader takes exactly what the writer makes; it allocates no more than the bytes it is given.
//!
//! Not recorded: the data, and questions that move none (geometry, block status).

use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_block::{BlockDevice, BlockError, Extent, Geometry, WriteFlags, ZeroFlags};
use muster_common::ByteLen;
use parking_lot::Mutex;

const MAGIC: [u8; 8] = *b"MSTTRACE";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 40;
const RECORD_LEN: usize = 32;
const CHECKSUM_LEN: usize = 8;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Bytes.
    Read = 1,
    /// To keep bytes.
    Write = 2,
    /// To read as zero from now on.
    WriteZeroes = 3,
    /// To give space back.
    Trim = 4,
    /// To make what was written durable.
    Flush = 5,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        [Kind::Read, Kind::Write, Kind::WriteZeroes, Kind::Trim, Kind::Flush].into_iter().find(|k| *k as u8 == byte)
    }
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Since the recorder was made. Whole microseconds.
    pub at: Duration,
    /// What.
    pub kind: Kind,
    /// With durability (writes and zeroes).
    pub fua: bool,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// The requests of a device, in the order they came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The device's size. No record goes beyond it.
    pub size: ByteLen,
    /// The requests.
    pub records: Vec<Record>,
    /// Requests that came after the recorder was full.
    pub left_out: u64,
}

/// Bytes that are not a trace.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TraceError {
    /// The first bytes are something else's.
    #[error("read a trace: not a trace")]
    NotATrace,
    /// Made by a later version.
    #[error("read a trace: version {0} is not known")]
    Version(u32),
    /// Too short, too long, or the checksum is wrong.
    #[error("read a trace: {0}")]
    Damaged(&'static str),
    /// A record says what no recorder would.
    #[error("read a trace: record {index}: {what}")]
    Record {
        /// Which, from 0.
        index: usize,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl Trace {
    /// The file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN + self.records.len() * RECORD_LEN + CHECKSUM_LEN);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 4]);
        for number in [self.size.bytes(), self.records.len() as u64, self.left_out] {
            out.extend(number.to_le_bytes());
        }
        for record in &self.records {
            for number in [record.at.as_micros() as u64, record.offset, record.len] {
                out.extend(number.to_le_bytes());
            }
            out.extend([record.kind as u8, u8::from(record.fua), 0, 0, 0, 0, 0, 0]);
        }
        let sum = checksum(&out);
        out.extend(sum.to_le_bytes());
        out
    }

    /// Reads a file, all of it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Trace, TraceError> {
        if !bytes.starts_with(&MAGIC) {
            return Err(TraceError::NotATrace);
        }
        let Some((header, rest)) = bytes.split_at_checked(HEADER_LEN) else {
            return Err(TraceError::Damaged("the header is cut off"));
        };
        let version = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        if version != VERSION {
            return Err(TraceError::Version(version));
        }
        let (size, count, left_out) = (number(header, 16), number(header, 24), number(header, 32));
        let length = count.checked_mul(RECORD_LEN as u64).and_then(|n| n.checked_add(CHECKSUM_LEN as u64));
        if length != Some(rest.len() as u64) {
            return Err(TraceError::Damaged("its length is not that of its records"));
        }
        let (covered, sum) = bytes.split_at(bytes.len() - CHECKSUM_LEN);
        if checksum(covered) != number(sum, 0) {
            return Err(TraceError::Damaged("wrong checksum"));
        }
        if header[12..16] != [0; 4] {
            return Err(TraceError::Damaged("the header's reserved bytes are not 0"));
        }
        let (mut records, mut before) = (Vec::with_capacity(count as usize), 0);
        for (index, bytes) in rest[..rest.len() - CHECKSUM_LEN].chunks_exact(RECORD_LEN).enumerate() {
            let bad = |what| TraceError::Record { index, what };
            let (at, offset, len) = (number(bytes, 0), number(bytes, 8), number(bytes, 16));
            let kind = Kind::from_byte(bytes[24]).ok_or(bad("unknown kind"))?;
            let fua = match (bytes[25], kind) {
                (0, _) => false,
                (1, Kind::Write | Kind::WriteZeroes) => true,
                _ => return Err(bad("unknown flags")),
            };
            if at < before {
                return Err(bad("time goes back"));
            }
            if bytes[26..] != [0; 6] {
                return Err(bad("reserved bytes are not 0"));
            }
            if offset.checked_add(len).is_none_or(|end| end > size) || kind == Kind::Flush && (offset, len) != (0, 0) {
                return Err(bad("the range is not within the device"));
            }
            before = at;
            records.push(Record { at: Duration::from_micros(at), kind, fua, offset, len });
        }
        Ok(Trace { size: ByteLen(size), records, left_out })
    }
}

/// Eight bytes at `at`, which is within `bytes`.
fn number(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

/// FNV-1a, 64 bit.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// A device that remembers what it was asked for. Everybody's requests go into one list behind one lock, held for the
/// push: meant for measurements, not for production.
pub struct Recorder {
    device: Arc<dyn BlockDevice>,
    start: Instant,
    limit: usize,
    /// The requests, and how many were left out.
    taken: Mutex<(Vec<Record>, u64)>,
}

impl Recorder {
    /// Records the first `limit` requests of `device` and counts those after.
    pub fn new(device: Arc<dyn BlockDevice>, limit: usize) -> Recorder {
        Recorder { device, start: Instant::now(), limit, taken: Mutex::default() }
    }

    /// What was recorded so far.
    pub fn trace(&self) -> Trace {
        let taken = self.taken.lock();
        Trace { size: self.device.geometry().size, records: taken.0.clone(), left_out: taken.1 }
    }

    /// A range that is not within the device is refused by it and not recorded: a trace can be replayed.
    fn note(&self, kind: Kind, fua: bool, offset: u64, len: u64) {
        if self.device.geometry().check(offset, len).is_err() {
            return;
        }
        let mut taken = self.taken.lock();
        if taken.0.len() >= self.limit {
            taken.1 += 1;
            return;
        }
        // under the lock, so that the list is in the order of time
        let at = Duration::from_micros(self.start.elapsed().as_micros() as u64);
        taken.0.push(Record { at, kind, fua, offset, len });
    }
}

impl BlockDevice for Recorder {
    fn geometry(&self) -> Geometry {
        self.device.geometry()
    }

    fn may_wait(&self) -> bool {
        self.device.may_wait()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.note(Kind::Read, false, offset, buf.len() as u64);
        self.device.read_at(offset, buf)
    }

    fn read_with(&self, offset: u64, len: u64, sink: &mut dyn FnMut(u64, &[u8])) -> Result<(), BlockError> {
        self.note(Kind::Read, false, offset, len);
        self.device.read_with(offset, len, sink)
    }

    fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
        self.note(Kind::Write, flags.fua, offset, data.len() as u64);
        self.device.write_at(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
        self.note(Kind::WriteZeroes, flags.fua, offset, len);
        self.device.write_zeroes(offset, len, flags)
    }

    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.note(Kind::Trim, false, offset, len);
        self.device.trim(offset, len)
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.note(Kind::Flush, false, 0, 0);
        self.device.flush()
    }

    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        self.device.block_status(offset, len, out)
    }
}

#[cfg(test)]
mod tests {
    use muster_block::{conformance, model::MemoryDevice};

    use super::*;

    fn sample() -> Trace {
        let record = |at, kind, fua, offset, len| Record { at: Duration::from_micros(at), kind, fua, offset, len };
        Trace {
            size: ByteLen::mib(1),
            records: vec![
                record(7, Kind::Read, false, 4096, 512),
                record(7, Kind::Write, true, 0, 8192),
                record(300, Kind::Flush, false, 0, 0),
            ],
            left_out: 2,
        }
    }

    /// Changes bytes and makes the checksum right again.
    fn forged(at: usize, with: &[u8]) -> Vec<u8> {
        let mut bytes = sample().to_bytes();
        bytes[at..at + with.len()].copy_from_slice(with);
        let end = bytes.len() - CHECKSUM_LEN;
        let sum = checksum(&bytes[..end]);
        bytes[end..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[test]
    fn the_format_does_not_change() {
        let golden = concat!(
            "4d53545452414345",
            "01000000",
            "00000000",
            "0000100000000000",
            "0300000000000000",
            "0200000000000000",
            "0700000000000000",
            "0010000000000000",
            "0002000000000000",
            "01",
            "00",
            "000000000000",
            "0700000000000000",
            "0000000000000000",
            "0020000000000000",
            "02",
            "01",
            "000000000000",
            "2c01000000000000",
            "0000000000000000",
            "0000000000000000",
            "05",
            "00",
            "000000000000",
            "14f9bd8dbec1a225"
        );
        let bytes = sample().to_bytes();
        let text: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(text, golden);
        assert_eq!(Trace::from_bytes(&bytes), Ok(sample()));
    }

    #[test]
    fn the_checksum_is_fnv_1a() {
        assert_eq!(checksum(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(checksum(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn every_cut_and_every_flipped_byte_is_refused() {
        let bytes = sample().to_bytes();
        for end in 0..bytes.len() {
            assert!(Trace::from_bytes(&bytes[..end]).is_err(), "cut to {end}");
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x40;
            assert!(Trace::from_bytes(&bad).is_err(), "byte {at}");
        }
        assert!(Trace::from_bytes(&[bytes, vec![0]].concat()).is_err());
    }

    #[test]
    fn what_no_recorder_writes_is_refused_even_with_a_right_checksum() {
        let first = HEADER_LEN;
        let record = |index, what| Err(TraceError::Record { index, what });
        assert_eq!(Trace::from_bytes(&forged(8, &[2])), Err(TraceError::Version(2)));
        assert_eq!(
            Trace::from_bytes(&forged(24, &u64::MAX.to_le_bytes())),
            Err(TraceError::Damaged("its length is not that of its records"))
        );
        assert!(matches!(Trace::from_bytes(&forged(12, &[1])), Err(TraceError::Damaged(_))));
        assert_eq!(Trace::from_bytes(&forged(first + 24, &[6])), record(0, "unknown kind"));
        assert_eq!(Trace::from_bytes(&forged(first + 24, &[0])), record(0, "unknown kind"));
        assert_eq!(Trace::from_bytes(&forged(first + 25, &[1])), record(0, "unknown flags"));
        assert_eq!(Trace::from_bytes(&forged(first + RECORD_LEN + 25, &[2])), record(1, "unknown flags"));
        assert_eq!(Trace::from_bytes(&forged(first + 31, &[1])), record(0, "reserved bytes are not 0"));
        assert_eq!(Trace::from_bytes(&forged(first, &[8])), record(1, "time goes back"));
        for offset in [1 << 20, u64::MAX] {
            let bad = forged(first + 8, &offset.to_le_bytes());
            assert_eq!(Trace::from_bytes(&bad), record(0, "the range is not within the device"));
        }
        let flush = first + 2 * RECORD_LEN + 8;
        assert_eq!(Trace::from_bytes(&forged(flush, &[1])), record(2, "the range is not within the device"));
    }

    #[test]
    fn every_kind_of_request_is_recorded_with_its_range_and_in_order() {
        let recorder = Recorder::new(Arc::new(MemoryDevice::new(ByteLen::mib(1))), 6);
        recorder.read_at(1, &mut [0; 2]).unwrap();
        recorder.read_with(3, 4, &mut |_, _| {}).unwrap();
        recorder.write_at(5, &[6; 6], WriteFlags { fua: true }).unwrap();
        recorder.write_zeroes(7, 8, ZeroFlags { fua: true, ..ZeroFlags::default() }).unwrap();
        recorder.trim(9, 10).unwrap();
        recorder.flush().unwrap();
        recorder.flush().unwrap();
        assert!(recorder.read_at(1 << 20, &mut [0; 1]).is_err());
        let trace = recorder.trace();
        let seen: Vec<_> = trace.records.iter().map(|r| (r.kind, r.fua, r.offset, r.len)).collect();
        assert_eq!(
            seen,
            [
                (Kind::Read, false, 1, 2),
                (Kind::Read, false, 3, 4),
                (Kind::Write, true, 5, 6),
                (Kind::WriteZeroes, true, 7, 8),
                (Kind::Trim, false, 9, 10),
                (Kind::Flush, false, 0, 0),
            ]
        );
        assert_eq!(trace.left_out, 1);
        assert_eq!(Trace::from_bytes(&trace.to_bytes()), Ok(trace));
    }

    #[test]
    fn a_recorded_device_is_still_a_device() {
        conformance::run(|size| Arc::new(Recorder::new(Arc::new(MemoryDevice::new(size)), 100)));
    }
}
