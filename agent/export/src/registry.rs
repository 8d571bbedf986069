//! The exports a server offers, who uses them, and how one is taken away.
//!
//! ```text
//!            add                 remove: drain -> wait -> cut -> wait
//!  (absent) -----> Offered ---------------------------------------------> (absent)
//!                    |  panic under a request, or fence()                     ^
//!                    '------------> Fenced: every request is EIO -------------'
//! ```
//!
//! Locks: the registry's map, then an export's session table; no lock is held while a device is called, a socket is
//! used or a thread is waited for.

use std::any::Any;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use muster_block::{BlockDevice, BlockError, BlockErrorKind, Geometry};
use muster_common::Chain;
use parking_lot::{Condvar, Mutex, RwLock};

use crate::handshake::{Offer, Refusal};
use crate::protocol::{Errno, transmission_flag as flag};
use crate::statistics::{ExportStatistics, Statistics};
use crate::throttle::{Limits, Throttle};
use crate::tls::Identity;
use crate::transport::Socket;

/// Longest request we offer: what every known client stays within (the specification's default).
pub const MAX_REQUEST: u32 = 32 * 1024 * 1024;

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process of this host, by the kernel's word.
    Local {
        /// Process id.
        pid: i32,
        /// User id.
        uid: u32,
    },
    /// A TCP client. Not authenticated: its address says nothing about who it is.
    Remote(SocketAddr),
    /// A TCP client that showed a certificate of an authority of ours.
    Certified {
        /// Where it connected from.
        address: SocketAddr,
        /// Who the certificate says it is.
        identity: Identity,
    },
    /// Not known.
    Unknown,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Peer::Local { pid, uid } => write!(f, "pid {pid} uid {uid}"),
            Peer::Remote(address) => address.fmt(f),
            Peer::Certified { address, identity } => write!(f, "{identity} at {address}"),
            Peer::Unknown => f.write_str("unknown"),
        }
    }
}

/// Where a server finds what it may offer. Called from connection threads; may block.
pub trait ExportCatalog: Send + Sync {
    /// The export of that name for this client. A catalog may return the same export to every client or a fresh one to
    /// each (a session that dies with its connection).
    fn open(&self, name: &str, peer: &Peer) -> Result<Arc<Export>, Refusal>;

    /// What a client is told about an export it does not open yet.
    fn describe(&self, name: &str, peer: &Peer) -> Result<Offer, Refusal> {
        self.open(name, peer).map(|export| export.offer())
    }

    /// The names this client may see; `None` when listing is forbidden.
    fn list(&self, peer: &Peer) -> Option<Vec<String>>;
}

/// An export could not be added or taken away.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The name is taken.
    #[error("export {0} exists already")]
    Exists(String),
    /// No such name.
    #[error("no export {0}")]
    Unknown(String),
    /// The sockets are closed, but a session is still inside a call of the device. The name is free already.
    #[error("{sessions} sessions of export {name} did not end in time")]
    Busy {
        /// The export.
        name: String,
        /// Sessions left.
        sessions: usize,
    },
}

/// One device under one name, its counters and its sessions.
pub struct Export {
    name: String,
    description: String,
    device: Arc<dyn BlockDevice>,
    statistics: Statistics,
    fenced: AtomicBool,
    fence_reason: Mutex<Option<String>>,
    /// The first device error was logged; the rest are counted.
    reported: AtomicBool,
    sessions: Mutex<Sessions>,
    left: Condvar,
    throttle: Throttle,
    /// Queues whose first request waits for space.
    waiting: AtomicUsize,
}

/// How a session is ended from outside. Called with the session table locked: must not block.
pub(crate) trait Link: Send + Sync {
    /// Asks it to end: what was received is finished, what comes later refused.
    fn drain(&self);
    /// Ends it at once.
    fn cut(&self);
}

impl Link for Socket {
    fn drain(&self) {
        Socket::drain(self);
    }
    fn cut(&self) {
        Socket::cut(self);
    }
}

#[derive(Default)]
struct Sessions {
    closing: bool,
    next: u64,
    live: BTreeMap<u64, (Peer, Option<Box<dyn Link>>)>,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("name", &self.name).field("fenced", &self.is_fenced()).finish_non_exhaustive()
    }
}

impl Export {
    /// Offers `device` as `name`, which the crate does not interpret.
    pub fn new(name: impl Into<String>, device: Arc<dyn BlockDevice>) -> Export {
        Export {
            name: name.into(),
            description: String::new(),
            device,
            statistics: Statistics::default(),
            fenced: AtomicBool::new(false),
            fence_reason: Mutex::new(None),
            reported: AtomicBool::new(false),
            sessions: Mutex::default(),
            left: Condvar::new(),
            throttle: Throttle::default(),
            waiting: AtomicUsize::new(0),
        }
    }

