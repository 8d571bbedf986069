//! A fleet of real processes on this machine: one `muster-controller` and some `muster-agent`s that find each other over
//! RTPS on the loopback interface, with the simulated hypervisor unless told otherwise. Everything lives in a temporary
//! directory and ends with the value; what outlives a killed agent does too.

use std::{
    fs::{self, File},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use muster_bus::testing::{Domain, free_domain};
use muster_common::HostId;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;

use crate::{Process, source_root, wait_for};

/// Starting a process, discovery, a first heartbeat: seconds on a calm machine, more on a shared one.
pub const LIMIT: Duration = Duration::from_secs(90);

/// One agent of a [`Fleet`].
pub struct Host {
    pub name: String,
    dir: PathBuf,
    run_dir: PathBuf,
    process: Option<Process>,
    /// Where `run_dir` is when no tmpfs may be mounted on it.
    _memory: Option<tempfile::TempDir>,
}

impl Host {
    fn new(name: String, dir: PathBuf, in_memory: bool) -> Self {
        let run_dir = dir.join("r");
        fs::create_dir_all(&run_dir).expect("make a host's directory");
        let mut host = Self { name, dir, run_dir, process: None, _memory: None };
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        if in_memory && mount("muster-test", &host.run_dir, "tmpfs", flags, c"mode=0700").is_err() {
            let memory = tempfile::Builder::new().prefix("mt").tempdir_in("/dev/shm").expect("a directory in /dev/shm");
            host.run_dir = memory.path().join("r");
            fs::create_dir(&host.run_dir).expect("make a run directory");
            host._memory = Some(memory);
        }
        host
    }

    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    fn config(&self) -> PathBuf {
        self.dir.join("agent.toml")
    }

    /// What it has logged so far, all its runs.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Where it keeps boot files when `run_dir` is on a disk; see `agent/src/boot.rs`.
    pub fn shared_memory(&self) -> Option<PathBuf> {
        let id = fs::read_to_string(self.dir.join("s/host-id")).ok()?.trim().parse::<HostId>().ok()?;
        Some(Path::new("/dev/shm").join(format!("muster-{}", id.short())))
    }

    /// Takes away what outlives an agent that was killed: its virtual machines, its store, its boot files.
    fn clear(&mut self) {
        self.process = None;
        let ours = [&self.dir, &self.run_dir].map(|dir| format!("{}/", dir.display()));
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command);
            let qemu = command.split('\0').next().is_some_and(|program| program.contains("qemu-system"));
            if qemu && ours.iter().any(|dir| command.contains(dir)) {
                let _ = Command::new("kill").arg("-9").arg(process.file_name()).status();
            }
        }
        for place in [self.run_dir.join("store"), self.run_dir.clone()] {
            // most are no mount points
            let _ = unmount(place, UnmountFlags::DETACH);
        }
        if let Some(memory) = self.shared_memory() {
            let _ = fs::remove_dir_all(memory);
        }
    }
}

/// How the agents of a [`Fleet`] are configured.
#[derive(Clone, Debug)]
pub struct Agents {
    /// The hypervisor's URI; empty for real machines.
    pub hypervisor: String,
    /// Volumes outlive an agent. Then `run_dir` is a tmpfs of its own, as on a real host, or lies in /dev/shm where nothing
    /// may be mounted.
    pub survive: bool,
    /// As `export.transport` says it.
    pub transport: &'static str,
    pub budget: &'static str,
}

impl Agents {
    /// Volumes that end with their agent, on a simulated hypervisor or none.
    pub fn simulated(hypervisor: &str) -> Self {
        Self { hypervisor: hypervisor.to_string(), survive: false, transport: "vhost-user", budget: "512MiB" }
    }
}

pub struct Fleet {
    // dropped in this order: processes before their directory (see also `Drop`)
    controller: Option<Process>,
    pub hosts: Vec<Host>,
    domain: Domain,
    network: Network,
    agents: Agents,
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
        Self::start_with(network, hosts, Agents::simulated(hypervisor))
    }

    /// As [`Fleet::start_on`], with other agents.
    ///
    /// # Panics
    /// When they do not find each other in time.
    pub fn start_with(network: Network, hosts: usize, agents: Agents) -> Self {
        // short: unix sockets lie below it
        let dir = tempfile::Builder::new().prefix("mt").tempdir_in("/tmp").expect("make a temporary directory");
        let mut fleet = Self { controller: None, hosts: Vec::new(), domain: free_domain(), network, agents, dir };
        fleet.start_controller();
        for n in 1..=hosts {
            let name = format!("host{n}");
            let dir = fleet.dir.path().join(format!("h{n}"));
            let host = Host::new(name, dir, fleet.agents.survive);
            fleet.hosts.push(host);
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
        let (host, agents) = (&self.hosts[index], &self.agents);
        let text = format!(
            "lab = true\nname = '{name}'\ncell = {cell}\ninterface = '{interface}'\nmulticast = {multicast}\n\
             state_dir = '{state}'\nrun_dir = '{run}'\nforce_stop = true\n\
             [store]\nbudget = '{budget}'\nsurvive = {survive}\n[export]\ntransport = '{transport}'\n\
             [hypervisor]\nuri = '{hypervisor}'\n[stream]\nlisten = '{interface}:0'\n",
            interface = self.network.interface(),
            multicast = self.network.multicast(),
            name = host.name,
            cell = self.cell(),
            state = host.dir.join("s").display(),
            run = host.run_dir.display(),
            budget = agents.budget,
            survive = agents.survive,
            transport = agents.transport,
            hypervisor = agents.hypervisor,
        );
        let config = host.config();
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

    /// `muster-agent stop` with these flags, and waits until the agent has ended.
    ///
    /// # Panics
    /// When it refuses, or does not end.
    pub fn stop_host(&mut self, index: usize, flags: &[&str]) {
        let host = &mut self.hosts[index];
        let stop = self
            .network
            .command(&program("muster-agent"))
            .arg("--config")
            .arg(host.config())
            .arg("stop")
            .args(flags)
            .output()
            .expect("run muster-agent stop");
        assert!(stop.status.success(), "{}", String::from_utf8_lossy(&stop.stderr));
        let mut process = host.process.take().expect("an agent runs");
        let ended = wait_for("an agent to end", LIMIT, || process.child().try_wait().expect("ask for its end"));
        assert!(ended.success(), "{ended}");
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

impl Drop for Fleet {
    fn drop(&mut self) {
        self.controller = None;
        for host in &mut self.hosts {
            host.clear();
            if std::thread::panicking() {
                let log = host.log();
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("the last words of {}:\n{}", host.name, lines[lines.len().saturating_sub(30)..].join("\n"));
            }
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
