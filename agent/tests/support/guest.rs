//! A real Debian guest on an agent, spoken to through its guest agent.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use muster_agent::{Agent, Config, Deps, config::TransportChoice};
use muster_common::{ByteLen, Digest};
use muster_idl::{
    arguments::{ApplicationSpec, BootSpec, ExecResult, TemplateSpec},
    v1::{Member, Outcome, Verb, Verdict},
};
use muster_repository::source::{ImageFormat, open_image};
use muster_store::{Store, StoreConfig};

use super::{Controller, Depot, Place, network, vm_on};

/// A guest under translation on a busy machine.
pub const BOOT: Duration = Duration::from_secs(150);

pub fn guest_images() -> Option<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    let tools = std::env::var_os("PATH").unwrap_or_default();
    let qemu = std::env::split_paths(&tools).any(|d| d.join("qemu-system-x86_64").is_file());
    if directory.join("debian.raw").is_file() && qemu {
        return Some(directory);
    }
    let hint = "QEMU or the guest images are missing: run cargo xtask setup and cargo xtask guest";
    assert!(std::env::var_os("MUSTER_ALLOW_SKIP").is_some(), "{hint}");
    eprintln!("skipped: {hint}");
    None
}

/// libvirt's embedded driver takes one root a process. Where tests share a process (`cargo test`; nextest gives each its
/// own), `test` is run again in one of its own, one after the other, and the answer is `false`: it has been run.
pub fn in_own_process(test: &str) -> bool {
    const MARK: &str = "MUSTER_TEST_IN_OWN_PROCESS";
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    if std::env::var_os("NEXTEST").is_some() || std::env::var_os(MARK).is_some() {
        return true;
    }
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let again = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(MARK, "1")
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&again.stdout), String::from_utf8_lossy(&again.stderr));
    assert!(again.status.success() && out.contains("1 passed"), "{test}: {}\n{out}\n{err}", again.status);
    false
}

/// A desk that runs on an agent whose store is the test's, so that it outlives the agent.
pub struct Running {
    pub world: World,
    pub network: muster_bus::twin::Network,
    pub config: Config,
    pub store: Store,
    pub place: Place,
    pub agent: Agent,
}

/// Starts one with a data disk of that size and these application disks, up to its guest's agent. None without QEMU or
/// images, where that is allowed.
pub async fn running(
    seed: u64,
    transport: TransportChoice,
    data: ByteLen,
    applications: &[Vec<u8>],
    budget: ByteLen,
) -> Option<Running> {
    let images = guest_images()?;
    muster_common::logging::init(muster_common::logging::LogFormat::Text);
    let (network, depot, place) = (network(seed), Depot::start().await, Place::new(seed));
    let applications: Vec<_> = applications.iter().map(|bytes| depot.import(bytes.clone())).collect();
    let template = desk_template(&depot, &images, Some(data), &applications);
    let mut config = place.config();
    config.hypervisor.uri = String::new();
    config.export.transport = transport;
    config.timeouts = Default::default();
    let store = Store::open(StoreConfig::new(budget)).unwrap();
    let agent = start(&network, &config, &store).await;
    let controller = Controller::join(&network, &depot.url);
    controller.beat(vec![]);
    let vm = vm_on(&agent, "desk 1");
    let mut world = World { controller, vm, since_us: 0 };
    world.done(Verb::Create, &[("template", &template)]).await;
    world.done(Verb::PowerOn, &[]).await;
    world.guest_up().await;
    Some(Running { world, network, config, store, place, agent })
}

pub async fn start(network: &muster_bus::twin::Network, config: &Config, store: &Store) -> Agent {
    let deps = Deps { bus: Some(network.join("host1")), store: Some(store.clone()), ..Deps::default() };
    let began = Instant::now();
    let agent = Agent::start(config.clone(), deps).await.unwrap();
    eprintln!("agent started in {:?}", began.elapsed());
    agent
}

pub struct World {
    pub controller: Controller,
    pub vm: Member,
    /// When the last verdict was said: states of before do not count.
    pub since_us: u64,
}

