//! A small world around agents: a network in memory, a controller's voice, and the repository it serves.
#![allow(dead_code, clippy::unwrap_used)]

pub mod balky;
pub mod guest;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{Path as UrlPath, State},
    http::StatusCode,
    routing::{get, post},
};
use bytes::Bytes;
use muster_agent::{Agent, Config, Deps};
use muster_bus::{
    Bus, Publisher, Subscriber,
    twin::{LossConfig, Network},
};
use muster_common::{ByteLen, Clock, CommandId, ControllerId, Digest, HostId, SystemClock, VmId};
use muster_idl::{
    arguments::{ApplicationSpec, BootSpec, TemplateSpec},
    v1::{Argument, ControllerState, Event, GroupCommand, Member, Outcome, TargetKind, Verb, Verdict, VirtualSystem},
};
use muster_repository::{Repository, storage::MemoryStorage};
use muster_store::Store;
use muster_virt::{
    Hypervisor,
    simulator::{Chances, Latencies, Simulator},
};

pub fn now_us() -> u64 {
    SystemClock.now_us()
}

/// Waits for a condition; never a fixed time.
pub async fn wait_for<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(started.elapsed() < deadline, "waited {deadline:?} for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Quick guests on real time.
pub fn simulator(seed: u64) -> Arc<Simulator> {
    let quick = |ms| Duration::from_millis(ms);
    let latencies =
        Latencies { boot: quick(150), shutdown: quick(100), save: quick(50), restore: quick(50), jitter: 0.1 };
    Arc::new(Simulator::real_time(seed, latencies, Chances::default()).unwrap())
}

/// What a controller serves to agents.
pub struct Depot {
    pub repository: Repository,
    pub url: String,
    pub chunks_served: Arc<std::sync::atomic::AtomicU64>,
}

#[derive(Clone)]
struct DepotState(Repository, Arc<std::sync::atomic::AtomicU64>);

impl Depot {
    pub async fn start() -> Self {
        let repository = Repository::open(Arc::new(MemoryStorage::default())).unwrap();
        let served = Arc::new(std::sync::atomic::AtomicU64::new(0));
        async fn manifest(State(s): State<DepotState>, UrlPath(d): UrlPath<String>) -> Result<Vec<u8>, StatusCode> {
            s.0.manifest_bytes(&d.parse().map_err(|_| StatusCode::BAD_REQUEST)?).map_err(|_| StatusCode::NOT_FOUND)
        }
        async fn blob(State(s): State<DepotState>, UrlPath(d): UrlPath<String>) -> Result<Vec<u8>, StatusCode> {
            s.0.blob(&d.parse().map_err(|_| StatusCode::BAD_REQUEST)?).map_err(|_| StatusCode::NOT_FOUND)
        }
        async fn chunks(State(s): State<DepotState>, body: Bytes) -> Result<Vec<u8>, StatusCode> {
            let mut out = Vec::new();
            for raw in body.chunks_exact(32) {
                let digest = Digest::from_bytes(raw.try_into().map_err(|_| StatusCode::BAD_REQUEST)?);
                let bytes = s.0.read_chunk(&digest).map_err(|_| StatusCode::NOT_FOUND)?;
                s.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
                out.extend_from_slice(&bytes);
            }
            Ok(out)
        }
        let router = Router::new()
            .route("/bulk/v1/manifests/{digest}", get(manifest))
            .route("/bulk/v1/blobs/{digest}", get(blob))
            .route("/bulk/v1/chunks", post(chunks))
            .with_state(DepotState(repository.clone(), served.clone()));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        // ends with the test's runtime
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { repository, url, chunks_served: served }
    }

    /// Imports an image made of these bytes.
    pub fn import(&self, bytes: Vec<u8>) -> Digest {
        let mut session = self.repository.session();
        let ingested =
            session.ingest(&bytes, &Default::default(), &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
        session.publish(&format!("image-{}", ingested.digest), b"x").unwrap();
        ingested.digest
    }
}

/// A disk image with recognisable contents: `salt` makes half of it differ.
pub fn image_bytes(mib: usize, salt: u8) -> Vec<u8> {
    let mut bytes = vec![0; mib << 20];
    let half = bytes.len() / 2;
    for (i, block) in bytes.chunks_mut(4096).enumerate() {
        // holes too
        if i % 3 != 0 {
            let mark = if i * 4096 < half { 1 } else { salt };
            block[..8].copy_from_slice(&(i as u64).to_le_bytes());
            block[8] = mark;
        }
    }
    bytes
}

/// The voice and ears of a controller.
pub struct Controller {
    pub id: ControllerId,
    pub bus: Bus,
    commands: Publisher<GroupCommand>,
    state: Publisher<ControllerState>,
    verdicts: Subscriber<Verdict>,
    pub systems: Subscriber<VirtualSystem>,
    pub events: Subscriber<Event>,
    pub seen: BTreeMap<(String, String, String), Vec<Verdict>>,
    pub depot: String,
    pub epoch: u64,
}

impl Controller {
    pub fn join(network: &Network, depot: &str) -> Self {
        let bus = network.join("controller");
        Self {
            id: ControllerId::random(),
            commands: bus.publisher().unwrap(),
            state: bus.publisher().unwrap(),
            verdicts: bus.subscriber(4096).unwrap(),
            systems: bus.subscriber(4096).unwrap(),
            events: bus.subscriber(4096).unwrap(),
            bus,
            seen: BTreeMap::new(),
            depot: depot.to_string(),
            epoch: 1,
        }
    }

    pub fn beat(&self, awaiting: Vec<String>) {
        let state = ControllerState {
            controller: self.id.to_string(),
            incarnation: "1".into(),
            name: "test".into(),
            epoch: self.epoch,
            group_epoch: 0,
            stream_endpoint: self.depot.clone(),
            lab: true,
            sent_at_us: now_us(),
            awaiting,
        };
        self.state.publish(&state).unwrap();
    }

    pub fn command(
        &self,
        verb: Verb,
        members: Vec<Member>,
        arguments: &[(&str, &str)],
        time: Duration,
    ) -> GroupCommand {
        GroupCommand {
            id: CommandId::now().to_string(),
            controller: self.id.to_string(),
            issuer: "test".into(),
            controller_epoch: self.epoch,
            group_epoch: 0,
            issued_at_us: now_us(),
            not_after_us: now_us() + time.as_micros() as u64,
            target_kind: if members[0].vm.is_empty() { TargetKind::Host } else { TargetKind::Vm },
            target: String::new(),
            members,
            verb,
            arguments: arguments.iter().map(|(n, v)| Argument { name: (*n).into(), value: (*v).into() }).collect(),
            wave: 0,
            plan_digest: String::new(),
            retry_of: String::new(),
            key_id: String::new(),
            signature: vec![],
            extension: vec![],
        }
    }

    pub fn publish(&self, command: &GroupCommand) {
        self.commands.publish(command).unwrap();
    }

    pub fn take(&mut self) {
        while let Some(sample) = self.verdicts.try_recv() {
            if let Some(v) = sample.value() {
                self.seen.entry((v.command.clone(), v.host.clone(), v.vm.clone())).or_default().push(v);
            }
        }
    }

    /// Publishes once and waits for a verdict of every member.
    pub async fn obeyed(&mut self, command: &GroupCommand) -> Vec<Verdict> {
        self.publish(command);
        self.answers(command).await
    }

    pub async fn answers(&mut self, command: &GroupCommand) -> Vec<Verdict> {
        let started = Instant::now();
        loop {
            self.take();
            let got: Vec<Verdict> = command
                .members
                .iter()
                .filter_map(|m| self.seen.get(&(command.id.clone(), m.host.clone(), m.vm.clone())))
                .map(|list| list[0].clone())
                .collect();
            if got.len() == command.members.len() {
                return got;
            }
            assert!(
                started.elapsed() < Duration::from_secs(30),
                "{} of {} answers to {}: {got:?}",
                got.len(),
                command.members.len(),
                command.verb
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The same, and every member must have done it.
    pub async fn done(&mut self, verb: Verb, members: &[Member], arguments: &[(&str, &str)]) -> Vec<Verdict> {
        let command = self.command(verb, members.to_vec(), arguments, Duration::from_secs(20));
        let verdicts = self.obeyed(&command).await;
        for v in &verdicts {
            assert_eq!(v.outcome, Outcome::Done, "{verb}: {} {}", v.code, v.message);
        }
        verdicts
    }

    /// The same, and the only member must answer like this.
    pub async fn answer(&mut self, verb: Verb, member: &Member, arguments: &[(&str, &str)]) -> Verdict {
        let command = self.command(verb, vec![member.clone()], arguments, Duration::from_secs(20));
        self.obeyed(&command).await.remove(0)
    }

    /// The newest state of a VM that satisfies the condition.
    pub async fn system(
        &mut self,
        vm: &Member,
        what: &str,
        condition: impl Fn(&VirtualSystem) -> bool,
    ) -> VirtualSystem {
        let started = Instant::now();
        loop {
            while let Some(sample) = self.systems.try_recv() {
                if let Some(system) = sample.value()
                    && system.vm == vm.vm
                    && condition(&system)
                {
                    return system;
                }
            }
            assert!(started.elapsed() < Duration::from_secs(15), "waited for {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

pub fn template(image: &Digest, data_mib: Option<u64>) -> String {
    template_with(image, data_mib, &[])
}

pub fn template_with(image: &Digest, data_mib: Option<u64>, applications: &[Digest]) -> String {
    let application = |digest: &Digest| ApplicationSpec { image: digest.to_string(), image_name: "tools".into() };
    let spec = TemplateSpec {
        name: "desk".into(),
        image: image.to_string(),
        image_name: "debian".into(),
        vcpus: 1,
        memory_bytes: 256 << 20,
        data_volume_bytes: data_mib.map(|m| m << 20),
        applications: applications.iter().map(application).collect(),
        boot: BootSpec::default(),
        bridge: None,
        system_limits: None,
        data_limits: None,
        tenant: None,
    };
    serde_json::to_string(&spec).unwrap()
}

/// An agent's directories; the agent may come and go.
pub struct Place {
    pub dir: tempfile::TempDir,
    pub hypervisor: Arc<Simulator>,
    pub name: String,
}

impl Drop for Place {
    /// A test that failed leaves no QEMU behind, an agent that was killed no boot files.
    fn drop(&mut self) {
        let ours = self.dir.path().to_string_lossy().into_owned();
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command);
            let program = command.split('\0').next().unwrap_or_default();
            if program.contains("qemu-system") && command.contains(&ours) {
                let _ = std::process::Command::new("kill").arg("-9").arg(process.file_name()).status();
            }
        }
        let id = std::fs::read_to_string(self.dir.path().join("s/host-id")).unwrap_or_default();
        if let Ok(id) = id.trim().parse::<HostId>() {
            let _ = std::fs::remove_dir_all(format!("/dev/shm/muster-{}", id.short()));
        }
    }
}

impl Place {
    pub fn new(seed: u64) -> Self {
        // unix socket paths are short
        let dir = tempfile::Builder::new().prefix("ma").tempdir_in("/tmp").unwrap();
        Self { dir, hypervisor: simulator(seed), name: format!("host{seed}") }
    }

    pub fn config(&self) -> Config {
        let mut config = Config::minimal(self.dir.path().join("s"), self.dir.path().join("r"), ByteLen::mib(256));
        config.name = Some(self.name.clone());
        config.timeouts.stop_ms = 500;
        config.timeouts.shutdown_agent_ms = 1000;
        config.timeouts.policy_reserve_ms = 1000;
        config
    }

    pub async fn start(&self, network: &Network) -> Agent {
        self.start_with(network, self.config()).await
    }

    pub async fn start_with(&self, network: &Network, config: Config) -> Agent {
        self.start_on(network, config, Arc::clone(&self.hypervisor) as Arc<dyn Hypervisor>).await
    }

    pub async fn start_on(&self, network: &Network, config: Config, hypervisor: Arc<dyn Hypervisor>) -> Agent {
        let deps = Deps { bus: Some(network.join(&self.name)), hypervisor: Some(hypervisor), ..Deps::default() };
        Agent::start(config, deps).await.unwrap()
    }

    /// On a store that outlives it.
    pub async fn start_on_store(&self, network: &Network, config: Config, store: &Store) -> Agent {
        let deps = Deps {
            bus: Some(network.join(&self.name)),
            hypervisor: Some(Arc::clone(&self.hypervisor) as Arc<dyn Hypervisor>),
            store: Some(store.clone()),
            ..Deps::default()
        };
        Agent::start(config, deps).await.unwrap()
    }

    /// VM records in the state directory.
    pub fn records(&self) -> usize {
        std::fs::read_dir(self.path().join("s/vms")).unwrap().count()
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Runs a program of package libnbd-bin without holding up the runtime. Without it the test fails and says so, unless
/// `MUSTER_ALLOW_SKIP=1`: then `None`.
pub async fn libnbd(program: &'static str, arguments: &[String]) -> Option<std::process::Output> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&path).any(|directory| directory.join(program).exists()) {
        assert!(std::env::var_os("MUSTER_ALLOW_SKIP").is_some(), "install libnbd-bin, or set MUSTER_ALLOW_SKIP=1");
        eprintln!("skipped: no {program}");
        return None;
    }
    let arguments = arguments.to_vec();
    let run = move || std::process::Command::new(program).args(&arguments).output().unwrap();
    Some(tokio::task::spawn_blocking(run).await.unwrap())
}

pub fn vm_on(agent: &Agent, name: &str) -> Member {
    Member {
        host: agent.host_id().to_string(),
        incarnation: String::new(),
        vm: VmId::random().to_string(),
        name: name.into(),
    }
}

pub fn host_of(agent: &Agent) -> Member {
    Member {
        host: agent.host_id().to_string(),
        incarnation: agent.incarnation().to_string(),
        vm: String::new(),
        name: String::new(),
    }
}

pub fn network(seed: u64) -> Network {
    Network::new(seed, LossConfig::NONE)
}
