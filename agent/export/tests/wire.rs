//! What only a client that talks bytes can ask for: fragments, holes, flags, errors, misbehaviour, and the life of an
//! export while clients are connected.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;

use std::io::{Cursor, Read, Write};
use std::num::NonZeroU64;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{
    Client, NAME, Reply, Served, handshake_bytes, option_bytes, read_chunk, read_handshake, read_option_reply, wait_for,
};
use muster_block::model::MemoryDevice;
use muster_block::{BlockDevice, BlockError, BlockErrorKind, Extent, Geometry, WriteFlags, ZeroFlags};
use muster_common::ByteLen;
use muster_export::protocol::{RequestHeader, command, command_flag, option, option_reply};
use muster_export::{ExportCatalog, Limits, Operation, Peer, Registry, RegistryError, ServerError, replay};
use parking_lot::Mutex;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

fn numbered(len: u64) -> Vec<u8> {
    (0..len / 4).flat_map(|word| (word as u32 | 0x8000_0000).to_le_bytes()).collect()
}

/// A memory device whose requests can be made to fail, panic or wait.
struct Troubled {
    inner: MemoryDevice,
    trouble: Mutex<Option<Trouble>>,
    flushes: AtomicU64,
    fua_writes: AtomicU64,
    /// Requests wait while this is locked.
    gate: Mutex<()>,
    at_gate: AtomicU64,
}

#[derive(Clone, Copy)]
enum Trouble {
    Fail(BlockErrorKind),
    /// Only reads that touch this offset.
    FailAt(u64),
    Panic,
    Gate,
}

