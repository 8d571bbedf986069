//! The configuration file; `examples/config/controller.toml` explains every key.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use muster_bus::BusConfig;
use muster_common::{Chain, logging::LogFormat};
use muster_fleet::{command, inventory};
use serde::{Deserialize, Serialize};

/// Prefix of environment variables that set keys.
pub const PREFIX: &str = "MUSTER_CONTROLLER";

/// All of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(default)]
    pub lab: bool,
    #[serde(default = "default_name")]
    pub name: String,
    pub state_dir: PathBuf,
    #[serde(default)]
    pub api: ApiConfig,
    #[serde(default)]
    pub stream: StreamConfig,
    #[serde(default)]
    pub bus: CellsConfig,
    #[serde(default)]
    pub timing: TimingConfig,
    #[serde(default)]
    pub placement: PlacementConfig,
    #[serde(default)]
    pub images: ImagesConfig,
    #[serde(default)]
    pub retention: RetentionConfig,
    #[serde(default)]
    pub log: LogConfig,
}

fn default_name() -> String {
    "muster".to_string()
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiConfig {
    /// Empty: `controller.sock` in the state directory.
    pub socket: Option<PathBuf>,
    /// Name of a group of this machine whose members may use the socket beside root and the controller's user.
    pub socket_group: Option<String>,
    /// 127.0.0.1 only; needs `lab`. None: not served; 0: any free port.
    pub http_port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamConfig {
    pub listen: SocketAddr,
    /// Base URL told to the agents; none: from `listen`, or from `bus.interface` when that is all addresses.
    pub advertise: Option<String>,
}

impl Default for StreamConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([0, 0, 0, 0], 7701)), advertise: None }
    }
}

/// The cells the controller joins, all the same way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CellsConfig {
    pub cells: Vec<u16>,
    pub interface: Option<IpAddr>,
    pub peers: Vec<IpAddr>,
    pub multicast: bool,
}

impl Default for CellsConfig {
    fn default() -> Self {
        Self { cells: vec![0], interface: None, peers: Vec::new(), multicast: true }
    }
}

