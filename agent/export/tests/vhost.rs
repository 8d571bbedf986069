//! vhost-user-blk over its socket, against a frontend and a driver of our own.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;
mod frontend;
mod served;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use common::{NAME, wait_for};
use frontend::{
    Client, DISCARD, Driver, F_EVENT_INDEX, F_FLUSH, F_INDIRECT, FLUSH, GET_ID, IO_ERROR, OK, Options, READ,
    UNSUPPORTED, WRITE, WRITE_ZEROES, WireDevice,
};
use muster_block::model::MemoryDevice;
use muster_block::{BlockDevice, BlockError, Extent, Geometry, WriteFlags, ZeroFlags, conformance};
use muster_common::ByteLen;
use muster_export::vhost::{ExportEvent, VhostConfig, VhostError, VhostServer};
use muster_export::{Limits, Operation};
use parking_lot::Mutex;
use served::{GRACE, Puppet, Served, memory, soon};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

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
    geometry() -> Geometry;
    read_at(offset: u64, buf: &mut [u8]) -> Result<(), BlockError>;
    write_at(offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError>;
    write_zeroes(offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError>;
    trim(offset: u64, len: u64) -> Result<(), BlockError>;
    flush() -> Result<(), BlockError>;
    block_status(offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError>;
}

fn conforms(options: Options, threads: u16, make: impl Fn(ByteLen) -> Arc<dyn BlockDevice>) {
    conformance::run(|size| {
        let served = Served::with(make(size), |config| config.threads = threads);
        let wire = WireDevice::new(served.connect(options));
        Arc::new(Whole { wire: Some(wire), served: Some(served) })
    });
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

#[test]
fn a_panic_of_the_device_fences_the_export_and_leaves_the_connection() {
    let device = Puppet::new(ByteLen::mib(1));
    let served = Served::new(device.clone());
    let client = served.connect(Options { queues: 2, ..Options::default() });
    device.panics.store(true, Relaxed);
    assert_eq!(client.queues[0].lock().read(0, &mut [0; 512]), IO_ERROR);
    device.panics.store(false, Relaxed);
    assert!(served.registry.get(NAME).unwrap().is_fenced());
    assert_eq!(client.queues[1].lock().read(0, &mut [0; 512]), IO_ERROR);
    assert!(!client.frontend_is_gone());
}

#[test]
fn a_write_without_space_waits_and_is_done_when_there_is_some() {
    let device = Puppet::new(ByteLen::mib(1));
    let events = Arc::new(Mutex::new(Vec::new()));
    let served = Served::with(device.clone(), |config| {
        let events = Arc::clone(&events);
        config.observer = Some(Arc::new(move |name, event| events.lock().push((name.to_owned(), event))));
    });
    let export = served.registry.get(NAME).unwrap();
    let mut client = served.connect(Options { queues: 2, ..Options::default() });
    let (first, second) = (Arc::clone(&client.queues[0]), Arc::clone(&client.queues[1]));
    device.full.store(true, Relaxed);
    let mut driver = first.lock();
    for sector in [0, 8, 16] {
        let slot = driver.slot().unwrap();
        driver.put(driver.data(slot), &[sector as u8 + 1; 512]);
        driver.prepare(slot, WRITE, sector, 512);
    }
    driver.publish();
    wait_for("the write to wait", || export.waiting_for_space());
    assert_eq!(events.lock().as_slice(), [(NAME.to_owned(), ExportEvent::SpaceWanted)]);
    let statistics = export.statistics();
    assert!(statistics.waiting_for_space);
    assert_eq!(statistics.in_flight, 3);
    assert!(driver.take().is_none());

    // The other queue goes on.
    assert_eq!(second.lock().read(0, &mut [0; 512]), OK);

    // The VM is paused: the queue stops at once, where its first write can be taken again. Nothing was answered.
    assert_eq!(client.frontend.get_vring_base(0).unwrap(), 0);
    assert!(export.waiting_for_space(), "it still needs space");
    assert_eq!(export.statistics().in_flight, 0);
    drop(driver);
    client.start_queue(0);
    let mut driver = first.lock();
    wait_for("the write to wait again", || export.statistics().in_flight == 3);
    assert!(driver.take().is_none());

    device.full.store(false, Relaxed);
    for _ in 0..3 {
        assert_eq!(driver.wait(soon()).unwrap().status, OK);
    }
    assert!(!export.waiting_for_space());
    assert_eq!(events.lock().len(), 2);
    assert_eq!(events.lock()[1].1, ExportEvent::SpaceBack);
    assert_eq!(export.statistics().of(Operation::Write).errors, 0);
    let contents = device.inner.contents();
    assert_eq!((contents[0], contents[8 * 512], contents[16 * 512]), (1, 9, 17));
}

#[test]
fn a_write_waits_for_space_no_longer_than_configured_or_until_the_export_is_withdrawn() {
    let device = Puppet::new(ByteLen::mib(1));
    device.full.store(true, Relaxed);
    let served = Served::with(device.clone(), |config| config.space_wait = Some(Duration::from_millis(30)));
    let client = served.connect(Options::default());
    assert_eq!(client.queues[0].lock().write(0, &[1; 512]), IO_ERROR);
    assert!(!served.registry.get(NAME).unwrap().waiting_for_space());

    let served = Served::new(device);
    let export = served.registry.get(NAME).unwrap();
    let client = served.connect(Options::default());
    let mut driver = client.queues[0].lock();
    let slot = driver.slot().unwrap();
    driver.prepare(slot, WRITE, 0, 512);
    driver.publish();
    wait_for("the write to wait", || export.waiting_for_space());
    served.server.withdraw(NAME, GRACE).unwrap();
    assert!(!export.waiting_for_space());
    assert!(driver.take().is_none(), "no answer, and no error");
}

#[test]
fn a_write_that_filled_the_store_is_done_after_the_guest_trimmed() {
    use muster_common::VolumeId;
    use muster_store::{Store, StoreConfig, VolumeSpec};
    const MIB: usize = 1 << 20;
    let store = Store::open(StoreConfig::new(ByteLen::mib(16))).unwrap();
    let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(64))).unwrap();
    let served = Served::new(volume.clone());
    let export = served.registry.get(NAME).unwrap();
    let client = served.connect(Options { queues: 2, ..Options::default() });
    let mut driver = client.queues[0].lock();
    let unique = |index: usize| -> Vec<u8> {
        (0..MIB / 8).flat_map(|word| ((index * MIB + word) as u64 * 0x9e37_79b9 + 1).to_le_bytes()).collect()
    };
    let mut written = 0;
    while !export.waiting_for_space() {
        assert!(written < 64, "a store of 16 MiB takes no 64 MiB");
        let slot = driver.slot().unwrap();
        driver.put(driver.data(slot), &unique(written));
        driver.prepare(slot, WRITE, (written * MIB / 512) as u64, MIB as u32);
        driver.publish();
        written += 1;
        let mut done = None;
        wait_for("an answer or no space", || {
            done = driver.take();
            done.is_some() || export.waiting_for_space()
        });
        assert!(done.is_none_or(|done| done.status == OK));
    }
    assert_eq!(client.queues[1].lock().range(DISCARD, 0, 2048, 0), OK);
    assert_eq!(driver.wait(soon()).expect("the write that waited").status, OK);
    let mut back = vec![0; MIB];
    volume.read_at(((written - 1) * MIB) as u64, &mut back).unwrap();
    assert!(back == unique(written - 1));
    assert!(store.audit().is_exact());
}

#[test]
fn limits_hold_and_can_be_changed_while_requests_wait() {
    let served = Served::new(memory(ByteLen::mib(1)));
    let export = served.registry.get(NAME).unwrap();
    let client = served.connect(Options::default());
    let mut driver = client.queues[0].lock();
    let limits = |requests| Limits {
        requests_per_second: NonZeroU64::new(requests),
        bytes_per_second: None,
        burst: Duration::ZERO,
    };
    export.set_limits(limits(500));
    let start = Instant::now();
    for _ in 0..50 {
        assert_eq!(driver.read(0, &mut [0; 512]), OK);
    }
    // The first passes at once; each other one not before its time.
    assert!(start.elapsed() >= Duration::from_millis(98), "{:?}", start.elapsed());

    export.set_limits(Limits { bytes_per_second: NonZeroU64::new(1), ..limits(0) });
    assert_eq!(driver.read(0, &mut [0; 512]), OK);
    assert_eq!(driver.ask(FLUSH, 0, 0).status, OK, "a flush does not wait");
    let before = export.statistics().throttled;
    let slot = driver.slot().unwrap();
    driver.prepare(slot, READ, 0, 512);
    driver.publish();
    wait_for("the read to wait for its turn", || export.statistics().throttled > before);
    assert!(driver.take().is_none());
    export.set_limits(Limits::default());
    assert_eq!(driver.wait(soon()).unwrap().status, OK);
}

#[test]
fn a_frontend_is_told_of_a_new_size_and_can_use_it() {
    struct Told(AtomicUsize);
    impl vhost::vhost_user::VhostUserFrontendReqHandler for Told {
        fn handle_config_change(&self) -> vhost::vhost_user::HandlerResult<u64> {
            self.0.fetch_add(1, Relaxed);
            Ok(0)
        }
    }
    struct RawFd(std::os::fd::RawFd);
    impl std::os::fd::AsRawFd for RawFd {
        fn as_raw_fd(&self) -> std::os::fd::RawFd {
            self.0
        }
    }
    let device = Puppet::new(ByteLen::mib(1));
    let served = Served::new(device.clone());
    assert!(!served.server.notify_resize(NAME).unwrap(), "nobody to tell");
    assert!(matches!(served.server.notify_resize("nobody"), Err(VhostError::Unknown(_))));
    let mut client = served.connect(Options::default());
    let told = Arc::new(Told(AtomicUsize::new(0)));
    let mut channel = vhost::vhost_user::FrontendReqHandler::new(Arc::clone(&told)).unwrap();
    client.frontend.set_backend_request_fd(&RawFd(channel.get_tx_raw_fd())).unwrap();
    channel.handle_request().unwrap();
    assert_eq!(told.0.swap(0, Relaxed), 1, "what nobody could be told before");
    let queue = Arc::clone(&client.queues[0]);
    assert_eq!(queue.lock().write(2048, &[1; 512]), IO_ERROR);
    device.size.store(2 << 20, Relaxed);
    assert!(served.server.notify_resize(NAME).unwrap());
    channel.handle_request().unwrap();
    assert_eq!(told.0.load(Relaxed), 1);
    client.config = client.read_config();
    assert_eq!(client.capacity(), 2 << 20);
    assert_eq!(queue.lock().write(2048, &[1; 512]), OK);
}

#[test]
fn a_queue_whose_driver_breaks_the_rules_stops_alone_and_can_be_started_again() {
    let events = Arc::new(Mutex::new(Vec::new()));
    let served = Served::with(memory(ByteLen::mib(1)), |config| {
        config.threads = 1;
        let events = Arc::clone(&events);
        config.observer = Some(Arc::new(move |_, event| events.lock().push(event)));
    });
    let mut client = served.connect(Options { queues: 2, ..Options::default() });
    let (first, second) = (Arc::clone(&client.queues[0]), Arc::clone(&client.queues[1]));
    type Break = fn(&mut Driver);
    let breaks: [(&str, Break); 9] = [
        ("a chain without end", |driver| {
            driver.descriptor(0, Driver::guest(0), 16, 1, 1);
            driver.descriptor(1, Driver::guest(0), 16, 1, 0);
            driver.offer(0);
        }),
        ("a head beyond the table", |driver| driver.offer(driver.size)),
        ("a next one beyond the table", |driver| {
            driver.descriptor(0, Driver::guest(0), 16, 1, driver.size);
            driver.offer(0);
        }),
        ("a buffer outside of memory", |driver| {
            driver.descriptor(0, frontend::GUEST_BASE - 16, 32, 0, 0);
            driver.offer(0);
        }),
        ("a buffer that wraps around", |driver| {
            driver.descriptor(0, u64::MAX - 3, 16, 0, 0);
            driver.offer(0);
        }),
        ("an empty buffer", |driver| {
            driver.descriptor(0, Driver::guest(0), 0, 0, 0);
            driver.offer(0);
        }),
        ("no status byte", |driver| {
            driver.descriptor(0, Driver::guest(0), 16, 0, 0);
            driver.offer(0);
        }),
        ("an indirect table of no whole entries", |driver| {
            driver.descriptor(0, Driver::guest(0), 24, 4, 0);
            driver.offer(0);
        }),
        ("more requests than there are", |driver| driver.next = driver.next.wrapping_add(driver.size + 1)),
    ];
    for (index, (what, break_it)) in breaks.into_iter().enumerate() {
        let mut driver = first.lock();
        assert_eq!(driver.write(1, &[index as u8 + 1; 512]), OK, "before {what}");
        let next = driver.next;
        break_it(&mut driver);
        driver.publish();
        wait_for(what, || events.lock().len() > index);
        assert!(matches!(events.lock()[index], ExportEvent::QueueBroken { queue: 0 }), "{what}");
        assert_eq!(driver.error.read().unwrap(), 1, "{what}");
        assert!(driver.take().is_none(), "{what}");
        let mut back = [0; 512];
        assert_eq!(second.lock().read(1, &mut back), OK, "{what}");
        assert_eq!(back, [index as u8 + 1; 512]);
        // The driver gives up on the queue and sets it up anew.
        assert_eq!(client.frontend.get_vring_base(0).unwrap(), u32::from(next), "{what}");
        driver.next = next;
        driver.withdraw_offers();
        drop(driver);
        client.start_queue(0);
    }
    assert_eq!(first.lock().read(1, &mut [0; 512]), OK);
    assert!(!served.registry.get(NAME).unwrap().is_fenced());
}

#[test]
fn a_guest_that_scribbles_over_its_rings_disturbs_nobody_else() {
    let served = Served::with(memory(ByteLen::mib(4)), |config| config.threads = 1);
    served.registry.add("victim", memory(ByteLen::mib(4))).unwrap();
    let victim = Client::connect(&served.server.serve("victim").unwrap(), Options::default());
    let options = Options { slot_bytes: 4096, ..Options::default() };
    let done = AtomicBool::new(false);
    let rounds = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = conformance::Random(7);
            let mut client = served.connect(options);
            let queue = Arc::clone(&client.queues[0]);
            while !done.load(Relaxed) || rounds.load(Relaxed) < 100 {
                let mut driver = queue.lock();
                for _ in 0..20 {
                    let slot = driver.slot().unwrap();
                    let kind = [READ, WRITE, FLUSH, GET_ID, DISCARD, WRITE_ZEROES][random.below(6) as usize];
                    driver.prepare(slot, kind, random.below(8000), 512);
                }
                driver.publish();
                // Anywhere in rings, headers and tables, while requests are served from them.
                for _ in 0..200 {
                    driver.put(random.below(0x2000) as usize, &[random.next_u64() as u8]);
                }
                // Until it stopped, or went through with it; then all is set up anew.
                client.frontend.get_vring_base(0).unwrap();
                driver.reset();
                drop(driver);
                client.inflight = None;
                client.reconnect(&served.socket);
                rounds.fetch_add(1, Relaxed);
            }
        });
        let mut driver = victim.queues[0].lock();
        for round in 0..2000u64 {
            let data = [round as u8; 4096];
            assert_eq!(driver.write(round % 1000 * 8, &data), OK);
            let mut back = [0; 4096];
            assert_eq!(driver.read(round % 1000 * 8, &mut back), OK);
            assert_eq!(back, data);
        }
        done.store(true, Relaxed);
    });
    for export in served.registry.exports() {
        assert!(!export.is_fenced(), "{export:?}");
        wait_for("the gauge to return", || export.statistics().in_flight == 0);
    }
    assert_eq!(served.registry.statistics("victim").unwrap().of(Operation::Write).errors, 0);
}

