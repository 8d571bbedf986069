//! The agent's configuration: `examples/config/agent.toml` explains every key and a test parses it.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU64,
    path::{Path, PathBuf},
    time::Duration,
};

use muster_bus::BusConfig;
use muster_common::{ByteLen, config::ConfigError};
use muster_export::Limits;
use muster_store::SpillConfig;
use serde::{Deserialize, Serialize};

use crate::records::Transport;

/// Prefix of the environment variables that set keys: `MUSTER_AGENT_STORE__BUDGET=8GiB`.
pub const ENVIRONMENT_PREFIX: &str = "MUSTER_AGENT";

/// libvirt's embedded driver makes sockets deep below its root (`muster_virt::libvirt::MAX_ROOT_LENGTH`); the root is
/// `run_dir` plus four bytes.
const MAX_RUN_DIR_LENGTH: usize = 44;

/// Less is not worth a file.
const LEAST_SPILL: ByteLen = ByteLen::mib(1);

/// Everything an operator can set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Must be true: this version has no authentication.
    #[serde(default)]
    pub lab: bool,
    /// The host's name for people; the kernel's host name when absent.
    #[serde(default)]
    pub name: Option<String>,
    /// The DDS domain id.
    #[serde(default)]
    pub cell: u16,
    #[serde(default)]
    pub interface: Option<IpAddr>,
    #[serde(default)]
    pub peers: Vec<IpAddr>,
    #[serde(default = "yes")]
    pub multicast: bool,
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// An orderly stop does not ask whether volumes are attached.
    #[serde(default)]
    pub force_stop: bool,
    /// Commands carried out at the same time.
    #[serde(default = "default_parallel")]
    pub parallel_commands: usize,
    pub store: StoreSection,
    #[serde(default)]
    pub scrub: ScrubSection,
    #[serde(default)]
    pub export: ExportSection,
    #[serde(default)]
    pub nbd: NbdSection,
    #[serde(default)]
    pub hypervisor: HypervisorSection,
    #[serde(default)]
    pub stream: StreamSection,
    #[serde(default)]
    pub backup: BackupSection,
    #[serde(default)]
    pub timeouts: TimeoutSection,
    #[serde(default)]
    pub log: LogSection,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreSection {
    pub budget: ByteLen,
    #[serde(default)]
    pub pages: PageChoice,
    /// The store's memory outlives the process.
    #[serde(default = "yes")]
    pub survive: bool,
    /// Where disks with the policy "spill" go when memory is full; none: no disk may have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill: Option<SpillSection>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpillSection {
    /// The most that may be there.
    pub size: ByteLen,
    /// `spill` below the state directory when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PageChoice {
    #[default]
    Auto,
    #[serde(rename = "4k")]
    Small,
    Thp,
    Hugetlb,
}

/// Looking for damage in the store's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScrubSection {
    /// Bytes a second; 0: never. Absent: so that all of it is looked at once a day.
    pub rate: Option<ByteLen>,
}

impl ScrubSection {
    pub fn is_on(&self) -> bool {
        self.rate != Some(ByteLen::ZERO)
    }
}

/// How the disks of VMs are served, from each VM's next cold start on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExportSection {
    pub transport: TransportChoice,
    /// Of a vhost-user disk; 0: one a processor of the VM, at most [`ExportSection::MOST_QUEUES_BY_ITSELF`].
    pub queues: u16,
    /// Requests a second of one disk; 0: as many as it can.
    pub iops: u64,
    /// Bytes a second of one disk; 0: as many as it can.
    pub bandwidth: ByteLen,
}

/// Disks for clients on other machines, always with TLS. Off unless it says where to listen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NbdSection {
    pub listen: Option<SocketAddr>,
    /// PEM files: the server's certificate and key, and the authorities of clients.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub authority: Option<PathBuf>,
    /// Certificates' names that may open every disk.
    pub everything: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TransportChoice {
    #[default]
    VhostUser,
    Nbd,
}

impl ExportSection {
    /// Each queue has a thread on the host: beyond a few they only take turns.
    pub const MOST_QUEUES_BY_ITSELF: u16 = 4;

    /// What each export is told.
    pub fn limits(&self) -> Limits {
        Limits {
            requests_per_second: NonZeroU64::new(self.iops),
            bytes_per_second: NonZeroU64::new(self.bandwidth.bytes()),
            ..Limits::default()
        }
    }

