//! The other side of vhost-user-blk: a frontend (the `vhost` crate's) with memory of its own, and a driver for its queues.
//! Small and obvious, and as fast as a driver that polls can be: the benchmark uses it too.
#![allow(dead_code, reason = "each program uses its part")]
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use muster_block::{BlockDevice, BlockError, BlockErrorKind, Extent, ExtentKind, Geometry, WriteFlags, ZeroFlags};
use muster_common::ByteLen;
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub const READ: u32 = 0;
pub const WRITE: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IO_ERROR: u8 = 1;
pub const UNSUPPORTED: u8 = 2;
/// What the driver puts where the status goes.
pub const NO_STATUS: u8 = 0xee;

pub const F_FLUSH: u64 = 1 << 9;
pub const F_EVENT_INDEX: u64 = 1 << 29;
pub const F_INDIRECT: u64 = 1 << 28;
const F_VERSION_1: u64 = 1 << 32;

/// Guest memory starts here: not at 0, so that an address taken for an offset is found out.
pub const GUEST_BASE: u64 = 0x4000_0000;
/// Rings and headers of a queue.
const QUEUE_BYTES: usize = 0x20000;

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub queues: usize,
    pub queue_size: u16,
    /// Data one request can have.
    pub slot_bytes: usize,
    /// Features not to take, though offered.
    pub without: u64,
    pub inflight: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { queues: 1, queue_size: 128, slot_bytes: 1 << 20, without: 0, inflight: true }
    }
}

/// A connected frontend, its memory and its queues.
pub struct Client {
    pub frontend: Frontend,
    pub options: Options,
    pub features: u64,
    pub config: Vec<u8>,
    pub memory: Arc<MmapRegion<()>>,
    file: File,
    pub queues: Vec<Arc<Mutex<Driver>>>,
    pub inflight: Option<(VhostUserInflight, File)>,
}

impl Client {
    pub fn connect(path: &Path, options: Options) -> Client {
        let queue_bytes = QUEUE_BYTES + options.slot_bytes * Driver::slots(options.queue_size);
        let size = queue_bytes * options.queues;
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, size as u64).unwrap();
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        let file = File::from(fd);
        let memory = Arc::new(MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), size).unwrap());
        let queues = (0..options.queues)
            .map(|index| Driver::new(Arc::clone(&memory), index * queue_bytes, options))
            .map(|driver| Arc::new(Mutex::new(driver)))
            .collect();
        let frontend = Frontend::connect(path, options.queues as u64).unwrap();
        let mut client =
            Client { frontend, options, features: 0, config: Vec::new(), memory, file, queues, inflight: None };
        client.set_up();
        client
    }

    /// A new connection for the same memory, rings and record, as QEMU makes one when the backend has gone.
    pub fn reconnect(&mut self, path: &Path) {
        let deadline = Instant::now() + Duration::from_secs(20);
        self.frontend = loop {
            match Frontend::connect(path, self.options.queues as u64) {
                Ok(frontend) => break frontend,
                Err(error) => assert!(Instant::now() < deadline, "reconnect: {error}"),
            }
            std::thread::park_timeout(Duration::from_millis(2));
        };
        self.set_up();
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: self.memory.size() as u64,
            userspace_addr: self.memory.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    fn set_up(&mut self) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_ne!(offered & protocol, 0);
        assert_ne!(offered & F_VERSION_1, 0);
        let protocols = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        // the peer of the benchmark has fewer
        frontend.set_protocol_features(protocols & wanted).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.features = offered & !self.options.without;
        frontend.set_features(self.features).unwrap();
        assert!(frontend.get_queue_num().unwrap() >= self.options.queues as u64);
        self.config = self.read_config();
        let (queues, size) = (self.options.queues as u16, self.options.queue_size);
        if self.options.inflight && protocols.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            if self.inflight.is_none() {
                let asked = VhostUserInflight::new(0, 0, queues, size);
                self.inflight = Some(self.frontend.get_inflight_fd(&asked).unwrap());
            }
            let (shape, file) = self.inflight.as_ref().unwrap();
            self.frontend.set_inflight_fd(shape, file.as_raw_fd()).unwrap();
        }
        let region = self.region();
        self.frontend.set_mem_table(&[region]).unwrap();
        for index in 0..self.options.queues {
            self.start_queue(index);
        }
    }

    /// Starts a queue where its used ring stands.
    pub fn start_queue(&mut self, index: usize) {
        let mut driver = self.queues[index].lock();
        driver.event_index = self.features & F_EVENT_INDEX != 0;
        let user = |at: usize| self.memory.as_ptr() as u64 + at as u64;
        let config = VringConfigData {
            queue_max_size: driver.size,
            queue_size: driver.size,
            flags: 0,
            desc_table_addr: user(driver.descriptors),
            used_ring_addr: user(driver.used),
            avail_ring_addr: user(driver.available),
            log_addr: None,
        };
        self.frontend.set_vring_num(index, driver.size).unwrap();
        self.frontend.set_vring_base(index, driver.used_index()).unwrap();
        self.frontend.set_vring_addr(index, &config).unwrap();
        self.frontend.set_vring_call(index, &driver.call).unwrap();
        self.frontend.set_vring_err(index, &driver.error).unwrap();
        self.frontend.set_vring_kick(index, &driver.kick).unwrap();
        self.frontend.set_vring_enable(index, true).unwrap();
    }

    pub fn read_config(&mut self) -> Vec<u8> {
        self.frontend.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap().1
    }

    /// Whether the backend has closed the connection.
    pub fn frontend_is_gone(&self) -> bool {
        self.frontend.get_features().is_err()
    }

    pub fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.config[..8].try_into().unwrap()) * 512
    }
}

