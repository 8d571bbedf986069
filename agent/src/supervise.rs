//! Puts the agent together and takes it apart again.
//!
//! Start: check configuration, lock the state directory, open ledger and records, open store and exports, hypervisor, adopt
//! what runs, join the bus, then listen and obey.
//!
//! Shutdown order, each step joined before the next:
//! 1. `control`, `stream`: nobody new comes in; open streams end.
//! 2. `driver`: no new command is begun; what runs gets `stop_ms`, the rest is read back by the next run. Then what
//!    outlives its order (`aftercare`) gets as long again.
//! 3. `listen`, `watch_states`, `watch_guests`, `nudge`, thread `agent-events`.
//! 4. thread `agent-telemetry` (its last word: shutting down), then `beat`.
//! 5. thread `agent-voice`: says what is queued.
//! 6. `libvirt-*` threads: what waits is given up, what runs gets `stop_ms`.
//! 7. `nbd-*` threads: exports end. From here on guests are without disks.
//! 8. the state directory's lock, by drop.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, thread::JoinHandle, time::Duration};

use muster_backup::Backups;
use muster_bus::{Bus, BusError};
use muster_common::{Chain, Clock, ErrorCode, HostId, Incarnation, SystemClock};
use muster_export::{ExportCatalog, NbdConfig, NbdServer, Registry, ServerError};
use muster_idl::v1::Severity;
use muster_store::{Pages, Store, StoreConfig, StoreError};
use muster_virt::{DomainState, Hypervisor, Lane};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle as Task,
};
use tokio_util::sync::CancellationToken;

use crate::{
    boot::BootFiles,
    config::{CheckError, Config, PageChoice},
    control,
    dispatcher::Dispatcher,
    driver::Driver,
    host::Host,
    identity::{DrainMark, Identity, IdentityError},
    images::{Images, PullError},
    inventory::{Entry, Inventory, is_lost},
    ledger::{Ledger, LedgerError},
    machines::Machines,
    observer,
    presence::Presence,
    records::{RecordError, Records, VmRecord},
    stop::{Stop, StopRefused, prepare_stop},
    stream,
    telemetry::{self, Telemetry},
    voice::{About, Voice},
    volumes::Volumes,
};

/// Commands waiting to be taken up.
const COMMANDS: usize = 1024;

/// What an embedding program or a test brings along; the default brings nothing.
pub struct Deps {
    /// `None`: DDS, as configured.
    pub bus: Option<Bus>,
    /// `None`: as configured.
    pub hypervisor: Option<Arc<dyn Hypervisor>>,
    pub clock: Arc<dyn Clock>,
}

