//! Many disks on few threads: each is served in turn, and one that is held up holds up no other.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod frontend;

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use frontend::{Client, OK, Options, READ, WRITE};
use muster_block::model::MemoryDevice;
use muster_block::{BlockDevice, BlockError, Extent, Geometry, WriteFlags, ZeroFlags};
use muster_common::ByteLen;
use muster_export::Registry;
use muster_export::vhost::{VhostConfig, VhostServer};
use parking_lot::{Condvar, Mutex};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// Nothing takes so long.
const LONG: Duration = Duration::from_secs(30);

struct Hall {
    registry: Arc<Registry>,
    server: VhostServer,
    _directory: tempfile::TempDir,
}

impl Hall {
    fn new(threads: u16) -> Hall {
        let directory = tempfile::tempdir().unwrap();
        let registry = Arc::new(Registry::new());
        let config = VhostConfig { threads, ..VhostConfig::new(directory.path().join("vu")) };
        let server = VhostServer::start(config, registry.clone()).unwrap();
        Hall { registry, server, _directory: directory }
    }

    fn connect(&self, name: &str, device: Arc<dyn BlockDevice>, options: Options) -> Client {
        self.registry.add(name, device).unwrap();
        Client::connect(&self.server.serve(name).unwrap(), options)
    }
}

fn memory() -> Arc<dyn BlockDevice> {
    Arc::new(MemoryDevice::new(ByteLen::mib(4)))
}

/// Memory, and something that is done at each read.
struct Around<F> {
    disk: MemoryDevice,
    waits: bool,
    before_read: F,
}

impl<F: Fn() + Send + Sync> BlockDevice for Around<F> {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }
    fn may_wait(&self) -> bool {
        self.waits
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        (self.before_read)();
        self.disk.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
        self.disk.write_at(offset, data, flags)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
        self.disk.write_zeroes(offset, len, flags)
    }
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.disk.trim(offset, len)
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.disk.flush()
    }
    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        self.disk.block_status(offset, len, out)
    }
}

/// Lets nobody through before it is opened, and says that one has come.
#[derive(Default)]
struct Gate {
    reached: AtomicBool,
    open: Mutex<bool>,
    change: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut open = self.open.lock();
        self.reached.store(true, Ordering::Release);
        while !*open {
            self.change.wait(&mut open);
        }
    }

    fn wait_until_reached(&self) {
        let deadline = Instant::now() + LONG;
        while !self.reached.load(Ordering::Acquire) {
            assert!(Instant::now() < deadline, "no read came");
            std::thread::yield_now();
        }
    }

    fn open(&self) {
        *self.open.lock() = true;
        self.change.notify_all();
    }
}

/// Writes and reads back on every queue.
fn work(clients: &[Client], rounds: u8) {
    for round in 0..rounds {
        for queue in clients.iter().flat_map(|client| &client.queues) {
            let mut queue = queue.lock();
            assert_eq!(queue.write(u64::from(round) * 8, &[round; 4096]), OK);
            let mut back = [0; 4096];
            assert_eq!(queue.read(u64::from(round) * 8, &mut back), OK);
            assert_eq!(back, [round; 4096]);
        }
    }
}

/// Reads of as many disks are under way, each held up; the others' answers come all the same.
fn others_go_on(threads: u16, held: usize, waits: bool) {
    let hall = Hall::new(threads);
    let mut others: Vec<Client> = (0..6)
        .map(|n| hall.connect(&format!("other.{n}"), memory(), Options { queues: 2, ..Options::default() }))
        .collect();
    let mut stuck = Vec::new();
    for n in 0..held {
        let gate = Arc::new(Gate::default());
        let before_read = {
            let gate = gate.clone();
            move || gate.pass()
        };
        let disk = Arc::new(Around { disk: MemoryDevice::new(ByteLen::mib(4)), waits, before_read });
        let client = hall.connect(&format!("held.{n}"), disk, Options::default());
        // the others' queues are looked at when this one takes a thread away, not kicked
        work(&others, 2);
        let slot = {
            let mut queue = client.queues[0].lock();
            let slot = queue.slot().unwrap();
            queue.prepare(slot, READ, 0, 4096);
            queue.publish();
            slot
        };
        gate.wait_until_reached();
        work(&others, 100);
        stuck.push((client, gate, slot));
    }
    // one that comes and one that goes meanwhile
    drop(others.pop());
    let late = hall.connect("late.1", memory(), Options::default());
    assert_eq!(late.queues[0].lock().write(0, &[1; 512]), OK);
    for (client, gate, slot) in &stuck {
        gate.open();
        let done = client.queues[0].lock().wait(Instant::now() + LONG).unwrap();
        assert_eq!((done.slot, done.status), (*slot, OK));
    }
    drop((stuck, others, late));
    hall.server.stop();
}

