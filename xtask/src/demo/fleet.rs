//! The programs of the demo: a controller and three agents, in machines of their own (root) or as processes on loopback.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::process::{ProcessId, wait_for};
use super::world::{AGENT_STREAM_PORT, CELL, CONTROLLER_STREAM_PORT, World, address};
use crate::run::{Cmd, Context};

pub const HOSTS: &[&str] = &["host1", "host2", "host3"];
/// Memory for images and volumes on each host: two images (0.3 GiB), what six guests write, and room to play.
const BUDGET: &str = "1GiB";
/// How long a program may take to come up. The agent may boot a probe under KVM first.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Where the fleet runs.
pub enum Place<'a> {
    /// In namespaces, as root.
    World(World<'a>),
    /// As processes of this user on 127.0.0.1.
    Loopback(Loopback<'a>),
}

pub struct Fleet<'a> {
    context: &'a Context,
    pub place: Place<'a>,
}

impl<'a> Fleet<'a> {
    pub fn new(context: &'a Context, root: bool) -> Fleet<'a> {
        let place = if root { Place::World(World::new(context)) } else { Place::Loopback(Loopback::new(context)) };
        Fleet { context, place }
    }

    pub fn dir(&self) -> &Path {
        match &self.place {
            Place::World(world) => &world.dir,
            Place::Loopback(loopback) => &loopback.dir,
        }
    }

    /// Where the command line reaches the controller.
    pub fn socket(&self) -> PathBuf {
        self.dir().join("control/ctl/controller.sock")
    }

    pub fn exists(&self) -> bool {
        match &self.place {
            Place::World(world) => world.exists(),
            Place::Loopback(loopback) => loopback.dir.exists(),
        }
    }

    /// True when every program runs and the controller sees every host.
    pub fn is_up(&self) -> bool {
        let running = match &self.place {
            Place::World(world) => world.is_up(),
            Place::Loopback(loopback) => loopback.is_up(),
        };
        running && self.all_hosts_online()
    }

    fn all_hosts_online(&self) -> bool {
        self.json(&["status"]).is_ok_and(|status| status["status"]["hosts_online"].as_u64() == Some(HOSTS.len() as u64))
    }

    /// Makes machines and starts the programs.
    pub fn create(&self) -> Result<String> {
        let bin = self.context.target.join("release");
        let programs: Vec<PathBuf> =
            ["muster", "muster-controller", "muster-agent"].iter().map(|name| bin.join(name)).collect();
        match &self.place {
            Place::World(world) => world.create(&programs)?,
            Place::Loopback(loopback) => loopback.create(&programs)?,
        }
        self.start_controller()?;
        for host in HOSTS {
            self.start_agent(host)?;
        }
        let socket = self.socket();
        if !wait_for(START_LIMIT, || socket.exists()) {
            bail!("the controller did not come up: {}", self.last_words("control", "muster-controller"));
        }
        if !wait_for(START_LIMIT, || self.all_hosts_online()) {
            let words: Vec<String> = HOSTS.iter().map(|host| self.last_words(host, "muster-agent")).collect();
            bail!("not all hosts were seen within {} s: {}", START_LIMIT.as_secs(), words.join("\n"));
        }
        Ok("controller up, 3 hosts found each other".to_owned())
    }

    fn start_controller(&self) -> Result<()> {
        let (state, ctl, at, stream, discovery) = match &self.place {
            Place::World(_) => (
                PathBuf::from("/run/muster/state"),
                PathBuf::from("/run/muster/ctl"),
                address("control").to_owned(),
                CONTROLLER_STREAM_PORT,
                "",
            ),
            Place::Loopback(l) => (
                l.node_dir("control").join("state"),
                l.node_dir("control").join("ctl"),
                LOOPBACK.to_owned(),
                17700,
                LOOPBACK_DISCOVERY,
            ),
        };
        let config = format!(
            "lab = true\nname = \"demo\"\nstate_dir = \"{}\"\n\n[api]\nsocket = \"{}\"\n\n\
             [stream]\nlisten = \"{at}:{stream}\"\n\n[bus]\ncells = [{CELL}]\ninterface = \"{at}\"\n{discovery}",
            state.display(),
            ctl.join("controller.sock").display(),
        );
        self.start("control", "muster-controller", &config)
    }

    fn start_agent(&self, host: &str) -> Result<()> {
        let (state, run, at, stream, discovery) = match &self.place {
            Place::World(_) => (
                PathBuf::from("/run/muster/state"),
                PathBuf::from("/run/muster/a"),
                address(host).to_owned(),
                AGENT_STREAM_PORT,
                "",
            ),
            Place::Loopback(l) => {
                let number = HOSTS.iter().position(|name| *name == host).unwrap_or(0) as u16;
                (
                    l.node_dir(host).join("state"),
                    l.run_dir(host),
                    LOOPBACK.to_owned(),
                    17801 + number,
                    LOOPBACK_DISCOVERY,
                )
            }
        };
        let config = format!(
            "lab = true\nname = \"{host}\"\ncell = {CELL}\ninterface = \"{at}\"\n{discovery}state_dir = \"{}\"\nrun_dir = \"{}\"\n\
             # the demo's volumes may go with it\nforce_stop = true\n\n[store]\nbudget = \"{BUDGET}\"\n\n[stream]\nlisten = \"{at}:{stream}\"\n",
            state.display(),
            run.display(),
        );
        self.start(host, "muster-agent", &config)
    }

    fn start(&self, node: &str, program: &str, config: &str) -> Result<()> {
        let name = format!("{program}.toml");
        fs::write(self.dir().join(node).join("state").join(&name), config)?;
        match &self.place {
            Place::World(world) => world.start_in(
                node,
                &format!("/run/muster/bin/{program}"),
                &["--config", &format!("/run/muster/state/{name}")],
            ),
            Place::Loopback(loopback) => loopback.start(node, program, &name),
        }
    }

    pub fn log(&self, node: &str, program: &str) -> PathBuf {
        self.dir().join(node).join("log").join(format!("{program}.log"))
    }

    /// The last line of a program's log, and where the log is.
    fn last_words(&self, node: &str, program: &str) -> String {
        let log = self.log(node, program);
        let text = fs::read_to_string(&log).unwrap_or_default();
        format!("{}\n  ({})", text.trim_end().lines().last().unwrap_or("not a word"), log.display())
    }

    /// The command line of this fleet.
    pub fn muster(&self, args: &[&str]) -> Cmd<'a> {
        self.context.command(self.dir().join("bin/muster")).args(args).env("MUSTER_CONNECT", self.socket())
    }

