//! Listens, accepts, and gives each connection a thread.
//!
//! Threads: `nbd-accept` for all listeners, `nbd-<n>` for each connection. [`NbdServer::stop`] ends and joins them all;
//! dropping the server does the same.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{SocketFlags, acceptfrom_with, sockopt};

use crate::connection::{Ended, Terms, serve};
use crate::handshake::HandshakeLimits;
use crate::registry::{ExportCatalog, Peer, panic_text};
use crate::session::End;
use crate::tls::Tls;
use crate::transport::Socket;

/// Send buffer of a unix socket (the kernel doubles it for its own bookkeeping). A quarter of that, 104 KiB, is what a
/// client may have unread before the session waits for it (see `Transport::settle`): most of a batch of 32 replies of
/// 4 KiB. Half as much and twice as much are both slower. TCP's buffers are left to the kernel, which adapts them.
const UNIX_SEND_BUFFER: usize = 208 * 1024;

/// Where to listen.
#[derive(Debug)]
pub enum Listen {
    /// A unix socket at this path, with this file mode. A dead socket file in the way is replaced.
    Unix {
        /// The path; at most 107 bytes, a limit of the kernel.
        path: PathBuf,
        /// Permissions of the socket file: who may connect.
        mode: u32,
    },
    /// A TCP address; port 0 takes a free one.
    Tcp(SocketAddr),
    /// A socket that is already listening.
    Socket(OwnedFd),
}

/// Configuration of a server.
#[derive(Debug)]
pub struct NbdConfig {
    /// Where to listen; at least one.
    pub listen: Vec<Listen>,
    /// Connections at the same time; one more is closed at once. Each costs a thread and up to 1 MiB of buffers.
    pub connections: usize,
    /// Time a client has to choose an export.
    pub handshake_time: Duration,
    /// See [`HandshakeLimits`].
    pub handshake: HandshakeLimits,
    /// Connections of one peer (a user of this host, or an address) that have not chosen an export yet; one more is
    /// closed at once. So one client that connects and says nothing does not keep the others out.
    pub handshakes_per_peer: usize,
    /// TCP clients must begin TLS and show a certificate before anything else. Unix sockets stay plain: their file mode
    /// says who may connect.
    pub tls: Option<Tls>,
    /// How long a connection looks for the next request before its thread sleeps, while its last one came about that
    /// quickly. Trades processor time for latency, and spares a busy client the wakeup; an idle one costs nothing.
    pub spin: Duration,
    /// Time for clients to take their replies when the server stops.
    pub grace: Duration,
}

impl NbdConfig {
    /// Listens on a unix socket that only this user may connect to.
    pub fn unix(path: impl Into<PathBuf>) -> NbdConfig {
        NbdConfig::on(Listen::Unix { path: path.into(), mode: 0o600 })
    }

    /// Listens on a TCP address, unprotected unless [`NbdConfig::tls`] is set.
    pub fn tcp(address: SocketAddr) -> NbdConfig {
        NbdConfig::on(Listen::Tcp(address))
    }

    fn on(listen: Listen) -> NbdConfig {
        NbdConfig {
            listen: vec![listen],
            connections: 1024,
            handshake_time: Duration::from_secs(10),
            handshake: HandshakeLimits::default(),
            handshakes_per_peer: 256,
            tls: None,
            spin: Duration::from_micros(50),
            grace: Duration::from_secs(2),
        }
    }
}

/// The server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Could not listen.
    #[error("listen on {on}")]
    Listen {
        /// The address or path.
        on: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process answers on that socket.
    #[error("listen on {0}: another server answers there")]
    InUse(PathBuf),
    /// Could not make the accept thread.
    #[error("start the accept thread")]
    Thread(#[source] io::Error),
}

/// A running server. Stops when dropped.
pub struct NbdServer {
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
    wake: Arc<OwnedFd>,
    addresses: Vec<SocketAddr>,
    /// Socket files of ours, with the inode to be sure of that.
    files: Vec<(PathBuf, u64)>,
    grace: Duration,
}

impl std::fmt::Debug for NbdServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdServer")
            .field("addresses", &self.addresses)
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

struct Shared {
    catalog: Arc<dyn ExportCatalog>,
    stopping: AtomicBool,
    connections: Mutex<BTreeMap<u64, Connection>>,
    /// A connection has ended.
    ended: Condvar,
    next: AtomicU64,
    limit: usize,
    handshake_time: Duration,
    handshake: HandshakeLimits,
    handshakes_per_peer: usize,
    tls: Option<Tls>,
    spin: Duration,
}

struct Connection {
    /// `None` when the connection has ended and its thread only waits to be joined.
    socket: Option<Socket>,
    thread: JoinHandle<()>,
    /// Whose handshake is going on.
    handshake_of: Option<Origin>,
}

/// What handshakes are counted by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Origin {
    User(u32),
    Address(IpAddr),
    Unknown,
}