    /// For a VM of so many processors.
    pub fn transport(&self, processors: u32) -> Transport {
        match (self.transport, self.queues) {
            (TransportChoice::Nbd, _) => Transport::Nbd,
            (TransportChoice::VhostUser, 0) => {
                let queues = processors.clamp(1, u32::from(Self::MOST_QUEUES_BY_ITSELF));
                Transport::VhostUser { queues: queues as u16 }
            }
            (TransportChoice::VhostUser, queues) => Transport::VhostUser { queues },
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HypervisorSection {
    /// Empty: the embedded QEMU driver below `run_dir`. "none": no VMs.
    pub uri: String,
    pub accelerator: AcceleratorChoice,
    /// Guests' memory on huge pages that the operator reserved.
    pub huge_pages: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    #[default]
    Auto,
    Kvm,
    Tcg,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamSection {
    pub listen: SocketAddr,
    /// What the host topic says; derived from `listen` and `interface` when absent.
    pub advertise: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BackupSection {
    /// `backup` below the state directory when absent.
    pub directory: Option<PathBuf>,
}

/// All in milliseconds, so that a test can make them small.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TimeoutSection {
    pub hypervisor_call_ms: u64,
    pub guest_agent_ms: u64,
    pub shutdown_agent_ms: u64,
    pub policy_reserve_ms: u64,
    pub controller_silence_ms: u64,
    pub http_ms: u64,
    pub stop_ms: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSection {
    pub format: muster_common::logging::LogFormat,
}

const fn yes() -> bool {
    true
}
fn default_state_dir() -> PathBuf {
    "/var/lib/muster/agent".into()
}
fn default_run_dir() -> PathBuf {
    "/run/muster/a".into()
}
const fn default_parallel() -> usize {
    8
}

impl Default for StreamSection {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([0, 0, 0, 0], 7800)), advertise: None }
    }
}

impl Default for TimeoutSection {
    fn default() -> Self {
        Self {
            hypervisor_call_ms: 30_000,
            guest_agent_ms: 2_000,
            shutdown_agent_ms: 15_000,
            policy_reserve_ms: 6_000,
            controller_silence_ms: 5_000,
            http_ms: 30_000,
            stop_ms: 10_000,
        }
    }
}

impl TimeoutSection {
    pub const fn hypervisor_call(&self) -> Duration {
        Duration::from_millis(self.hypervisor_call_ms)
    }
    pub const fn guest_agent(&self) -> Duration {
        Duration::from_millis(self.guest_agent_ms)
    }
    pub const fn http(&self) -> Duration {
        Duration::from_millis(self.http_ms)
    }
    pub const fn stop(&self) -> Duration {
        Duration::from_millis(self.stop_ms)
    }
}

/// A configuration that parses and cannot be.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error(
        "start without authentication: this version has none; say lab = true in the configuration to run it on a \
         network where every machine may command every other"
    )]
    NotLab,
    #[error("use cell {cell}: cells are 0 to {most}", most = muster_bus::MAX_CELL)]
    Cell { cell: u16 },
    #[error("use run_dir {path}: an absolute path of at most {MAX_RUN_DIR_LENGTH} bytes is needed (unix sockets lie below it)", path = path.display())]
    RunDir { path: PathBuf },
    #[error("use state_dir {path}: an absolute path is needed", path = path.display())]
    StateDir { path: PathBuf },
    #[error("use parallel_commands = 0: at least one command has to run")]
    NoParallel,
    #[error("use export.queues = {queues}: 0 to {most} are possible", most = muster_virt::DiskTransport::MAX_QUEUES)]
    Queues { queues: u16 },
    #[error("use store.spill.size = {size}: at least {LEAST_SPILL} is needed; leave store.spill out for none")]
    SpillSize { size: ByteLen },
    #[error("use store.spill with store.pages = \"hugetlb\": such pages do not go back block by block; leave one out")]
    SpillFromHugetlb,
    #[error("use store.spill.directory {path}: an absolute path is needed", path = path.display())]
    SpillDirectory { path: PathBuf },
    #[error(
        "use nbd.listen: disks are served over TCP only with TLS; set nbd.certificate, nbd.key and nbd.authority (PEM files)"
    )]
    NbdWithoutTls,
    #[error("use host name {name:?}: 1 to 64 letters, digits, dots and hyphens")]
    Name { name: String },
}

