//! vhost-user-blk when the connection or the server goes: nothing in flight is lost, no guest sees an error.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;
mod frontend;
mod served;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use common::{NAME, wait_for};
use frontend::{Client, OK, Options, READ, WRITE};
use muster_block::{
    BlockDevice, BlockError, BlockErrorKind, Extent, ExtentKind, Geometry, WriteFlags, ZeroFlags, conformance,
};
use muster_common::ByteLen;
use muster_export::Registry;
use muster_export::vhost::{VhostConfig, VhostServer};
use served::{Puppet, Served, memory, soon};
use vhost::VhostBackend;

#[test]
fn requests_in_flight_when_a_connection_is_lost_are_done_on_the_next_one() {
    let device = Puppet::new(ByteLen::mib(1));
    let served = Served::new(device.clone());
    let mut client = served.connect(Options::default());
    let queue = Arc::clone(&client.queues[0]);
    device.hold(true);
    let mut driver = queue.lock();
    for sector in 0..10 {
        let slot = driver.slot().unwrap();
        driver.put(driver.data(slot), &[sector as u8 + 1; 512]);
        driver.prepare(slot, WRITE, sector, 512);
    }
    driver.publish();
    wait_for("the first write to be inside the device", || device.inside.load(Relaxed) == 1);
    drop(driver);
    let reconnected = std::thread::spawn({
        let socket = served.socket.clone();
        move || {
            client.reconnect(&socket);
            client
        }
    });
    // The new connection waits until the old one's request has left the device.
    device.hold(false);
    let client = reconnected.join().unwrap();
    let mut driver = queue.lock();
    for _ in 0..10 {
        assert_eq!(driver.wait(soon()).expect("each is answered").status, OK);
    }
    assert!(driver.take().is_none(), "and answered once");
    let contents = device.inner.contents();
    assert!((0..10).all(|sector| contents[sector * 512..][..512].iter().all(|byte| *byte == sector as u8 + 1)));
    drop(driver);
    drop(client);
}

#[test]
fn requests_another_server_took_are_done_again_first_and_in_its_order() {
    use std::os::unix::fs::FileExt;
    let served = Served::new(memory(ByteLen::mib(1)));
    let mut client = served.connect(Options::default());
    let queue = Arc::clone(&client.queues[0]);
    client.frontend.get_vring_base(0).unwrap();
    let mut driver = queue.lock();
    let mut slots = Vec::new();
    for sector in 0..4 {
        let slot = driver.slot().unwrap();
        driver.prepare(slot, READ, sector, 512);
        slots.push(slot);
    }
    driver.publish();
    // As a server leaves it that took all four and has answered the second.
    let record = &client.inflight.as_ref().unwrap().1;
    for (counter, index) in [(7u64, 3), (8, 0), (9, 2)] {
        let entry = 16 + 16 * u64::from(slots[index] * 3);
        record.write_all_at(&counter.to_le_bytes(), entry + 8).unwrap();
        record.write_all_at(&[1], entry).unwrap();
    }
    driver.answer(slots[1] * 3);
    record.write_all_at(&1u16.to_le_bytes(), 14).unwrap();
    drop(driver);
    client.start_queue(0);
    let mut driver = queue.lock();
    let order: Vec<u16> = (0..4).map(|_| driver.wait(soon()).unwrap().slot).collect();
    assert_eq!(order, [slots[1], slots[3], slots[0], slots[2]]);
    assert_eq!(driver.read(0, &mut [0; 512]), OK);
}

/// A disk that survives its process.
struct FileDevice(std::fs::File);

impl BlockDevice for FileDevice {
    fn geometry(&self) -> Geometry {
        Geometry::memory(ByteLen(self.0.metadata().map_or(0, |metadata| metadata.len())), false)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.geometry().check(offset, buf.len() as u64)?;
        std::os::unix::fs::FileExt::read_exact_at(&self.0, buf, offset)
            .map_err(|error| BlockError::with_source(BlockErrorKind::Io, "read the file", error))
    }
    fn write_at(&self, offset: u64, data: &[u8], _flags: WriteFlags) -> Result<(), BlockError> {
        self.geometry().check(offset, data.len() as u64)?;
        std::os::unix::fs::FileExt::write_all_at(&self.0, data, offset)
            .map_err(|error| BlockError::with_source(BlockErrorKind::Io, "write the file", error))
    }
    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> Result<(), BlockError> {
        self.write_at(offset, &vec![0; len as usize], WriteFlags::default())
    }
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.write_zeroes(offset, len, ZeroFlags::default())
    }
    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }
    fn block_status(&self, _offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        out.clear();
        Extent::push(out, len, ExtentKind::Data);
        Ok(())
    }
}

