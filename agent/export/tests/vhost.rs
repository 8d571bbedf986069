//! vhost-user-blk over its socket, against a frontend and a driver of our own.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;
mod frontend;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::{NAME, wait_for};
use frontend::{
    Client, DISCARD, F_EVENT_INDEX, F_FLUSH, F_INDIRECT, FLUSH, GET_ID, IO_ERROR, OK, Options, READ, UNSUPPORTED,
    WRITE, WRITE_ZEROES, WireDevice,
};
use muster_block::model::MemoryDevice;
use muster_block::{BlockDevice, conformance};
use muster_common::ByteLen;
use muster_export::vhost::{VhostConfig, VhostError, VhostServer};
use muster_export::{Operation, Registry};

const GRACE: Duration = Duration::from_secs(10);

/// A server with one export.
struct Served {
    registry: Arc<Registry>,
    server: VhostServer,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Served {
    fn new(device: Arc<dyn BlockDevice>) -> Served {
        Served::with(device, |_| {})
    }

    fn with(device: Arc<dyn BlockDevice>, change: impl FnOnce(&mut VhostConfig)) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let registry = Arc::new(Registry::new());
        registry.add(NAME, device).unwrap();
        let mut config = VhostConfig::new(directory.path().join("vu"));
        change(&mut config);
        let server = VhostServer::start(config, registry.clone()).unwrap();
        let socket = server.serve(NAME).unwrap();
        Served { registry, server, socket, _directory: directory }
    }

    fn connect(&self, options: Options) -> Client {
        Client::connect(&self.socket, options)
    }
}

/// A device over the wire that takes its server with it.
struct Whole {
    wire: Option<WireDevice>,
    served: Option<Served>,
}

impl Drop for Whole {
    fn drop(&mut self) {
        drop(self.wire.take());
        let served = self.served.take().unwrap();
        served.server.withdraw(NAME, GRACE).unwrap();
        served.registry.remove(NAME, GRACE).unwrap();
        served.server.stop();
    }
}

macro_rules! forward {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        impl BlockDevice for Whole {
            $(fn $name(&self, $($argument: $kind),*) -> $result {
                self.wire.as_ref().unwrap().$name($($argument),*)
            })*
        }
    };
}

forward! {
    geometry() -> muster_block::Geometry;
    read_at(offset: u64, buf: &mut [u8]) -> Result<(), muster_block::BlockError>;
    write_at(offset: u64, data: &[u8], flags: muster_block::WriteFlags) -> Result<(), muster_block::BlockError>;
    write_zeroes(offset: u64, len: u64, flags: muster_block::ZeroFlags) -> Result<(), muster_block::BlockError>;
    trim(offset: u64, len: u64) -> Result<(), muster_block::BlockError>;
    flush() -> Result<(), muster_block::BlockError>;
    block_status(offset: u64, len: u64, out: &mut Vec<muster_block::Extent>) -> Result<(), muster_block::BlockError>;
}

fn conforms(options: Options, workers: u16, make: impl Fn(ByteLen) -> Arc<dyn BlockDevice>) {
    conformance::run(|size| {
        let served = Served::with(make(size), |config| config.workers = workers);
        let wire = WireDevice::new(served.connect(options));
        Arc::new(Whole { wire: Some(wire), served: Some(served) })
    });
}

fn memory(size: ByteLen) -> Arc<dyn BlockDevice> {
    Arc::new(MemoryDevice::new(size))
}

#[test]
fn the_disk_conforms_over_the_wire_with_one_queue() {
    conforms(Options::default(), 1, memory);
}

#[test]
fn the_disk_conforms_over_the_wire_with_four_queues_on_two_threads() {
    conforms(Options { queues: 4, ..Options::default() }, 2, memory);
}

#[test]
fn the_disk_conforms_without_event_indices_flush_and_the_record_of_requests_in_flight() {
    let without = F_EVENT_INDEX | F_FLUSH | F_INDIRECT;
    conforms(Options { without, inflight: false, queue_size: 64, ..Options::default() }, 1, memory);
}

#[test]
fn the_store_conforms_over_the_wire() {
    use muster_common::VolumeId;
    use muster_store::{Store, StoreConfig, VolumeSpec};
    conforms(Options { queues: 2, ..Options::default() }, 2, |size| {
        let store = Store::open(StoreConfig::new(ByteLen::mib(64))).unwrap();
        store.create_volume(VolumeSpec::blank(VolumeId::random(), size)).unwrap()
    });
}

