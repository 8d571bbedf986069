//! Listens: one socket and one thread for each served export, which accepts a frontend and stays with it.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use muster_block::BlockDevice;
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt;

use super::pool::Pool;
use super::session::{Channel, serve};
use super::{Names, Settings, VhostConfig, socket_name};
use crate::handshake::Refusal;
use crate::registry::{ExportCatalog, Link, Peer};

/// Longest path of a unix socket the kernel takes.
const LONGEST_PATH: usize = 107;

/// Threads of a device that may wait, at most.
const OWN_THREADS: u16 = 4;

/// An export could not be served, or not be withdrawn.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The catalog does not offer it.
    #[error("serve export {name}: refused ({refusal:?})")]
    Refused {
        /// The export.
        name: String,
        /// Why.
        refusal: Refusal,
    },
    /// It is served already.
    #[error("export {0} is served already")]
    Exists(String),
    /// It is not served.
    #[error("export {0} is not served")]
    Unknown(String),
    /// No socket can have this name, or its path would be too long.
    #[error("serve export {name}: no socket path can be made of it ({path})")]
    Name {
        /// The export.
        name: String,
        /// What it would be.
        path: PathBuf,
    },
    /// Another process answers on that socket.
    #[error("listen on {0}: another server answers there")]
    InUse(PathBuf),
    /// Could not listen.
    #[error("listen on {path}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Could not make a thread or what wakes it.
    #[error("start a thread for export {name}")]
    Thread {
        /// The export.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Could not make the threads that serve queues.
    #[error("start the threads that serve queues")]
    Pool(#[source] io::Error),
    /// The socket is gone and the frontend is cut off, but a request is still inside the device.
    #[error("a request of export {0} did not end in time")]
    Busy(String),
}

/// Serves exports over vhost-user-blk, each on a socket of its own. Stops when dropped.
pub struct VhostServer {
    config: VhostConfig,
    catalog: Arc<dyn ExportCatalog>,
    names: Arc<Names>,
    pool: Arc<Pool>,
    served: Mutex<BTreeMap<String, Served>>,
    /// Withdrawn ones whose threads had not ended in time; joined when the server stops.
    lingering: Mutex<Vec<Served>>,
}

impl std::fmt::Debug for VhostServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhostServer").field("directory", &self.config.directory).finish_non_exhaustive()
    }
}

struct Served {
    path: PathBuf,
    inode: u64,
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

/// What a served export's thread shares with the server.
struct Shared {
    wake: OwnedFd,
    stopping: AtomicBool,
    /// The frontend that is connected.
    current: Mutex<Option<UnixStream>>,
    channel: Channel,
    ended: Mutex<bool>,
    end: Condvar,
}

impl Shared {
    fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        if let Some(stream) = &*self.current.lock() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

impl VhostServer {
    /// A server that serves nothing yet. Makes the directory if it is missing.
    pub fn start(config: VhostConfig, catalog: Arc<dyn ExportCatalog>) -> Result<VhostServer, VhostError> {
        std::fs::create_dir_all(&config.directory)
            .map_err(|source| VhostError::Listen { path: config.directory.clone(), source })?;
        let names = Arc::<Names>::default();
        let pool = Pool::start(config.threads, config.spin, &names).map_err(VhostError::Pool)?;
        Ok(VhostServer {
            config,
            catalog,
            pool: Arc::new(pool),
            names,
            served: Mutex::default(),
            lingering: Mutex::default(),
        })
    }

    /// Where the socket of the export of that name is, served or not: always the same place.
    pub fn socket_path(&self, name: &str) -> Result<PathBuf, VhostError> {
        let path = self.config.directory.join(socket_name(name));
        let fits = path.as_os_str().len() <= LONGEST_PATH;
        let plain = !name.is_empty()
            && !name.starts_with('.')
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if fits && plain { Ok(path) } else { Err(VhostError::Name { name: name.to_owned(), path }) }
    }

    /// Serves the export of that name. When it returns, the socket is there and a frontend may connect; they are served
    /// one after the other. The path is the same after a restart of the process.
    pub fn serve(&self, name: &str) -> Result<PathBuf, VhostError> {
        let path = self.socket_path(name)?;
        let mut served = self.served.lock();
        if served.contains_key(name) || served.values().any(|other| other.path == path) {
            return Err(VhostError::Exists(name.to_owned()));
        }
        self.catalog
            .open(name, &Peer::Unknown)
            .map_err(|refusal| VhostError::Refused { name: name.to_owned(), refusal })?;
        let failed = |source| VhostError::Thread { name: name.to_owned(), source };
        let wake = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let (listener, inode) = listen(&path, self.config.mode)?;
        let shared = Arc::new(Shared {
            wake,
            stopping: AtomicBool::new(false),
            current: Mutex::default(),
            channel: Channel::default(),
            ended: Mutex::new(false),
            end: Condvar::new(),
        });
        let thread = std::thread::Builder::new().name(self.names.next("vu-ctl")).spawn({
            let (shared, name) = (Arc::clone(&shared), name.to_owned());
            let served = Service {
                catalog: Arc::clone(&self.catalog),
                settings: self.config.settings(),
                threads: self.config.threads,
                pool: Arc::clone(&self.pool),
                names: Arc::clone(&self.names),
            };
            move || {
                accept(&shared, &listener, &name, &served);
                *shared.ended.lock() = true;
                shared.end.notify_all();
            }
        });
        match thread {
            Ok(thread) => {
                served.insert(name.to_owned(), Served { path: path.clone(), inode, shared, thread });
                Ok(path)
            }
            Err(source) => {
                let _ = std::fs::remove_file(&path);
                Err(failed(source))
            }
        }
    }