impl Origin {
    fn of(peer: &Peer) -> Origin {
        match peer {
            Peer::Local { uid, .. } => Origin::User(*uid),
            Peer::Remote(address) | Peer::Certified { address, .. } => Origin::Address(address.ip()),
            Peer::Unknown => Origin::Unknown,
        }
    }
}

impl Shared {
    fn live(connections: &BTreeMap<u64, Connection>) -> usize {
        connections.values().filter(|one| one.socket.is_some()).count()
    }

    /// Which limit keeps this peer out, if one does.
    fn is_full_for(&self, peer: &Peer) -> Option<&'static str> {
        let connections = self.connections.lock();
        if Shared::live(&connections) >= self.limit {
            return Some("connections");
        }
        let origin = Some(Origin::of(peer));
        let shaking = connections.values().filter(|one| one.socket.is_some() && one.handshake_of == origin).count();
        (shaking >= self.handshakes_per_peer).then_some("handshakes of this peer")
    }
}

impl NbdServer {
    /// Binds every listener, then starts to accept.
    pub fn start(config: NbdConfig, catalog: Arc<dyn ExportCatalog>) -> Result<NbdServer, ServerError> {
        let mut listeners = Vec::new();
        let mut addresses = Vec::new();
        let mut files = Vec::new();
        for listen in config.listen {
            match listen {
                Listen::Unix { path, mode } => {
                    let (fd, inode) = listen_unix(&path, mode)?;
                    listeners.push(fd);
                    files.push((path, inode));
                }
                Listen::Tcp(address) => {
                    let failed = |source| ServerError::Listen { on: address.to_string(), source };
                    let listener = std::net::TcpListener::bind(address).map_err(failed)?;
                    addresses.push(listener.local_addr().map_err(failed)?);
                    listeners.push(OwnedFd::from(listener));
                }
                Listen::Socket(fd) => listeners.push(fd),
            }
        }
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| ServerError::Thread(error.into()))?);
        let shared = Arc::new(Shared {
            catalog,
            stopping: AtomicBool::new(false),
            connections: Mutex::default(),
            ended: Condvar::new(),
            next: AtomicU64::new(0),
            limit: config.connections,
            handshake_time: config.handshake_time,
            handshake: config.handshake,
            handshakes_per_peer: config.handshakes_per_peer,
            tls: config.tls,
            spin: config.spin,
        });
        for listener in &listeners {
            // A client that is gone between poll and accept must not make accept wait.
            rustix::io::ioctl_fionbio(listener, true)
                .map_err(|error| ServerError::Listen { on: "a given socket".into(), source: error.into() })?;
        }
        let accept = std::thread::Builder::new()
            .name("nbd-accept".into())
            .spawn({
                let (shared, wake) = (Arc::clone(&shared), Arc::clone(&wake));
                move || accept_loop(&shared, &listeners, &wake)
            })
            .map_err(ServerError::Thread)?;
        Ok(NbdServer { shared, accept: Some(accept), wake, addresses, files, grace: config.grace })
    }

    /// The TCP addresses it listens on, in the order of the configuration.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Connections now, those still in their handshake included.
    pub fn connections(&self) -> usize {
        Shared::live(&self.shared.connections.lock())
    }

    /// Stops listening, ends every connection (received requests are finished; after the configured grace sockets are
    /// cut) and joins every thread.
    pub fn stop(mut self) {
        self.stop_all();
    }

    fn stop_all(&mut self) {
        let Some(accept) = self.accept.take() else { return };
        self.shared.stopping.store(true, Ordering::Release);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        if accept.join().is_err() {
            tracing::error!("the accept thread panicked");
        }
        for (path, inode) in &self.files {
            if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.ino() == *inode) {
                let _ = std::fs::remove_file(path);
            }
        }
        let mut connections = self.shared.connections.lock();
        for how in [Socket::drain, Socket::cut] {
            connections.values().filter_map(|one| one.socket.as_ref()).for_each(how);
            let deadline = Instant::now() + self.grace;
            while Shared::live(&connections) > 0 {
                if self.shared.ended.wait_until(&mut connections, deadline).timed_out() {
                    break;
                }
            }
        }
        let left = std::mem::take(&mut *connections);
        drop(connections);
        for connection in left.into_values() {
            // One that is still inside a device call is waited for: leaving it behind would leave the device in use.
            if connection.thread.join().is_err() {
                tracing::error!("a connection thread panicked");
            }
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop_all();
    }
}

fn listen_unix(path: &Path, mode: u32) -> Result<(OwnedFd, u64), ServerError> {
    let failed = |source| ServerError::Listen { on: path.display().to_string(), source };
    if UnixStream::connect(path).is_ok() {
        return Err(ServerError::InUse(path.to_owned()));
    }
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        use std::os::unix::fs::FileTypeExt;
        // Nobody answers: a socket left behind by a killed process. Anything else is not ours to delete.
        if metadata.file_type().is_socket() {
            std::fs::remove_file(path).map_err(failed)?;
        }
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    let inode = std::fs::symlink_metadata(path).map_err(failed)?.ino();
    Ok((listener.into(), inode))
}