    /// A text for people, told to clients that ask.
    #[must_use]
    pub fn with_description(mut self, description: impl Into<String>) -> Export {
        self.description = description.into();
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its device.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// Its counters since it was made, and how it is now.
    pub fn statistics(&self) -> ExportStatistics {
        let mut statistics = self.statistics.snapshot();
        statistics.waiting_for_space = self.waiting_for_space();
        statistics
    }

    /// Sets what it may do a second, from now on, for all its sessions together.
    pub fn set_limits(&self, limits: Limits) {
        self.throttle.set(limits);
    }

    /// What it may do a second.
    pub fn limits(&self) -> Limits {
        self.throttle.limits()
    }

    /// A write over vhost-user was refused for want of space and is tried again until there is some. NBD clients are
    /// told instead.
    pub fn waiting_for_space(&self) -> bool {
        self.queues_waiting_for_space() > 0
    }

    /// In how many queues such a write waits.
    pub fn queues_waiting_for_space(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    /// Admits a request of that many bytes under the limits, or says how long to wait before asking again.
    pub(crate) fn admit(&self, now: Instant, bytes: u64) -> Result<(), Duration> {
        self.throttle.admit(now, bytes)
    }

    /// The same, when nothing else is to be done meanwhile: true when it was admitted.
    #[inline]
    pub(crate) fn admit_now(&self, bytes: u64) -> bool {
        self.throttle.admit_now(bytes)
    }

    /// Waits for the turn of a request that was not admitted, or until the export is fenced or going away, or `give_up`. For
    /// a thread that serves one connection and has nothing else to do.
    pub(crate) fn wait_turn(&self, bytes: u64, give_up: impl Fn() -> bool) {
        let since = Instant::now();
        self.statistics.throttled();
        self.throttle.wait(bytes, || self.is_fenced() || self.is_closing() || give_up());
        self.statistics.was_throttled(since.elapsed());
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.sessions.lock().closing
    }

    /// One more or one fewer queue waits for space. Returns whether that changed [`Export::waiting_for_space`].
    pub(crate) fn wait_for_space(&self, waits: bool) -> bool {
        if waits {
            self.waiting.fetch_add(1, Ordering::AcqRel) == 0
        } else {
            self.waiting.fetch_sub(1, Ordering::AcqRel) == 1
        }
    }

    /// Who is connected.
    pub fn peers(&self) -> Vec<Peer> {
        self.sessions.lock().live.values().map(|(peer, _)| peer.clone()).collect()
    }

    /// How many are connected.
    pub fn sessions(&self) -> usize {
        self.sessions.lock().live.len()
    }

    /// From now on every request is answered with an I/O error. There is no way back: make a new export.
    pub fn fence(&self, why: &str) {
        if !self.fenced.swap(true, Ordering::AcqRel) {
            *self.fence_reason.lock() = Some(why.to_owned());
            tracing::error!(export = %self.name, reason = why, "export fenced");
        }
    }

    /// Whether it is fenced.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    /// Why it is fenced.
    pub fn fence_reason(&self) -> Option<String> {
        self.fence_reason.lock().clone()
    }

    /// Ends every session and lets no new one in. Requests already received are finished; after `grace` the sockets
    /// are cut, and after another `grace` the number of sessions still inside a device call is returned.
    pub fn close(&self, grace: Duration) -> usize {
        let mut sessions = self.sessions.lock();
        sessions.closing = true;
        let stops: [fn(&dyn Link); 2] = [|link| link.drain(), |link| link.cut()];
        for how in stops {
            sessions.live.values().filter_map(|(_, link)| link.as_deref()).for_each(how);
            let deadline = Instant::now() + grace;
            while !sessions.live.is_empty() {
                if self.left.wait_until(&mut sessions, deadline).timed_out() {
                    break;
                }
            }
        }
        sessions.live.len()
    }

    /// What clients are told.
    pub fn offer(&self) -> Offer {
        let geometry = self.geometry();
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN | flag::SEND_CACHE;
        if geometry.read_only {
            flags |= flag::READ_ONLY;
        } else {
            flags |= flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        }
        if geometry.rotational {
            flags |= flag::ROTATIONAL;
        }
        Offer {
            size: geometry.size.bytes(),
            flags,
            minimum_block: geometry.minimum_block,
            preferred_block: geometry.block_size,
            maximum_block: geometry.max_request.min(MAX_REQUEST),
            description: self.description.clone(),
        }
    }

    /// The geometry; a device that panics even here is fenced and has no size.
    pub(crate) fn geometry(&self) -> Geometry {
        match catch_unwind(AssertUnwindSafe(|| self.device.geometry())) {
            Ok(geometry) => geometry,
            Err(panic) => {
                self.fence(&format!("device panicked: {}", panic_text(&*panic)));
                Geometry::memory(muster_common::ByteLen::ZERO, true)
            }
        }
    }

    /// Calls the device. A fenced export does not call it; a panic inside fences the export.
    pub(crate) fn call<R>(
        &self,
        operation: impl FnOnce(&dyn BlockDevice) -> Result<R, BlockError>,
    ) -> Result<R, Errno> {
        if self.is_fenced() {
            return Err(Errno::Io);
        }
        // The device may be left half changed by a panic: that is why nobody may use it again through this export.
        match catch_unwind(AssertUnwindSafe(|| operation(&*self.device))) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                let errno = errno(error.kind());
                if errno == Errno::Io && !self.reported.swap(true, Ordering::Relaxed) {
                    tracing::error!(export = %self.name, err = %Chain(&error), "device error; later ones are only counted");
                }
                Err(errno)
            }
            Err(panic) => {
                self.fence(&format!("device panicked: {}", panic_text(&*panic)));
                Err(Errno::Io)
            }
        }
    }