impl Config {
    /// Reads file, environment and overrides; see `muster_common::config::load`.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        overrides: &[(String, String)],
    ) -> Result<Self, ConfigError> {
        muster_common::config::load(file, ENVIRONMENT_PREFIX, environment, overrides)
    }

    /// The least that works, for tests and embedding servers: lab mode, no hypervisor, port chosen by the kernel.
    pub fn minimal(state_dir: impl Into<PathBuf>, run_dir: impl Into<PathBuf>, budget: ByteLen) -> Self {
        Self {
            lab: true,
            name: None,
            cell: 0,
            interface: None,
            peers: Vec::new(),
            multicast: true,
            state_dir: state_dir.into(),
            run_dir: run_dir.into(),
            force_stop: false,
            parallel_commands: default_parallel(),
            store: StoreSection { budget, pages: PageChoice::Auto, survive: false, spill: None },
            scrub: ScrubSection::default(),
            export: ExportSection::default(),
            nbd: NbdSection::default(),
            hypervisor: HypervisorSection { uri: "none".into(), ..HypervisorSection::default() },
            stream: StreamSection { listen: SocketAddr::from(([127, 0, 0, 1], 0)), advertise: None },
            backup: BackupSection::default(),
            timeouts: TimeoutSection::default(),
            log: LogSection::default(),
        }
    }

    /// Refuses what parses and cannot work.
    pub fn check(&self) -> Result<(), CheckError> {
        if !self.lab {
            return Err(CheckError::NotLab);
        }
        if self.cell > muster_bus::MAX_CELL {
            return Err(CheckError::Cell { cell: self.cell });
        }
        if !self.run_dir.is_absolute() || self.run_dir.as_os_str().len() > MAX_RUN_DIR_LENGTH {
            return Err(CheckError::RunDir { path: self.run_dir.clone() });
        }
        if !self.state_dir.is_absolute() {
            return Err(CheckError::StateDir { path: self.state_dir.clone() });
        }
        if self.parallel_commands == 0 {
            return Err(CheckError::NoParallel);
        }
        if self.export.queues > muster_virt::DiskTransport::MAX_QUEUES {
            return Err(CheckError::Queues { queues: self.export.queues });
        }
        match &self.store.spill {
            Some(spill) if spill.size < LEAST_SPILL => return Err(CheckError::SpillSize { size: spill.size }),
            Some(_) if self.store.pages == PageChoice::Hugetlb => return Err(CheckError::SpillFromHugetlb),
            Some(SpillSection { directory: Some(path), .. }) if !path.is_absolute() => {
                return Err(CheckError::SpillDirectory { path: path.clone() });
            }
            _ => {}
        }
        let files = [&self.nbd.certificate, &self.nbd.key, &self.nbd.authority];
        if self.nbd.listen.is_some() && files.iter().any(|file| file.is_none()) {
            return Err(CheckError::NbdWithoutTls);
        }
        if let Some(name) = &self.name {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-' || c == '_';
            if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
                return Err(CheckError::Name { name: name.clone() });
            }
        }
        Ok(())
    }

    /// What `muster_virt::open` is given; `None` for "none".
    pub fn hypervisor_uri(&self) -> Option<String> {
        match self.hypervisor.uri.as_str() {
            "none" => None,
            "" => Some(format!("qemu:///embed?root={}/hv", self.run_dir.display())),
            "simulator:" => Some("sim:///".into()),
            uri => Some(uri.to_string()),
        }
    }

    pub fn bus(&self) -> BusConfig {
        BusConfig { cell: self.cell, interface: self.interface, peers: self.peers.clone(), multicast: self.multicast }
    }

    pub fn backup_directory(&self) -> PathBuf {
        self.backup.directory.clone().unwrap_or_else(|| self.state_dir.join("backup"))
    }

    /// The one NBD socket.
    pub fn export_socket(&self) -> PathBuf {
        self.run_dir.join("nbd.sock")
    }

    /// Where the store's memory lies, so that it outlives the process.
    pub fn store_directory(&self) -> PathBuf {
        self.run_dir.join("store")
    }

    /// The file that disks spill to, and how much may be there.
    pub fn spill(&self) -> Option<SpillConfig> {
        let spill = self.store.spill.as_ref()?;
        let directory = spill.directory.clone().unwrap_or_else(|| self.state_dir.join("spill"));
        Some(SpillConfig { file: directory.join("blocks"), limit: spill.size })
    }

    /// Where the vhost-user sockets are, one for each disk. 37 bytes and the generation follow: run_dir may have 44, a
    /// socket's path 107.
    pub fn disk_sockets(&self) -> PathBuf {
        self.run_dir.join("vu")
    }

    /// The control socket of `muster-agent stop` and `status`.
    pub fn control_socket(&self) -> PathBuf {
        self.run_dir.join("ctl.sock")
    }
}

#[cfg(test)]
mod tests {
    use muster_common::VolumeId;

    use super::*;

