//! One connection after its handshake: receives, lets [`transmission`](crate::transmission) decide, calls the device,
//! sends replies.
//!
//! ```text
//!   recv --> input buffer --> next() --> device --> output buffer --> send
//!               |  one recv brings many requests       |  one send takes many replies
//!               '- a long write is handed to the       '- a long read is done in slices between which new
//!                  device piece by piece as it            requests are received (fragmented structured replies)
//!                  arrives, straight from here
//! ```
//!
//! Both buffers have a fixed size whatever the client asks for. Payload is never copied between them and the device:
//! `write_at` gets a slice of the input buffer, `read_at` fills the output buffer.
//!
//! Replies are sent when the output buffer has reached [`SEND_AT`], and always before waiting for the client, so a
//! lone request (queue depth 1) costs one `recv` and one `send`.
//!
//! A client under a deep queue pays for every request that wakes this thread. Two things spare it that: while it has
//! much unread the session waits for it to read, not for its requests ([`Transport::settle`]), and while requests come
//! in quick succession the session looks for the next one for a few microseconds before it sleeps.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use muster_block::{Extent, ExtentKind, WriteFlags, ZeroFlags};

use crate::handshake::{Agreed, Offer};
use crate::protocol::{
    BASE_ALLOCATION_ID, CHUNK_HEADER_LEN, Errno, REQUEST_LEN, SIMPLE_REPLY_LEN, allocation, chunk, chunk_header,
    simple_reply, transmission_flag,
};
use crate::registry::Export;
use crate::statistics::Operation;
use crate::transmission::{Action, Command, Rules, Verdict, next, wire_len};
use crate::transport::{Transport, Wait};

/// Size of the input buffer: what one `recv` can bring. Above the usual socket buffers, below the L2 cache.
const INPUT_LEN: usize = 512 * 1024;
/// Longest piece of a read that is done at once.
const SLICE: usize = 256 * 1024;
/// Longest write that is held back until its payload is complete; longer ones are handed on piece by piece.
const WHOLE_WRITE: usize = 128 * 1024;
/// Pieces of long writes end at multiples of this on the device, so that a store of 4 KiB blocks is not made to
/// read-modify-write at every seam.
const PIECE_ALIGN: u64 = 4096;
/// Replies are sent when there are this many bytes of them.
const SEND_AT: usize = 64 * 1024;
/// Room for a slice and the headers around it.
const OUTPUT_LEN: usize = SEND_AT + SLICE + 64 * 1024;
/// Reads from this length on are asked for holes: below it the answer costs more than the bytes.
const HOLES_FROM: usize = 64 * 1024;
/// Holes shorter than this are sent as data: every chunk costs the client several system calls.
const HOLE_MIN: u64 = 32 * 1024;
/// Longest trim or zeroing done at once, so that other requests come in between.
const RANGE_SLICE: u64 = 64 * 1024 * 1024;
/// Extents in one block status reply. A client asks again for what is missing.
const MAX_EXTENTS: usize = 4096;
/// Bytes looked at by one block status call of the device; together with [`MAX_EXTENTS`] it bounds the work.
const STATUS_SLICE: u64 = 64 * 1024 * 1024;
/// Such calls for one request.
const STATUS_SLICES: usize = 16;
/// Requests that are worked on in slices at the same time; above it nothing new is taken from the input.
const MAX_TASKS: usize = 32;

/// Why a session ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// The client said good-bye.
    Disconnected,
    /// The client closed the stream between requests, or the export is going away.
    Closed,
    /// The client closed the stream inside a request.
    Truncated,
    /// The client broke the protocol.
    Violation(&'static str),
    /// Data already announced could not be read: the only way to say so is to close (§ *Simple reply message*).
    Unanswerable,
}

/// A request that is done in slices.
#[derive(Debug)]
struct Task {
    command: Command,
    done: u64,
    received: Instant,
}