impl CellsConfig {
    pub fn bus(&self, cell: u16) -> BusConfig {
        BusConfig { cell, interface: self.interface, peers: self.peers.clone(), multicast: self.multicast }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TimingConfig {
    pub offline_after_ms: u64,
    pub verdict_grace_ms: u64,
    pub restart_grace_ms: u64,
    pub settle_minutes: u64,
}

impl Default for TimingConfig {
    fn default() -> Self {
        Self { offline_after_ms: 5_000, verdict_grace_ms: 3_000, restart_grace_ms: 8_000, settle_minutes: 10 }
    }
}

impl TimingConfig {
    pub fn inventory(&self) -> inventory::Settings {
        inventory::Settings { offline_after_us: self.offline_after_ms * 1000, ..inventory::Settings::default() }
    }
    pub fn engine(&self) -> command::Settings {
        command::Settings {
            grace_us: self.verdict_grace_ms * 1000,
            restart_grace_us: self.restart_grace_ms * 1000,
            settle_us: self.settle_minutes * 60_000_000,
            ..command::Settings::default()
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlacementConfig {
    pub overcommit_percent: u32,
}

impl Default for PlacementConfig {
    fn default() -> Self {
        Self { overcommit_percent: 100 }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImagesConfig {
    /// Largest upload.
    pub upload_limit: muster_common::ByteLen,
}

impl Default for ImagesConfig {
    fn default() -> Self {
        Self { upload_limit: muster_common::ByteLen::gib(256) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionConfig {
    pub events_days: u32,
    pub usage_days: u32,
    pub commands_days: u32,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self { events_days: 30, usage_days: 90, commands_days: 90 }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    pub format: LogFormat,
}

/// A setting that parses and makes no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SettingError {
    #[error(
        "lab is false: certificates and signed commands are not built yet, so the controller runs in lab mode only; \
         set lab = true to accept that everyone on the fleet's network can command the fleet"
    )]
    LabRequired,
    #[error("bus.cells is empty: name at least one cell (DDS domain id)")]
    NoCells,
    #[error("bus.cells names cell {0} twice")]
    CellTwice(u16),
    #[error("bus.cells names cell {0}: cells are 0 to 100")]
    CellOutOfRange(u16),
    #[error("{key} is {value}: it must be {rule}")]
    OutOfRange { key: &'static str, value: u64, rule: &'static str },
    #[error("stream.advertise is {0:?}: it must be a URL such as http://10.0.0.1:7701")]
    NotAUrl(String),
    #[error("name is {0:?}: it must be 1 to 63 letters, digits, '.', '_' or '-'")]
    Name(String),
}

impl Config {
    /// Checks what the types cannot.
    ///
    /// # Errors
    /// The first setting that makes no sense, with what to do about it.
    pub fn check(&self) -> Result<(), SettingError> {
        if !self.lab {
            return Err(SettingError::LabRequired);
        }
        if !muster_fleet::name::is_valid(&self.name) {
            return Err(SettingError::Name(self.name.clone()));
        }
        if self.bus.cells.is_empty() {
            return Err(SettingError::NoCells);
        }
        for (at, cell) in self.bus.cells.iter().enumerate() {
            if *cell > muster_bus::MAX_CELL {
                return Err(SettingError::CellOutOfRange(*cell));
            }
            if self.bus.cells[..at].contains(cell) {
                return Err(SettingError::CellTwice(*cell));
            }
        }
        if !(2_000..=3_600_000).contains(&self.timing.offline_after_ms) {
            let (value, rule) = (self.timing.offline_after_ms, "2000 to 3600000: heartbeats come each second");
            return Err(SettingError::OutOfRange { key: "timing.offline_after_ms", value, rule });
        }
        if !(50..=1000).contains(&self.placement.overcommit_percent) {
            let (value, rule) = (u64::from(self.placement.overcommit_percent), "50 to 1000");
            return Err(SettingError::OutOfRange { key: "placement.overcommit_percent", value, rule });
        }
        if let Some(url) = &self.stream.advertise
            && !url.starts_with("http://")
        {
            return Err(SettingError::NotAUrl(url.clone()));
        }
        Ok(())
    }

    pub fn socket(&self) -> PathBuf {
        self.api.socket.clone().unwrap_or_else(|| self.state_dir.join("controller.sock"))
    }

    /// The base URL agents pull from, once it is known where the listener is.
    pub fn stream_endpoint(&self, listening: SocketAddr) -> String {
        if let Some(url) = &self.stream.advertise {
            return url.trim_end_matches('/').to_string();
        }
        let address = if listening.ip().is_unspecified() {
            // without an interface named, agents on this machine are the only ones sure to reach us
            self.bus.interface.unwrap_or_else(|| IpAddr::from([127, 0, 0, 1]))
        } else {
            listening.ip()
        };
        format!("http://{}", SocketAddr::new(address, listening.port()))
    }

    /// The effective settings as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_else(|error| format!("# {}", Chain(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commented_example_is_the_default() {
        let text = include_str!("../../examples/config/controller.toml");
        let example: Config = toml::from_str(text).unwrap();
        example.check().unwrap();
        let defaults = format!("lab = true\nstate_dir = {:?}\n", example.state_dir);
        let mut expected: Config = toml::from_str(&defaults).unwrap();
        expected.api.http_port = example.api.http_port;
        expected.api.socket = example.api.socket.clone();
        assert_eq!(example, expected, "the example shows the defaults");
        // every key is there, commented out or not
        for key in expected.to_toml().lines().filter_map(|line| line.split_once(" = ")).map(|(key, _)| key) {
            assert!(text.lines().any(|l| l.trim_start_matches("# ").starts_with(&format!("{key} ="))), "{key}");
        }
    }

    #[test]
    fn without_lab_it_says_what_that_means() {
        let config: Config = toml::from_str("state_dir = '/x'").unwrap();
        assert_eq!(config.check(), Err(SettingError::LabRequired));
    }

    #[test]
    fn senseless_settings_are_named() {
        let check = |text: &str| {
            toml::from_str::<Config>(&format!("lab = true\nstate_dir = '/x'\n{text}")).unwrap().check().unwrap_err()
        };
        assert_eq!(check("bus.cells = []"), SettingError::NoCells);
        assert_eq!(check("bus.cells = [1, 1]"), SettingError::CellTwice(1));
        assert_eq!(check("bus.cells = [101]"), SettingError::CellOutOfRange(101));
        assert!(check("timing.offline_after_ms = 10").to_string().contains("timing.offline_after_ms"));
    }
}