    /// Takes the export's socket away and cuts its frontend off, which gets no errors but no answers either. The request
    /// it is at is finished; waits for that, up to `grace`. When it returns `Ok`, no thread of the server uses the device.
    pub fn withdraw(&self, name: &str, grace: Duration) -> Result<(), VhostError> {
        let served = self.served.lock().remove(name).ok_or_else(|| VhostError::Unknown(name.to_owned()))?;
        served.remove_socket();
        served.shared.stop();
        let deadline = Instant::now() + grace;
        let mut ended = served.shared.ended.lock();
        while !*ended {
            if served.shared.end.wait_until(&mut ended, deadline).timed_out() {
                break;
            }
        }
        let in_time = *ended;
        drop(ended);
        if in_time {
            served.join();
            Ok(())
        } else {
            self.lingering.lock().push(served);
            Err(VhostError::Busy(name.to_owned()))
        }
    }

    /// Has the frontend of that export read the device's size again. `Ok(false)` when none is connected or it cannot be
    /// told: then it is told when one connects.
    pub fn notify_resize(&self, name: &str) -> Result<bool, VhostError> {
        let served = self.served.lock();
        let served = served.get(name).ok_or_else(|| VhostError::Unknown(name.to_owned()))?;
        Ok(served.shared.channel.config_changed())
    }

    /// Names of the exports that are served, and whether a frontend is connected.
    pub fn served(&self) -> BTreeMap<String, bool> {
        let served = self.served.lock();
        served.iter().map(|(name, one)| (name.clone(), one.shared.current.lock().is_some())).collect()
    }

    /// Withdraws every export and joins every thread, however long the requests they are at take.
    pub fn stop(self) {
        self.stop_all();
    }

    fn stop_all(&self) {
        let served = std::mem::take(&mut *self.served.lock());
        for one in served.values() {
            one.remove_socket();
            one.shared.stop();
        }
        let lingering = std::mem::take(&mut *self.lingering.lock());
        served.into_values().chain(lingering).for_each(Served::join);
    }
}

impl Drop for VhostServer {
    fn drop(&mut self) {
        self.stop_all();
    }
}

impl Served {
    fn remove_socket(&self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!(socket = %self.path.display(), "a frontend's thread panicked");
        }
    }
}

fn listen(path: &Path, mode: u32) -> Result<(UnixListener, u64), VhostError> {
    let failed = |source| VhostError::Listen { path: path.to_owned(), source };
    if let Ok(metadata) = std::fs::symlink_metadata(path)
        && metadata.file_type().is_socket()
    {
        if UnixStream::connect(path).is_ok() {
            return Err(VhostError::InUse(path.to_owned()));
        }
        // Nobody answers: left behind by a killed process. Anything else is not ours to delete.
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    // A frontend that is gone between poll and accept must not make accept wait.
    listener.set_nonblocking(true).map_err(failed)?;
    let inode = std::fs::symlink_metadata(path).map_err(failed)?.ino();
    Ok((listener, inode))
}

/// Ends a session from outside.
struct SocketLink(UnixStream);

impl Link for SocketLink {
    fn drain(&self) {
        let _ = self.0.shutdown(Shutdown::Read);
    }
    fn cut(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// What a frontend's thread has of the server.
struct Service {
    catalog: Arc<dyn ExportCatalog>,
    settings: Settings,
    threads: u16,
    pool: Arc<Pool>,
    names: Arc<Names>,
}

impl Service {
    /// Who serves this device's queues: everybody's threads, unless others would have to wait for its disk.
    fn pool(&self, device: &dyn BlockDevice) -> io::Result<Arc<Pool>> {
        if !device.may_wait() {
            return Ok(Arc::clone(&self.pool));
        }
        Ok(Arc::new(Pool::start(self.threads.min(OWN_THREADS), self.settings.spin, &self.names)?))
    }
}

fn accept(shared: &Shared, listener: &UnixListener, name: &str, service: &Service) {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&shared.wake, PollFlags::IN)];
        if let Err(error) = poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            tracing::error!(export = name, err = %error, "poll for frontends; none is accepted any more");
            return;
        }
        if shared.is_stopping() {
            return;
        }
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => continue,
            Err(error) => {
                tracing::warn!(export = name, err = %error, "accept");
                // Out of descriptors, most likely: the listener stays readable, so wait for something else.
                let pause = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                let _ = poll(&mut [PollFd::new(&shared.wake, PollFlags::IN)], Some(&pause));
                continue;
            }
        };
        if let Err(error) = connect(shared, stream, name, service) {
            tracing::warn!(export = name, err = %error, "frontend turned away");
        }
        shared.current.lock().take();
    }
}

fn connect(shared: &Shared, stream: UnixStream, name: &str, service: &Service) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    *shared.current.lock() = Some(stream.try_clone()?);
    // After it can be seen: who stops us either finds it there, or has set the flag before.
    if shared.is_stopping() {
        return Ok(());
    }
    let peer = match sockopt::socket_peercred(stream.as_fd()) {
        Ok(credentials) => Peer::Local { pid: credentials.pid.as_raw_nonzero().get(), uid: credentials.uid.as_raw() },
        Err(_) => Peer::Unknown,
    };
    let refused = |refusal: Refusal| io::Error::other(format!("refused ({refusal:?})"));
    let export = service.catalog.open(name, &peer).map_err(refused)?;
    let pool = service.pool(&**export.device())?;
    let link = SocketLink(stream.try_clone()?);
    let entered = export.enter_linked(peer, Some(Box::new(link))).map_err(refused)?;
    serve(stream, entered, &service.settings, pool, &shared.channel);
    Ok(())
}