impl Troubled {
    fn new(bytes: Vec<u8>) -> Arc<Troubled> {
        Arc::new(Troubled {
            inner: MemoryDevice::from_bytes(bytes),
            trouble: Mutex::new(None),
            flushes: AtomicU64::new(0),
            fua_writes: AtomicU64::new(0),
            gate: Mutex::new(()),
            at_gate: AtomicU64::new(0),
        })
    }
    fn set(&self, trouble: Trouble) {
        *self.trouble.lock() = Some(trouble);
    }
    fn check(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        let trouble = *self.trouble.lock();
        match trouble {
            Some(Trouble::Fail(kind)) => Err(BlockError::new(kind, "injected")),
            Some(Trouble::FailAt(at)) if (offset..offset + len).contains(&at) => {
                Err(BlockError::new(BlockErrorKind::Io, "injected"))
            }
            Some(Trouble::Panic) => panic!("injected panic"),
            Some(Trouble::Gate) => {
                self.at_gate.fetch_add(1, Ordering::SeqCst);
                drop(self.gate.lock());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl BlockDevice for Troubled {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.check(offset, buf.len() as u64)?;
        self.inner.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
        self.check(offset, data.len() as u64)?;
        self.fua_writes.fetch_add(u64::from(flags.fua), Ordering::SeqCst);
        self.inner.write_at(offset, data, flags)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
        self.check(offset, len)?;
        self.inner.write_zeroes(offset, len, flags)
    }
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.check(offset, len)?;
        self.inner.trim(offset, len)
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.inner.flush()
    }
    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        self.inner.block_status(offset, len, out)
    }
}

fn served(bytes: Vec<u8>) -> (Arc<Troubled>, Served) {
    let device = Troubled::new(bytes);
    let served = Served::new(device.clone());
    (device, served)
}

#[test]
fn long_reads_come_in_fragments_with_holes_and_df_in_one_piece() {
    let mut bytes = numbered(4 * MIB);
    bytes[MIB as usize..2 * MIB as usize].fill(0);
    let (_, served) = served(bytes.clone());
    let mut client = served.client(true);
    let reply = client.ask(command::READ, 0, 0, 4 * MIB as u32, &[]);
    assert!(reply.bytes(0, bytes.len()) == bytes);
    assert_eq!(reply.holes.iter().map(|(_, len)| u64::from(*len)).sum::<u64>(), MIB);
    assert!(reply.chunks > 4);
    let reply = client.ask(command::READ, command_flag::DF, 0, 4 * MIB as u32, &[]);
    assert_eq!(reply.chunks, 1);
    assert!(reply.bytes(0, bytes.len()) == bytes);
    let reply = client.ask(command::READ, 0, 5, 3, &[]);
    assert_eq!((reply.chunks, reply.bytes(5, 3)), (1, bytes[5..8].to_vec()));
    assert_eq!(client.ask(command::READ, 0, 5, 0, &[]), Reply { cookie: client.cookie, chunks: 1, ..Reply::default() });
}

#[test]
fn simple_replies_carry_the_same_bytes() {
    let bytes = numbered(4 * MIB);
    let (_, served) = served(bytes.clone());
    let mut client = served.client(false);
    for (offset, length) in [(0u64, 4 * MIB as u32), (12345, 100_000), (4096, 4096)] {
        let reply = client.ask(command::READ, 0, offset, length, &[]);
        assert!(reply.bytes(offset, length as usize) == bytes[offset as usize..offset as usize + length as usize]);
    }
}

#[test]
fn a_short_request_overtakes_a_long_read() {
    let (_, served) = served(numbered(32 * MIB));
    let mut client = served.client(true);
    let long = RequestHeader { flags: 0, command: command::READ, cookie: 1, offset: 0, length: 32 * MIB as u32 };
    let short = RequestHeader { flags: 0, command: command::READ, cookie: 2, offset: 0, length: 4096 };
    client.stream.write_all(&[long.encode(), short.encode()].concat()).unwrap();
    let mut order = Vec::new();
    while order.len() < 2 {
        let mut reply = Reply::default();
        if read_chunk(&mut client.stream, |_| 0, &mut reply) {
            order.push(reply.cookie);
        }
    }
    assert_eq!(order, [2, 1]);
}

#[test]
fn limits_hold_for_all_connections_of_an_export_together() {
    let (_, served) = served(numbered(MIB));
    let export = served.registry.get(NAME).unwrap();
    let limits = |requests, bytes| Limits {
        requests_per_second: NonZeroU64::new(requests),
        bytes_per_second: NonZeroU64::new(bytes),
        burst: Duration::ZERO,
    };
    let mut clients = [served.client(true), served.client(false)];
    export.set_limits(limits(500, 0));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for client in &mut clients {
            scope.spawn(|| {
                for n in 0..25 {
                    let written = client.ask(command::WRITE, 0, n * 512, 512, &[7; 512]);
                    assert_eq!(written.errno, 0);
                }
            });
        }
    });
    // The first passes at once; each other one, of either connection, not before its time.
    assert!(start.elapsed() >= Duration::from_millis(98), "{:?}", start.elapsed());
    let statistics = export.statistics();
    assert!(statistics.throttled > 0 && statistics.throttled_time >= Duration::from_millis(50), "{statistics:?}");

    let waits = |client: &mut Client| {
        export.set_limits(limits(0, 1));
        assert_eq!(client.ask(command::READ, 0, 0, 512, &[]).errno, 0, "the first passes");
        assert_eq!(client.ask(command::FLUSH, 0, 0, 0, &[]).errno, 0, "a flush does not wait");
        assert_eq!(client.ask(command::TRIM, 0, 4096, 4096, &[]).errno, 0, "nor does what moves no bytes");
        export.statistics().throttled
    };
    let [first, second] = &mut clients;
    // lifting the limits lets it go; a long write is not even taken from the socket before
    let before = waits(first);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| first.ask(command::WRITE, 0, 0, 512 << 10, &vec![9; 512 << 10]));
        wait_for("the write to wait for its turn", || export.statistics().throttled > before);
        export.set_limits(Limits::default());
        assert_eq!(writing.join().unwrap().errno, 0);
    });
    // one that came before is finished and answered while another waits
    export.set_limits(limits(0, 1));
    first.send(command::READ, 0, 0, MIB as u32, &[]);
    first.send(command::READ, 0, 0, 512, &[]);
    assert_eq!(first.reply(0).bytes(0, MIB as usize)[..512], [9; 512]);
    export.set_limits(Limits::default());
    assert_eq!(first.reply(0).errno, 0);
    // and an export that goes away does not wait for it
    let before = waits(second);
    second.send(command::READ, 0, 0, 512, &[]);
    wait_for("a read to wait for its turn", || export.statistics().throttled > before);
    let start = Instant::now();
    served.registry.remove(NAME, Duration::from_secs(20)).unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn a_server_that_stops_does_not_wait_for_the_turn_of_a_request() {
    let (_, mut served) = served(numbered(MIB));
    let export = served.registry.get(NAME).unwrap();
    export.set_limits(Limits { bytes_per_second: NonZeroU64::new(1), ..Limits::default() });
    let mut client = served.client(true);
    client.ask(command::READ, 0, 0, 4096, &[]);
    client.send(command::READ, 0, 0, 4096, &[]);
    wait_for("a read to wait for its turn", || export.statistics().throttled > 0);
    let start = Instant::now();
    served.server.take().unwrap().stop();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn a_read_error_in_the_middle_says_where() {
    let (device, served) = served(numbered(2 * MIB));
    let mut client = served.client(true);
    device.set(Trouble::FailAt(MIB + 5));
    let reply = client.ask(command::READ, 0, 0, 2 * MIB as u32, &[]);
    assert_eq!(reply.errno, EIO);
    assert_eq!(reply.error_offset, Some(MIB));
    // The connection goes on.
    assert_eq!(client.ask(command::READ, 0, 0, 4096, &[]).errno, 0);
    // In one piece the error is too late to be told: the connection is closed.
    client.send(command::READ, command_flag::DF, 0, 2 * MIB as u32, &[]);
    let mut rest = Vec::new();
    client.stream.read_to_end(&mut rest).unwrap();
    assert!(rest.len() < 2 * MIB as usize);
}

#[test]
fn long_writes_arrive_in_pieces_and_are_whole() {
    let (device, served) = served(vec![0; 40 * MIB as usize]);
    let data = numbered(32 * MIB);
    for structured in [true, false] {
        let mut client = served.client(structured);
        // Not aligned, so that pieces have to find their seams.
        assert_eq!(client.ask(command::WRITE, 0, 1000, 32 * MIB as u32, &data).errno, 0);
        let contents = device.inner.contents();
        assert!(contents[1000..1000 + data.len()] == data);
        assert_eq!(client.ask(command::WRITE_ZEROES, 0, 0, 40 * MIB as u32, &[]).errno, 0);
        assert!(device.inner.contents().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn fua_reaches_the_device_and_flush_flushes() {
    let (device, served) = served(vec![0; 4 * MIB as usize]);
    let mut client = served.client(true);
    client.ask(command::WRITE, command_flag::FUA, 0, 4096, &[1; 4096]);
    assert_eq!(device.fua_writes.load(Ordering::SeqCst), 1);
    client.ask(command::WRITE, command_flag::FUA, 0, MIB as u32, &vec![1; MIB as usize]);
    assert_eq!(device.flushes.load(Ordering::SeqCst), 1, "the pieces of a long write are followed by one flush");
    client.ask(command::FLUSH, 0, 0, 0, &[]);
    client.ask(command::TRIM, command_flag::FUA, 0, 4096, &[]);
    assert_eq!(device.flushes.load(Ordering::SeqCst), 3);
}

#[test]
fn block_status_covers_the_range_and_req_one_gives_one() {
    let mut bytes = numbered(4 * MIB);
    bytes[MIB as usize..2 * MIB as usize].fill(0);
    let (_, served) = served(bytes);
    let mut client = served.client(true);
    let reply = client.ask(command::BLOCK_STATUS, 0, 4096, 4 * MIB as u32 - 4096, &[]);
    let mib = MIB as u32;
    assert_eq!(reply.extents, [(mib - 4096, 0), (mib, 3), (2 * mib, 0)]);
    let reply = client.ask(command::BLOCK_STATUS, command_flag::REQ_ONE, MIB + 4096, 2 * mib, &[]);
    assert_eq!(reply.extents, [(mib - 4096, 3)]);
    assert_eq!(client.ask(command::BLOCK_STATUS, 0, 0, 0, &[]).errno, EINVAL);
}

#[test]
fn refused_requests_have_their_errno_and_the_connection_goes_on() {
    const SIZE: u64 = 40 << 20;
    let (device, served) = served(vec![0; SIZE as usize]);
    for structured in [true, false] {
        let mut client = served.client(structured);
        assert_eq!(client.ask(command::READ, 0, SIZE, 1, &[]).errno, EINVAL);
        assert_eq!(client.ask(command::WRITE, 0, SIZE - 1, 4096, &[9; 4096]).errno, ENOSPC);
        assert_eq!(client.ask(command::WRITE_ZEROES, 0, u64::MAX, 4096, &[]).errno, ENOSPC);
        assert_eq!(client.ask(command::READ, 1 << 9, 0, 1, &[]).errno, EINVAL);
        assert_eq!(client.ask(77, 0, 0, 1, &[]).errno, EINVAL);
        assert_eq!(client.ask(command::WRITE, 0, 0, 33 << 20, &vec![9; 33 << 20]).errno, EINVAL, "above 32 MiB");
        assert_eq!(client.ask(command::CACHE, 0, 0, 4096, &[]).errno, 0);
        for (kind, errno) in [
            (BlockErrorKind::NoSpace, ENOSPC),
            (BlockErrorKind::ReadOnly, EPERM),
            (BlockErrorKind::Io, EIO),
            (BlockErrorKind::Fenced, EIO),
            (BlockErrorKind::Invalid, EINVAL),
        ] {
            device.set(Trouble::Fail(kind));
            assert_eq!(client.ask(command::WRITE, 0, 0, 4096, &[9; 4096]).errno, errno, "{kind:?}");
            assert_eq!(client.ask(command::WRITE, 0, 0, 512 << 10, &vec![9; 512 << 10]).errno, errno, "{kind:?}");
        }
        device.set(Trouble::Fail(BlockErrorKind::Unsupported));
        assert_eq!(client.ask(command::WRITE_ZEROES, command_flag::FAST_ZERO, 0, 4096, &[]).errno, ENOTSUP);
        *device.trouble.lock() = None;
        assert_eq!(client.ask(command::READ, 0, 0, 4096, &[]).bytes(0, 4096), [0; 4096]);
    }
    let statistics = served.registry.statistics(NAME).unwrap();
    assert_eq!(statistics.of(Operation::Write).errors, 20);
}

#[test]
fn a_read_only_export_takes_no_change() {
    let served = Served::new(Arc::new(MemoryDevice::new(ByteLen::mib(1)).read_only()));
    let mut client = served.client(true);
    assert_eq!(client.ask(command::WRITE, 0, 0, 4096, &[9; 4096]).errno, EPERM);
    assert_eq!(client.ask(command::TRIM, 0, 0, 4096, &[]).errno, EPERM);
    assert_eq!(client.ask(command::FLUSH, 0, 0, 0, &[]).errno, 0);
}

#[test]
fn a_panic_fences_its_export_and_nothing_else() {
    let (device, served) = served(numbered(MIB));
    served.registry.add("other", Arc::new(MemoryDevice::from_bytes(vec![5; 4096]))).unwrap();
    let mut client = served.client(true);
    let mut second = served.client(true);
    let mut other = served.connect();
    other.handshake("other", true);
    device.set(Trouble::Panic);
    assert_eq!(client.ask(command::WRITE, 0, 0, 4096, &[9; 4096]).errno, EIO);
    *device.trouble.lock() = None;
    // Fenced for every session and for good, although the device would answer.
    assert_eq!(client.ask(command::READ, 0, 0, 4096, &[]).errno, EIO);
    assert_eq!(second.ask(command::READ, 0, 0, 4096, &[]).errno, EIO);
    assert_eq!(second.ask(command::READ, 0, 0, MIB as u32, &[]).errno, EIO);
    assert_eq!(second.ask(command::FLUSH, 0, 0, 0, &[]).errno, EIO);
    assert_eq!(second.ask(command::BLOCK_STATUS, 0, 0, 4096, &[]).errno, EIO);
    let export = served.registry.get(NAME).unwrap();
    assert!(export.fence_reason().unwrap().contains("injected panic"));
    assert_eq!(other.ask(command::READ, 0, 0, 4096, &[]).bytes(0, 4096), [5; 4096]);
}

#[test]
fn removing_an_export_ends_its_sessions_and_frees_the_name() {
    let (_, served) = served(numbered(MIB));
    let mut clients = [served.client(true), served.client(false)];
    wait_for("two sessions", || served.registry.sessions(NAME) == Some(2));
    let peers = served.registry.get(NAME).unwrap().peers();
    let pid = std::process::id() as i32;
    assert!(peers.iter().all(|peer| matches!(peer, Peer::Local { pid: found, .. } if *found == pid)), "{peers:?}");
    served.registry.remove(NAME, Duration::from_secs(5)).unwrap();
    for client in &mut clients {
        assert!(client.is_closed());
    }
    assert!(matches!(served.registry.remove(NAME, Duration::ZERO), Err(RegistryError::Unknown(_))));
    // A new client is told that there is none, and one under the same name again is a new one.
    let mut late = served.connect();
    late.stream.write_all(&handshake_bytes(NAME, false)).unwrap();
    late.stream.read_exact(&mut [0; 18]).unwrap();
    assert_eq!(read_option_reply(&mut late.stream).1, option_reply::ERR_UNKNOWN);
    served.registry.add(NAME, Arc::new(MemoryDevice::new(ByteLen::mib(1)))).unwrap();
    assert_eq!(served.client(true).ask(command::READ, 0, 0, 512, &[]).bytes(0, 512), [0; 512]);
    assert!(served.registry.statistics(NAME).unwrap().of(Operation::Read).requests <= 1);
}

#[test]
fn removal_finishes_a_request_that_is_inside_the_device() {
    let (device, served) = served(numbered(MIB));
    let mut client = served.client(true);
    let gate = device.gate.lock();
    device.set(Trouble::Gate);
    client.send(command::READ, 0, 0, 4096, &[]);
    wait_for("the request is at the gate", || device.at_gate.load(Ordering::SeqCst) == 1);
    // It does not end while the device holds the request, and says so.
    assert!(matches!(
        served.registry.remove(NAME, Duration::from_millis(50)),
        Err(RegistryError::Busy { sessions: 1, .. })
    ));
    drop(gate);
    // Cut by now: the reply is lost, the thread is not.
    wait_for("no connection", || {
        // Accepting reaps: a connection that is turned away is enough.
        drop(UnixStream::connect(&served.socket));
        client.is_closed()
    });
}

#[test]
fn a_client_that_takes_no_replies_does_not_hold_up_removal_or_others() {
    let (_, served) = served(numbered(32 * MIB));
    let mut stuck = served.client(true);
    for _ in 0..4 {
        stuck.send(command::READ, 0, 0, 32 * MIB as u32, &[]);
    }
    let mut other = served.client(true);
    assert_eq!(other.ask(command::READ, 0, 0, 8, &[]).bytes(0, 8), numbered(8));
    served.registry.remove(NAME, Duration::from_millis(100)).unwrap();
}

#[test]
fn a_request_behind_the_end_of_an_export_is_refused_as_shut_down() {
    let (device, served) = served(numbered(MIB));
    let mut client = served.client(true);
    device.set(Trouble::Gate);
    let gate = device.gate.lock();
    client.send(command::READ, 0, 0, 4096, &[]);
    wait_for("the request is at the gate", || device.at_gate.load(Ordering::SeqCst) == 1);
    client.send(command::READ, 0, 4096, 4096, &[]);
    let registry = served.registry.clone();
    let remover = std::thread::spawn(move || registry.remove(NAME, Duration::from_secs(20)));
    wait_for("the export is gone", || served.registry.get(NAME).is_none());
    // The read side is closed once a write of ours fails; from then on the session refuses what it still has.
    wait_for("the session is draining", || client.stream.write_all(&[0]).is_err());
    drop(gate);
    assert_eq!(client.reply(4096).errno, 0);
    assert_eq!(client.reply(4096).errno, ESHUTDOWN);
    remover.join().unwrap().unwrap();
    assert!(client.is_closed());
}

#[test]
fn stopping_the_server_ends_everything_and_removes_the_socket() {
    let (_, mut served) = served(numbered(MIB));
    let mut client = served.client(true);
    let mut silent = served.connect();
    silent.stream.read_exact(&mut [0; 18]).unwrap();
    served.server.take().unwrap().stop();
    assert!(client.is_closed() && silent.is_closed());
    assert!(!served.socket.exists());
    assert_eq!(served.registry.sessions(NAME), Some(0));
}

#[test]
fn a_socket_in_use_is_refused_and_a_dead_one_replaced() {
    let (_, served) = served(numbered(MIB));
    let start = |path: &std::path::Path| {
        muster_export::NbdServer::start(muster_export::NbdConfig::unix(path), Arc::new(Registry::new()))
    };
    assert!(matches!(start(&served.socket), Err(ServerError::InUse(_))));
    let dead = served.path("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    start(&dead).unwrap().stop();
    let file = served.path("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(start(&file), Err(ServerError::Listen { .. })));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn handshake_limits_hold() {
    let device: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(ByteLen::mib(1)));
    let served = Served::with(device, |config| {
        config.handshake_time = Duration::from_millis(100);
        config.connections = 3;
        config.handshake.options = 5;
    });
    // Slow.
    let mut slow = served.connect();
    slow.stream.read_exact(&mut [0; 18]).unwrap();
    assert!(slow.is_closed());
    // Talkative.
    let mut talkative = served.connect();
    talkative.stream.write_all(&3u32.to_be_bytes()).unwrap();
    for _ in 0..6 {
        talkative.stream.write_all(&option_bytes(99, &[])).unwrap();
    }
    let mut all = Vec::new();
    talkative.stream.read_to_end(&mut all).unwrap();
    // Too many: three are served, the fourth is closed without a greeting.
    let mut served_clients: Vec<Client> = Vec::new();
    while served_clients.len() < 3 {
        let mut client = served.connect();
        // Those above may not be reaped yet.
        if client.stream.read_exact(&mut [0; 18]).is_ok() {
            client.stream.write_all(&handshake_bytes(NAME, false)).unwrap();
            while read_option_reply(&mut client.stream).1 != option_reply::ACK {}
            served_clients.push(client);
        }
    }
    assert!(served.connect().is_closed());
    served_clients.pop();
    wait_for("room again", || served.connect().stream.read_exact(&mut [0; 18]).is_ok());
}

#[test]
fn a_peer_that_says_nothing_keeps_no_one_out_who_has_chosen() {
    let device: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(ByteLen::mib(1)));
    let served = Served::with(device, |config| {
        config.handshakes_per_peer = 2;
        config.handshake_time = Duration::from_secs(60);
        config.handshake.total_len = 1000;
    });
    // Those in their session do not count.
    let mut sessions = [served.client(true), served.client(true), served.client(true)];
    let mut silent = [served.connect(), served.connect()];
    for client in &mut silent {
        client.stream.read_exact(&mut [0; 18]).unwrap();
    }
    assert!(served.connect().is_closed());
    for client in &mut sessions {
        assert_eq!(client.ask(command::READ, 0, 0, 512, &[]).errno, 0);
    }
    // Options that are short each and too much together end one of them, and there is room again.
    silent[0].stream.write_all(&3u32.to_be_bytes()).unwrap();
    for _ in 0..3 {
        // The last ones may find the door closed.
        let _ = silent[0].stream.write_all(&option_bytes(99, &[0; 400]));
    }
    let _ = silent[0].stream.read_to_end(&mut Vec::new());
    wait_for("room again", || served.connect().stream.read_exact(&mut [0; 18]).is_ok());
}

#[test]
fn the_old_export_name_option_works() {
    let (_, served) = served(numbered(MIB));
    let mut client = served.connect();
    client
        .stream
        .write_all(&[&1u32.to_be_bytes()[..], &option_bytes(option::EXPORT_NAME, NAME.as_bytes())].concat())
        .unwrap();
    let mut reply = [0; 18 + 8 + 2 + 124];
    client.stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[18..26], MIB.to_be_bytes());
    assert_eq!(client.ask(command::READ, 0, 0, 512, &[]).bytes(0, 512), numbered(512));
    client.send(command::DISC, 0, 0, 0, &[]);
    assert!(client.is_closed());
}

#[test]
fn garbage_closes_the_connection_and_the_server_goes_on() {
    let (_, served) = served(numbered(MIB));
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    for round in 0..40 {
        let garbage: Vec<u8> = (0..5000).map(|_| random()).collect();
        let mut client = served.connect();
        if round % 2 == 0 {
            client.handshake(NAME, round % 4 == 0);
        }
        // The server may close before it has read all of it.
        let _ = client.stream.write_all(&garbage);
        let _ = client.stream.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = client.stream.read_to_end(&mut rest);
    }
    // Truncated at every byte.
    let good = handshake_bytes(NAME, true);
    for len in 0..good.len() {
        let mut client = served.connect();
        client.stream.write_all(&good[..len]).unwrap();
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        client.stream.read_to_end(&mut Vec::new()).unwrap();
    }
    // A huge write is not allocated for, and a request cut off is no request.
    let mut client = served.client(true);
    client.send(command::WRITE, 0, 0, u32::MAX, &[]);
    assert!(client.is_closed());
    let mut client = served.client(true);
    client.send(command::WRITE, 0, 0, 4096, &[1; 100]);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(client.is_closed());
    let mut client = served.client(true);
    assert_eq!(client.ask(command::READ, 0, 0, 8, &[]).bytes(0, 8), numbered(8));
}

#[test]
fn many_clients_log_in_at_once() {
    let (_, served) = served(numbered(MIB));
    let served = &served;
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(move || {
                let mut client = served.client(true);
                assert_eq!(client.ask(command::READ, 0, 4096, 4096, &[]).bytes(4096, 4096), numbered(MIB)[4096..8192]);
            });
        }
    });
}