    /// Runs a command as a reader would type it, its output on the screen.
    pub fn show(&self, args: &[&str]) -> Result<()> {
        println!("\n$ muster {}", super::shell_words(args));
        self.muster(args).stream()
    }

    /// The result of a command as data.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let text = self.muster(args).args(["--output", "json"]).read()?;
        serde_json::from_str(&text).with_context(|| format!("read the JSON of muster {}", args.join(" ")))
    }

    /// The elements of a list, whether it comes bare or within a page.
    pub fn list(&self, args: &[&str]) -> Result<Vec<Value>> {
        let value = self.json(args)?;
        let items = value.as_array().or_else(|| value["items"].as_array()).cloned();
        items.with_context(|| format!("muster {} gave no list", args.join(" ")))
    }

    pub fn destroy(&self) -> Result<String> {
        match &self.place {
            Place::World(world) => world.destroy(),
            Place::Loopback(loopback) => loopback.destroy(),
        }
    }
}

const LOOPBACK: &str = "127.0.0.1";
const LOOPBACK_DISCOVERY: &str = "multicast = false\npeers = [\"127.0.0.1\"]\n";

/// The hosts as processes of this user: they share network and files, but everything else is the same.
pub struct Loopback<'a> {
    context: &'a Context,
    pub dir: PathBuf,
}