/// A region of memory, and the file behind it.
pub struct MorePlace(pub VhostUserMemoryRegionInfo, File);

/// Another region of guest memory.
pub fn more_memory(guest: u64, size: usize) -> (Arc<MmapRegion<()>>, MorePlace) {
    let fd = memfd_create("more", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size as u64).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    let file = File::from(fd);
    let map = Arc::new(MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), size).unwrap());
    let place = VhostUserMemoryRegionInfo {
        guest_phys_addr: guest,
        memory_size: size as u64,
        userspace_addr: map.as_ptr() as u64,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    (map, MorePlace(place, file))
}

pub fn fill(map: &MmapRegion<()>, at: usize, bytes: &[u8]) {
    map.as_volatile_slice().write_slice(bytes, at).unwrap();
}

/// The driver of one queue. Each slot has three descriptors and a stretch of memory for data.
pub struct Driver {
    memory: Arc<MmapRegion<()>>,
    pub size: u16,
    pub descriptors: usize,
    pub available: usize,
    pub used: usize,
    headers: usize,
    data: usize,
    slot_bytes: usize,
    free: Vec<u16>,
    pub next: u16,
    pub last_used: u16,
    pub event_index: bool,
    /// The driver looks at the used ring by itself and wants no calls.
    pub polls: bool,
    pub kick: EventFd,
    pub call: EventFd,
    pub error: EventFd,
    pub kicks: u64,
    calls: Epoll,
}

/// An answered request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Done {
    pub slot: u16,
    pub len: u32,
    pub status: u8,
}

impl Driver {
    pub fn slots(queue_size: u16) -> usize {
        usize::from(queue_size) / 3
    }