/// A request of the property test; everything fits one slice, so the order of the stream is the order of execution.
#[derive(Clone, Debug)]
enum Ask {
    Read(u64, u32),
    Write(u64, Vec<u8>),
    Trim(u64, u32),
    Zero(u64, u32),
    Status(u64, u32),
    Flush,
}

const PROPERTY_SIZE: u64 = 600 * 1024;

fn ask() -> impl Strategy<Value = Ask> {
    let range = |longest: u32| {
        (0..PROPERTY_SIZE, 1..longest).prop_map(|(offset, len)| (offset, len.min((PROPERTY_SIZE - offset) as u32)))
    };
    prop_oneof![
        4 => range(250_000).prop_map(|(offset, len)| Ask::Read(offset, len)),
        4 => (range(200_000), 1u8..255).prop_map(|((offset, len), byte)| {
            Ask::Write(offset, (0..len).map(|at| byte ^ (at / 7) as u8).collect())
        }),
        1 => range(300_000).prop_map(|(offset, len)| Ask::Trim(offset, len)),
        1 => range(300_000).prop_map(|(offset, len)| Ask::Zero(offset, len)),
        1 => range(300_000).prop_map(|(offset, len)| Ask::Status(offset, len)),
        1 => Just(Ask::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whole sessions of random requests, cut into random pieces, against a vector.
    #[test]
    fn a_session_equals_the_oracle(asks in prop::collection::vec(ask(), 1..30), structured: bool, piece in 1usize..300_000) {
        let device = Arc::new(MemoryDevice::new(ByteLen(PROPERTY_SIZE)));
        let registry = Registry::new();
        registry.add(NAME, device.clone()).unwrap();
        let mut input = handshake_bytes(NAME, structured);
        let mut expected = Vec::new();
        let mut oracle = vec![0u8; PROPERTY_SIZE as usize];
        for (cookie, ask) in asks.iter().enumerate() {
            let mut put = |command, offset, length, payload: &[u8]| {
                input.extend(RequestHeader { flags: 0, command, cookie: cookie as u64, offset, length }.encode());
                input.extend(payload);
            };
            let range = |offset: u64, len: u32| offset as usize..offset as usize + len as usize;
            match ask {
                Ask::Read(offset, len) => {
                    put(command::READ, *offset, *len, &[]);
                    expected.push(Some((*offset, oracle[range(*offset, *len)].to_vec())));
                    continue;
                }
                Ask::Write(offset, data) => {
                    put(command::WRITE, *offset, data.len() as u32, data);
                    oracle[range(*offset, data.len() as u32)].copy_from_slice(data);
                }
                Ask::Trim(offset, len) => {
                    put(command::TRIM, *offset, *len, &[]);
                    oracle[range(*offset, *len)].fill(0);
                }
                Ask::Zero(offset, len) => {
                    put(command::WRITE_ZEROES, *offset, *len, &[]);
                    oracle[range(*offset, *len)].fill(0);
                }
                Ask::Status(offset, len) => put(command::BLOCK_STATUS, *offset, *len, &[]),
                Ask::Flush => put(command::FLUSH, 0, 0, &[]),
            }
            expected.push(None);
        }
        input.extend(RequestHeader { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 }.encode());
        let mut output = Cursor::new(replay(&input, piece, &registry));
        read_handshake(&mut output);
        for (cookie, expected) in expected.iter().enumerate() {
            let mut reply = Reply::default();
            let len = expected.as_ref().map_or(0, |(_, data)| data.len());
            while !read_chunk(&mut output, |_| len, &mut reply) {}
            prop_assert_eq!(reply.cookie, cookie as u64);
            if let Some((offset, data)) = expected {
                prop_assert!(&reply.bytes(*offset, data.len()) == data);
            } else if let Ask::Status(_, len) = &asks[cookie] {
                prop_assert_eq!(reply.errno, if structured { 0 } else { EINVAL });
                prop_assert_eq!(reply.extents.iter().map(|(len, _)| len).sum::<u32>(), if structured { *len } else { 0 });
            } else {
                prop_assert_eq!(reply.errno, 0);
            }
        }
        prop_assert_eq!(output.position(), output.get_ref().len() as u64);
        prop_assert!(device.contents() == oracle);
    }

    /// Mostly valid, rarely broken: what a fuzzer would start from.
    #[test]
    fn broken_sessions_are_survived(
        headers in prop::collection::vec((0u16..40, 0u16..9, any::<u64>(), prop_oneof![0u64..2_000_000, any::<u64>()], prop_oneof![0u32..100_000, any::<u32>()]), 0..20),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        structured: bool,
        piece in 1usize..5000,
    ) {
        let registry = Registry::new();
        registry.add(NAME, Arc::new(MemoryDevice::new(ByteLen::mib(1)))).unwrap();
        let mut input = handshake_bytes(NAME, structured);
        for (flags, command, cookie, offset, length) in headers {
            input.extend(RequestHeader { flags, command, cookie, offset, length }.encode());
            if command == command::WRITE {
                input.extend(vec![7; (length as usize).min(10_000)]);
            }
        }
        for (index, bits) in flips {
            let at = index.index(input.len());
            input[at] ^= bits;
        }
        let _ = replay(&input, piece, &registry);
        prop_assert_eq!(registry.sessions(NAME), Some(0));
    }
}

#[test]
fn a_catalog_may_forbid_listing() {
    struct Silent;
    impl ExportCatalog for Silent {
        fn open(&self, _: &str, _: &Peer) -> Result<Arc<muster_export::Export>, muster_export::Refusal> {
            Err(muster_export::Refusal::Policy)
        }
        fn list(&self, _: &Peer) -> Option<Vec<String>> {
            None
        }
    }
    let mut input = 3u32.to_be_bytes().to_vec();
    input.extend(option_bytes(option::LIST, &[]));
    let mut output = Cursor::new(replay(&input, 64, &Silent));
    output.set_position(18);
    assert_eq!(read_option_reply(&mut output).1, option_reply::ERR_POLICY);
}
