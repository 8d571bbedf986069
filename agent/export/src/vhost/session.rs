//! One frontend's connection: what it says about memory, rings and descriptors, and the queues the pool serves.
//!
//! The messages are read and checked by the `vhost` crate. Two parts of the protocol are ours, because neither `vhost`
//! nor `vhost-user-backend` has them: the record of requests in flight, and telling the frontend that the configuration
//! has changed.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use muster_common::Chain;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut,
};

use super::Settings;
use super::event::Event;
use super::inflight::{self, Inflight};
use super::log::Log;
use super::memory::{Memory, Place};
use super::pool::{Pool, Slot};
use super::queue::{Context, Queue};
use super::request::{self, feature};
use super::ring::MAX_QUEUE_SIZE;
use crate::registry::Entered;

/// Regions of memory a frontend may have: what QEMU and its own library agree on.
const MAX_REGIONS: usize = 509;
/// Number of the message that brings the channel to the frontend.
const SET_BACKEND_REQ_FD: u32 = 21;
/// Configuration change, version 1, no body: a whole message on that channel.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The way to the frontend.
#[derive(Default)]
pub(crate) struct Channel(parking_lot::Mutex<Way>);

#[derive(Default)]
struct Way {
    /// If the frontend gave one.
    fd: Option<OwnedFd>,
    /// It could not be told that the configuration has changed. One that was connected before and comes back reads only what
    /// it is told to.
    owed: bool,
}

impl Channel {
    /// Has the frontend read the configuration again. `false` when it cannot be told now: then it is when it comes back.
    pub(crate) fn config_changed(&self) -> bool {
        let mut way = self.0.lock();
        way.owed = true;
        way.tell()
    }

    fn set(&self, fd: Option<OwnedFd>) {
        let mut way = self.0.lock();
        way.fd = fd;
        way.tell();
    }
}

impl Way {
    /// Tells what is owed, if there is a way to.
    fn tell(&mut self) -> bool {
        let Some(fd) = self.fd.as_ref().filter(|_| self.owed) else { return false };
        let message: Vec<u8> = CONFIG_CHANGE.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let told = send(fd, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) == Ok(message.len());
        self.owed = !told;
        told
    }
}

/// Serves a connected frontend until it leaves, is told to, or breaks the protocol.
pub(crate) fn serve(stream: UnixStream, entered: Entered, settings: &Settings, pool: Arc<Pool>, channel: &Channel) {
    let name = entered.export.name().to_owned();
    let peek = match stream.try_clone() {
        Ok(peek) => peek,
        Err(error) => {
            tracing::warn!(export = name, err = %error, "duplicate a frontend's socket");
            return;
        }
    };
    let device = Arc::new(Mutex::new(Device::new(entered, settings.clone(), pool)));
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&device));
    tracing::debug!(export = name, "frontend connected");
    loop {
        match channel_offered(&peek) {
            Ok(Some(fd)) => channel.set(Some(fd)),
            Ok(None) => {}
            Err(error) => tracing::warn!(export = name, err = %error, "take the frontend's channel"),
        }
        match handler.handle_request() {
            Ok(()) => {}
            Err(VhostError::Disconnected | VhostError::SocketBroken(_)) => break,
            Err(VhostError::ReqHandlerError(error)) => {
                tracing::warn!(export = name, err = %Chain(&error), "frontend refused");
                break;
            }
            Err(error) => {
                tracing::warn!(export = name, err = %error, "frontend refused");
                break;
            }
        }
    }
    channel.set(None);
    device.lock().unwrap_or_else(std::sync::PoisonError::into_inner).close();
    tracing::debug!(export = name, "frontend left");
}

/// Waits for a message. When it brings the channel to the frontend, returns it: `vhost` takes the descriptor out of the
/// message and has no use for it that we have, but looking at a message without taking it makes a second one.
fn channel_offered(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut code = [0; 4];
    // An error is found again when the message is taken.
    let Ok((_, 4)) = recv(socket, &mut code[..], RecvFlags::PEEK) else { return Ok(None) };
    if u32::from_ne_bytes(code) != SET_BACKEND_REQ_FD {
        return Ok(None);
    }
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [io::IoSliceMut::new(&mut code)];
    recvmsg(socket, &mut iov, &mut ancillary, RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok(fds.next().and_then(|mut fds| fds.next()))
}

/// The device as one frontend sees it.
struct Device {
    entered: Entered,
    settings: Settings,
    pool: Arc<Pool>,
    slots: Vec<Arc<Slot>>,
    memory: Memory,
    features: u64,
    inflight: Option<Inflight>,
    log: Option<Arc<Log>>,
}

fn invalid(what: &str) -> VhostError {
    VhostError::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, what.to_owned()))
}

