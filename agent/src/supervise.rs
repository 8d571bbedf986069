//! Puts the agent together and takes it apart again.
//!
//! Start: check configuration, lock the state directory, open ledger and records, open the store (as an earlier run left it,
//! if it can be) and offer the disks of every VM whose volumes are there: their guests wait for it. Only then what takes
//! time: hypervisor, bus. Then adopt what runs, listen and obey.
//!
//! Shutdown order, each step joined before the next:
//! 1. `control`, `stream`: nobody new comes in; open streams end.
//! 2. `driver`: no new command is begun; what runs gets `stop_ms`, the rest is read back by the next run. Then what
//!    outlives its order (`aftercare`) gets as long again.
//! 3. `listen`, `watch_states`, `watch_guests`, `mend`, `nudge`, threads `agent-events`, `agent-scrub`.
//! 4. thread `agent-telemetry` (its last word: shutting down), then `beat`.
//! 5. thread `agent-voice`: says what is queued.
//! 6. `libvirt-*` threads: what waits is given up, what runs gets `stop_ms`.
//! 7. `nbd-*` and `vu-*` threads: exports end. From here on guests are without disks.
//! 8. the store: given back to the machine, unless the next run is to find it (see [`crate::stop`]).
//! 9. the state directory's lock, by drop.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, thread::JoinHandle, time::Duration, time::Instant};

use muster_backup::Backups;
use muster_bus::{Bus, BusError};
use muster_common::{Chain, Clock, ErrorCode, HostId, Incarnation, SystemClock};
use muster_export::{
    ExportCatalog, NbdConfig, NbdServer, Registry, ServerError,
    vhost::{VhostConfig, VhostError, VhostServer},
};
use muster_idl::v1::Severity;
use muster_store::{Attached, Store, StoreError};
use muster_virt::{DomainState, Hypervisor, Lane};
use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    task::JoinHandle as Task,
};
use tokio_util::sync::CancellationToken;

use crate::{
    boot::BootFiles,
    config::{CheckError, Config},
    control,
    dispatcher::Dispatcher,
    driver::Driver,
    host::Host,
    identity::{DrainMark, Identity, IdentityError},
    images::{Images, PullError},
    inventory::{Entry, Inventory, SnapshotSet, is_lost},
    ledger::{Ledger, LedgerError},
    machines::Machines,
    memory::{self, Fate, Memory},
    mend, numa, observer,
    presence::Presence,
    records::{RecordError, Records, VmRecord},
    scrub,
    stop::{Stop, StopRefused, prepare_stop},
    stream,
    tcp::{self, TcpError},
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
    /// `None`: as configured. One that is given is taken as an earlier run left it, and left as it is at the end.
    pub store: Option<Store>,
    pub clock: Arc<dyn Clock>,
}

impl Default for Deps {
    fn default() -> Self {
        Self { bus: None, hypervisor: None, store: None, clock: Arc::new(SystemClock) }
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
    #[error("serve disks")]
    Sockets(#[from] VhostError),
    #[error(transparent)]
    Tcp(#[from] TcpError),
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
            Self::Tcp(TcpError::Read { .. } | TcpError::Tls(_)) => ErrorCode::InvalidArgument,
            Self::Directory { .. }
            | Self::Tcp(_)
            | Self::Export(_)
            | Self::Sockets(_)
            | Self::Listen { .. }
            | Self::Thread { .. } => ErrorCode::Io,
            Self::Bus(e) => e.code(),
        }
    }
}

type Served = (Volumes, (NbdServer, Option<NbdServer>));
/// A thread of ours.
type Named = (&'static str, JoinHandle<()>);

/// A running agent. Ends in [`Agent::stop`]; dropped without it, it is as if it had been killed, but for its threads.
pub struct Agent {
    host: Arc<Host>,
    stopping: watch::Receiver<Option<Stop>>,
    /// In the order of the module's list.
    doors: (CancellationToken, Vec<Task<()>>),
    driver: (CancellationToken, Task<()>),
    watchers: (CancellationToken, Vec<Task<()>>, Vec<Named>),
    telemetry: (CancellationToken, JoinHandle<()>, Task<()>),
    voice: JoinHandle<()>,
    /// On the unix socket, and on TCP when that is configured.
    exports: (NbdServer, Option<NbdServer>),
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

        let Memory { store, attached, fate } = memory::open(&config, deps.store)?;
        let (volumes, exports) = serve_disks(&config, store, &known)?;
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
            images: Images::new(volumes.store.clone(), config.timeouts.http())?,
            volumes,
            store_fate: fate,
            backups,
            machines,
            inventory: Inventory::default(),
            aftercare: Default::default(),
            records,
            record_changes: Mutex::default(),
            draining: DrainMark::new(&config.state_dir),
            boot_files,
            scrub: Default::default(),
            presence: Mutex::new(Presence::new(identity.host, identity.incarnation, silence, clock.now_us())),
            voice: voice.clone(),
            beats,
            stream_endpoint: Mutex::new(stream::advertised(&config, stream_address)),
            guest_file_reads: Default::default(),
            silent: Default::default(),
            clock,
            config,
        });
        adopt(&host, known, unreadable.is_empty()).await;
        match attached {
            Attached::Fresh(None) => {}
            Attached::Fresh(Some(why)) => tracing::warn!(reason = why, "what an earlier run left cannot be used"),
            Attached::Warm(report) => {
                let stats = host.volumes.store.stats();
                let text =
                    format!("{} volumes and {} images are as the earlier run left them", stats.volumes, stats.images);
                tracing::info!(took_ms = report.took.as_millis() as u64, "{text}");
                host.voice.event(Severity::Info, "store-attached", text, About::default());
            }
        }