#[test]
fn disks_that_are_held_up_leave_the_last_thread_to_all_others() {
    others_go_on(2, 1, false);
    others_go_on(4, 3, false);
}

#[test]
fn a_disk_that_may_wait_has_threads_of_its_own() {
    others_go_on(1, 2, true);
}

#[test]
fn one_thread_serves_full_queues_in_turn() {
    const DISKS: u64 = 24;
    const DEPTH: u64 = 40;
    const TURN: u64 = 64;
    let hall = Hall::new(1);
    let (all, longest) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<Client> = (0..DISKS)
        .map(|n| {
            let (all, longest, last) = (all.clone(), longest.clone(), AtomicU64::new(0));
            // reads that came to others between two of its own
            let before_read = move || {
                let now = all.fetch_add(1, Ordering::Relaxed);
                let last = last.swap(now, Ordering::Relaxed);
                if last > 0 {
                    longest.fetch_max(now - last, Ordering::Relaxed);
                }
            };
            let fair = Around { disk: MemoryDevice::new(ByteLen::mib(4)), waits: false, before_read };
            hall.connect(&format!("disk.{n}"), Arc::new(fair), Options { slot_bytes: 4096, ..Options::default() })
        })
        .collect();
    // every queue is kept full by one driver that answers at once
    let mut left: Vec<u64> = vec![1_000; DISKS as usize];
    let mut out: Vec<u64> = vec![0; DISKS as usize];
    let deadline = Instant::now() + LONG;
    while left.iter().any(|left| *left > 0) || out.iter().any(|out| *out > 0) {
        assert!(Instant::now() < deadline, "{left:?} {out:?}");
        for (n, client) in clients.iter().enumerate() {
            let mut queue = client.queues[0].lock();
            while let Some(done) = queue.take() {
                assert_eq!(done.status, OK);
                out[n] -= 1;
            }
            let before = out[n];
            while out[n] < DEPTH && left[n] > 0 {
                let slot = queue.slot().unwrap();
                queue.prepare(slot, READ, left[n] % 1000 * 8, 4096);
                (out[n], left[n]) = (out[n] + 1, left[n] - 1);
            }
            if out[n] > before {
                queue.publish();
            }
        }
    }
    assert_eq!(all.load(Ordering::Relaxed), 1 + DISKS * 1_000);
    // between two reads of a disk lies at most a turn of every other, twice when it was missed by a hair; how many it really
    // gets depends on when the driver looks, but no disk is passed over round after round while it has something
    let longest = longest.load(Ordering::Relaxed);
    assert!(longest <= 3 * DISKS * TURN, "{longest} reads of others between two of one");
    drop(clients);
    hall.server.stop();
}

#[test]
fn disks_that_rest_wake_up_at_a_kick_again_and_again() {
    let hall = Hall::new(2);
    let clients: Vec<Client> =
        (0..16).map(|n| hall.connect(&format!("disk.{n}"), memory(), Options::default())).collect();
    let before: Vec<u64> = clients.iter().map(|client| client.queues[0].lock().kicks).collect();
    for round in 0..60u64 {
        for (n, client) in clients.iter().enumerate() {
            if (round + n as u64).is_multiple_of(3) {
                let done = client.queues[0].lock().ask(WRITE, round, 512);
                assert_eq!(done.status, OK);
            }
        }
        // longer than any thread looks without a kick
        std::thread::park_timeout(Duration::from_millis(1));
    }
    let after: Vec<u64> = clients.iter().map(|client| client.queues[0].lock().kicks).collect();
    assert!(before.iter().zip(&after).all(|(before, after)| after > before), "{before:?} {after:?}: all rested");
    drop(clients);
    hall.server.stop();
}