impl Device {
    fn new(entered: Entered, settings: Settings, pool: Arc<Pool>) -> Device {
        let context = Arc::new(Context {
            export: Arc::clone(&entered.export),
            name: super::device_name(entered.export.name()),
            space_wait: settings.space_wait,
            observer: settings.observer.clone(),
        });
        let queue = |index| pool.enlist(Queue::new(Arc::clone(&context), index), Arc::clone(&entered.export));
        let slots = (0..settings.queues).map(queue).collect();
        Device { entered, settings, pool, slots, memory: Memory::default(), features: 0, inflight: None, log: None }
    }

    fn offered(&self) -> u64 {
        request::features(&self.entered.export.geometry())
    }

    /// Ends everything; afterwards no thread uses the device or the guest's memory.
    fn close(&mut self) {
        for slot in &self.slots {
            self.pool.close(slot);
        }
        self.memory = Memory::default();
    }

    fn slot(&self, index: usize) -> VhostResult<&Arc<Slot>> {
        self.slots.get(index).ok_or(VhostError::InvalidParam)
    }

    /// Changes a queue and has a thread look at it.
    fn change<R>(&self, index: usize, change: impl FnOnce(&mut Queue) -> R) -> VhostResult<R> {
        Ok(self.pool.change(self.slot(index)?, change))
    }

    fn change_all(&self, change: impl Fn(&mut Queue)) {
        for index in 0..self.slots.len() {
            let _ = self.change(index, &change);
        }
    }

    fn set_memory(&mut self, memory: Memory) {
        // A queue that was asked to stop using the old memory has stopped when `change` returns.
        self.change_all(|queue| queue.memory = memory.clone());
        self.memory = memory;
    }
}