/// A payload that arrives over several `recv`s.
#[derive(Debug)]
enum Arriving {
    Write { command: Command, fua: bool, done: u64, error: Option<Errno> },
    Discard { left: u32, cookie: u64, errno: Errno, why: &'static str },
}

/// Buffers of a connection; the handshake uses the input, too, since a client may send its first requests with the
/// last option.
pub(crate) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    pub(crate) fn new() -> Input {
        Input { bytes: vec![0; INPUT_LEN].into_boxed_slice(), start: 0, end: 0 }
    }
    pub(crate) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }
    pub(crate) fn consume(&mut self, len: usize) {
        self.start += len;
        debug_assert!(self.start <= self.end);
    }
    /// Receives behind the unread bytes; these move to the front when less than half of the buffer is left.
    pub(crate) fn fill(&mut self, transport: &impl Transport, wait: Wait) -> io::Result<Option<usize>> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 && self.bytes.len() - self.end < INPUT_LEN / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let received = transport.receive(&mut self.bytes[self.end..], wait)?;
        self.end += received.unwrap_or(0);
        Ok(received)
    }
}

/// Replies not sent yet.
struct Output {
    bytes: Box<[u8]>,
    len: usize,
}

impl Output {
    fn push(&mut self, bytes: &[u8]) {
        debug_assert!(self.len + bytes.len() <= OUTPUT_LEN);
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
    /// Room for `len` bytes behind the replies, not part of them until `len` is moved.
    fn room(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.len..self.len + len]
    }
}

/// Why the loop stops: the stream failed, or the session is over.
enum Stop {
    Io(io::Error),
    End(End),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Stop {
        Stop::Io(error)
    }
}

/// What the input still holds.
#[derive(PartialEq, Eq)]
enum Parsed {
    /// Nothing that is complete.
    All,
    /// Perhaps more, but enough is being worked on.
    Enough,
}

/// One connection in the transmission phase.
pub(crate) struct Session<'a, T: Transport> {
    transport: &'a T,
    export: &'a Export,
    rules: Rules,
    spin: Duration,
    /// The last wait was short, so the next may be, too.
    brisk: bool,
    input: Input,
    output: Output,
    arriving: Option<Arriving>,
    tasks: VecDeque<Task>,
    /// Scratch for block status calls.
    extents: Vec<Extent>,
    /// When the newest bytes of the input came.
    received: Instant,
}

