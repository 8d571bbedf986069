//! The controller: it knows the fleet, commands it, and answers to people. A library with a thin program.
//!
//! Main types: [`Config`], [`Controller`] (a running one). Inside: `core` (the one owner of all state), `db` (SQLite), `link`
//! (the bus), `rest` (the interface), `bulk` (images for agents), `import`, `commit`, `jobs`.
//!
//! Invariants:
//! 1. What is answered or published is durable first (see `core`).
//! 2. Only the core thread changes state; everybody else asks it.
//! 3. A command is published once a cell; what a crash leaves in doubt is published again under the same id, which agents know.
//! 4. It does not start outside of lab mode, and says in every view that it is in it.
//! 5. One controller a state directory, by a lock on it.
//!
//! Threads: `core`; `bus-out-<cell>`, one a cell; the tokio runtime of the caller for everything else. No locks but that of the
//! job list. Order of shutdown: listeners stop accepting and streams end; running imports are cancelled and joined; bus readers;
//! the core, after all it was told; the writers of the bus.
//!
//! Does not: decide (that is `muster-fleet`), keep VM state of its own (it is what hosts say), authenticate (lab mode).
#![forbid(unsafe_code)]

mod bulk;
mod commit;
pub mod config;
mod core;
mod db;
mod import;
mod jobs;
mod link;
mod refusal;
pub mod rest;