    fn new(memory: Arc<MmapRegion<()>>, base: usize, options: Options) -> Driver {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        let size = usize::from(options.queue_size);
        let available = base + size * 16;
        let used = (available + 4 + 2 * size + 2).next_multiple_of(64);
        let headers = (used + 4 + 8 * size + 2).next_multiple_of(64);
        assert!(headers + 64 * Self::slots(options.queue_size) <= base + QUEUE_BYTES);
        let (call, calls) = (event(), Epoll::new().unwrap());
        calls.ctl(ControlOperation::Add, call.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        Driver {
            memory,
            calls,
            size: options.queue_size,
            descriptors: base,
            available,
            used,
            headers,
            data: base + QUEUE_BYTES,
            slot_bytes: options.slot_bytes,
            free: (0..Self::slots(options.queue_size) as u16).rev().collect(),
            next: 0,
            last_used: 0,
            event_index: false,
            polls: false,
            kick: event(),
            call,
            error: event(),
            kicks: 0,
        }
    }

    pub fn put(&self, at: usize, bytes: &[u8]) {
        self.memory.as_volatile_slice().write_slice(bytes, at).unwrap();
    }

    pub fn get(&self, at: usize, bytes: &mut [u8]) {
        self.memory.as_volatile_slice().read_slice(bytes, at).unwrap();
    }

    /// Has the kernel find memory for the slots' data now, not at the first request.
    pub fn touch(&self) {
        let bytes = self.slot_bytes * Self::slots(self.size);
        (self.data..self.data + bytes).step_by(4096).for_each(|at| self.put(at, &[0]));
    }

    fn load(&self, at: usize, order: Ordering) -> u16 {
        self.memory.as_volatile_slice().load(at, order).unwrap()
    }

    fn store(&self, at: usize, value: u16, order: Ordering) {
        self.memory.as_volatile_slice().store(value, at, order).unwrap();
    }

    pub fn used_index(&self) -> u16 {
        self.load(self.used + 2, Ordering::Acquire)
    }

    /// Where a slot's data is in the memory.
    pub fn data(&self, slot: u16) -> usize {
        self.data + usize::from(slot) * self.slot_bytes
    }

    fn header(&self, slot: u16) -> usize {
        self.headers + 64 * usize::from(slot)
    }

    pub fn guest(at: usize) -> u64 {
        GUEST_BASE + at as u64
    }

    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let word = u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.put(self.descriptors + 16 * usize::from(index), &word.to_le_bytes());
    }

