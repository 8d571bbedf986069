//! A fleet of real processes on this machine: one `muster-controller` and some `muster-agent`s that find each other over
//! RTPS on the loopback interface, with the simulated hypervisor unless told otherwise. Everything lives in a temporary
//! directory and ends with the value.

use std::{
    fs::{self, File},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use muster_bus::testing::{Domain, free_domain};
use serde_json::Value;

use crate::{Process, source_root, wait_for};

/// Starting a process, discovery, a first heartbeat: seconds on a calm machine, more on a shared one.
pub const LIMIT: Duration = Duration::from_secs(90);

/// One agent of a [`Fleet`].
pub struct Host {
    pub name: String,
    dir: PathBuf,
    process: Option<Process>,
}

pub struct Fleet {
    // dropped in this order: processes before their directory
    controller: Option<Process>,
    pub hosts: Vec<Host>,
    domain: Domain,
    network: Network,
    hypervisor: String,
    dir: tempfile::TempDir,
}

/// Where the processes of a [`Fleet`] meet.
#[derive(Clone, Debug)]
pub enum Network {
    /// The loopback interface, without multicast: up to a dozen processes.
    Loopback,
    /// One interface with multicast, in a network namespace: as many as the machine bears.
    Namespace { name: String, address: IpAddr },
}

impl Network {
    fn interface(&self) -> IpAddr {
        match self {
            Network::Loopback => IpAddr::from([127, 0, 0, 1]),
            Network::Namespace { address, .. } => *address,
        }
    }
    fn multicast(&self) -> bool {
        matches!(self, Network::Namespace { .. })
    }
    fn command(&self, program: &Path) -> Command {
        match self {
            Network::Loopback => Command::new(program),
            Network::Namespace { name, .. } => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(program);
                command
            }
        }
    }
}

/// A program of this workspace, as `cargo build` left it.
///
/// # Panics
/// When it has not been built.
pub fn program(name: &str) -> PathBuf {
    let mut dir = std::env::current_exe().expect("a running test has a path");
    while !dir.join(name).is_file() {
        assert!(dir.pop(), "{name} has not been built: run cargo build --workspace --bins (cargo xtask test does)");
    }
    dir.join(name)
}

impl Fleet {
    /// A controller and `hosts` agents, all seen.
    ///
    /// # Panics
    /// When they do not find each other in time.
    pub fn start(hosts: usize, hypervisor: &str) -> Self {
        Self::start_on(Network::Loopback, hosts, hypervisor)
    }