impl Default for Deps {
    fn default() -> Self {
        Self { bus: None, hypervisor: None, clock: Arc::new(SystemClock) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] CheckError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Records(#[from] RecordError),
    #[error("open the memory store")]
    Store(#[from] StoreError),
    #[error("make an HTTP client")]
    Http(#[from] PullError),
    #[error("{action} {path}", path = path.display())]
    Directory {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("serve disks")]
    Export(#[from] ServerError),
    #[error("listen for streams on {address}: is another agent or service there? Set stream.listen")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("join the bus")]
    Bus(#[from] BusError),
    #[error("start thread {name}")]
    Thread {
        name: &'static str,
        #[source]
        source: io::Error,
    },
}

impl StartError {
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Config(_) => ErrorCode::InvalidArgument,
            Self::Identity(e) => e.code(),
            Self::Ledger(e) => e.code(),
            Self::Records(e) => e.code(),
            Self::Store(e) => e.code(),
            Self::Http(e) => e.code(),
            Self::Export(ServerError::InUse(_)) => ErrorCode::AddressInUse,
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => ErrorCode::AddressInUse,
            Self::Directory { .. } | Self::Export(_) | Self::Listen { .. } | Self::Thread { .. } => ErrorCode::Io,
            Self::Bus(e) => e.code(),
        }
    }
}

/// A running agent. Ends in [`Agent::stop`]; dropped without it, it is as if it had been killed, but for its threads.
pub struct Agent {
    host: Arc<Host>,
    stopping: watch::Receiver<bool>,
    /// In the order of the module's list.
    doors: (CancellationToken, Vec<Task<()>>),
    driver: (CancellationToken, Task<()>),
    watchers: (CancellationToken, Vec<Task<()>>, Option<JoinHandle<()>>),
    telemetry: (CancellationToken, JoinHandle<()>, Task<()>),
    voice: JoinHandle<()>,
    exports: NbdServer,
    stream_address: SocketAddr,
    _identity: Identity,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("host", &self.host.id).field("incarnation", &self.host.incarnation).finish()
    }
}

fn make_directory(action: &'static str, path: PathBuf) -> Result<PathBuf, StartError> {
    std::fs::create_dir_all(&path).map_err(|source| StartError::Directory { action, path: path.clone(), source })?;
    Ok(path)
}

fn named(name: &'static str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StartError> {
    std::thread::Builder::new().name(name.into()).spawn(body).map_err(|source| StartError::Thread { name, source })
}

impl Agent {
    /// Starts everything; on an error nothing is left running. Needs a multi-threaded tokio runtime. Takes seconds when KVM is
    /// probed.
    pub async fn start(config: Config, deps: Deps) -> Result<Self, StartError> {
        config.check()?;
        let clock = deps.clock;
        let now = clock.now_us();
        let identity = Identity::open(&config.state_dir)?;
        let (ledger, entries) = Ledger::open(&config.state_dir.join("ledger"), now)?;
        let (records, known, unreadable) = Records::open(&config.state_dir)?;
        for error in &unreadable {
            tracing::error!(err = %Chain(error), "a VM record cannot be read, the VM is left alone");
        }
        make_directory("make run directory", config.run_dir.clone())?;
        make_directory("make console directory", config.state_dir.join("console"))?;
        let boot_files = BootFiles::choose(&config.run_dir, identity.host);

        let pages = match config.store.pages {
            PageChoice::Auto => Pages::Auto,
            PageChoice::Small => Pages::Small,
            PageChoice::Thp => Pages::Transparent,
            PageChoice::Hugetlb => Pages::Huge,
        };
        let store = Store::open(StoreConfig { pages, ..StoreConfig::new(config.store.budget) })?;
        let registry = Arc::new(Registry::new());
        let catalog: Arc<dyn ExportCatalog> = registry.clone();
        let exports = NbdServer::start(NbdConfig::unix(config.export_socket()), catalog)?;
        let listen = |source| StartError::Listen { address: config.stream.listen, source };
        let listener = tokio::net::TcpListener::bind(config.stream.listen).await.map_err(listen)?;
        let stream_address = listener.local_addr().map_err(listen)?;
        let control_socket = config.control_socket();
        let control = control::bind(&control_socket).map_err(|source| StartError::Directory {
            action: "listen on control socket",
            path: control_socket,
            source,
        })?;

        let machines = blocking({
            let (config, given) = (config.clone(), deps.hypervisor);
            move || Machines::open(&config, given)
        })
        .await;
        let bus = match deps.bus {
            Some(bus) => bus,
            None => {
                let bus_config = config.bus();
                blocking(move || Bus::dds(&bus_config)).await?
            }
        };
        let directory = config.backup_directory();
        let backups = blocking(move || {
            let parents = directory.parent().map_or(Ok(()), std::fs::create_dir_all);
            match (parents, Backups::open(&directory)) {
                (_, Ok(backups)) => Ok(backups),
                (_, Err(e)) => Err(format!("{}: {}", directory.display(), Chain(&e))),
            }
        })
        .await;
        if let Err(why) = &backups {
            tracing::error!(reason = why, "backups cannot be made");
        }

        let (voice, voice_thread) = Voice::start(&bus, Arc::clone(&clock), identity.host, identity.incarnation)?;
        let silence = config.timeouts.controller_silence_ms;
        let name =
            config.name.clone().or_else(|| sysinfo::System::host_name().ok()).unwrap_or_else(|| identity.host.short());
        let (beats, beats_asked) = mpsc::channel(16);
        let host = Arc::new(Host {
            id: identity.host,
            incarnation: identity.incarnation,
            boot_id: identity.boot.clone(),
            hardware_uuid: identity.hardware_uuid.clone(),
            name,
            started_us: now,
            bus: bus.clone(),
            images: Images::new(store.clone(), config.timeouts.http())?,
            volumes: Volumes { store, exports: registry },
            backups,
            machines,
            inventory: Inventory::default(),
            aftercare: Default::default(),
            records,
            draining: DrainMark::new(&config.state_dir),
            boot_files,
            presence: Mutex::new(Presence::new(identity.host, identity.incarnation, silence, clock.now_us())),
            voice: voice.clone(),
            beats,
            stream_endpoint: Mutex::new(stream::advertised(&config, stream_address)),
            guest_file_reads: Default::default(),
            silent: Default::default(),
            clock,
            config,
        });
        adopt(&host, known).await;

        let mut dispatcher = Dispatcher::new(host.id, host.incarnation, host.config.parallel_commands);
        let first = dispatcher.recover(host.now_us(), entries);
        let (awaiting_in, awaiting) = mpsc::channel(64);
        let (stopping_in, stopping) = watch::channel(false);

        let (doors, driving, watching, telling) =
            (CancellationToken::new(), CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        // subscribed before the first heartbeat: who hears us can command us
        let commands = bus.subscriber(COMMANDS)?;
        let controllers = bus.subscriber(64)?;
        let hearts = bus.subscriber(1024)?;
        let driver = Driver {
            host: Arc::clone(&host),
            dispatcher,
            ledger: Arc::new(Mutex::new(ledger)),
            commands,
            awaiting,
            stop: driving.clone(),
            first,
        };
        let (wake_in, wake) = crossbeam_channel::bounded(1);
        let sampler = Telemetry::new(Arc::clone(&host), &bus)?;
        let heartbeat = bus.publisher()?;
        let events_thread = match host.machines.pool() {
            None => None,
            Some(pool) => {
                let events = pool.hypervisor().events();
                let (host, stop) = (Arc::clone(&host), watching.clone());
                Some(named("agent-events", move || observer::follow_events(&host, &events, &stop))?)
            }
        };
        let telemetry_thread = {
            let stop = telling.clone();
            named("agent-telemetry", move || sampler.run(&wake, &stop))?
        };

        let h = || Arc::clone(&host);
        let watchers = vec![
            tokio::spawn(observer::listen(h(), controllers, hearts, awaiting_in, watching.clone())),
            tokio::spawn(observer::watch_states(h(), watching.clone())),
            tokio::spawn(observer::watch_guests(h(), watching.clone())),
            tokio::spawn(telemetry::nudge(h(), wake_in, watching.clone())),
        ];
        let beat = tokio::spawn(telemetry::beat(h(), heartbeat, beats_asked, telling.clone()));
        let driver = tokio::spawn(driver.run(host.config.timeouts.stop()));
        let open_doors = vec![
            tokio::spawn(stream::serve(h(), listener, doors.clone())),
            tokio::spawn(control::serve(h(), control, stopping_in, doors.clone())),
        ];

        host.voice.event(
            Severity::Info,
            "agent-started",
            format!("agent {} started; lab mode: no authentication", env!("CARGO_PKG_VERSION")),
            About::default(),
        );
        tracing::info!(
            host = %host.id, name = host.name, incarnation = %host.incarnation, cell = host.config.cell,
            stream = *host.stream_endpoint.lock(), hypervisor = host.config.hypervisor_uri().unwrap_or_else(|| "none".into()),
            accelerator = host.machines.accelerator(), "agent started in lab mode: no authentication"
        );
        Ok(Self {
            host,
            stopping,
            doors: (doors, open_doors),
            driver: (driving, driver),
            watchers: (watching, watchers, events_thread),
            telemetry: (telling, telemetry_thread, beat),
            voice: voice_thread,
            exports,
            stream_address,
            _identity: identity,
        })
    }

    pub fn host_id(&self) -> HostId {
        self.host.id
    }
    pub fn incarnation(&self) -> Incarnation {
        self.host.incarnation
    }
    pub fn name(&self) -> &str {
        &self.host.name
    }
    /// Where streams are served.
    pub fn stream_address(&self) -> SocketAddr {
        self.stream_address
    }
    /// The memory store: an embedding server may look into it.
    pub fn store(&self) -> &Store {
        &self.host.volumes.store
    }
    /// The socket its exports are served on.
    pub fn export_socket(&self) -> PathBuf {
        self.host.config.export_socket()
    }

    /// Returns when somebody was granted a stop through the control socket. Cancel-safe.
    pub async fn stop_requested(&self) {
        let mut stopping = self.stopping.clone();
        if stopping.wait_for(|stop| *stop).await.is_err() {
            // the control socket is gone: nobody can ask any more
            std::future::pending::<()>().await;
        }
    }

    /// Stops, or says why not and runs on; see [`crate::stop`].
    pub async fn stop(self, how: Stop) -> Result<(), (Self, StopRefused)> {
        match prepare_stop(&self.host, how).await {
            Err(refused) => Err((self, refused)),
            Ok(_) => {
                self.take_apart(true).await;
                Ok(())
            }
        }
    }

    /// Ends as by SIGKILL, as far as others can see: nothing is paused, nothing more is said or recorded, commands at work
    /// are cut off. For tests.
    pub async fn kill(self) {
        self.host.silent.store(true, std::sync::atomic::Ordering::Relaxed);
        // before the orders: it would take their end for a reason to tidy up
        self.host.aftercare.finish(Duration::ZERO).await;
        self.driver.1.abort();
        self.telemetry.2.abort();
        self.take_apart(false).await;
    }

    async fn take_apart(self, orderly: bool) {
        let host = self.host;
        let grace = if orderly { host.config.timeouts.stop() } else { Duration::ZERO };
        // 1
        self.doors.0.cancel();
        for task in self.doors.1 {
            joined("door", task).await;
        }
        // 2
        self.driver.0.cancel();
        joined("driver", self.driver.1).await;
        host.aftercare.finish(grace).await;
        // 3
        self.watchers.0.cancel();
        for task in self.watchers.1 {
            joined("watcher", task).await;
        }
        if let Some(thread) = self.watchers.2 {
            join_thread("agent-events", thread).await;
        }
        // 4
        if orderly {
            host.voice.event(Severity::Info, "agent-stopped", "the agent stops in order", About::default());
        }
        self.telemetry.0.cancel();
        join_thread("agent-telemetry", self.telemetry.1).await;
        joined("heartbeat", self.telemetry.2).await;
        // 5
        let voice = host.voice.clone();
        blocking(move || voice.finish()).await;
        join_thread("agent-voice", self.voice).await;
        // 6
        let closing = Arc::clone(&host);
        let stuck = blocking(move || closing.machines.close(grace)).await;
        if stuck > 0 {
            tracing::warn!(calls = stuck, "hypervisor calls were still running at the end");
        }
        // 7
        let exports = self.exports;
        blocking(move || exports.stop()).await;
        if orderly {
            host.boot_files.leave();
        }
        // another agent may be coming up on it: only a dead socket's file is in its way, and it replaces that
        let _ = std::fs::remove_file(host.config.control_socket());
        tracing::info!(host = %host.id, orderly, "agent stopped");
    }
}

/// Blocking work of start and stop, whose panic is ours.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

async fn joined(what: &'static str, task: Task<()>) {
    match task.await {
        Err(e) if e.is_panic() => tracing::error!(task = what, "a task had panicked"),
        _ => {}
    }
}

async fn join_thread(what: &'static str, thread: JoinHandle<()>) {
    if blocking(move || thread.join()).await.is_err() {
        tracing::error!(thread = what, "a thread had panicked");
    }
}

/// Takes over what an earlier run left: its VMs run on, or stand paused because their disks are gone. Their volumes were in
/// its memory and are lost; so that no guest goes on without its disk, what still runs is paused.
async fn adopt(host: &Host, known: Vec<VmRecord>) {
    let listed = match host.machines.missing() {
        Some(_) => Vec::new(),
        None => match host.machines.call(Lane::Host, "list", |h| h.list()).await {
            Ok(list) => list,
            Err(e) => {
                host.complain("the hypervisor does not list its machines", &e);
                Vec::new()
            }
        },
    };
    let now = host.now_us();
    for status in listed.iter().filter(|s| s.ours && !known.iter().any(|r| r.vm == s.vm)) {
        tracing::warn!(vm = %status.vm, name = status.name, "a machine of ours without a record, left alone");
    }
    for record in known {
        let vm = record.vm;
        let status = listed.iter().find(|s| s.vm == vm);
        let mut entry = Entry::new(record.clone(), status.map_or(DomainState::Off, |s| s.state), now);
        if let Some(status) = status {
            entry.reason = status.reason;
        }
        host.inventory.insert(entry);
        if !is_lost(&record, &host.volumes.store) {
            continue;
        }
        if status.is_some_and(|s| s.state == DomainState::Running) {
            match host.machines.call(Lane::Urgent, "pause", move |h| h.pause(vm)).await {
                Ok(()) => {}
                Err(e) => host.complain("a VM without its disks was not paused", &e),
            }
            if let Ok(Some(status)) = host.machines.status(vm).await {
                host.inventory.observe(now, &status);
            }
        }
        tracing::warn!(vm = %vm, name = record.name, "adopted; its volumes were lost with the earlier run's memory");
        let text = format!("{}: its volumes were lost with the earlier run's memory", record.name);
        host.voice.event(Severity::Error, "volume-lost", text, About { vm: vm.to_string(), ..About::default() });
    }
}