    pub(crate) fn counters(&self) -> &Statistics {
        &self.statistics
    }

    /// Enters a session, unless the export is going away.
    pub(crate) fn enter(self: &Arc<Self>, peer: Peer, socket: Option<Socket>) -> Result<Entered, Refusal> {
        self.enter_linked(peer, socket.map(|socket| Box::new(socket) as Box<dyn Link>))
    }

    pub(crate) fn enter_linked(self: &Arc<Self>, peer: Peer, link: Option<Box<dyn Link>>) -> Result<Entered, Refusal> {
        let mut sessions = self.sessions.lock();
        if sessions.closing {
            return Err(Refusal::Shutdown);
        }
        let id = sessions.next;
        sessions.next += 1;
        sessions.live.insert(id, (peer, link));
        Ok(Entered { export: Arc::clone(self), id })
    }
}

/// A session that is counted until this is dropped.
pub(crate) struct Entered {
    pub(crate) export: Arc<Export>,
    id: u64,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.export.sessions.lock().live.remove(&self.id);
        self.export.left.notify_all();
    }
}

/// The protocol's name for a device error.
pub fn errno(kind: BlockErrorKind) -> Errno {
    match kind {
        BlockErrorKind::OutOfRange | BlockErrorKind::Invalid => Errno::Invalid,
        BlockErrorKind::ReadOnly => Errno::Perm,
        BlockErrorKind::NoSpace => Errno::NoSpace,
        BlockErrorKind::Unsupported => Errno::NotSupported,
        // Fenced, too: for the guest a disk that was taken away is an I/O error.
        _ => Errno::Io,
    }
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// A catalog whose exports are added and removed by hand.
#[derive(Debug, Default)]
pub struct Registry {
    exports: RwLock<BTreeMap<String, Arc<Export>>>,
}

impl Registry {
    /// No exports.
    pub fn new() -> Registry {
        Registry::default()
    }

    /// Offers `device` as `name`.
    pub fn add(&self, name: impl Into<String>, device: Arc<dyn BlockDevice>) -> Result<Arc<Export>, RegistryError> {
        self.add_export(Export::new(name, device))
    }

    /// Offers an export under its name.
    pub fn add_export(&self, export: Export) -> Result<Arc<Export>, RegistryError> {
        let mut exports = self.exports.write();
        if exports.contains_key(export.name()) {
            return Err(RegistryError::Exists(export.name));
        }
        let export = Arc::new(export);
        exports.insert(export.name().to_owned(), Arc::clone(&export));
        Ok(export)
    }

    /// Takes the export away: the name is free at once, its sessions are ended (see [`Export::close`]) and waited for.
    /// Blocks for up to twice `grace`. When it returns `Ok`, no thread of this crate uses the device any more.
    pub fn remove(&self, name: &str, grace: Duration) -> Result<(), RegistryError> {
        let export = self.exports.write().remove(name).ok_or_else(|| RegistryError::Unknown(name.to_owned()))?;
        match export.close(grace) {
            0 => Ok(()),
            sessions => Err(RegistryError::Busy { name: name.to_owned(), sessions }),
        }
    }

    /// See [`Export::fence`].
    pub fn fence(&self, name: &str, why: &str) -> Result<(), RegistryError> {
        self.get(name).map(|export| export.fence(why)).ok_or_else(|| RegistryError::Unknown(name.to_owned()))
    }

    /// The export of that name.
    pub fn get(&self, name: &str) -> Option<Arc<Export>> {
        self.exports.read().get(name).cloned()
    }

    /// Connected sessions of the export of that name.
    pub fn sessions(&self, name: &str) -> Option<usize> {
        self.get(name).map(|export| export.sessions())
    }

    /// Counters of the export of that name.
    pub fn statistics(&self, name: &str) -> Option<ExportStatistics> {
        self.get(name).map(|export| export.statistics())
    }

    /// Every export, by name.
    pub fn exports(&self) -> Vec<Arc<Export>> {
        self.exports.read().values().cloned().collect()
    }
}

impl ExportCatalog for Registry {
    fn open(&self, name: &str, _peer: &Peer) -> Result<Arc<Export>, Refusal> {
        self.get(name).ok_or(Refusal::Unknown)
    }

    fn list(&self, _peer: &Peer) -> Option<Vec<String>> {
        Some(self.exports.read().keys().cloned().collect())
    }
}
