//! A fleet of fake agents on the in-memory bus, and a controller among them.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use muster_api::{Client, Command, CommandState, Endpoint};
use muster_bus::{
    Bus,
    twin::{LossConfig, Network},
};
use muster_common::{Clock, HostId, Incarnation, SystemClock};
use muster_controller::{Config, Controller};
use muster_idl::v1::{self, Outcome, Verb};

/// What an agent does with a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Obeys,
    /// Hears everything and does nothing.
    Mute,
    /// Does it, and keeps the verdict to itself until it is asked for.
    Reluctant,
    /// Refuses all.
    Refuses,
}

struct State {
    mood: Mood,
    vms: BTreeMap<String, v1::VirtualSystem>,
    /// Command and VM to the verdict: the durable ledger of a real agent.
    ledger: BTreeMap<(String, String), v1::Verdict>,
    executed: u64,
    budget_bytes: u64,
    stream_endpoint: String,
}

/// An agent: heartbeats, one VM table, verdicts.
pub struct FakeAgent {
    pub host: HostId,
    pub name: String,
    state: Arc<Mutex<State>>,
    alive: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    /// Samples of commands heard.
    pub heard: Arc<AtomicU64>,
}

impl FakeAgent {
    pub fn start(bus: &Bus, name: &str) -> Self {
        Self::start_as(bus, name, HostId::random(), BTreeMap::new())
    }