        let mut dispatcher = Dispatcher::new(host.id, host.incarnation, host.config.parallel_commands);
        let first = dispatcher.recover(host.now_us(), entries);
        let (awaiting_in, awaiting) = mpsc::channel(64);
        let (stopping_in, stopping) = watch::channel(None);

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
        let mut watching_threads = Vec::new();
        let mut watch = |name: &'static str, body: Box<dyn FnOnce() + Send>| {
            watching_threads.push((name, named(name, body)?));
            Ok::<(), StartError>(())
        };
        if let Some(pool) = host.machines.pool() {
            let events = pool.hypervisor().events();
            let (host, stop) = (Arc::clone(&host), watching.clone());
            watch("agent-events", Box::new(move || observer::follow_events(&host, &events, &stop)))?;
        }
        if host.config.scrub.is_on() {
            let (host, stop, runtime) = (Arc::clone(&host), watching.clone(), Handle::current());
            watch("agent-scrub", Box::new(move || scrub::run(&host, &runtime, &stop)))?;
        }
        let telemetry_thread = {
            let stop = telling.clone();
            named("agent-telemetry", move || sampler.run(&wake, &stop))?
        };

        let h = || Arc::clone(&host);
        let watchers = vec![
            tokio::spawn(observer::listen(h(), controllers, hearts, awaiting_in, watching.clone())),
            tokio::spawn(observer::watch_states(h(), watching.clone())),
            tokio::spawn(observer::watch_guests(h(), watching.clone())),
            tokio::spawn(mend::watch(h(), watching.clone())),
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
            accelerator = host.machines.accelerator(), numa = ?numa::sizes(), "agent started in lab mode: no authentication"
        );
        Ok(Self {
            host,
            stopping,
            doors: (doors, open_doors),
            driver: (driving, driver),
            watchers: (watching, watchers, watching_threads),
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

    /// Where disks are served over TCP.
    pub fn nbd_address(&self) -> Option<SocketAddr> {
        self.exports.1.as_ref().and_then(|server| server.addresses().first().copied())
    }

    /// Names of the disks that are offered, however they are served.
    pub fn exports(&self) -> Vec<String> {
        self.host.volumes.exports.exports().iter().map(|export| export.name().to_string()).collect()
    }

    /// Returns when somebody was granted a stop through the control socket, with what to stop by. Cancel-safe.
    pub async fn stop_requested(&self) -> Stop {
        let mut stopping = self.stopping.clone();
        if let Ok(how) = stopping.wait_for(Option::is_some).await.map(|how| *how)
            && let Some(how) = how
        {
            return how;
        }
        // the control socket is gone: nobody can ask any more
        std::future::pending().await
    }

    /// Stops, or says why not and runs on; see [`crate::stop`].
    pub async fn stop(self, how: Stop) -> Result<(), (Self, StopRefused)> {
        match prepare_stop(&self.host, how).await {
            Err(refused) => Err((self, refused)),
            Ok(_) => {
                self.take_apart(if how == Stop::Keep { Ending::Keep } else { Ending::GiveBack }).await;
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
        self.take_apart(Ending::Killed).await;
    }

    async fn take_apart(self, ending: Ending) {
        let host = self.host;
        let orderly = ending != Ending::Killed;
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
        for (name, thread) in self.watchers.2 {
            join_thread(name, thread).await;
        }
        // 4
        if orderly {
            let text = match ending {
                Ending::Keep => "the agent stops and leaves VMs and volumes to the next one",
                Ending::GiveBack | Ending::Killed => "the agent stops in order",
            };
            host.voice.event(Severity::Info, "agent-stopped", text, About::default());
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
        let (exports, volumes) = (self.exports, host.volumes.clone());
        blocking(move || {
            volumes.close_sockets();
            exports.0.stop();
            drop(exports.1);
        })
        .await;
        // 8
        if ending == Ending::GiveBack {
            host.boot_files.leave();
            if host.store_fate == Fate::Stays {
                host.volumes.store.clone().discard();
            }
        }
        // another agent may be coming up on it: only a dead socket's file is in its way, and it replaces that
        let _ = std::fs::remove_file(host.config.control_socket());
        tracing::info!(host = %host.id, orderly, "agent stopped");
    }
}

/// What becomes of memory and exports at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The machine gets the memory back.
    GiveBack,
    /// The next run finds it.
    Keep,
    /// As by SIGKILL.
    Killed,
}

/// Offers what is there of the disks of known VMs, then opens the doors: a QEMU that comes at once finds its disk.
fn serve_disks(config: &Config, store: Store, known: &[VmRecord]) -> Result<Served, StartError> {
    let began = Instant::now();
    let registry = Arc::new(Registry::new());
    let catalog: Arc<dyn ExportCatalog> = registry.clone();
    let sockets = VhostServer::start(VhostConfig::new(config.disk_sockets()), Arc::clone(&catalog))?;
    let limits = config.export.limits();
    let volumes = Volumes { store, exports: registry, sockets: Arc::new(sockets), limits };
    let mut offered = 0;
    for record in known {
        match volumes.offer_again(record) {
            Ok(true) => offered += 1,
            Ok(false) => {}
            // the other VMs do not wait for this one
            Err(e) => tracing::error!(vm = %record.vm, err = %Chain(&e), "disks of a VM are not offered again"),
        }
    }
    let nbd = NbdServer::start(NbdConfig::unix(config.export_socket()), Arc::clone(&catalog))?;
    let tcp = tcp::serve(&config.nbd, catalog)?;
    if offered > 0 {
        tracing::info!(vms = offered, took_us = began.elapsed().as_micros() as u64, "their disks are offered again");
    }
    Ok((volumes, (nbd, tcp)))
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

/// Takes over what an earlier run left. Its VMs run on, on the disks that are offered again by now; what a disk paused
/// meanwhile is resumed by [`crate::mend`]. A VM whose volumes are lost is paused if it still runs, so that no guest goes on
/// without its disk.
async fn adopt(host: &Host, known: Vec<VmRecord>, all_read: bool) {
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
    if all_read {
        sweep(host, &known).await;
    }
    for record in known {
        let vm = record.vm;
        let status = listed.iter().find(|s| s.vm == vm);
        let mut entry = Entry::new(record.clone(), status.map_or(DomainState::Off, |s| s.state), now);
        if let Some(status) = status {
            entry.reason = status.reason;
        }
        for (name, (taken_us, volumes)) in host.volumes.kept_snapshots(&record.disks) {
            entry.snapshots.insert(name, SnapshotSet::new(taken_us, volumes, None));
        }
        host.inventory.insert(entry);
        if !is_lost(&record, &host.volumes.store) {
            tracing::info!(vm = %vm, name = record.name, "adopted with its volumes");
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

/// Deletes volumes that no VM has: what a restore had read beside the disks when the earlier run ended. Not called when a
/// record could not be read, whose volumes would look like those.
async fn sweep(host: &Host, known: &[VmRecord]) {
    let store = &host.volumes.store;
    let named = |id| known.iter().any(|record| record.disks.iter().any(|disk| disk.volume == id));
    for volume in store.volumes().into_iter().map(|volume| volume.id()).filter(|id| !named(*id)) {
        let store = store.clone();
        match blocking(move || store.delete_volume(volume)).await {
            Ok(()) => tracing::info!(vol = %volume, "a volume that no VM has was deleted"),
            Err(e) => tracing::warn!(vol = %volume, err = %Chain(&e), "a volume that no VM has stayed"),
        }
    }
}
