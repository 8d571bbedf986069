//! The byte stream under a session: a socket now, TLS over one later, a slice in fuzzing and tests.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

/// Longest time to wait for a client to read its replies before looking for more requests: far above what a busy one
/// takes, and short enough for one that sends much before it reads anything.
const SETTLE_NS: i64 = 5_000_000;
/// Pauses of the processor between two looks at the socket while spinning: about a microsecond.
const SPIN_PAUSES: u32 = 64;

/// How long to wait for bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wait {
    /// Not at all.
    No,
    /// Until there are some, but spin for this long before sleeping.
    Forever(Duration),
    /// Until there are some or this moment has come, which is a `TimedOut` error.
    Until(Instant),
}

/// A byte stream.
pub(crate) trait Transport {
    /// Bytes received; `Some(0)` is the end of the stream, `None` (only with [`Wait::No`]) nothing there yet.
    fn receive(&self, buffer: &mut [u8], wait: Wait) -> io::Result<Option<usize>>;
    /// Sends everything, or fails. `until` limits the time.
    fn send(&self, bytes: &[u8], until: Option<Instant>) -> io::Result<()>;
    /// Waits for the peer to have read most of what was sent, a short time at most.
    fn settle(&self) {}
    /// Whether the session should refuse what comes from now on.
    fn is_draining(&self) -> bool;
}

/// A connected socket that other threads can end. Cloned between the session that uses it and whoever may stop it.
#[derive(Debug, Clone)]
pub(crate) struct Socket {
    fd: Arc<OwnedFd>,
    draining: Arc<AtomicBool>,
}

impl Socket {
    pub(crate) fn new(fd: OwnedFd) -> Socket {
        Socket { fd: Arc::new(fd), draining: Arc::new(AtomicBool::new(false)) }
    }

    /// Asks the session to end: what was received is finished, what comes later refused, and the stream ends.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        let _ = shutdown(&*self.fd, Shutdown::Read);
    }

    /// Ends the stream at once; a session that waits for its client wakes up with an error.
    pub(crate) fn cut(&self) {
        self.draining.store(true, Ordering::Release);
        let _ = shutdown(&*self.fd, Shutdown::Both);
    }

    fn wait_for(&self, flags: PollFlags, until: Instant) -> io::Result<()> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut fds = [PollFd::new(&*self.fd, flags)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn try_receive(&self, buffer: &mut [u8], flags: RecvFlags) -> io::Result<Option<usize>> {
        loop {
            match recv(&*self.fd, &mut *buffer, flags) {
                Ok((_, received)) => return Ok(Some(received)),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Transport for Socket {
    fn receive(&self, buffer: &mut [u8], wait: Wait) -> io::Result<Option<usize>> {
        match wait {
            Wait::No => self.try_receive(buffer, RecvFlags::DONTWAIT),
            Wait::Until(until) => loop {
                if let Some(received) = self.try_receive(buffer, RecvFlags::DONTWAIT)? {
                    return Ok(Some(received));
                }
                self.wait_for(PollFlags::IN, until)?;
            },
            Wait::Forever(spin) => {
                if !spin.is_zero() {
                    let start = Instant::now();
                    while start.elapsed() < spin {
                        if let Some(received) = self.try_receive(buffer, RecvFlags::DONTWAIT)? {
                            return Ok(Some(received));
                        }
                        // Looking takes the lock that the client needs to send, so not too often.
                        for _ in 0..SPIN_PAUSES {
                            std::hint::spin_loop();
                        }
                        std::thread::yield_now();
                    }
                }
                self.try_receive(buffer, RecvFlags::empty())
            }
        }
    }

    fn send(&self, mut bytes: &[u8], until: Option<Instant>) -> io::Result<()> {
        // A peer that has gone is an error here, not a signal to the process.
        let flags = match until {
            None => SendFlags::NOSIGNAL,
            Some(_) => SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        };
        while !bytes.is_empty() {
            match send(&*self.fd, bytes, flags) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match until {
                    Some(until) => self.wait_for(PollFlags::OUT, until)?,
                    None => self.wait_for(PollFlags::OUT, Instant::now() + Duration::from_secs(3600))?,
                },
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Unix sockets count as writable when less than a quarter of the send buffer is unread. Until then the client has
    /// enough to do, and a thread that waits for room is not woken by each of its requests: under a deep queue that
    /// wakeup is the dearest part of a client's request.
    fn settle(&self) {
        let timeout = Timespec { tv_sec: 0, tv_nsec: SETTLE_NS };
        let _ = poll(&mut [PollFd::new(&*self.fd, PollFlags::OUT | PollFlags::RDHUP)], Some(&timeout));
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}

/// A stream that holds all it will ever receive: a whole session as one call, for tests and fuzzing.
#[derive(Debug)]
pub(crate) struct Recorded<'a> {
    input: std::cell::Cell<&'a [u8]>,
    /// Longest piece given at once, so that messages are cut at every place.
    piece: usize,
    output: std::cell::RefCell<Vec<u8>>,
}

impl<'a> Recorded<'a> {
    pub(crate) fn new(input: &'a [u8], piece: usize) -> Recorded<'a> {
        Recorded { input: std::cell::Cell::new(input), piece: piece.max(1), output: std::cell::RefCell::default() }
    }

    pub(crate) fn into_output(self) -> Vec<u8> {
        self.output.into_inner()
    }
}

impl Transport for Recorded<'_> {
    fn receive(&self, buffer: &mut [u8], _wait: Wait) -> io::Result<Option<usize>> {
        let input = self.input.get();
        let (now, later) = input.split_at(input.len().min(self.piece).min(buffer.len()));
        buffer[..now.len()].copy_from_slice(now);
        self.input.set(later);
        Ok(Some(now.len()))
    }

    fn send(&self, bytes: &[u8], _until: Option<Instant>) -> io::Result<()> {
        self.output.borrow_mut().extend_from_slice(bytes);
        Ok(())
    }

    fn is_draining(&self) -> bool {
        false
    }
}