/// A descriptor that came with a message, if one did.
fn event(file: Option<File>, what: &'static str) -> VhostResult<Option<Event>> {
    let taken = file.map(|file| Event::take(file, what)).transpose();
    taken.map_err(|error| VhostError::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, error)))
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        for slot in &self.slots {
            self.pool.stop(slot);
        }
        self.change_all(|queue| queue.enable(false));
        self.features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        if features & !self.offered() != 0 {
            return Err(VhostError::InvalidParam);
        }
        self.features = features;
        let set = |bit| features & bit != 0;
        let log = self.log.clone();
        self.change_all(|queue| {
            queue.event_index = set(feature::EVENT_INDEX);
            queue.indirect = set(feature::INDIRECT);
            queue.flushes = set(feature::FLUSH);
            queue.log = log.clone().filter(|_| set(feature::LOG_ALL));
            if !set(feature::PROTOCOL) {
                queue.enable(true);
            }
        });
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        places: &[VhostUserMemoryRegion],
        files: Vec<File>,
        postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        if postcopy.is_some() {
            return Err(VhostError::InvalidOperation("postcopy"));
        }
        let regions: Result<Vec<_>, _> = places
            .iter()
            .zip(files)
            .map(|(region, file)| {
                let place = Place {
                    guest: region.guest_phys_addr,
                    user: region.user_addr,
                    size: region.memory_size,
                    offset: region.mmap_offset,
                };
                Memory::map(place, file, self.settings.sealed_memory)
            })
            .collect();
        let memory = regions.and_then(Memory::new).map_err(VhostError::ReqHandlerError)?;
        self.set_memory(memory);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() && size <= MAX_QUEUE_SIZE => {
                let changed = self.change(index as usize, |queue| {
                    if !queue.is_started() {
                        queue.layout.size = size;
                    }
                    !queue.is_started()
                })?;
                if changed { Ok(()) } else { Err(invalid("size of a running queue")) }
            }
            _ => Err(invalid("size of a queue")),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        // a ring that is logged apart from the rest lies in memory that is all logged
        if !(flags - VhostUserVringAddrFlags::VHOST_VRING_F_LOG).is_empty() {
            return Err(invalid("flags of a ring"));
        }
        let guest = |user| self.memory.guest_of_user(user).ok_or(invalid("a ring that is not in memory"));
        let (descriptors, available, used) = (guest(descriptor)?, guest(available)?, guest(used)?);
        self.change(index as usize, |queue| {
            queue.layout.descriptors = descriptors;
            queue.layout.available = available;
            queue.layout.used = used;
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        self.change(index as usize, |queue| queue.set_base(base as u16))
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        let base = self.pool.stop(self.slot(index as usize)?);
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let index = usize::from(index);
        let kick = event(file, "kick")?;
        self.pool.set_kick(self.slot(index)?, kick).map_err(VhostError::ReqHandlerError)?;
        let inflight = self.inflight.clone();
        self.change(index, |queue| {
            if queue.is_started() {
                return Ok(());
            }
            if queue.layout.size == 0 {
                return Err(invalid("a queue without a size"));
            }
            queue.record = inflight.and_then(|inflight| inflight.queue(index as u16, queue.layout.size));
            queue.start();
            Ok(())
        })?
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let call = event(file, "call")?;
        self.change(usize::from(index), |queue| {
            queue.call = call;
            // What was answered meanwhile was told to the old one, or to nobody.
            queue.signal_if_started();
        })
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let error = event(file, "error")?;
        self.change(usize::from(index), |queue| queue.error = error)
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        type Feature = VhostUserProtocolFeatures;
        Ok(Feature::MQ
            | Feature::CONFIG
            | Feature::REPLY_ACK
            | Feature::BACKEND_REQ
            | Feature::INFLIGHT_SHMFD
            | Feature::LOG_SHMFD
            | Feature::RESET_DEVICE
            | Feature::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, _features: u64) -> VhostResult<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(self.slots.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.change(index as usize, |queue| queue.enable(enable))
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        let config = request::config(&self.entered.export.geometry(), self.settings.queues);
        // A frontend that knows more fields than we do reads zeroes there.
        let from = config.len().min(offset as usize);
        let mut out = config[from..].to_vec();
        out.resize(size as usize, 0);
        Ok(out)
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        // The only field a driver may write is the write cache's, which is not offered.
        Err(VhostError::InvalidOperation("change the configuration"))
    }

    fn set_gpu_socket(&mut self, _socket: GpuBackend) -> VhostResult<()> {
        Err(VhostError::InvalidOperation("graphics"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        Err(VhostError::InvalidOperation("shared objects"))
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        let (queues, size) = (asked.num_queues, asked.queue_size);
        if queues == 0 || queues > self.settings.queues || size == 0 || size > MAX_QUEUE_SIZE {
            return Err(invalid("shape of the record of requests in flight"));
        }
        let file = inflight::create(queues, size).map_err(VhostError::ReqHandlerError)?;
        Ok((VhostUserInflight::new(inflight::area(queues, size), 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> VhostResult<()> {
        let (place, shape) = ((given.mmap_offset, given.mmap_size), (given.num_queues, given.queue_size));
        let map = Inflight::map(file, place, shape, self.settings.sealed_memory);
        self.inflight = Some(map.map_err(VhostError::ReqHandlerError)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        postcopy: Option<bool>,
    ) -> VhostResult<Option<VhostUserMemoryRegionBase>> {
        if postcopy.is_some() {
            return Err(VhostError::InvalidOperation("postcopy"));
        }
        if self.memory.regions() >= MAX_REGIONS {
            return Err(invalid("too many regions of memory"));
        }
        let region = Memory::map(place(region), file, self.settings.sealed_memory);
        let memory = region.and_then(|region| self.memory.with(region)).map_err(VhostError::ReqHandlerError)?;
        self.set_memory(memory);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        let memory = self.memory.without(place(region)).ok_or_else(|| invalid("no such region of memory"))?;
        self.set_memory(memory);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> VhostResult<Option<File>> {
        Err(VhostError::InvalidOperation("device state"))
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        Err(VhostError::InvalidOperation("device state"))
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        Err(VhostError::InvalidOperation("shared memory of the device"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> VhostResult<()> {
        let log = Log::map(file, log.mmap_offset, log.mmap_size, self.settings.sealed_memory);
        let log = Arc::new(log.map_err(VhostError::ReqHandlerError)?);
        self.log = Some(Arc::clone(&log));
        let logging = self.features & feature::LOG_ALL != 0;
        self.change_all(|queue| queue.log = logging.then(|| Arc::clone(&log)));
        Ok(())
    }
}

fn place(region: &VhostUserSingleMemoryRegion) -> Place {
    Place {
        guest: region.guest_phys_addr,
        user: region.user_addr,
        size: region.memory_size,
        offset: region.mmap_offset,
    }
}