/// A size is demanded of a queue before its kick.
const SET_VRING_NUM: u32 = 8;
/// What a queue's descriptors are handed over by: kick, call and error.
const SET_VRING_FDS: [u32; 3] = [12, 13, 14];

/// Hands over a descriptor of the first queue, and asks for the features; whether there was an answer to that.
fn is_taken(stream: &mut UnixStream, message: u32, fd: BorrowedFd<'_>) -> bool {
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_ne_bytes()).collect() };
    stream.write_all(&words(&[SET_VRING_NUM, 1, 8, 0, 128])).unwrap();
    let bytes = words(&[message, 1, 8, 0, 0]);
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&*stream, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    // refused: it may be gone before it is asked
    let _ = stream.write_all(&words(&[1, 1, 0]));
    stream.set_read_timeout(Some(LONG)).unwrap();
    match stream.read_exact(&mut [0; 20]) {
        Ok(()) => true,
        Err(error) => {
            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "neither an answer nor an end");
            false
        }
    }
}

#[test]
fn a_frontend_whose_descriptors_could_hold_a_thread_is_turned_away() {
    let hall = Hall::new(1);
    let other = [hall.connect("other.1", memory(), Options::default())];
    hall.registry.add("taken.1", memory()).unwrap();
    let path = hall.server.serve("taken.1").unwrap();
    let (reader, pipe) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&pipe, true).unwrap();
    // full: a write that waits would do so until the end of this test
    while rustix::io::write(&pipe, &[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&pipe, false).unwrap();
    let (socket, end) = UnixStream::pair().unwrap();
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    for message in SET_VRING_FDS {
        for fd in [pipe.as_fd(), reader.as_fd(), socket.as_fd()] {
            let mut stream = UnixStream::connect(&path).unwrap();
            assert!(!is_taken(&mut stream, message, fd), "message {message}");
        }
        let mut stream = UnixStream::connect(&path).unwrap();
        assert!(is_taken(&mut stream, message, eventfd.as_fd()), "message {message}");
        work(&other, 4);
    }
    assert_eq!(rustix::io::ioctl_fionread(&end).unwrap(), 0, "nothing was written to it");
    // whoever comes next is served
    let next = Client::connect(&path, Options::default());
    assert_eq!(next.queues[0].lock().write(0, &[1; 512]), OK);
    drop((next, other));
    hall.server.stop();
}

/// Lets who waits to write go on, also when the test fails.
struct Emptied(EventFd);

impl Drop for Emptied {
    fn drop(&mut self) {
        let _ = self.0.read();
    }
}

#[test]
fn a_driver_that_never_looks_at_its_calls_holds_nobody() {
    let hall = Hall::new(1);
    let others = [hall.connect("other.1", memory(), Options::default())];
    let full = hall.connect("full.1", memory(), Options::default());
    // one that waits when it is full, and is
    let call = EventFd::new(EFD_CLOEXEC).unwrap();
    let emptied = Emptied(call.try_clone().unwrap());
    full.frontend.set_vring_call(0, &call).unwrap();
    full.frontend.set_vring_err(0, &call).unwrap();
    assert_eq!(call.read().unwrap(), 1, "told once when it is handed over");
    call.write(u64::MAX - 1).unwrap();
    let queue = Arc::clone(&full.queues[0]);
    for sector in 0..100 {
        {
            let mut queue = queue.lock();
            queue.polls = true;
            queue.want_call(true);
            assert_eq!(queue.write(sector, &[sector as u8; 512]), OK);
        }
        work(&others, 1);
    }
    // stopped with a word to the error's descriptor, which is full, too
    let mut queue = queue.lock();
    queue.offer(u16::MAX);
    queue.publish();
    work(&others, 20);
    assert_eq!(emptied.0.read().unwrap(), u64::MAX - 1);
    drop((queue, emptied, full, others));
    hall.server.stop();
}
