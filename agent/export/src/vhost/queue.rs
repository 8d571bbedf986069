//! One queue: takes requests from its ring in order, does them on the device, answers.
//!
//! ```text
//!            first kick descriptor          stop (GET_VRING_BASE), end of the session
//!  Stopped -----------------------> Started ------------------------------------------> Stopped
//!                                     |  the driver breaks the ring's rules        ^
//!                                     '-----> Broken: nothing is taken ------------'
//! ```
//!
//! A request is taken, done and answered before the next one is taken, so what is in flight is at most one request, and
//! `next_available` moves when it is answered. A write for which there is no space, or whose turn has not come under the
//! limits, stays where it is: not taken, nothing kept but a number. That is what makes stopping at any time safe.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use muster_block::{WriteFlags, ZeroFlags};

use super::event::Event;
use super::inflight::QueueRecord;
use super::log::Log;
use super::memory::{Cursor, Memory, Slice};
use super::request::{self, HEADER_BYTES, Kind, MAX_DATA, MAX_RANGES, NAME_BYTES, RANGE_BYTES, Range, SECTOR, status};
use super::ring::{Broken, Chain, Layout, Ring};
use super::{ExportEvent, Observer};
use crate::protocol::Errno;
use crate::registry::Export;
use crate::statistics::Operation;

/// Writes are copied out of the guest in pieces of this size, so that a queue's memory is fixed.
const PIECE: usize = 256 << 10;
/// Times of arrival kept apart; with more, the newest ones are counted from the last one kept.
const SEEN: usize = 64;
/// Requests done in a row, and bytes and time after which no more are begun, before other queues get their turn.
const BATCH: (u32, u64, Duration) = (64, 512 << 10, Duration::from_micros(500));
/// The driver is told of answers at least this often, however many requests are in the batch.
const CALL_INTERVAL: Duration = Duration::from_micros(50);
/// How soon a write without space is tried again: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));

/// What a look at a queue led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Nothing to do until the driver kicks.
    Idle,
    /// Requests were done; there may be more.
    Worked,
    /// Nothing to do before this moment, kick or not.
    Until(Instant),
}

/// Whether a queue can be left alone until its driver kicks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Armed {
    /// It kicks when there is something.
    Kick,
    /// There is something already.
    Pending,
    /// It waits for its turn or for space.
    Waits,
    /// There is nothing it could kick.
    NoKick,
}

/// What a queue needs besides its ring.
pub(crate) struct Context {
    pub(crate) export: Arc<Export>,
    pub(crate) name: [u8; NAME_BYTES],
    /// How long a write waits for space before it fails; `None`: as long as it takes.
    pub(crate) space_wait: Option<Duration>,
    pub(crate) observer: Option<Arc<Observer>>,
}

/// A queue and all that is known of it.
pub(crate) struct Queue {
    context: Arc<Context>,
    index: u16,
    /// How many want this queue while a thread serves it.
    pub(crate) wanted: Arc<AtomicU32>,
    pub(crate) memory: Memory,
    pub(crate) layout: Layout,
    pub(crate) event_index: bool,
    pub(crate) indirect: bool,
    /// The driver flushes by itself; else every write is durable before it is answered.
    pub(crate) flushes: bool,
    pub(crate) kick: Option<Event>,
    pub(crate) call: Option<Event>,
    pub(crate) error: Option<Event>,
    pub(crate) record: Option<QueueRecord>,
    /// Where writes to guest memory are logged, while they are.
    pub(crate) log: Option<Arc<Log>>,
    enabled: bool,
    started: bool,
    broken: Option<Broken>,
    /// Requests the last one to serve the queue took and did not answer; they come first.
    again: VecDeque<u16>,
    next_available: u16,
    next_used: u16,
    /// The driver was asked to kick.
    armed: bool,
    /// Up to which index requests were seen, and when.
    seen: VecDeque<(u16, Instant)>,
    /// Requests counted as in flight.
    counted: u16,
    waits: Waits,
    buffer: Vec<u8>,
}

/// The request at the front cannot be done yet.
#[derive(Default)]
struct Waits {
    /// For its turn under the limits since then, and was counted.
    turn: Option<Instant>,
    /// For space.
    space: Option<Space>,
}

struct Space {
    since: Instant,
    retry: Duration,
    next: Instant,
    /// Bytes of the request that were written before.
    done: u64,
}

/// What became of one request.
enum Outcome {
    /// To be answered with this status, and this many bytes of data were given to the driver.
    Answer(u8, u64),
    /// No space after this many bytes.
    NoSpace(u64),
}

