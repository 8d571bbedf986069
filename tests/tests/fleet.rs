//! A controller and three agents in one process, on a network in memory that loses samples: everything real but guests and
//! wires.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use muster_agent::{Agent, Deps};
use muster_api::{
    Client, Command, CommandState, CreateCommand, CreateTemplate, CreateVms, Endpoint, HostState, ImportByPath,
    JobState, NetworkMode, Outcome, Verb, VmState,
};
use muster_bus::twin::{LossConfig, Network};
use muster_common::{ByteLen, SystemClock};
use muster_controller::Controller;
use muster_virt::{
    Hypervisor,
    simulator::{Chances, Fault, Latencies, Simulator},
};

const LIMIT: Duration = Duration::from_secs(60);

async fn wait_for<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(started.elapsed() < LIMIT, "waited {LIMIT:?} for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

struct Host {
    hypervisor: Arc<Simulator>,
    agent: Option<Agent>,
}

struct Fleet {
    network: Network,
    controller: Controller,
    client: Client,
    hosts: Vec<Host>,
    dir: tempfile::TempDir,
}

async fn start_controller(network: &Network, dir: &Path) -> Controller {
    let text =
        format!("lab = true\nstate_dir = '{}'\nstream.listen = '127.0.0.1:0'\n", dir.join("controller").display());
    let config = dir.join("controller.toml");
    std::fs::write(&config, text).unwrap();
    let config = muster_common::config::load(Some(&config), "NONE", [], &[]).unwrap();
    Controller::start_with(config, Arc::new(SystemClock), vec![network.join("controller")]).await.unwrap()
}

async fn start_agent(network: &Network, dir: &Path, name: &str, hypervisor: &Arc<Simulator>) -> Agent {
    let mut config =
        muster_agent::Config::minimal(dir.join(name).join("s"), dir.join(name).join("r"), ByteLen::mib(256));
    config.name = Some(name.into());
    config.timeouts.stop_ms = 500;
    let hypervisor: Arc<dyn Hypervisor> = hypervisor.clone();
    let deps = Deps { bus: Some(network.join(name)), hypervisor: Some(hypervisor), ..Deps::default() };
    Agent::start(config, deps).await.unwrap()
}

impl Fleet {
    async fn start(seed: u64, loss: LossConfig) -> Self {
        // short: unix sockets lie below it
        let dir = tempfile::Builder::new().prefix("mf").tempdir_in("/tmp").unwrap();
        let network = Network::new(seed, loss);
        let controller = start_controller(&network, dir.path()).await;
        let client = Client::connect(Endpoint::Unix(controller.socket().to_path_buf())).unwrap();
        let quick = Latencies {
            boot: Duration::from_millis(200),
            shutdown: Duration::from_millis(150),
            save: Duration::from_millis(50),
            restore: Duration::from_millis(50),
            jitter: 0.2,
        };
        let mut hosts = Vec::new();
        for n in 1..=3 {
            let hypervisor = Arc::new(Simulator::real_time(seed + n, quick, Chances::default()).unwrap());
            let agent = start_agent(&network, dir.path(), &format!("host{n}"), &hypervisor).await;
            hosts.push(Host { hypervisor, agent: Some(agent) });
        }
        let fleet = Self { network, controller, client, hosts, dir };
        fleet.wait_online(3).await;
        fleet
    }

    async fn wait_online(&self, count: usize) {
        wait_for("the hosts to be online", async || {
            let hosts = self.client.all_hosts().await.unwrap();
            let online = hosts.iter().filter(|h| h.state == HostState::Online && !h.accelerator.is_empty());
            (online.count() == count).then_some(())
        })
        .await;
    }

    /// An image, a template with a data volume, two desktops a host in school/lab1.
    async fn furnish(&self) {
        let path = self.dir.path().join("disk.raw");
        let mut bytes = vec![0u8; 2 << 20];
        for (i, block) in bytes.chunks_mut(4096).enumerate().filter(|(i, _)| i % 2 == 0) {
            block[..8].copy_from_slice(&(i as u64 + 1).to_le_bytes());
        }
        std::fs::write(&path, bytes).unwrap();
        let import = ImportByPath { name: "debian".into(), path: path.display().to_string(), ..Default::default() };
        let job = self.client.import_image_by_path(&import).await.unwrap();
        let job = self.client.follow_job(&job.id, |_| ()).await.unwrap();
        assert_eq!(job.state, JobState::Done, "{:?}", job.problem);
        std::fs::remove_file(&path).unwrap();
        let create = CreateTemplate {
            name: "desk".into(),
            image: "debian".into(),
            vcpus: 1,
            memory: ByteLen::mib(64),
            data_volume: Some(ByteLen::mib(1)),
            applications: Vec::new(),
            boot: None,
            network: NetworkMode::None,
            system_limits: Default::default(),
            data_limits: Default::default(),
            tenant: None,
        };
        self.client.create_template(&create).await.unwrap();
        let create = CreateVms {
            template: "desk".into(),
            per_host: Some(2),
            groups: vec!["school/lab1".into()],
            ..Default::default()
        };
        let created = self.client.create_vms(&create, None).await.unwrap();
        assert_eq!(created.vms.len(), 6);
        all_done(&self.ended(&created.command.to_string()).await);
    }

    async fn give(&self, verb: Verb, target: &str, seconds: u32) -> Command {
        let create = CreateCommand {
            verb,
            target: vec![target.into()],
            target_kind: None,
            arguments: BTreeMap::new(),
            timeout_seconds: Some(seconds),
            retry_of: None,
        };
        self.client.create_command(&create, None).await.unwrap()
    }

    async fn ended(&self, id: &str) -> Command {
        wait_for("the command to end", async || {
            let command = self.client.command(id).await.unwrap();
            (command.summary.state == CommandState::Ended).then_some(command)
        })
        .await
    }

    async fn obey(&self, verb: Verb, target: &str, seconds: u32) -> Command {
        let given = self.give(verb, target, seconds).await;
        self.ended(&given.summary.id.to_string()).await
    }
}

fn outcomes(command: &Command) -> BTreeMap<Outcome, u32> {
    command.summary.outcomes.clone()
}

fn all_done(command: &Command) {
    let failed: Vec<_> = command
        .members
        .iter()
        .filter(|m| m.verdict.as_ref().is_none_or(|v| v.outcome != Outcome::Done))
        .map(|m| (&m.name, &m.verdict))
        .collect();
    assert!(failed.is_empty(), "{}: {failed:?}", command.summary.verb);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_school_is_commanded_with_one_sample_each_over_a_network_that_loses_some() {
    let fleet = Fleet::start(11, LossConfig::lossy(0.1, Duration::from_millis(20))).await;
    fleet.furnish().await;
    let topic = "muster_v1_group_command";
    for (verb, state) in [
        (Verb::PowerOn, VmState::Running),
        (Verb::Backup, VmState::Running),
        (Verb::ResetSession, VmState::Running),
        (Verb::Pause, VmState::Paused),
        (Verb::Resume, VmState::Running),
        (Verb::PowerOff, VmState::Off),
        (Verb::DestroyVolumes, VmState::Off),
        (Verb::Restore, VmState::Off),
        (Verb::PowerOn, VmState::Running),
    ] {
        let before = fleet.network.published(topic);
        all_done(&fleet.obey(verb, "school", 20).await);
        assert_eq!(fleet.network.published(topic) - before, 1, "{verb}: one sample");
        wait_for("the states to follow", async || {
            let vms = fleet.client.all_vms(&["school".into()]).await.unwrap();
            vms.iter().all(|vm| vm.state == state).then_some(())
        })
        .await;
    }
    assert_eq!(fleet.client.all_backups(&["school".into()]).await.unwrap().len(), 6);
    wait_for("every guest to be up", async || {
        let vms = fleet.client.all_vms(&["school".into()]).await.unwrap();
        vms.iter().all(|vm| vm.guest_up).then_some(())
    })
    .await;
    let stores = fleet.client.stores().await.unwrap();
    assert!(stores.iter().all(|s| s.guest_file_reads == 0), "{stores:?}");
    all_done(&fleet.obey(Verb::Shutdown, "school", 20).await);
    all_done(&fleet.obey(Verb::Delete, "school", 20).await);
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_is_offline_by_the_deadline_and_its_successor_answers_for_it() {
    let mut fleet = Fleet::start(23, LossConfig::NONE).await;
    fleet.furnish().await;
    all_done(&fleet.obey(Verb::PowerOn, "school", 20).await);
    let on_first: Vec<_> = fleet.hosts[0].hypervisor.list().unwrap().into_iter().map(|s| s.vm).collect();
    for vm in on_first {
        fleet.hosts[0].hypervisor.inject(vm, Fault::StuckShutdown).unwrap();
    }
    let given = fleet.give(Verb::Shutdown, "school", 6).await;
    let id = given.summary.id.to_string();
    wait_for("the shutdown to be begun", async || {
        let vms = fleet.client.all_vms(&["host:host1".into()]).await.unwrap();
        vms.iter().all(|vm| vm.state == VmState::ShuttingDown).then_some(())
    })
    .await;
    fleet.hosts[0].agent.take().unwrap().kill().await;
    let command = fleet.ended(&id).await;
    assert_eq!(outcomes(&command), BTreeMap::from([(Outcome::Done, 4), (Outcome::Offline, 2)]), "{command:?}");
    let late_by = command.summary.ended_at_us.saturating_sub(command.summary.not_after_us);
    assert!(late_by < 5_000_000, "it ended {late_by} us after its deadline");

    let hypervisor = fleet.hosts[0].hypervisor.clone();
    fleet.hosts[0].agent = Some(start_agent(&fleet.network, fleet.dir.path(), "host1", &hypervisor).await);
    fleet.wait_online(3).await;
    // the successor's own word replaces "offline": begun, and lost with the memory of its predecessor
    wait_for("the late verdicts", async || {
        let command = fleet.client.command(&id).await.unwrap();
        let failed = outcomes(&command).get(&Outcome::Failed).copied();
        (failed == Some(2)).then_some(())
    })
    .await;
    let vms = wait_for("the lost volumes to be told", async || {
        let vms = fleet.client.all_vms(&["host:host1".into()]).await.unwrap();
        vms.iter().all(|vm| vm.disks.iter().all(|d| d.condition == "lost")).then_some(vms)
    })
    .await;
    assert!(vms.iter().all(|vm| vm.state == VmState::Paused && vm.health_state == 20), "{vms:?}");
    let refused = fleet.obey(Verb::Resume, "host:host1", 5).await;
    for member in &refused.members {
        let verdict = member.verdict.as_ref().unwrap();
        assert_eq!((verdict.outcome, verdict.code.as_str()), (Outcome::Refused, "volume-lost"));
    }
    fleet.controller.shutdown().await;
}