use std::{
    fs::File,
    future::IntoFuture,
    io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use muster_bus::{Bus, BusError};
use muster_common::{Clock, ErrorCode, Incarnation};
use muster_repository::{Repository, RepositoryError, storage::DirectoryStorage};
use tokio::{
    net::{TcpListener, UnixListener, UnixStream},
    task::JoinSet,
    time::MissedTickBehavior,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use config::Config;

use crate::{
    config::SettingError,
    core::{Core, Handle, Identity},
    db::{Db, DbError},
    rest::Caller,
};

/// Why the controller did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("check the configuration")]
    Setting(#[from] SettingError),
    #[error("lock the state directory {path}: another controller runs with it; stop it, or set state_dir")]
    Locked { path: PathBuf },
    #[error("{attempted} {path}")]
    File {
        attempted: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("open the database")]
    Db(#[from] DbError),
    #[error("open the image repository")]
    Repository(#[from] RepositoryError),
    #[error("listen on {address}: is another controller or service there? Set {what}")]
    Listen {
        what: &'static str,
        address: String,
        #[source]
        source: io::Error,
    },
    #[error("listen on {path}: another program answers there; stop it, or set api.socket")]
    SocketInUse { path: PathBuf },
    #[error("listen on {path}: a file that is no socket is in the way, and stays; set api.socket")]
    NotASocket { path: PathBuf },
    #[error("api.socket_group is {group:?}: this machine has no such group")]
    UnknownGroup { group: String },
    #[error("join cell {cell}")]
    Bus {
        cell: u16,
        #[source]
        source: BusError,
    },
    #[error("start a thread")]
    Thread {
        #[source]
        source: io::Error,
    },
    #[error("build the HTTP client")]
    Http {
        #[source]
        source: reqwest::Error,
    },
}

impl StartError {
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Locked { .. } | Self::SocketInUse { .. } => ErrorCode::AddressInUse,
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => ErrorCode::AddressInUse,
            Self::Setting(_) | Self::UnknownGroup { .. } | Self::NotASocket { .. } => ErrorCode::InvalidArgument,
            Self::Db(error) => error.code(),
            Self::Repository(error) => error.code(),
            Self::Bus { source, .. } => source.code(),
            Self::File { .. } | Self::Listen { .. } | Self::Thread { .. } => ErrorCode::Io,
            Self::Http { .. } => ErrorCode::Internal,
        }
    }
}

/// A running controller.
pub struct Controller {
    socket: PathBuf,
    http: Option<SocketAddr>,
    stream_endpoint: String,
    core: Handle,
    stop: CancellationToken,
    servers: JoinSet<()>,
    tasks: TaskTracker,
    readers: JoinSet<()>,
    core_thread: std::thread::JoinHandle<()>,
    writers: link::Threads,
    // held to the end
    _lock: File,
}

/// How often the core looks at the clock: how late a deadline is noticed.
const TICK: Duration = Duration::from_millis(250);
/// Requests in progress get so long when the controller stops.
const DRAIN: Duration = Duration::from_secs(5);

impl Controller {
    /// Starts over DDS, in the cells of the configuration.
    ///
    /// # Errors
    /// Whatever keeps it from starting; nothing is left behind then.
    pub async fn start(config: Config, clock: Arc<dyn Clock>) -> Result<Self, StartError> {
        config.check()?;
        let cells = config.bus.clone();
        let buses = tokio::task::spawn_blocking(move || {
            cells
                .cells
                .iter()
                .map(|cell| Bus::dds(&cells.bus(*cell)).map_err(|source| StartError::Bus { cell: *cell, source }))
                .collect::<Result<Vec<_>, _>>()
        })
        .await
        .map_err(|error| StartError::Thread { source: io::Error::other(error) })??;
        Self::start_with(config, clock, buses).await
    }

    /// Starts over the given buses, one a cell.
    ///
    /// # Errors
    /// Whatever keeps it from starting.
    pub async fn start_with(config: Config, clock: Arc<dyn Clock>, buses: Vec<Bus>) -> Result<Self, StartError> {
        config.check()?;
        let config = Arc::new(config);
        let lock = prepare_state_dir(&config.state_dir)?;
        let repository_dir = config.state_dir.join("repository");
        let (mut db, repository) = {
            let config = config.clone();
            tokio::task::spawn_blocking(move || {
                let db = Db::open(&config.state_dir.join("controller.db"))?;
                let storage = DirectoryStorage::open(&repository_dir).map_err(RepositoryError::from)?;
                Ok::<_, StartError>((db, Repository::open(Arc::new(storage))?))
            })
            .await
            .map_err(|error| StartError::Thread { source: io::Error::other(error) })??
        };

        // listeners first: a port in use is known before the fleet hears of us
        let bulk = listen("stream.listen", config.stream.listen).await?;
        let bulk_address = bulk.local_addr().map_err(|source| StartError::Listen {
            what: "stream.listen",
            address: config.stream.listen.to_string(),
            source,
        })?;
        let http = match config.api.http_port {
            Some(port) => Some(listen("api.http_port", SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await?),
            None => None,
        };
        let http_address = http.as_ref().and_then(|listener| listener.local_addr().ok());
        let socket = config.socket();
        let unix = listen_unix(&socket, config.api.socket_group.as_deref()).await?;

        let (id, epoch) = db.begin_epoch()?;
        let stream_endpoint = config.stream_endpoint(bulk_address);
        let identity = Identity {
            id,
            incarnation: Incarnation::random(),
            epoch,
            name: config.name.clone(),
            stream_endpoint: stream_endpoint.clone(),
            started_at_us: clock.now_us(),
        };
        let stop = CancellationToken::new();
        let mut joined = Vec::new();
        for bus in buses {
            let cell = bus.cell();
            joined.push(link::join(bus).map_err(|source| StartError::Bus { cell, source })?);
        }
        let mut readers = JoinSet::new();
        let mut writers = None;
        let (core, core_thread) =
            Core::start(db, config.clone(), clock.clone(), identity, |handle| {
                match link::start(joined, &handle, &mut readers, &stop) {
                    Ok((links, threads)) => {
                        writers = Some(Ok(threads));
                        links
                    }
                    Err(source) => {
                        writers = Some(Err(source));
                        Vec::new()
                    }
                }
            })?;
        let writers = writers
            .unwrap_or_else(|| Err(io::Error::other("the link was not started")))
            .map_err(|source| StartError::Thread { source })?;

        let (ticking, stopped) = (core.clone(), stop.clone());
        readers.spawn(async move {
            let mut tick = tokio::time::interval(TICK);
            tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
            loop {
                tokio::select! {
                    () = stopped.cancelled() => break,
                    _ = tick.tick() => ticking.tick(),
                }
            }
        });

        // before the interface is served: no import can be under way
        import::tidy(repository.clone(), core.clone()).await;
        let tasks = TaskTracker::new();
        let shared = rest::Shared {
            core: core.clone(),
            jobs: jobs::Jobs::new(clock.clone()),
            repository: repository.clone(),
            config: config.clone(),
            clock,
            stop: stop.clone(),
            tasks: tasks.clone(),
            agents: reqwest::Client::builder()
                .connect_timeout(Duration::from_secs(5))
                .no_proxy()
                .build()
                .map_err(|source| StartError::Http { source })?,
            imports: Arc::new(tokio::sync::Semaphore::new(1)),
        };
        let app = rest::router(shared);
        let mut servers = JoinSet::new();
        let service = app.clone().into_make_service_with_connect_info::<Caller>();
        let serve = axum::serve(unix, service).with_graceful_shutdown(stop.clone().cancelled_owned());
        servers.spawn(serve_until_end("unix socket", serve.into_future()));
        if let Some(http) = http {
            let service = app.into_make_service_with_connect_info::<Caller>();
            let serve = axum::serve(http, service).with_graceful_shutdown(stop.clone().cancelled_owned());
            servers.spawn(serve_until_end("http", serve.into_future()));
        }
        let bulk_service: Router = bulk::router(repository);
        let serve = axum::serve(bulk, bulk_service).with_graceful_shutdown(stop.clone().cancelled_owned());
        servers.spawn(serve_until_end("stream endpoint", serve.into_future()));
        tracing::info!(controller = %id, epoch, socket = %socket.display(), stream = stream_endpoint, "controller started, lab mode");
        Ok(Self {
            socket,
            http: http_address,
            stream_endpoint,
            core,
            stop,
            servers,
            tasks,
            readers,
            core_thread,
            writers,
            _lock: lock,
        })
    }

    /// Where the REST interface is.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
    /// Where it is on 127.0.0.1, when it is.
    pub fn http(&self) -> Option<SocketAddr> {
        self.http
    }
    /// Base URL that agents pull from.
    pub fn stream_endpoint(&self) -> &str {
        &self.stream_endpoint
    }

    /// Stops in order: see the crate's documentation.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        let drained = async { while self.servers.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            tracing::warn!("requests still in progress are cut off");
            self.servers.shutdown().await;
        }
        self.tasks.close();
        if tokio::time::timeout(DRAIN, self.tasks.wait()).await.is_err() {
            tracing::warn!("background work still in progress is left to the end of the process");
        }
        while self.readers.join_next().await.is_some() {}
        self.core.stop().await;
        let Self { core, core_thread, writers, socket, .. } = self;
        drop(core);
        let joined = tokio::task::spawn_blocking(move || {
            if core_thread.join().is_err() {
                tracing::error!("the core panicked");
            }
            writers.join();
        });
        if joined.await.is_err() {
            tracing::error!("the threads could not be joined");
        }
        // gone already when another controller has taken it over
        let _ = std::fs::remove_file(socket);
    }
}

async fn serve_until_end(what: &'static str, serve: impl Future<Output = io::Result<()>>) {
    if let Err(error) = serve.await {
        tracing::error!(what, err = %error, "server ended");
    }
}

async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Listen { what, address: address.to_string(), source })
}