    fn start_as(bus: &Bus, name: &str, host: HostId, ledger: BTreeMap<(String, String), v1::Verdict>) -> Self {
        let state = State {
            mood: Mood::Obeys,
            vms: BTreeMap::new(),
            ledger,
            executed: 0,
            budget_bytes: 1 << 30,
            stream_endpoint: String::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let alive = Arc::new(AtomicBool::new(true));
        let heard = Arc::new(AtomicU64::new(0));
        let agent = Running {
            host: host.to_string(),
            name: name.to_string(),
            incarnation: Incarnation::random().to_string(),
            bus: bus.clone(),
            state: state.clone(),
            alive: alive.clone(),
            heard: heard.clone(),
            started_at_us: now_us(),
        };
        let thread = std::thread::spawn(move || agent.run());
        Self { host, name: name.to_string(), state, alive, thread: Some(thread), heard }
    }

    pub fn set_mood(&self, mood: Mood) {
        self.state.lock().unwrap().mood = mood;
    }
    pub fn set_budget(&self, bytes: u64) {
        self.state.lock().unwrap().budget_bytes = bytes;
    }
    pub fn set_stream_endpoint(&self, url: &str) {
        self.state.lock().unwrap().stream_endpoint = url.to_string();
    }
    pub fn executed(&self) -> u64 {
        self.state.lock().unwrap().executed
    }
    pub fn has_recorded(&self, command: &str) -> bool {
        self.state.lock().unwrap().ledger.keys().any(|(id, _)| id == command)
    }
    pub fn forget_vm(&self, vm: &str) {
        self.state.lock().unwrap().vms.remove(vm);
    }

    /// As by kill -9: no word any more.
    pub fn kill(&mut self) {
        self.alive.store(false, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Running {
    host: String,
    name: String,
    incarnation: String,
    bus: Bus,
    state: Arc<Mutex<State>>,
    alive: Arc<AtomicBool>,
    heard: Arc<AtomicU64>,
    started_at_us: u64,
}

fn now_us() -> u64 {
    SystemClock.now_us()
}

impl Running {
    fn run(self) {
        let heartbeat = self.bus.publisher::<v1::Heartbeat>().unwrap();
        let physical_host = self.bus.publisher::<v1::PhysicalHost>().unwrap();
        let store = self.bus.publisher::<v1::StoreState>().unwrap();
        let health = self.bus.publisher::<v1::StoreHealth>().unwrap();
        let systems = self.bus.publisher::<v1::VirtualSystem>().unwrap();
        let verdicts = self.bus.publisher::<v1::Verdict>().unwrap();
        let progress = self.bus.publisher::<v1::Progress>().unwrap();
        let events = self.bus.publisher::<v1::Event>().unwrap();
        let metrics = self.bus.publisher::<v1::HostMetrics>().unwrap();
        let mut commands = self.bus.subscriber::<v1::GroupCommand>(256).unwrap();
        let mut controllers = self.bus.subscriber::<v1::ControllerState>(16).unwrap();
        physical_host.publish(&self.describe()).unwrap();
        store.publish(&self.store()).unwrap();
        events.publish(&self.event()).unwrap();
        let mut counter = 0;
        let mut last_beat: Option<Instant> = None;
        while self.alive.load(Ordering::SeqCst) {
            if last_beat.is_none_or(|at| at.elapsed() >= Duration::from_millis(300)) {
                last_beat = Some(Instant::now());
                let beat = v1::Heartbeat {
                    host: self.host.clone(),
                    incarnation: self.incarnation.clone(),
                    boot: "boot".into(),
                    participant: self.bus.participant_guid(),
                    counter,
                    sent_at_us: now_us(),
                    draining: false,
                };
                counter += 1;
                let _ = heartbeat.publish(&beat);
                let _ = metrics.publish(&self.metrics());
                let _ = store.publish(&self.store());
                let _ = health.publish(&self.health());
                let _ = physical_host.publish(&self.describe());
                for system in self.state.lock().unwrap().vms.values() {
                    let _ = systems.publish(system);
                }
            }
            if let Some(sample) = commands.recv_timeout(Duration::from_millis(20)).and_then(|s| s.value()) {
                self.heard.fetch_add(1, Ordering::SeqCst);
                self.obey(&sample, &verdicts, &systems, &progress);
            }
            while let Some(state) = controllers.try_recv().and_then(|s| s.value()) {
                let ledger = &self.state.lock().unwrap().ledger;
                for ((command, _), verdict) in ledger {
                    if state.awaiting.contains(command) {
                        let _ = verdicts.publish(verdict);
                    }
                }
            }
        }
    }

    fn obey(
        &self,
        command: &v1::GroupCommand,
        verdicts: &muster_bus::Publisher<v1::Verdict>,
        systems: &muster_bus::Publisher<v1::VirtualSystem>,
        progress: &muster_bus::Publisher<v1::Progress>,
    ) {
        let mut state = self.state.lock().unwrap();
        if state.mood == Mood::Mute {
            return;
        }
        for member in command.members.iter().filter(|member| member.host == self.host) {
            let key = (command.id.clone(), member.vm.clone());
            if let Some(verdict) = state.ledger.get(&key) {
                verdicts.publish(verdict).unwrap();
                continue;
            }
            let _ = progress.publish(&v1::Progress {
                command: command.id.clone(),
                host: self.host.clone(),
                vm: member.vm.clone(),
                phase: "working".into(),
                done: 1,
                total: 2,
                sent_at_us: now_us(),
            });
            let stale = !member.incarnation.is_empty() && member.incarnation != self.incarnation;
            let (outcome, code) = match state.mood {
                _ if stale => (Outcome::Refused, "stale-incarnation"),
                Mood::Refuses => (Outcome::Refused, "invalid-state"),
                _ => (Outcome::Done, "ok"),
            };
            let mut result = String::new();
            if outcome == Outcome::Done {
                state.executed += 1;
                result = self.act(command, member, &mut state, systems);
            }
            let now = now_us();
            let verdict = v1::Verdict {
                command: command.id.clone(),
                host: self.host.clone(),
                vm: member.vm.clone(),
                incarnation: self.incarnation.clone(),
                outcome,
                code: code.into(),
                message: String::new(),
                enabled_state: state.vms.get(&member.vm).map_or(3, |vm| vm.enabled_state),
                guest_up: false,
                result,
                received_at_us: now,
                started_at_us: now,
                ended_at_us: now,
            };
            let tell = state.mood != Mood::Reluctant;
            state.ledger.insert(key, verdict.clone());
            if tell {
                verdicts.publish(&verdict).unwrap();
            }
        }
    }

    fn act(
        &self,
        command: &v1::GroupCommand,
        member: &v1::Member,
        state: &mut State,
        systems: &muster_bus::Publisher<v1::VirtualSystem>,
    ) -> String {
        let enabled_state = match command.verb {
            Verb::Create => 3,
            Verb::Delete => {
                state.vms.remove(&member.vm);
                let key = v1::VmKey { host: self.host.clone(), vm: member.vm.clone() };
                systems.dispose(&key).unwrap();
                return String::new();
            }
            Verb::PowerOn => 2,
            Verb::PowerOff | Verb::Shutdown => 3,
            Verb::Backup if !member.vm.is_empty() => {
                return serde_json::to_string(&muster_idl::arguments::BackupResult {
                    id: "b1".into(),
                    vm: member.vm.clone(),
                    vm_name: member.name.clone(),
                    taken_at_us: now_us(),
                    volumes: Vec::new(),
                    logical_bytes: 4096,
                    new_bytes: 4096,
                })
                .unwrap();
            }
            _ => return String::new(),
        };
        let image = command.arguments.iter().find(|a| a.name == "template").map(|argument| {
            serde_json::from_str::<muster_idl::arguments::TemplateSpec>(&argument.value).unwrap().image
        });
        let system = state.vms.entry(member.vm.clone()).or_insert_with(|| v1::VirtualSystem {
            host: self.host.clone(),
            vm: member.vm.clone(),
            incarnation: self.incarnation.clone(),
            name: member.name.clone(),
            enabled_state,
            requested_state: 12,
            health_state: 5,
            operational_status: vec![2],
            guest_up: false,
            virtual_processors: 1,
            memory_bytes: 64 << 20,
            disks: vec![v1::VirtualDisk {
                role: "system".into(),
                volume: muster_common::VolumeId::random().to_string(),
                generation: 1,
                size_bytes: 1 << 20,
                image: image.unwrap_or_default(),
                condition: "volatile".into(),
            }],
            template: "t".into(),
            remark: String::new(),
            changed_at_us: now_us(),
            sampled_at_us: now_us(),
        });
        system.enabled_state = enabled_state;
        system.sampled_at_us = now_us();
        systems.publish(system).unwrap();
        String::new()
    }

    fn describe(&self) -> v1::PhysicalHost {
        v1::PhysicalHost {
            host: self.host.clone(),
            incarnation: self.incarnation.clone(),
            name: self.name.clone(),
            cell: self.bus.cell(),
            hardware_uuid: String::new(),
            boot: "boot".into(),
            agent_version: "0".into(),
            operating_system: "fake".into(),
            kernel: "0".into(),
            processor_model: "fake".into(),
            number_of_processors: 4,
            total_memory_bytes: 8 << 30,
            enabled_state: 2,
            health_state: 5,
            operational_status: vec![2],
            hypervisor_uri: "simulator:".into(),
            hypervisor_version: "0".into(),
            accelerator: "simulated".into(),
            hypervisor_remark: String::new(),
            draining: false,
            lab: true,
            stream_endpoint: self.state.lock().unwrap().stream_endpoint.clone(),
            started_at_us: self.started_at_us,
        }
    }

    fn store(&self) -> v1::StoreState {
        v1::StoreState {
            host: self.host.clone(),
            sampled_at_us: now_us(),
            budget_bytes: self.state.lock().unwrap().budget_bytes,
            resident_bytes: 0,
            metadata_bytes: 0,
            logical_bytes: 0,
            provisioned_bytes: 0,
            unique_blocks: 0,
            dedup_ratio: 1.0,
            guest_file_reads: 0,
            page_kind: "4k".into(),
            images: Vec::new(),
            volumes: 0,
        }
    }

    fn health(&self) -> v1::StoreHealth {
        v1::StoreHealth {
            host: self.host.clone(),
            sampled_at_us: now_us(),
            scrubbing: true,
            blocks_checked: 70,
            blocks_damaged: 3,
            blocks_repaired: 2,
            blocks_unreadable: 1,
            passes: 4,
            last_pass_at_us: self.started_at_us,
            nodes: vec![v1::StoreNode { node: 1, memory_bytes: 8 << 30, store_bytes: 1 << 20 }],
        }
    }

    fn metrics(&self) -> v1::HostMetrics {
        v1::HostMetrics {
            host: self.host.clone(),
            sampled_at_us: now_us(),
            processor_percent: 12.5,
            load_average_1m: 0.5,
            memory_total_bytes: 8 << 30,
            memory_available_bytes: 4 << 30,
            network_received_bytes: 0,
            network_sent_bytes: 0,
            disk_read_bytes: 0,
            disk_written_bytes: 0,
            running_vms: 0,
        }
    }

    fn event(&self) -> v1::Event {
        v1::Event {
            host: self.host.clone(),
            vm: String::new(),
            incarnation: self.incarnation.clone(),
            counter: 0,
            occurred_at_us: now_us(),
            severity: v1::Severity::Info,
            kind: "agent-started".into(),
            message: "here".into(),
            from_state: 0,
            to_state: 0,
            command: String::new(),
        }
    }
}

/// Settings of a controller that hurries.
pub fn config(dir: &Path) -> Config {
    let text = format!(
        "lab = true\nstate_dir = {:?}\nstream.listen = '127.0.0.1:0'\n\
         timing.offline_after_ms = 2000\ntiming.verdict_grace_ms = 300\ntiming.restart_grace_ms = 4000\n",
        dir.join("state")
    );
    toml::from_str(&text).unwrap()
}

/// A controller and the way to it. The socket is used as the CLI would.
pub struct Fleet {
    pub network: Network,
    pub agents: Vec<FakeAgent>,
    pub controller: Controller,
    pub client: Client,
    pub dir: Arc<tempfile::TempDir>,
}

impl Fleet {
    pub async fn start(hosts: usize) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let network = Network::new(7, LossConfig::NONE);
        let controller = start_controller(&network, dir.path()).await;
        let client = client(&controller);
        let agents =
            (1..=hosts).map(|n| FakeAgent::start(&network.join(&format!("h{n}")), &format!("host{n}"))).collect();
        let fleet = Self { network, agents, controller, client, dir };
        wait_for("all hosts to be online and described", async || {
            let hosts = fleet.client.all_hosts().await.unwrap();
            let named: BTreeSet<String> = hosts.iter().map(|h| h.name.clone()).collect();
            hosts.len() == fleet.agents.len()
                && fleet.agents.iter().all(|a| named.contains(&a.name))
                && hosts.iter().all(|h| h.state == muster_api::HostState::Online && !h.accelerator.is_empty())
        })
        .await;
        fleet
    }

    /// Imports a small image and makes the template "desk" from it.
    pub async fn template(&self) {
        let path = self.dir.path().join("disk.raw");
        let mut bytes = vec![0u8; 1 << 20];
        bytes[..8].copy_from_slice(b"a system");
        bytes[500_000] = 7;
        std::fs::write(&path, bytes).unwrap();
        let import =
            muster_api::ImportByPath { name: "debian".into(), path: path.display().to_string(), ..Default::default() };
        let job = self.client.import_image_by_path(&import).await.unwrap();
        let job = self.client.follow_job(&job.id, |_| ()).await.unwrap();
        assert_eq!(job.state, muster_api::JobState::Done, "{:?}", job.problem);
        let create = muster_api::CreateTemplate {
            name: "desk".into(),
            image: "debian".into(),
            vcpus: 1,
            memory: muster_common::ByteLen::mib(64),
            data_volume: None,
            applications: Vec::new(),
            boot: None,
            network: muster_api::NetworkMode::None,
            system_limits: Default::default(),
            data_limits: Default::default(),
            tenant: None,
        };
        self.client.create_template(&create).await.unwrap();
    }

    /// Two VMs a host in school/lab1.
    pub async fn desktops(&self) -> muster_api::CreatedVms {
        let create = muster_api::CreateVms {
            template: "desk".into(),
            per_host: Some(2),
            groups: vec!["school/lab1".into()],
            ..Default::default()
        };
        let created = self.client.create_vms(&create, None).await.unwrap();
        let ended = ended(&self.client, &created.command.to_string()).await;
        assert!(ended.members.iter().all(|m| m.verdict.as_ref().unwrap().outcome.is_success()), "{ended:?}");
        created
    }
}

pub async fn start_controller(network: &Network, dir: &Path) -> Controller {
    Controller::start_with(config(dir), Arc::new(SystemClock), vec![network.join("controller")]).await.unwrap()
}

pub fn client(controller: &Controller) -> Client {
    Client::connect(Endpoint::Unix(controller.socket().to_path_buf())).unwrap()
}

/// The command once it has ended.
pub async fn ended(client: &Client, id: &str) -> Command {
    let mut command = client.command(id).await.unwrap();
    wait_for("the command to end", async || {
        command = client.command(id).await.unwrap();
        command.summary.state == CommandState::Ended
    })
    .await;
    command
}

/// Waits for a condition, not for a time.
pub async fn wait_for(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition().await {
        assert!(Instant::now() < deadline, "waited 30 s for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub fn command(verb: muster_api::Verb, target: &[&str], timeout_seconds: u32) -> muster_api::CreateCommand {
    muster_api::CreateCommand {
        verb,
        target: target.iter().map(|t| t.to_string()).collect(),
        target_kind: None,
        arguments: BTreeMap::new(),
        timeout_seconds: Some(timeout_seconds),
        retry_of: None,
    }
}