impl<'a> Loopback<'a> {
    fn new(context: &'a Context) -> Loopback<'a> {
        Loopback { context, dir: context.target.join("demo-fleet") }
    }

    fn node_dir(&self, node: &str) -> PathBuf {
        self.dir.join(node)
    }

    /// Sockets lie below it and their paths are limited to 107 bytes, so it cannot be in the checkout.
    fn run_dir(&self, host: &str) -> PathBuf {
        let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        base.join("muster-demo").join(host)
    }

    fn create(&self, programs: &[PathBuf]) -> Result<()> {
        for node in std::iter::once(&"control").chain(HOSTS) {
            for part in ["state", "ctl", "log"] {
                fs::create_dir_all(self.node_dir(node).join(part))?;
            }
        }
        for host in HOSTS {
            fs::create_dir_all(self.run_dir(host))?;
        }
        fs::create_dir_all(self.dir.join("bin"))?;
        for program in programs {
            let name = program.file_name().context("a program has a name")?;
            fs::copy(program, self.dir.join("bin").join(name))
                .with_context(|| format!("copy {}", program.display()))?;
        }
        Ok(())
    }

    fn start(&self, node: &str, program: &str, config: &str) -> Result<()> {
        let dir = self.node_dir(node);
        let child = self
            .context
            .command("setsid")
            .arg(self.dir.join("bin").join(program))
            .arg("--config")
            .arg(dir.join("state").join(config))
            .start(&dir.join("log").join(format!("{program}.log")))?;
        let id = ProcessId::of(child.id()).with_context(|| format!("{program} ended at once"))?;
        fs::write(dir.join("pid"), id.to_string())?;
        Ok(())
    }

    fn processes(&self) -> Vec<Option<ProcessId>> {
        let nodes = std::iter::once(&"control").chain(HOSTS);
        nodes.map(|node| ProcessId::parse(&fs::read_to_string(self.node_dir(node).join("pid")).ok()?)).collect()
    }

    fn is_up(&self) -> bool {
        self.processes().iter().all(|process| process.as_ref().is_some_and(ProcessId::is_alive))
    }

    fn destroy(&self) -> Result<String> {
        let processes: Vec<ProcessId> = self.processes().into_iter().flatten().filter(ProcessId::is_alive).collect();
        // virtual machines outlive their agent by design: they are found by the run folder on their command line
        let machines = self.machines();
        for id in processes.iter().map(|process| process.id).chain(machines.iter().map(|process| process.id)) {
            self.context.command("kill").args(["-KILL", &id.to_string()]).run().ok();
        }
        if !wait_for(Duration::from_secs(20), || !processes.iter().chain(&machines).any(ProcessId::is_alive)) {
            bail!("a process of the demo does not end");
        }
        for host in HOSTS {
            fs::remove_dir_all(self.run_dir(host)).ok();
            // the agent keeps kernels there when its run folder is on a disk, and a killed one does not tidy up
            let id = fs::read_to_string(self.node_dir(host).join("state/host-id")).unwrap_or_default();
            if let Some(short) = id.get(..8) {
                fs::remove_dir_all(Path::new("/dev/shm").join(format!("muster-{short}"))).ok();
            }
        }
        if let Some(parent) = self.run_dir(HOSTS[0]).parent() {
            fs::remove_dir(parent).ok();
        }
        fs::remove_dir_all(&self.dir).with_context(|| format!("remove {}", self.dir.display()))?;
        Ok(format!("{} programs and {} virtual machines ended", processes.len(), machines.len()))
    }

    /// QEMU processes of this demo's hosts.
    fn machines(&self) -> Vec<ProcessId> {
        let mark = self.run_dir(HOSTS[0]).parent().map(|parent| format!("{}/", parent.display())).unwrap_or_default();
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok())
            .filter(|id| {
                let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line);
                line.contains("qemu-system") && !mark.is_empty() && line.contains(&mark)
            })
            .filter_map(ProcessId::of)
            .collect()
    }
}