impl World {
    pub async fn verdict(&mut self, verb: Verb, arguments: &[(&str, &str)]) -> Verdict {
        self.verdict_within(verb, arguments, BOOT).await
    }
    async fn verdict_within(&mut self, verb: Verb, arguments: &[(&str, &str)], time: Duration) -> Verdict {
        let command = self.controller.command(verb, vec![self.vm.clone()], arguments, time);
        self.controller.publish(&command);
        let key = (command.id.clone(), self.vm.host.clone(), self.vm.vm.clone());
        let started = Instant::now();
        loop {
            self.controller.take();
            if let Some(list) = self.controller.seen.get(&key) {
                eprintln!("{verb}: {} {} in {:?}", list[0].outcome, list[0].message, started.elapsed());
                self.since_us = list[0].ended_at_us;
                return list[0].clone();
            }
            assert!(started.elapsed() < time, "no verdict of {verb}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    pub async fn done(&mut self, verb: Verb, arguments: &[(&str, &str)]) -> Verdict {
        let verdict = self.verdict(verb, arguments).await;
        assert_eq!(verdict.outcome, Outcome::Done, "{verb}: {} {}", verdict.code, verdict.message);
        verdict
    }
    pub async fn guest_up(&mut self) {
        let started = Instant::now();
        loop {
            while let Some(sample) = self.controller.systems.try_recv() {
                if sample.value().is_some_and(|s| s.vm == self.vm.vm && s.guest_up && s.sampled_at_us > self.since_us) {
                    eprintln!("guest up after {:?}", started.elapsed());
                    return;
                }
            }
            assert!(started.elapsed() < BOOT, "the guest agent did not come up");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    pub async fn read(&mut self, path: &str) -> (i32, String) {
        self.exec(&["cat", path]).await
    }
    pub async fn exec(&mut self, argv: &[&str]) -> (i32, String) {
        self.exec_within(argv, BOOT).await
    }
    pub async fn exec_within(&mut self, argv: &[&str], time: Duration) -> (i32, String) {
        let argv = serde_json::to_string(argv).unwrap();
        let verdict = self.verdict_within(Verb::Exec, &[("argv", &argv)], time).await;
        assert_eq!(verdict.outcome, Outcome::Done, "exec: {} {}", verdict.code, verdict.message);
        let result: ExecResult = serde_json::from_str(&verdict.result).unwrap();
        (result.exit_status, result.stdout)
    }
}

/// Imports the Debian guest; the template of a desktop made of it.
pub fn desk_template(depot: &Depot, images: &Path, data: Option<ByteLen>, applications: &[Digest]) -> String {
    let source = open_image(&images.join("debian.raw"), ImageFormat::Raw).unwrap();
    let mut session = depot.repository.session();
    let go_on = &mut |_| std::ops::ControlFlow::Continue(());
    let image = session.ingest(&*source, &Default::default(), go_on).unwrap().digest;
    session.publish("image", b"x").unwrap();
    let blob = |name: &str| depot.repository.put_blob(&std::fs::read(images.join(name)).unwrap()).unwrap().to_string();
    let spec = TemplateSpec {
        name: "desk".into(),
        image: image.to_string(),
        image_name: "debian".into(),
        vcpus: 1,
        memory_bytes: 256 << 20,
        data_volume_bytes: data.map(|size| size.bytes()),
        applications: applications
            .iter()
            .map(|image| ApplicationSpec { image: image.to_string(), image_name: "tools".into() })
            .collect(),
        boot: BootSpec {
            kernel: Some(blob("vmlinuz")),
            initrd: Some(blob("initramfs")),
            cmdline: format!(
                "{} muster.name={{name}}",
                std::fs::read_to_string(images.join("cmdline")).unwrap().trim()
            ),
        },
        bridge: None,
        system_limits: None,
        data_limits: None,
        tenant: None,
    };
    serde_json::to_string(&spec).unwrap()
}