#[test]
fn requests_are_answered_as_virtio_says() {
    let served = Served::new(memory(ByteLen::mib(1)));
    let client = served.connect(Options::default());
    assert_eq!(client.capacity(), 1 << 20);
    let mut queue = client.queues[0].lock();
    let sectors = (1 << 20) / 512;
    let data = [7; 1024];
    assert_eq!(queue.write(10, &data), OK);
    let mut back = [0; 1024];
    assert_eq!(queue.read(10, &mut back), OK);
    assert_eq!(back, data);
    assert_eq!(queue.ask(FLUSH, 0, 0).len, 1);

    // beyond the end, over it, far away, and not whole sectors
    for (sector, len) in [(sectors, 512), (sectors - 1, 1024), (u64::MAX / 512, 512), (u64::MAX, 512), (0, 100)] {
        for kind in [READ, WRITE] {
            assert_eq!(queue.ask(kind, sector, len).status, IO_ERROR, "kind {kind}, {len} at {sector}");
        }
    }
    assert_eq!(queue.read(sectors - 1, &mut back[..512]), OK);
    assert!(back[..512].iter().all(|byte| *byte == 0), "a refused write changes nothing");

    assert_eq!(queue.range(WRITE_ZEROES, 10, 1, 0), OK);
    assert_eq!(queue.read(10, &mut back), OK);
    assert_eq!((back[0], back[512]), (0, 7));
    assert_eq!(queue.range(DISCARD, 11, 1, 0), OK);
    assert_eq!(queue.read(10, &mut back), OK);
    assert_eq!((back[0], back[512]), (0, 0));
    assert_eq!(queue.range(WRITE_ZEROES, 10, 1, 1), OK);
    assert_eq!(queue.range(DISCARD, 10, 1, 1), UNSUPPORTED);
    assert_eq!(queue.range(WRITE_ZEROES, 10, 1, 2), UNSUPPORTED);
    assert_eq!(queue.range(DISCARD, sectors, 1, 0), IO_ERROR);
    assert_eq!(queue.range(DISCARD, 0, u32::MAX, 0), IO_ERROR);
    assert_eq!(queue.ask(99, 0, 512).status, UNSUPPORTED);

    let done = queue.ask(GET_ID, 0, 20);
    assert_eq!((done.status, done.len), (OK, 21));
    let mut name = [0; 20];
    let at = queue.data(done.slot);
    queue.get(at, &mut name);
    assert_eq!(&name, b"0f4c9c2e6f1f4a5e9d59");

    let statistics = served.registry.statistics(NAME).unwrap();
    assert_eq!(statistics.in_flight, 0);
    assert_eq!(statistics.of(Operation::Write).requests, 6);
    assert_eq!(statistics.of(Operation::Write).errors, 5);
    assert_eq!(statistics.of(Operation::Write).bytes, 1024);
    assert_eq!(statistics.of(Operation::Trim).requests, 4);
    assert_eq!(statistics.of(Operation::Flush).requests, 1);
}

#[test]
fn a_read_only_disk_says_so_and_takes_no_writes() {
    let served = Served::new(Arc::new(MemoryDevice::new(ByteLen::mib(1)).read_only()));
    let client = served.connect(Options::default());
    assert_ne!(client.features & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    let mut queue = client.queues[0].lock();
    assert_eq!(queue.write(0, &[1; 512]), IO_ERROR);
    assert_eq!(queue.range(DISCARD, 0, 1, 0), IO_ERROR);
    assert_eq!(queue.read(0, &mut [0; 512]), OK);
}

#[test]
fn an_export_is_served_once_found_again_at_the_same_path_and_gone_after_withdrawal() {
    let served = Served::new(memory(ByteLen::mib(1)));
    assert!(matches!(served.server.serve(NAME), Err(VhostError::Exists(_))));
    assert!(matches!(served.server.serve("nobody"), Err(VhostError::Refused { .. })));
    for name in ["", "a/b", "../x", ".hidden", "a b", &"x".repeat(120)] {
        assert!(matches!(served.server.serve(name), Err(VhostError::Name { .. })), "{name:?}");
    }
    assert_eq!(served.server.socket_path(NAME).unwrap(), served.socket);
    let client = served.connect(Options::default());
    assert_eq!(served.registry.sessions(NAME), Some(1));
    assert!(served.server.served()[NAME]);
    served.server.withdraw(NAME, GRACE).unwrap();
    assert!(!served.socket.exists());
    assert_eq!(served.registry.sessions(NAME), Some(0));
    assert!(matches!(served.server.withdraw(NAME, GRACE), Err(VhostError::Unknown(_))));
    drop(client);
    // A dead socket file in the way is replaced.
    drop(std::os::unix::net::UnixListener::bind(&served.socket).unwrap());
    assert_eq!(served.server.serve(NAME).unwrap(), served.socket);
    let other = VhostServer::start(VhostConfig::new(served.socket.parent().unwrap()), served.registry.clone()).unwrap();
    assert!(matches!(other.serve(NAME), Err(VhostError::InUse(_))));
    let client = served.connect(Options::default());
    assert_eq!(client.queues[0].lock().write(0, &[1; 512]), OK);
}

#[test]
fn frontends_come_one_after_the_other() {
    let served = Served::new(memory(ByteLen::mib(1)));
    for round in 1..=5u8 {
        let client = served.connect(Options { queues: 2, ..Options::default() });
        let mut queue = client.queues[usize::from(round % 2)].lock();
        assert_eq!(queue.write(0, &[round; 512]), OK);
        drop(queue);
        drop(client);
    }
    wait_for("the last session to end", || served.registry.sessions(NAME) == Some(0));
}

#[test]
fn removing_the_export_ends_its_frontend() {
    let served = Served::new(memory(ByteLen::mib(1)));
    let client = served.connect(Options::default());
    assert_eq!(client.queues[0].lock().write(0, &[1; 512]), OK);
    served.registry.remove(NAME, GRACE).unwrap();
    assert!(client.frontend_is_gone());
}