impl Queue {
    pub(crate) fn new(context: Arc<Context>, index: u16) -> Queue {
        Queue {
            context,
            index,
            wanted: Arc::default(),
            memory: Memory::default(),
            layout: Layout::default(),
            event_index: false,
            indirect: false,
            flushes: false,
            kick: None,
            call: None,
            error: None,
            record: None,
            log: None,
            enabled: false,
            started: false,
            broken: None,
            again: VecDeque::new(),
            next_available: 0,
            next_used: 0,
            armed: false,
            seen: VecDeque::new(),
            counted: 0,
            waits: Waits::default(),
            buffer: Vec::new(),
        }
    }

    pub(crate) fn is_started(&self) -> bool {
        self.started
    }

    pub(crate) fn is_running(&self) -> bool {
        self.started && self.enabled && self.broken.is_none()
    }

    /// Where the used ring stands.
    pub(crate) fn answered(&self) -> u16 {
        self.next_used
    }

    pub(crate) fn enable(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Where to go on taking requests.
    pub(crate) fn set_base(&mut self, base: u16) {
        self.next_available = base;
    }

    /// Starts to take requests: what was in flight with the last one to serve the queue comes first.
    pub(crate) fn start(&mut self) {
        let (memory, layout) = (std::mem::take(&mut self.memory), self.layout);
        let used = Ring::find(&memory, &layout).and_then(|ring| ring.used_index());
        self.memory = memory;
        self.started = true;
        self.armed = false;
        self.broken = None;
        self.seen.clear();
        match used {
            Ok(used) => {
                self.next_used = used;
                if let Some(record) = &mut self.record {
                    self.again = record.recover(used).into();
                    self.next_available = used.wrapping_add(self.again.len() as u16);
                }
                // The driver may have missed a call, and we a kick.
                self.signal();
            }
            Err(why) => self.fail(why),
        }
    }

    /// Takes nothing more; returns where to go on. Waits for nothing: the caller holds the queue, so no request is being
    /// done.
    pub(crate) fn stop(&mut self) -> u16 {
        self.started = false;
        self.kick = None;
        self.call = None;
        if let Some(log) = &self.log {
            // what was written to the rings beside answers
            log.mark_all();
        }
        self.uncount(self.counted);
        self.waits.turn = None;
        // A request that waits was never taken. It is the first one after the start, and waits on.
        self.again.clear();
        self.next_available
    }

    /// The session is over.
    pub(crate) fn close(&mut self) {
        self.stop();
        (self.error, self.record, self.log) = (None, None, None);
        self.memory = Memory::default();
        self.stop_waiting_for_space();
    }

    fn uncount(&mut self, requests: u16) {
        if requests > 0 {
            self.counted -= requests;
            self.context.export.counters().ended(u64::from(requests));
        }
    }

    fn stop_waiting_for_space(&mut self) {
        if self.waits.space.take().is_some() && self.context.export.wait_for_space(false) {
            self.context.tell(ExportEvent::SpaceBack);
        }
    }

    fn wait_for_space(&mut self, now: Instant, done: u64) -> Step {
        let next = match &mut self.waits.space {
            Some(space) => {
                // More room, but not enough: it is being made, so look again soon.
                space.retry = if done > space.done { RETRY.0 } else { (space.retry * 2).min(RETRY.1) };
                (space.done, space.next) = (done, now + space.retry);
                space.next
            }
            None => {
                let next = now + RETRY.0;
                self.waits.space = Some(Space { since: now, retry: RETRY.0, next, done });
                if self.context.export.wait_for_space(true) {
                    tracing::warn!(export = self.context.export.name(), "no space: writes wait");
                    self.context.tell(ExportEvent::SpaceWanted);
                }
                next
            }
        };
        Step::Until(next)
    }

    /// The queue takes nothing more until it is started again.
    fn fail(&mut self, why: Broken) {
        self.broken = Some(why);
        // What was answered before.
        self.signal();
        self.uncount(self.counted);
        self.stop_waiting_for_space();
        tracing::warn!(export = self.context.export.name(), queue = self.index, err = %why, "queue stopped");
        if let Some(error) = &self.error {
            error.signal();
        }
        self.context.tell(ExportEvent::QueueBroken { queue: self.index });
    }

    /// Tells the driver to look at the used ring.
    fn signal(&self) {
        if let Some(call) = &self.call {
            call.signal();
        }
    }

    /// Tells the driver, unconditionally; after its descriptor was replaced.
    pub(crate) fn signal_if_started(&self) {
        if self.started {
            self.signal();
        }
    }

    /// Does what is there, up to a batch.
    pub(crate) fn run(&mut self) -> Step {
        if !self.is_running() {
            return Step::Idle;
        }
        // Taken out, so that slices of it and the queue's other parts can be used side by side.
        let memory = std::mem::take(&mut self.memory);
        let step = self.run_in(&memory);
        self.memory = memory;
        step.unwrap_or_else(|why| {
            self.fail(why);
            Step::Idle
        })
    }

    /// Asks the driver to kick, then looks once more.
    pub(crate) fn arm(&mut self) -> Armed {
        if !self.is_running() {
            return Armed::Kick;
        }
        if self.waits.space.is_some() || self.waits.turn.is_some() {
            return Armed::Waits;
        }
        if self.kick.is_none() {
            return Armed::NoKick;
        }
        let memory = std::mem::take(&mut self.memory);
        let pending = Ring::find(&memory, &self.layout).and_then(|ring| {
            ring.want_kick(self.event_index, self.next_available)?;
            self.armed = true;
            fence(Ordering::SeqCst);
            ring.pending(self.next_available)
        });
        self.memory = memory;
        match pending {
            Ok(0) if self.again.is_empty() => Armed::Kick,
            // a ring that is broken is found to be so when it is served
            Ok(_) | Err(_) => Armed::Pending,
        }
    }

    fn run_in(&mut self, memory: &Memory) -> Result<Step, Broken> {
        let ring = Ring::find(memory, &self.layout)?;
        let pending = ring.pending(self.next_available)?;
        let mut left = usize::from(pending) + self.again.len();
        if left == 0 {
            self.seen.clear();
            if self.waits.space.is_some() {
                // The driver was reset: what waited is gone.
                self.stop_waiting_for_space();
            }
            return Ok(Step::Idle);
        }
        let now = Instant::now();
        if let Some(space) = &self.waits.space
            && now < space.next
            && !self.context.export.is_fenced()
        {
            return Ok(Step::Until(space.next));
        }
        let end = self.next_available.wrapping_add(pending);
        let kept = self.seen.len();
        match self.seen.back_mut() {
            Some((upto, _)) if *upto == end => {}
            Some((upto, _)) if kept >= SEEN => *upto = end,
            _ => self.seen.push_back((end, now)),
        }
        let new = (left as u16).saturating_sub(self.counted);
        if new > 0 {
            self.counted += new;
            self.context.export.counters().began(u64::from(new));
        }
        if self.armed {
            ring.want_no_kick(self.event_index)?;
            self.armed = false;
        }

        let context = Arc::clone(&self.context);
        let mut chain = Chain::default();
        let mut last = now;
        let mut told = (self.next_used, now);
        let mut step = Step::Worked;
        let (mut done, mut bytes) = (0, 0);
        // Who wants the queue does not wait for more than one request.
        while left > 0 && done < BATCH.0 && bytes < BATCH.1 {
            let long = last.duration_since(now) > BATCH.2;
            if done > 0 && (long || self.wanted.load(Ordering::Relaxed) > 0) {
                break;
            }
            let head = match self.again.front() {
                Some(head) => *head,
                None => ring.head(self.next_available)?,
            };
            ring.walk(memory, head, self.indirect, &mut chain)?;
            bytes += chain.readable.iter().chain(&chain.writable).map(|slice| slice.len() as u64).sum::<u64>();
            match self.serve(&context, &ring, head, &mut chain, last)? {
                Ok(after) => last = after,
                Err(wait) => {
                    step = wait;
                    break;
                }
            }
            left -= 1;
            done += 1;
            if last.duration_since(told.1) > CALL_INTERVAL {
                self.call_if_wanted(&ring, told.0)?;
                told = (self.next_used, last);
            }
        }
        self.call_if_wanted(&ring, told.0)?;
        Ok(step)
    }

    fn call_if_wanted(&self, ring: &Ring<'_>, old: u16) -> Result<(), Broken> {
        if self.next_used != old {
            fence(Ordering::SeqCst);
            if ring.wants_call(self.event_index, old, self.next_used)? {
                self.signal();
            }
        }
        Ok(())
    }

    /// Does one request and answers it; or says when to try again.
    #[inline]
    fn serve(
        &mut self,
        context: &Context,
        ring: &Ring<'_>,
        head: u16,
        chain: &mut Chain<'_>,
        now: Instant,
    ) -> Result<Result<Instant, Step>, Broken> {
        let (kind, status_byte) = frame(chain)?;
        let readable: u64 = chain.readable.iter().map(|slice| slice.len() as u64).sum();
        let writable: u64 = chain.writable.iter().map(|slice| slice.len() as u64).sum();
        let out = readable - HEADER_BYTES as u64;
        let (operation, bytes) = match kind {
            Kind::Read { .. } => (Some(Operation::Read), writable),
            Kind::Write { .. } => (Some(Operation::Write), out),
            Kind::Flush => (Some(Operation::Flush), 0),
            Kind::Discard => (Some(Operation::Trim), 0),
            Kind::WriteZeroes => (Some(Operation::WriteZeroes), 0),
            Kind::Name | Kind::Unknown => (None, 0),
        };
        let export = &*context.export;
        // A request that waits for space has had its turn.
        if operation.is_some_and(|operation| operation != Operation::Flush) && self.waits.space.is_none() {
            if let Err(wait) = export.admit(now, bytes) {
                if self.waits.turn.is_none() {
                    self.waits.turn = Some(now);
                    export.counters().throttled();
                }
                // Not long at once: the limits may be lifted.
                return Ok(Err(Step::Until(now + wait.min(Duration::from_millis(20)))));
            }
            if let Some(since) = self.waits.turn.take() {
                export.counters().was_throttled(now.saturating_duration_since(since));
            }
        }
        if let Some(record) = &mut self.record {
            record.take(head);
        }
        let outcome = match kind {
            Kind::Read { offset } => read(export, offset, writable, &chain.writable),
            Kind::Write { offset } => {
                let from = self.waits.space.as_ref().map_or(0, |space| space.done);
                self.write(export, offset, out, from, &chain.readable)
            }
            Kind::Flush => answer(export.call(|device| device.flush())),
            Kind::Discard | Kind::WriteZeroes => change_ranges(export, kind, out, &chain.readable),
            Kind::Name => Outcome::Answer(status::OK, Cursor::new(&chain.writable).write(0, &self.context.name) as u64),
            Kind::Unknown => Outcome::Answer(status::UNSUPPORTED, 0),
        };
        let (status, given) = match outcome {
            Outcome::Answer(status, given) => (status, given),
            Outcome::NoSpace(written) => {
                let waited = self.waits.space.as_ref().map_or(Duration::ZERO, |space| now - space.since);
                if self.context.space_wait.is_none_or(|limit| waited < limit) {
                    // It stays in the record: whoever serves the queue next does it first.
                    return Ok(Err(self.wait_for_space(now, written)));
                }
                tracing::error!(export = export.name(), "no space for too long: a write fails");
                (status::IO_ERROR, 0)
            }
        };
        status_byte.copy_from(&[status]);
        if let Some(record) = &mut self.record {
            record.answering(head);
        }
        ring.put_used(self.next_used, head, u32::try_from(given + 1).unwrap_or(u32::MAX))?;
        self.next_used = self.next_used.wrapping_add(1);
        ring.publish(self.next_used)?;
        if let Some(log) = &self.log {
            log.mark_all();
        }
        if let Some(record) = &mut self.record {
            record.answered(head, self.next_used);
        }
        if self.waits.space.is_some() {
            self.stop_waiting_for_space();
        }
        let after = Instant::now();
        let seen = self.advance(now);
        if let Some(operation) = operation {
            let moved = if matches!(operation, Operation::Read | Operation::Write) { bytes } else { 0 };
            export.counters().record(operation, moved, after.duration_since(seen), status != status::OK);
        }
        self.uncount(1);
        Ok(Ok(after))
    }

    /// Goes on to the next request; returns when this one was seen.
    fn advance(&mut self, now: Instant) -> Instant {
        if self.again.pop_front().is_some() {
            return now;
        }
        self.next_available = self.next_available.wrapping_add(1);
        let seen = self.seen.front().map_or(now, |(_, at)| *at);
        if self.seen.front().is_some_and(|(upto, _)| *upto == self.next_available) {
            self.seen.pop_front();
        }
        seen
    }

    /// Writes the guest's bytes from `from` on. Each is copied out once, into memory of ours, before the device sees it.
    fn write(&mut self, export: &Export, offset: u64, len: u64, from: u64, header_and_data: &[Slice<'_>]) -> Outcome {
        if !len.is_multiple_of(SECTOR) || len > MAX_DATA {
            return Outcome::Answer(status::IO_ERROR, 0);
        }
        if self.buffer.is_empty() && len > 0 {
            self.buffer = vec![0; PIECE];
        }
        let flags = WriteFlags { fua: !self.flushes };
        // What is written in pieces is cut at blocks, so that none is written in two halves.
        let block = if len > PIECE as u64 { u64::from(export.geometry().block_size.max(1)) } else { 1 };
        let mut cursor = Cursor::new(header_and_data);
        let mut done = from;
        loop {
            let left = len - done;
            let mut piece = left.min(PIECE as u64);
            if piece < left {
                piece -= (offset.wrapping_add(done + piece)) % block % piece;
            }
            let bytes = &mut self.buffer[..piece as usize];
            cursor.read(HEADER_BYTES as u64 + done, bytes);
            match export.call(|device| device.write_at(offset.saturating_add(done), bytes, flags)) {
                Ok(()) => done += piece,
                Err(Errno::NoSpace) => return Outcome::NoSpace(done),
                Err(_) => return Outcome::Answer(status::IO_ERROR, 0),
            }
            if done >= len {
                return Outcome::Answer(status::OK, 0);
            }
        }
    }
}

impl Context {
    fn tell(&self, event: ExportEvent) {
        if let Some(observer) = &self.observer {
            observer(self.export.name(), event);
        }
    }
}

/// Splits the header off the front and the status off the end. The header stays in the readable buffers (16 bytes of
/// it are skipped), the status byte leaves the writable ones.
#[inline]
fn frame<'m>(chain: &mut Chain<'m>) -> Result<(Kind, Slice<'m>), Broken> {
    let mut header = [0; HEADER_BYTES];
    if Cursor::new(&chain.readable).read(0, &mut header) < HEADER_BYTES {
        return Err(Broken::Frame);
    }
    let last = chain.writable.pop().ok_or(Broken::Frame)?;
    let (data, status) = last.split_at(last.len() - 1).map_err(|_| Broken::Frame)?;
    if !data.is_empty() {
        chain.writable.push(data);
    }
    Ok((Kind::decode(&header), status))
}

fn answer(result: Result<(), Errno>) -> Outcome {
    match result {
        Ok(()) => Outcome::Answer(status::OK, 0),
        Err(Errno::NoSpace) => Outcome::NoSpace(0),
        Err(Errno::NotSupported) => Outcome::Answer(status::UNSUPPORTED, 0),
        Err(_) => Outcome::Answer(status::IO_ERROR, 0),
    }
}

#[inline]
fn read(export: &Export, offset: u64, len: u64, data: &[Slice<'_>]) -> Outcome {
    if !len.is_multiple_of(SECTOR) || len > MAX_DATA {
        return Outcome::Answer(status::IO_ERROR, 0);
    }
    let mut cursor = Cursor::new(data);
    let mut sink = |at: u64, piece: &[u8]| {
        cursor.write(at, piece);
    };
    match export.call(|device| device.read_with(offset, len, &mut sink)) {
        Ok(()) => Outcome::Answer(status::OK, len),
        Err(_) => Outcome::Answer(status::IO_ERROR, 0),
    }
}

fn change_ranges(export: &Export, kind: Kind, len: u64, header_and_ranges: &[Slice<'_>]) -> Outcome {
    let discard = kind == Kind::Discard;
    let ranges = len / RANGE_BYTES as u64;
    if !len.is_multiple_of(RANGE_BYTES as u64) || ranges > u64::from(MAX_RANGES) {
        return Outcome::Answer(status::IO_ERROR, 0);
    }
    let mut cursor = Cursor::new(header_and_ranges);
    for index in 0..ranges {
        let mut bytes = [0; request::RANGE_BYTES];
        cursor.read(HEADER_BYTES as u64 + index * RANGE_BYTES as u64, &mut bytes);
        let range = match Range::decode(&bytes, discard) {
            Ok(range) => range,
            Err(status) => return Outcome::Answer(status, 0),
        };
        let result = export.call(|device| {
            if discard {
                device.trim(range.offset, range.len)
            } else {
                let flags = ZeroFlags { no_hole: !range.unmap, ..ZeroFlags::default() };
                device.write_zeroes(range.offset, range.len, flags)
            }
        });
        // Ranges done before are done again when it waits for space: that changes nothing.
        if result.is_err() {
            return answer(result);
        }
    }
    Outcome::Answer(status::OK, 0)
}