#[test]
fn a_frontend_that_talks_nonsense_is_turned_away_and_the_next_one_served() {
    use std::io::{Read, Write};
    let served = Served::new(memory(ByteLen::mib(1)));
    let message = |code: u32, flags: u32, body: &[u8]| -> Vec<u8> {
        let header = [code, flags, body.len() as u32].map(u32::to_ne_bytes).concat();
        [header, body.to_vec()].concat()
    };
    let long = |value: u64| value.to_ne_bytes();
    let ring = |index: u32, value: u32| [index.to_ne_bytes(), value.to_ne_bytes()].concat();
    let nonsense: Vec<Vec<u8>> = vec![
        vec![0xff; 4096],
        vec![1, 0],
        message(1, 1, &[]).into_iter().take(7).collect(),
        message(21, 1, &[]),
        message(2, 1, &long(u64::MAX)),
        message(8, 1, &ring(0, 3)),
        message(8, 1, &ring(0, 1 << 20)),
        message(8, 1, &ring(1000, 128)),
        message(12, 1, &long(0x100)),
        message(12, 1, &long(0x1ff)),
        message(11, 1, &ring(999, 0)),
        message(9, 1, &[7; 40]),
        message(5, 1, &[0; 8]),
        message(31, 1, &[0; 24]),
        message(32, 1, &[0xff; 24]),
    ];
    for bytes in nonsense {
        let mut stream = std::os::unix::net::UnixStream::connect(&served.socket).unwrap();
        stream.set_read_timeout(Some(GRACE)).unwrap();
        let _ = stream.write_all(&bytes);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        let end = stream.read_to_end(&mut rest);
        assert!(end.is_ok_and(|read| read == 0) || rest.is_empty(), "{bytes:02x?}");
    }
    let client = served.connect(Options::default());
    assert_eq!(client.queues[0].lock().write(0, &[1; 512]), OK);
    assert!(!served.registry.get(NAME).unwrap().is_fenced());
}