    /// A slot that no request is in.
    pub fn slot(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// Makes a request of a slot, whose data is in place or will be; it is seen after [`Driver::publish`].
    pub fn prepare(&mut self, slot: u16, kind: u32, sector: u64, len: u32) {
        self.prepare_at(slot, kind, sector, Self::guest(self.data(slot)), len);
    }

    /// The same with data at any guest address.
    pub fn prepare_at(&mut self, slot: u16, kind: u32, sector: u64, address: u64, len: u32) {
        let (header, first) = (self.header(slot), slot * 3);
        let word = u128::from(kind) | u128::from(sector) << 64;
        self.put(header, &word.to_le_bytes());
        self.put(header + 16, &[NO_STATUS]);
        let incoming = matches!(kind, READ | GET_ID);
        if len > 0 {
            self.descriptor(first, Self::guest(header), 16, 1, first + 1);
            self.descriptor(first + 1, address, len, 1 | u16::from(incoming) << 1, first + 2);
        } else {
            self.descriptor(first, Self::guest(header), 16, 1, first + 2);
        }
        self.descriptor(first + 2, Self::guest(header + 16), 1, 2, 0);
        self.offer(first);
    }

    /// Puts a chain into the available ring.
    pub fn offer(&mut self, head: u16) {
        self.store(self.available + 4 + 2 * usize::from(self.next % self.size), head, Ordering::Relaxed);
        self.next = self.next.wrapping_add(1);
    }

    /// Shows the device what was offered; kicks if it wants that.
    pub fn publish(&mut self) {
        let old = self.load(self.available + 2, Ordering::Relaxed);
        self.store(self.available + 2, self.next, Ordering::Release);
        fence(Ordering::SeqCst);
        let kick = if self.event_index {
            let event = self.load(self.used + 4 + 8 * usize::from(self.size), Ordering::Relaxed);
            self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(old)
        } else {
            self.load(self.used, Ordering::Relaxed) & 1 == 0
        };
        if kick {
            self.kicks += 1;
            self.kick.write(1).unwrap();
        }
    }

    /// The next answer, if there is one.
    pub fn take(&mut self) -> Option<Done> {
        if self.used_index() == self.last_used {
            return None;
        }
        let mut entry = [0; 8];
        self.get(self.used + 4 + 8 * usize::from(self.last_used % self.size), &mut entry);
        self.last_used = self.last_used.wrapping_add(1);
        let word = u64::from_le_bytes(entry);
        let slot = (word as u32 / 3) as u16;
        let mut status = [0];
        self.get(self.header(slot) + 16, &mut status);
        self.free.push(slot);
        Some(Done { slot, len: (word >> 32) as u32, status: status[0] })
    }

    /// Takes back what was offered since [`Driver::next`] was set back.
    pub fn withdraw_offers(&mut self) {
        self.store(self.available + 2, self.next, Ordering::Release);
    }

    /// Forgets everything: empty rings, every slot free.
    pub fn reset(&mut self) {
        self.put(self.descriptors, &vec![0; QUEUE_BYTES]);
        (self.next, self.last_used) = (0, 0);
        self.free = (0..Self::slots(self.size) as u16).rev().collect();
        let _ = (self.kick.read(), self.call.read(), self.error.read());
    }

    /// Answers a chain as a server would.
    pub fn answer(&mut self, head: u16) {
        let used = self.used_index();
        let entry = u64::from(head) | 1 << 32;
        self.put(self.used + 4 + 8 * usize::from(used % self.size), &entry.to_le_bytes());
        self.store(self.used + 2, used.wrapping_add(1), Ordering::Release);
    }

    /// Asks to be called for the next answer, or for none for a long time.
    pub fn want_call(&self, wanted: bool) {
        if self.event_index {
            let event = if wanted { self.last_used } else { self.last_used.wrapping_sub(1) };
            self.store(self.available + 4 + 2 * usize::from(self.size), event, Ordering::Relaxed);
        } else {
            self.store(self.available, u16::from(!wanted), Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    /// Waits for an answer: by the call's descriptor, so that a lost call is a failed test.
    pub fn wait(&mut self, deadline: Instant) -> Option<Done> {
        loop {
            if let Some(done) = self.take() {
                return Some(done);
            }
            if self.polls {
                if Instant::now() > deadline {
                    return None;
                }
                std::hint::spin_loop();
                continue;
            }
            self.want_call(true);
            if self.used_index() != self.last_used {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let _ = self.calls.wait(left.as_millis() as i32 + 1, &mut [EpollEvent::default()]);
            let _ = self.call.read();
        }
    }

    /// One request from beginning to end. Panics when no answer comes.
    pub fn ask(&mut self, kind: u32, sector: u64, len: u32) -> Done {
        let slot = self.slot().expect("a free slot");
        self.ask_in(slot, kind, sector, len)
    }

    pub fn ask_in(&mut self, slot: u16, kind: u32, sector: u64, len: u32) -> Done {
        self.prepare(slot, kind, sector, len);
        self.publish();
        let done = self.wait(Instant::now() + Duration::from_secs(30)).expect("an answer");
        assert_eq!(done.slot, slot);
        done
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let slot = self.slot().expect("a free slot");
        self.put(self.data(slot), data);
        self.ask_in(slot, WRITE, sector, data.len() as u32).status
    }

    pub fn read(&mut self, sector: u64, data: &mut [u8]) -> u8 {
        let done = self.ask(READ, sector, data.len() as u32);
        if done.status == OK {
            assert_eq!(done.len as usize, data.len() + 1);
            self.get(self.data(done.slot), data);
        }
        done.status
    }

    pub fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let slot = self.slot().expect("a free slot");
        let word = u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96;
        self.put(self.data(slot), &word.to_le_bytes());
        self.ask_in(slot, kind, 0, 16).status
    }
}

/// The disk as its user sees it, as a device again: so that what any device must do can be asked of it over the wire.
/// The wire knows sectors; what is not aligned is read, changed and written, under a lock.
pub struct WireDevice {
    pub client: Mutex<Client>,
    queues: Vec<Arc<Mutex<Driver>>>,
    size: u64,
    unaligned: Mutex<()>,
}

impl WireDevice {
    pub fn new(client: Client) -> WireDevice {
        let size = client.capacity();
        let queues = client.queues.clone();
        WireDevice { client: Mutex::new(client), queues, size, unaligned: Mutex::new(()) }
    }

    fn with<R>(&self, use_it: impl FnOnce(&mut Driver) -> R) -> R {
        for queue in &self.queues {
            if let Some(mut queue) = queue.try_lock() {
                return use_it(&mut queue);
            }
        }
        use_it(&mut self.queues[0].lock())
    }

    fn check(status: u8) -> Result<(), BlockError> {
        match status {
            OK => Ok(()),
            other => Err(BlockError::new(BlockErrorKind::Io, format!("status {other}"))),
        }
    }

    fn change(&self, offset: u64, len: u64, change: impl FnOnce(&mut [u8])) -> Result<(), BlockError> {
        let _guard = self.unaligned.lock();
        let start = offset / 512 * 512;
        let end = (offset + len).next_multiple_of(512);
        let mut bytes = vec![0; (end - start) as usize];
        self.read_at(start, &mut bytes)?;
        change(&mut bytes[(offset - start) as usize..(offset - start + len) as usize]);
        self.write_at(start, &bytes, WriteFlags::default())
    }

    fn zero(&self, kind: u32, flags: u32, offset: u64, len: u64) -> Result<(), BlockError> {
        self.geometry().check(offset, len)?;
        if !offset.is_multiple_of(512) || !len.is_multiple_of(512) {
            return self.change(offset, len, |bytes| bytes.fill(0));
        }
        Self::check(self.with(|driver| driver.range(kind, offset / 512, (len / 512) as u32, flags)))
    }
}

impl BlockDevice for WireDevice {
    fn geometry(&self) -> Geometry {
        Geometry::memory(ByteLen(self.size), false)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.geometry().check(offset, buf.len() as u64)?;
        if !offset.is_multiple_of(512) || !buf.len().is_multiple_of(512) {
            let start = offset / 512 * 512;
            let end = (offset + buf.len() as u64).next_multiple_of(512);
            let mut bytes = vec![0; (end - start) as usize];
            self.read_at(start, &mut bytes)?;
            let from = (offset - start) as usize;
            buf.copy_from_slice(&bytes[from..from + buf.len()]);
            return Ok(());
        }
        for (index, piece) in buf.chunks_mut(1 << 20).enumerate() {
            let sector = offset / 512 + index as u64 * 2048;
            Self::check(self.with(|driver| driver.read(sector, piece)))?;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
        self.geometry().check(offset, data.len() as u64)?;
        if !offset.is_multiple_of(512) || !data.len().is_multiple_of(512) {
            return self.change(offset, data.len() as u64, |bytes| bytes.copy_from_slice(data));
        }
        for (index, piece) in data.chunks(1 << 20).enumerate() {
            let sector = offset / 512 + index as u64 * 2048;
            Self::check(self.with(|driver| driver.write(sector, piece)))?;
        }
        if flags.fua { self.flush() } else { Ok(()) }
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
        self.zero(WRITE_ZEROES, u32::from(!flags.no_hole), offset, len)
    }

    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.zero(DISCARD, 0, offset, len)
    }

    fn flush(&self) -> Result<(), BlockError> {
        Self::check(self.with(|driver| driver.ask(FLUSH, 0, 0).status))
    }

    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        // virtio-blk has no such request.
        self.geometry().check(offset, len)?;
        out.clear();
        Extent::push(out, len, ExtentKind::Data);
        Ok(())
    }
}