    /// As [`Fleet::start`], on another network.
    ///
    /// # Panics
    /// When they do not find each other in time.
    pub fn start_on(network: Network, hosts: usize, hypervisor: &str) -> Self {
        // short: unix sockets lie below it
        let dir = tempfile::Builder::new().prefix("mt").tempdir_in("/tmp").expect("make a temporary directory");
        let mut fleet = Self {
            controller: None,
            hosts: Vec::new(),
            domain: free_domain(),
            network,
            hypervisor: hypervisor.to_string(),
            dir,
        };
        fleet.start_controller();
        for n in 1..=hosts {
            let name = format!("host{n}");
            let dir = fleet.dir.path().join(format!("h{n}"));
            fs::create_dir_all(&dir).expect("make a host's directory");
            fleet.hosts.push(Host { name, dir, process: None });
            fleet.start_host(n - 1);
        }
        fleet.wait_online(hosts);
        fleet
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn cell(&self) -> u16 {
        self.domain.cell()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("c.sock")
    }

    /// Starts the controller, or starts it again on what it had stored.
    pub fn start_controller(&mut self) {
        let dir = self.dir.path();
        let text = format!(
            "lab = true\nstate_dir = '{state}'\n[api]\nsocket = '{socket}'\n[stream]\nlisten = '{interface}:0'\n\
             [bus]\ncells = [{cell}]\ninterface = '{interface}'\nmulticast = {multicast}\n",
            interface = self.network.interface(),
            multicast = self.network.multicast(),
            state = dir.join("c").display(),
            socket = self.socket().display(),
            cell = self.cell(),
        );
        let config = dir.join("controller.toml");
        fs::write(&config, text).expect("write the controller's configuration");
        self.controller = Some(spawn(&self.network, "muster-controller", &config, &dir.join("controller.log")));
        wait_for("the controller to answer", LIMIT, || self.try_json(&["status"]));
    }

    /// Starts an agent, or starts it again on what it had stored.
    pub fn start_host(&mut self, index: usize) {
        let host = &self.hosts[index];
        let text = format!(
            "lab = true\nname = '{name}'\ncell = {cell}\ninterface = '{interface}'\nmulticast = {multicast}\n\
             state_dir = '{state}'\nrun_dir = '{run}'\nforce_stop = true\n[store]\nbudget = '512MiB'\nsurvive = false\n\
             [hypervisor]\nuri = '{hypervisor}'\n[stream]\nlisten = '{interface}:0'\n",
            interface = self.network.interface(),
            multicast = self.network.multicast(),
            name = host.name,
            cell = self.cell(),
            state = host.dir.join("s").display(),
            run = host.dir.join("r").display(),
            hypervisor = self.hypervisor,
        );
        let config = host.dir.join("agent.toml");
        fs::write(&config, text).expect("write the agent's configuration");
        let process = spawn(&self.network, "muster-agent", &config, &host.dir.join("log"));
        self.hosts[index].process = Some(process);
    }

    /// SIGKILL.
    pub fn kill_host(&mut self, index: usize) {
        if let Some(mut process) = self.hosts[index].process.take() {
            process.kill().expect("kill an agent");
        }
    }

    /// SIGKILL.
    pub fn kill_controller(&mut self) {
        if let Some(mut process) = self.controller.take() {
            process.kill().expect("kill the controller");
        }
    }

    pub fn wait_online(&self, hosts: usize) {
        wait_for(&format!("{hosts} hosts online (logs in {})", self.dir.path().display()), LIMIT, || {
            let list = self.try_json(&["host", "ls"])?;
            let online = list.as_array()?.iter().filter(|h| h["state"] == "online").count();
            (online == hosts).then_some(())
        });
    }

    /// Runs `muster` as an operator would.
    pub fn muster(&self, args: &[&str]) -> Output {
        Command::new(program("muster"))
            .arg("--connect")
            .arg(self.socket())
            .args(args)
            .stdin(Stdio::null())
            .output()
            .expect("run muster")
    }

    /// The JSON a successful run prints.
    ///
    /// # Panics
    /// When it could not run (exit status 2); failed members are the caller's to judge.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.muster(&[&["--output", "json"], args].concat());
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.code().is_some_and(|c| c < 2),
            "muster {}: {}\n{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("muster {}: {e}: {text}", args.join(" ")))
    }

    fn try_json(&self, args: &[&str]) -> Option<Value> {
        let output = self.muster(&[&["--output", "json"], args].concat());
        serde_json::from_slice(&output.stdout).ok()
    }

    /// Imports a small image of pseudo-random blocks, makes a template of it, and VMs in groups `school/lab1`,
    /// `school/lab2` (odd and even hosts).
    pub fn furnish(&self, vms_per_host: u32) {
        let image = self.dir.path().join("small.raw");
        let mut state = 1u64;
        let bytes: Vec<u8> = (0..4 << 20)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect();
        fs::write(&image, bytes).expect("write the image");
        let image = image.display().to_string();
        self.json(&["image", "import", &image, "--name", "small"]);
        self.json(&["template", "create", "desk", "--image", "small", "--memory", "64MiB", "--data", "1MiB"]);
        let per_host = vms_per_host.to_string();
        for (n, host) in self.hosts.iter().enumerate() {
            let group = format!("school/lab{}", 1 + n % 2);
            let pattern = format!("{}-desk{{n}}", host.name);
            let made = self.json(&[
                "vm",
                "create",
                "--template",
                "desk",
                "--per-host",
                &per_host,
                "--on",
                &host.name,
                "--group",
                &group,
                "--name",
                &pattern,
            ]);
            assert_eq!(outcomes(&made), [("done".to_string(), u64::from(vms_per_host))], "{made:#}");
        }
    }
}

/// Outcomes of a command and how many members have each, from its JSON.
pub fn outcomes(command: &Value) -> Vec<(String, u64)> {
    let members = command["members"].as_array().cloned().unwrap_or_default();
    let mut counts = std::collections::BTreeMap::new();
    for member in members {
        let outcome = member["verdict"]["outcome"].as_str().unwrap_or("none").to_string();
        *counts.entry(outcome).or_insert(0) += 1;
    }
    counts.into_iter().collect()
}

fn spawn(network: &Network, name: &str, config: &Path, log: &Path) -> Process {
    let log = File::options().create(true).append(true).open(log).expect("open a log");
    let errors = log.try_clone().expect("open a log twice");
    let mut command = network.command(&program(name));
    command.arg("--config").arg(config).stdin(Stdio::null()).stdout(log).stderr(errors).current_dir(source_root());
    Process::spawn(&mut command).unwrap_or_else(|e| panic!("start {name}: {e}"))
}