#[test]
fn memory_that_comes_is_used_and_memory_that_goes_is_not() {
    let events = Arc::new(AtomicUsize::new(0));
    let served = Served::with(memory(ByteLen::mib(1)), |config| {
        let events = Arc::clone(&events);
        config.observer = Some(Arc::new(move |_, _| {
            events.fetch_add(1, Relaxed);
        }));
    });
    let mut client = served.connect(Options::default());
    assert!(client.frontend.get_max_mem_slots().unwrap() >= 32);
    let (map, place) = frontend::more_memory(0x8000_0000, 1 << 20);
    client.frontend.add_mem_region(&place.0).unwrap();
    let queue = Arc::clone(&client.queues[0]);
    let mut driver = queue.lock();
    frontend::fill(&map, 4096, &[5; 512]);
    let through = |driver: &mut Driver, kind, address: u64| {
        let slot = driver.slot().unwrap();
        driver.prepare_at(slot, kind, 0, address, 512);
        driver.publish();
        slot
    };
    through(&mut driver, WRITE, 0x8000_1000);
    assert_eq!(driver.wait(soon()).unwrap().status, OK);
    let mut back = [0; 512];
    assert_eq!(driver.read(0, &mut back), OK);
    assert_eq!(back, [5; 512]);
    assert!(client.frontend.add_mem_region(&place.0).is_err() || client.frontend_is_gone(), "it is there already");
    drop(driver);
    client.reconnect(&served.socket);
    let mut driver = queue.lock();
    through(&mut driver, WRITE, 0x8000_1000);
    wait_for("the queue to stop", || events.load(Relaxed) == 1);
}

#[test]
fn memory_that_could_shrink_is_refused() {
    let served = Served::new(memory(ByteLen::mib(1)));
    let mut client = served.connect(Options::default());
    let (_map, mut place) = frontend::more_memory(0x8000_0000, 1 << 20);
    let unsealed = tempfile::tempfile().unwrap();
    unsealed.set_len(1 << 20).unwrap();
    place.0.mmap_handle = std::os::fd::AsRawFd::as_raw_fd(&unsealed);
    assert!(client.frontend.add_mem_region(&place.0).is_err());
}