    #[test]
    fn the_commented_example_parses_and_names_every_key() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/config/agent.toml");
        let config = Config::load(Some(Path::new(path)), [], &[]).unwrap();
        config.check().unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        let effective = toml::Table::try_from(&config).unwrap();
        fn keys(table: &toml::Table, out: &mut Vec<String>) {
            for (key, value) in table {
                match value {
                    toml::Value::Table(inner) => keys(inner, out),
                    _ => out.push(key.clone()),
                }
            }
        }
        let mut names =
            vec!["advertise".to_string(), "directory".into(), "interface".into(), "name".into(), "rate".into()];
        names.extend(["certificate", "key", "authority"].map(String::from));
        keys(&effective, &mut names);
        for name in names {
            assert!(text.contains(&format!("{name} = ")), "examples/config/agent.toml does not explain {name}");
        }
        // with every comment sign of a key taken away it is still a configuration
        let bare: String = text
            .lines()
            .map(|line| match line.strip_prefix("#") {
                Some(key) if !key.starts_with(' ') && key.contains(" = ") => format!("{key}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        toml::from_str::<Config>(&bare).unwrap().check().unwrap();
    }

    #[test]
    fn without_lab_mode_it_does_not_start() {
        let mut config = Config::minimal("/s", "/r", ByteLen::gib(1));
        config.check().unwrap();
        config.lab = false;
        assert!(config.check().unwrap_err().to_string().contains("lab = true"));
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_reason() {
        let good = Config::minimal("/s", "/r", ByteLen::gib(1));
        let spilling = |size, directory: Option<&str>| {
            let spill = Some(SpillSection { size, directory: directory.map(Into::into) });
            Config { store: StoreSection { spill, ..good.store.clone() }, ..good.clone() }
        };
        let on_hugetlb = |mut config: Config| {
            config.store.pages = PageChoice::Hugetlb;
            config
        };
        on_hugetlb(good.clone()).check().unwrap();
        let file = |config: Config| config.spill().map(|spill| spill.file);
        assert_eq!(file(spilling(ByteLen::gib(1), None)), Some("/s/spill/blocks".into()));
        assert_eq!(file(spilling(ByteLen::gib(1), Some("/fast"))), Some("/fast/blocks".into()));
        assert_eq!(file(good.clone()), None);
        let bad = [
            Config { cell: 101, ..good.clone() },
            Config { run_dir: "relative".into(), ..good.clone() },
            Config { run_dir: format!("/{}", "x".repeat(60)).into(), ..good.clone() },
            Config { state_dir: "relative".into(), ..good.clone() },
            Config { parallel_commands: 0, ..good.clone() },
            Config { export: ExportSection { queues: 65, ..good.export }, ..good.clone() },
            Config { name: Some("a b".into()), ..good.clone() },
            spilling(ByteLen::kib(4), None),
            spilling(ByteLen::gib(1), Some("relative")),
            on_hugetlb(spilling(ByteLen::gib(1), None)),
            Config {
                nbd: NbdSection {
                    listen: Some(([127, 0, 0, 1], 0).into()),
                    key: Some("/k".into()),
                    ..NbdSection::default()
                },
                ..good.clone()
            },
        ];
        for config in bad {
            assert!(config.check().is_err(), "{config:?}");
        }
    }

    #[test]
    fn queues_are_one_a_processor_up_to_a_few_unless_said_otherwise() {
        let mut export = ExportSection::default();
        let queues = |export: &ExportSection, processors| match export.transport(processors) {
            Transport::VhostUser { queues } => queues,
            Transport::Nbd => 0,
        };
        assert_eq!([0, 1, 3, 64].map(|n| queues(&export, n)), [1, 1, 3, 4]);
        export.queues = 2;
        assert_eq!(queues(&export, 1), 2);
        export.transport = TransportChoice::Nbd;
        assert_eq!(export.transport(1), Transport::Nbd);
    }

    #[test]
    fn the_longest_socket_of_a_disk_fits() {
        let config = Config::minimal("/s", format!("/{}", "r".repeat(MAX_RUN_DIR_LENGTH - 1)), ByteLen::gib(1));
        config.check().unwrap();
        // a generation a second for a thousand years
        let path = config.disk_sockets().join(format!("{}.31536000000", VolumeId::random().uuid().simple()));
        assert!(path.as_os_str().len() <= 107, "{}", path.display());
    }

    #[test]
    fn the_default_hypervisor_lives_below_run_dir() {
        let mut config = Config::minimal("/s", "/run/m/h1", ByteLen::gib(1));
        assert_eq!(config.hypervisor_uri(), None);
        config.hypervisor.uri = String::new();
        assert_eq!(config.hypervisor_uri().unwrap(), "qemu:///embed?root=/run/m/h1/hv");
    }
}