impl<'a, T: Transport> Session<'a, T> {
    /// `input` may already hold requests.
    pub(crate) fn new(
        transport: &'a T,
        export: &'a Export,
        offer: &Offer,
        agreed: Agreed,
        input: Input,
        spin: Duration,
    ) -> Session<'a, T> {
        let rules = Rules {
            size: offer.size,
            read_only: offer.flags & transmission_flag::READ_ONLY != 0,
            // Clients are told the device's minimum, but the device takes any range, so a client that did not ask
            // for block sizes and assumes 1 is served, too.
            minimum_block: 1,
            max_request: offer.maximum_block,
            agreed,
        };
        Session {
            transport,
            export,
            rules,
            spin,
            brisk: false,
            input,
            output: Output { bytes: vec![0; OUTPUT_LEN].into_boxed_slice(), len: 0 },
            arriving: None,
            tasks: VecDeque::new(),
            extents: Vec::new(),
            received: Instant::now(),
        }
    }

    /// Serves the client until it or the stream ends.
    pub(crate) fn run(mut self) -> io::Result<End> {
        loop {
            match self.turn() {
                Ok(()) => {}
                Err(Stop::Io(error)) => return Err(error),
                Err(Stop::End(End::Unanswerable)) => return Ok(End::Unanswerable),
                Err(Stop::End(end)) => return self.finish(end),
            }
        }
    }

    /// Requests in flight are finished before a good-bye takes effect (§ *Request types*, `NBD_CMD_DISC`).
    fn finish(&mut self, end: End) -> io::Result<End> {
        loop {
            match self.step() {
                Ok(true) => {}
                Ok(false) => break,
                Err(Stop::Io(error)) => return Err(error),
                Err(Stop::End(end)) => return Ok(end),
            }
        }
        self.send()?;
        Ok(end)
    }

    /// Everything that is complete, one slice of a long request, and one `recv`.
    fn turn(&mut self) -> Result<(), Stop> {
        let parsed = self.parse()?;
        let busy = self.step()?;
        if parsed == Parsed::Enough {
            return Ok(());
        }
        let wait = if busy {
            Wait::No
        } else {
            self.send()?;
            self.transport.settle();
            Wait::Forever(if self.brisk { self.spin } else { Duration::ZERO })
        };
        let asked = Instant::now();
        match self.input.fill(self.transport, wait)? {
            Some(0) => {
                let inside = self.arriving.is_some() || !self.input.unread().is_empty();
                Err(Stop::End(if inside && !self.transport.is_draining() { End::Truncated } else { End::Closed }))
            }
            Some(_) => {
                self.received = Instant::now();
                // Twice: a sleeping thread takes a while to wake up.
                self.brisk = self.received - asked < 2 * self.spin;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn parse(&mut self) -> Result<Parsed, Stop> {
        loop {
            if !self.arrive()? {
                return Ok(Parsed::All);
            }
            if self.tasks.len() >= MAX_TASKS {
                return Ok(Parsed::Enough);
            }
            match next(self.input.unread(), &self.rules) {
                Verdict::NeedMore => return Ok(Parsed::All),
                Verdict::Execute(command) if self.transport.is_draining() => {
                    self.input.consume(REQUEST_LEN);
                    self.arriving = Some(Arriving::Discard {
                        left: (wire_len(&command) - REQUEST_LEN as u64) as u32,
                        cookie: command.cookie,
                        errno: Errno::Shutdown,
                        why: "the export is going away",
                    });
                }
                Verdict::Execute(command) => {
                    if !self.execute(command)? {
                        return Ok(Parsed::All);
                    }
                }
                Verdict::Refuse { cookie, errno, why, discard } => {
                    self.input.consume(REQUEST_LEN);
                    self.arriving = Some(Arriving::Discard { left: discard, cookie, errno, why });
                }
                Verdict::Disconnect => return Err(Stop::End(End::Disconnected)),
                Verdict::Violation(why) => return Err(Stop::End(End::Violation(why))),
            }
        }
    }

    /// Takes what has come of a payload. `true` when none is outstanding any more.
    fn arrive(&mut self) -> Result<bool, Stop> {
        match self.arriving.take() {
            None => Ok(true),
            Some(Arriving::Discard { left, cookie, errno, why }) => {
                let now = (left as usize).min(self.input.unread().len());
                self.input.consume(now);
                let left = left - now as u32;
                if left > 0 {
                    self.arriving = Some(Arriving::Discard { left, cookie, errno, why });
                    return Ok(false);
                }
                self.fail(cookie, errno, why)?;
                Ok(true)
            }
            Some(Arriving::Write { command, fua, mut done, mut error }) => {
                let left = u64::from(command.length) - done;
                let at = command.offset + done;
                let mut now = left.min(self.input.unread().len() as u64);
                if now < left {
                    now = ((at + now) / PIECE_ALIGN * PIECE_ALIGN).saturating_sub(at);
                }
                if now > 0 {
                    let piece = &self.input.unread()[..now as usize];
                    if error.is_none() {
                        let flags = WriteFlags::default();
                        error = self.export.call(|device| device.write_at(at, piece, flags)).err();
                    }
                    self.input.consume(now as usize);
                    done += now;
                }
                if done < u64::from(command.length) {
                    self.arriving = Some(Arriving::Write { command, fua, done, error });
                    return Ok(false);
                }
                // One flush for all pieces: FUA on each would make the device wait as often as there are pieces.
                if fua && error.is_none() {
                    error = self.export.call(|device| device.flush()).err();
                }
                self.acknowledge(Operation::Write, &command, self.received, error)?;
                Ok(true)
            }
        }
    }

    /// Does or begins a command whose header is at the front of the input. `false` when its payload is not all there.
    fn execute(&mut self, command: Command) -> Result<bool, Stop> {
        let length = command.length as usize;
        match command.action {
            Action::Write { fua } => {
                if length > WHOLE_WRITE {
                    self.take_turn(length as u64)?;
                    self.input.consume(REQUEST_LEN);
                    self.arriving = Some(Arriving::Write { command, fua, done: 0, error: None });
                    return Ok(true);
                }
                if self.input.unread().len() < REQUEST_LEN + length {
                    return Ok(false);
                }
                self.take_turn(length as u64)?;
                let payload = &self.input.unread()[REQUEST_LEN..REQUEST_LEN + length];
                let result = self.export.call(|device| device.write_at(command.offset, payload, WriteFlags { fua }));
                self.input.consume(REQUEST_LEN + length);
                self.acknowledge(Operation::Write, &command, self.received, result.err())?;
                return Ok(true);
            }
            Action::Read { whole } => {
                self.take_turn(length as u64)?;
                let fragments = self.rules.agreed.structured && !whole;
                if length > SLICE && fragments {
                    self.begin(command)?;
                } else if length > SLICE {
                    self.read_stream(&command)?;
                } else if length >= HOLES_FROM && fragments {
                    let error = self.read_fragments(&command, 0, length as u64, true)?;
                    self.record(Operation::Read, &command, self.received, error.is_some());
                } else {
                    self.read_whole(&command)?;
                }
            }
            Action::Trim { .. } | Action::WriteZeroes { .. } => {
                self.take_turn(0)?;
                self.begin(command)?;
            }
            Action::Flush => {
                let result = self.export.call(|device| device.flush());
                self.acknowledge(Operation::Flush, &command, self.received, result.err())?;
            }
            // Everything is in memory already; the range was checked.
            Action::Cache => {
                self.take_turn(0)?;
                self.acknowledge(Operation::Cache, &command, self.received, None)?;
            }
            Action::BlockStatus { one } => {
                self.take_turn(0)?;
                self.block_status(&command, one)?;
            }
        }
        self.input.consume(REQUEST_LEN);
        Ok(true)
    }

    /// Waits until a request that moves so many bytes may be done under the export's limits, which all of its connections
    /// share. What was begun before is finished and answered first. A session that is to end does not wait.
    fn take_turn(&mut self, bytes: u64) -> Result<(), Stop> {
        if self.export.admit_now(bytes) {
            return Ok(());
        }
        while self.step()? {}
        self.send()?;
        self.export.wait_turn(bytes, || self.transport.is_draining());
        Ok(())
    }

    /// The first slice at once, so that what fits one is done in order.
    fn begin(&mut self, command: Command) -> Result<(), Stop> {
        self.advance(Task { command, done: 0, received: self.received })
    }

    /// One slice of the request that has waited longest. `false` when there is none.
    fn step(&mut self) -> Result<bool, Stop> {
        let Some(task) = self.tasks.pop_front() else { return Ok(false) };
        self.advance(task)?;
        Ok(true)
    }

    /// One slice; the task goes to the end of the line when more is left, and is answered when not.
    fn advance(&mut self, mut task: Task) -> Result<(), Stop> {
        let command = task.command;
        let left = u64::from(command.length) - task.done;
        let at = command.offset + task.done;
        if let Action::Read { .. } = command.action {
            let slice = left.min(SLICE as u64);
            let error = self.read_fragments(&command, task.done, slice, slice == left)?;
            task.done += slice;
            if error.is_some() || slice == left {
                self.record(Operation::Read, &command, task.received, error.is_some());
            } else {
                self.tasks.push_back(task);
            }
            return Ok(());
        }
        let slice = left.min(RANGE_SLICE);
        let last = slice == left;
        if left > RANGE_SLICE {
            // This may take a while: what is ready should not wait for it.
            self.send()?;
        }
        let (operation, result) = match command.action {
            Action::WriteZeroes { fua, no_hole, fast } => (
                Operation::WriteZeroes,
                self.export.call(|device| device.write_zeroes(at, slice, ZeroFlags { no_hole, fast, fua })),
            ),
            // The only other kind that is begun as a task is a trim.
            action => (
                Operation::Trim,
                self.export.call(|device| {
                    device.trim(at, slice)?;
                    if last && action == (Action::Trim { fua: true }) { device.flush() } else { Ok(()) }
                }),
            ),
        };
        task.done += slice;
        if result.is_ok() && !last {
            self.tasks.push_back(task);
            return Ok(());
        }
        self.acknowledge(operation, &command, task.received, result.err())
    }

    /// A read that fits one slice, in one piece.
    fn read_whole(&mut self, command: &Command) -> Result<(), Stop> {
        let length = command.length as usize;
        let structured = self.rules.agreed.structured;
        if structured && length == 0 {
            self.make_room(CHUNK_HEADER_LEN)?;
            self.output.push(&chunk_header(command.cookie, true, chunk::NONE, 0));
            self.record(Operation::Read, command, self.received, false);
            return self.sent_when_full();
        }
        let header = if structured { CHUNK_HEADER_LEN + 8 } else { SIMPLE_REPLY_LEN };
        self.make_room(header + length)?;
        let data = &mut self.output.room(header + length)[header..];
        match self.export.call(|device| device.read_at(command.offset, data)) {
            Ok(()) => {
                if structured {
                    self.output.push(&chunk_header(command.cookie, true, chunk::OFFSET_DATA, length as u32 + 8));
                    self.output.push(&command.offset.to_be_bytes());
                } else {
                    self.output.push(&simple_reply(command.cookie, 0));
                }
                self.output.len += length;
                self.record(Operation::Read, command, self.received, false);
                self.sent_when_full()
            }
            Err(errno) => {
                self.record(Operation::Read, command, self.received, true);
                self.fail(command.cookie, errno, "read failed")
            }
        }
    }

    /// A long read that must be one chunk (simple replies, or `DF`). The first slice is read before success is
    /// announced; a later failure can only close the connection. The alternative, a buffer as long as the request,
    /// would let each client hold 32 MiB of ours.
    fn read_stream(&mut self, command: &Command) -> Result<(), Stop> {
        let structured = self.rules.agreed.structured;
        let header = if structured { CHUNK_HEADER_LEN + 8 } else { SIMPLE_REPLY_LEN };
        let mut done = 0;
        while done < command.length as usize {
            let slice = (command.length as usize - done).min(SLICE);
            let head = if done == 0 { header } else { 0 };
            self.make_room(head + slice)?;
            let at = command.offset + done as u64;
            let data = &mut self.output.room(head + slice)[head..];
            if let Err(errno) = self.export.call(|device| device.read_at(at, data)) {
                self.record(Operation::Read, command, self.received, true);
                if done == 0 {
                    return self.fail(command.cookie, errno, "read failed");
                }
                return Err(Stop::End(End::Unanswerable));
            }
            if done == 0 && structured {
                self.output.push(&chunk_header(command.cookie, true, chunk::OFFSET_DATA, command.length + 8));
                self.output.push(&command.offset.to_be_bytes());
            } else if done == 0 {
                self.output.push(&simple_reply(command.cookie, 0));
            }
            self.output.len += slice;
            self.sent_when_full()?;
            done += slice;
        }
        self.record(Operation::Read, command, self.received, false);
        Ok(())
    }

    /// A part of a read, at most a slice, as data and hole chunks. `last` closes the reply. An error was answered.
    fn read_fragments(&mut self, command: &Command, done: u64, len: u64, last: bool) -> Result<Option<Errno>, Stop> {
        // Room for a chunk header per hole and per data run between two.
        self.make_room(len as usize + (len / HOLE_MIN + 2) as usize * 2 * (CHUNK_HEADER_LEN + 8))?;
        let start = command.offset + done;
        let mut extents = std::mem::take(&mut self.extents);
        extents.clear();
        // Without extents the data are read: same bytes, only more of them.
        if self.export.call(|device| device.block_status(start, len, &mut extents)).is_err() {
            extents.clear();
        }
        let mut at = start;
        let end = start + len;
        let mut error = None;
        let mut next_extent = 0;
        while at < end && error.is_none() {
            // A run of data takes short holes with it.
            let mut data = 0;
            let mut hole = 0;
            while let Some(extent) = extents.get(next_extent) {
                next_extent += 1;
                if extent.kind == ExtentKind::Hole && extent.len >= HOLE_MIN {
                    hole = extent.len;
                    break;
                }
                data += extent.len;
            }
            // The device is not trusted to cover exactly the range.
            data = data.min(end - at);
            hole = hole.min(end - at - data);
            if data + hole == 0 {
                data = end - at;
            }
            if data > 0 {
                let done = last && at + data == end;
                let length = data as usize;
                let header = CHUNK_HEADER_LEN + 8;
                let room = &mut self.output.room(header + length)[header..];
                match self.export.call(|device| device.read_at(at, room)) {
                    Ok(()) => {
                        self.output.push(&chunk_header(command.cookie, done, chunk::OFFSET_DATA, length as u32 + 8));
                        self.output.push(&at.to_be_bytes());
                        self.output.len += length;
                    }
                    Err(errno) => error = Some(errno),
                }
                at += if error.is_none() { data } else { 0 };
            }
            if hole > 0 && error.is_none() {
                let done = last && at + hole == end;
                self.output.push(&chunk_header(command.cookie, done, chunk::OFFSET_HOLE, 12));
                self.output.push(&at.to_be_bytes());
                self.output.push(&(hole as u32).to_be_bytes());
                at += hole;
            }
        }
        self.extents = extents;
        if let Some(errno) = error {
            const WHY: &[u8] = b"read failed";
            self.make_room(CHUNK_HEADER_LEN + 14 + WHY.len())?;
            self.output.push(&chunk_header(command.cookie, true, chunk::ERROR_OFFSET, 14 + WHY.len() as u32));
            self.output.push(&(errno as u32).to_be_bytes());
            self.output.push(&(WHY.len() as u16).to_be_bytes());
            self.output.push(WHY);
            self.output.push(&at.to_be_bytes());
        }
        self.sent_when_full()?;
        Ok(error)
    }

    /// § *NBD_CMD_BLOCK_STATUS*: the reply may cover less than was asked for, never more here.
    fn block_status(&mut self, command: &Command, one: bool) -> Result<(), Stop> {
        let end = command.offset + u64::from(command.length);
        let wanted = if one { 1 } else { MAX_EXTENTS };
        let mut found: Vec<Extent> = Vec::new();
        let mut extents = std::mem::take(&mut self.extents);
        let mut at = command.offset;
        let mut error = None;
        for _ in 0..STATUS_SLICES {
            let len = (end - at).min(STATUS_SLICE);
            if len == 0 || found.len() > wanted {
                break;
            }
            extents.clear();
            error = self.export.call(|device| device.block_status(at, len, &mut extents)).err();
            if error.is_some() {
                break;
            }
            let mut covered = 0;
            for extent in &extents {
                let len = extent.len.min(len - covered);
                Extent::push(&mut found, len, extent.kind);
                covered += len;
            }
            // A device that does not answer for all of it is believed for what it said; the rest is data.
            Extent::push(&mut found, len - covered, ExtentKind::Data);
            at += len;
        }
        self.extents = extents;
        found.truncate(wanted);
        self.record(Operation::BlockStatus, command, self.received, error.is_some());
        if let (Some(errno), true) = (error, found.is_empty()) {
            return self.fail(command.cookie, errno, "block status failed");
        }
        let payload = 4 + found.len() * 8;
        self.make_room(CHUNK_HEADER_LEN + payload)?;
        self.output.push(&chunk_header(command.cookie, true, chunk::BLOCK_STATUS, payload as u32));
        self.output.push(&BASE_ALLOCATION_ID.to_be_bytes());
        for extent in &found {
            let flags = match extent.kind {
                ExtentKind::Data => 0,
                ExtentKind::Hole => allocation::HOLE | allocation::ZERO,
            };
            self.output.push(&(extent.len as u32).to_be_bytes());
            self.output.push(&flags.to_be_bytes());
        }
        self.sent_when_full()
    }

    /// Answers a command that has no data in its reply, and counts it.
    fn acknowledge(
        &mut self,
        operation: Operation,
        command: &Command,
        received: Instant,
        error: Option<Errno>,
    ) -> Result<(), Stop> {
        self.record(operation, command, received, error.is_some());
        if let Some(errno) = error {
            return self.fail(command.cookie, errno, "request failed");
        }
        self.make_room(SIMPLE_REPLY_LEN)?;
        self.output.push(&simple_reply(command.cookie, 0));
        self.sent_when_full()
    }

    fn fail(&mut self, cookie: u64, errno: Errno, why: &str) -> Result<(), Stop> {
        self.make_room(CHUNK_HEADER_LEN + 6 + why.len())?;
        if self.rules.agreed.structured {
            self.output.push(&chunk_header(cookie, true, chunk::ERROR, 6 + why.len() as u32));
            self.output.push(&(errno as u32).to_be_bytes());
            self.output.push(&(why.len() as u16).to_be_bytes());
            self.output.push(why.as_bytes());
        } else {
            self.output.push(&simple_reply(cookie, errno as u32));
        }
        self.sent_when_full()
    }

    fn record(&self, operation: Operation, command: &Command, received: Instant, failed: bool) {
        self.export.counters().record(operation, u64::from(command.length), received.elapsed(), failed);
    }

    fn make_room(&mut self, len: usize) -> Result<(), Stop> {
        if self.output.len + len > OUTPUT_LEN {
            self.send()?;
        }
        Ok(())
    }

    fn sent_when_full(&mut self) -> Result<(), Stop> {
        if self.output.len >= SEND_AT {
            self.send()?;
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        if self.output.len > 0 {
            let len = std::mem::take(&mut self.output.len);
            self.transport.send(&self.output.bytes[..len], None)?;
        }
        Ok(())
    }
}