const CHILD: &str = "MUSTER_VHOST_CHILD";

/// Not a test by itself: the process that the next one kills.
#[test]
fn child_that_serves_a_file() {
    let Some(directory) = std::env::var_os(CHILD) else { return };
    let directory = PathBuf::from(directory);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(directory.join("disk")).unwrap();
    let served = Registry::new();
    served.add(NAME, Arc::new(FileDevice(file))).unwrap();
    let server = VhostServer::start(VhostConfig::new(directory.join("vu")), Arc::new(served)).unwrap();
    server.serve(NAME).unwrap();
    // Until the other process closes our input, or kills us.
    let _ = std::io::stdin().read_line(&mut String::new());
}

struct Child(std::process::Child);

impl Child {
    fn start(directory: &std::path::Path) -> Child {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["child_that_serves_a_file", "--exact"]).env(CHILD, directory);
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
        Child(command.spawn().unwrap())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn killing_the_server_again_and_again_under_load_loses_no_write_and_gives_no_error() {
    const BLOCKS: u64 = 1024;
    const KILLS: u64 = 12;
    let directory = tempfile::tempdir().unwrap();
    std::fs::File::create(directory.path().join("disk")).unwrap().set_len(BLOCKS * 4096).unwrap();
    let socket = directory.path().join("vu").join(NAME.replacen('-', "", 4));
    let mut child = Child::start(directory.path());
    wait_for("the child to listen", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let options = Options { queues: 2, slot_bytes: 8192, ..Options::default() };
    let mut client = Client::connect(&socket, options);
    let queues = client.queues.clone();

    let mut random = conformance::Random(1);
    // What each block holds, and the write that is on its way to it.
    let mut expected = vec![0u64; BLOCKS as usize];
    let mut pending: Vec<BTreeMap<u16, (u64, u64)>> = vec![BTreeMap::new(); 2];
    let mut busy = vec![false; BLOCKS as usize];
    let (mut written, mut answered) = (0u64, 0u64);
    for kill in 0..=KILLS {
        let last = kill == KILLS;
        let until = answered + 500 + random.below(3000);
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            assert!(Instant::now() < deadline, "after {kill} kills: {pending:?} are not answered");
            for (index, queue) in queues.iter().enumerate() {
                let mut driver = queue.lock();
                while let Some(done) = driver.take() {
                    assert_eq!(done.status, OK, "after {kill} kills");
                    let (block, value) = pending[index].remove(&done.slot).expect("answered once");
                    expected[block as usize] = value;
                    busy[block as usize] = false;
                    answered += 1;
                }
                let mut offered = false;
                while answered < until && pending[index].len() < 32 {
                    let block = random.below(BLOCKS);
                    if busy[block as usize] {
                        continue;
                    }
                    let slot = driver.slot().unwrap();
                    written += 1;
                    driver.put(driver.data(slot), &written.to_le_bytes().repeat(512));
                    driver.prepare(slot, WRITE, block * 8, 4096);
                    pending[index].insert(slot, (block, written));
                    busy[block as usize] = true;
                    offered = true;
                }
                if offered {
                    driver.publish();
                }
            }
            // The last round ends when all is answered, the others in the middle.
            if answered >= until && (!last || pending.iter().all(BTreeMap::is_empty)) {
                break;
            }
        }
        if !last {
            child = {
                drop(child);
                Child::start(directory.path())
            };
            client.reconnect(&socket);
        }
    }
    assert!(written >= answered && answered > KILLS * 500);
    let contents = std::fs::read(directory.path().join("disk")).unwrap();
    for (block, value) in expected.iter().enumerate() {
        assert!(contents[block * 4096..][..4096] == value.to_le_bytes().repeat(512), "block {block}");
    }
}