/// Makes the state directory, locks it, and clears what a crash left of uploads.
fn prepare_state_dir(dir: &Path) -> Result<File, StartError> {
    fn failed(attempted: &'static str, path: &Path) -> impl Fn(io::Error) -> StartError {
        move |source| StartError::File { attempted, path: path.to_path_buf(), source }
    }
    std::fs::create_dir_all(dir).map_err(failed("make the state directory", dir))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o750)).map_err(failed("set the mode of", dir))?;
    let path = dir.join("lock");
    let lock = File::create(&path).map_err(failed("open the lock", &path))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(StartError::Locked { path: dir.to_path_buf() }),
        Err(error) => return Err(failed("lock", &path)(error.into())),
    }
    let incoming = dir.join("incoming");
    if incoming.exists() {
        std::fs::remove_dir_all(&incoming).map_err(failed("clear", &incoming))?;
    }
    std::fs::create_dir_all(&incoming).map_err(failed("make", &incoming))?;
    Ok(lock)
}

/// The socket: for its owner, or for a group too. One left behind by a crash is replaced, one that answers is not.
async fn listen_unix(path: &Path, group: Option<&str>) -> Result<UnixListener, StartError> {
    let failed = |source| StartError::Listen { what: "api.socket", address: path.display().to_string(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(failed)?;
            }
        }
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(StartError::NotASocket { path: path.to_path_buf() });
        }
        Ok(_) if UnixStream::connect(path).await.is_ok() => {
            return Err(StartError::SocketInUse { path: path.to_path_buf() });
        }
        Ok(_) => std::fs::remove_file(path).map_err(failed)?,
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let mut mode = 0o600;
    if let Some(name) = group {
        let id = group_id(name).ok_or_else(|| StartError::UnknownGroup { group: name.to_string() })?;
        std::os::unix::fs::chown(path, None, Some(id)).map_err(failed)?;
        mode = 0o660;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok(listener)
}

/// The number of a group of this machine.
fn group_id(name: &str) -> Option<u32> {
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}