fn accept_loop(shared: &Arc<Shared>, listeners: &[OwnedFd], wake: &OwnedFd) {
    let mut refused = 0u64;
    loop {
        let mut fds: Vec<PollFd<'_>> = listeners.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        fds.push(PollFd::new(wake, PollFlags::IN));
        if let Err(error) = poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            tracing::error!(err = %error, "poll for connections; no new ones are accepted any more");
            return;
        }
        if shared.stopping.load(Ordering::Acquire) {
            return;
        }
        reap(shared);
        for listener in listeners {
            match acceptfrom_with(listener, SocketFlags::CLOEXEC) {
                Ok((fd, address)) => {
                    let peer = match address.and_then(|address| SocketAddr::try_from(address).ok()) {
                        Some(address) => Peer::Remote(address),
                        None => local_peer(&fd),
                    };
                    if let Some(limit) = shared.is_full_for(&peer) {
                        refused += 1;
                        if refused.is_power_of_two() {
                            tracing::warn!(%peer, limit, refused, "connection limit reached, client turned away");
                        }
                        continue;
                    }
                    start_connection(shared, fd, peer);
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::warn!(err = %error, "accept");
                    // Out of descriptors, most likely: the listener stays readable, so wait for something else.
                    let pause = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                    let _ = poll(&mut [PollFd::new(wake, PollFlags::IN)], Some(&pause));
                }
            }
        }
    }
}

fn local_peer(fd: &OwnedFd) -> Peer {
    match sockopt::socket_peercred(fd.as_fd()) {
        Ok(credentials) => Peer::Local { pid: credentials.pid.as_raw_nonzero().get(), uid: credentials.uid.as_raw() },
        Err(_) => Peer::Unknown,
    }
}

/// Joins threads that are done.
fn reap(shared: &Shared) {
    let mut connections = shared.connections.lock();
    let done: Vec<u64> = connections.iter().filter(|(_, one)| one.socket.is_none()).map(|(id, _)| *id).collect();
    for id in done {
        if let Some(connection) = connections.remove(&id) {
            let _ = connection.thread.join();
        }
    }
}

fn start_connection(shared: &Arc<Shared>, fd: OwnedFd, peer: Peer) {
    // Not fatal: only slower.
    match peer {
        Peer::Remote(_) => {
            let _ = sockopt::set_tcp_nodelay(&fd, true);
            let _ = sockopt::set_socket_keepalive(&fd, true);
        }
        _ => {
            let _ = sockopt::set_socket_send_buffer_size(&fd, UNIX_SEND_BUFFER);
        }
    }
    let socket = Socket::new(fd);
    let id = shared.next.fetch_add(1, Ordering::Relaxed);
    // Locked over the start: the thread finds its entry when it ends.
    let mut connections = shared.connections.lock();
    let spawned = std::thread::Builder::new().name(format!("nbd-{id}")).spawn({
        let (shared, socket, peer) = (Arc::clone(shared), socket.clone(), peer.clone());
        move || {
            connection_thread(&shared, id, &socket, &peer);
            if let Some(connection) = shared.connections.lock().get_mut(&id) {
                connection.socket = None;
            }
            shared.ended.notify_all();
        }
    });
    match spawned {
        Ok(thread) => {
            let handshake_of = Some(Origin::of(&peer));
            connections.insert(id, Connection { socket: Some(socket), thread, handshake_of });
        }
        Err(error) => tracing::error!(err = %error, "start a connection thread; client turned away"),
    }
}

fn connection_thread(shared: &Shared, id: u64, socket: &Socket, peer: &Peer) {
    let chosen = || {
        if let Some(connection) = shared.connections.lock().get_mut(&id) {
            connection.handshake_of = None;
        }
    };
    let terms = Terms {
        catalog: &*shared.catalog,
        limits: shared.handshake,
        handshake_until: Instant::now() + shared.handshake_time,
        chosen: &chosen,
        spin: shared.spin,
    };
    let tls = shared.tls.as_ref().filter(|_| matches!(peer, Peer::Remote(_)));
    // A panic of the device is caught where it is called and fences the export. This one catches our own mistakes, so
    // that they cost one connection; the session's guard leaves the export on the way out.
    let result = catch_unwind(AssertUnwindSafe(|| serve(socket, tls, peer, &terms)));
    match result {
        Ok(Ok(Ended::Session(End::Violation(why)))) => tracing::warn!(%peer, why, "client broke the protocol"),
        Ok(Ok(ended)) => tracing::debug!(%peer, ?ended, "connection ended"),
        Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => tracing::warn!(%peer, "handshake took too long"),
        Ok(Err(error)) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::PermissionDenied) => {
            tracing::warn!(%peer, err = %error, "TLS failed");
        }
        Ok(Err(error)) => tracing::debug!(%peer, err = %error, "connection lost"),
        Err(panic) => tracing::error!(%peer, reason = panic_text(&*panic), "connection thread panicked"),
    }
    // Whoever else holds the descriptor, the client sees the end now.
    socket.cut();
}
