//! What is said about a domain: state, status, statistics, events.

use std::time::Duration;

use muster_common::id::VmId;
use muster_common::units::ByteLen;
use serde::{Deserialize, Serialize};

/// State of a domain as the hypervisor reports it.
///
/// ```text
///            start                shutdown (asked)            gone
///   Off ------------> Running ------------------> ShuttingDown ----> Off
///    ^                 |  ^  \ suspend
///    | power_off       |  |   +---------> Saved --start--> Running
///    +-----------------+  |
///                pause |  | resume
///                      v  |
///                     Paused  (also: I/O error)        Crashed: the guest or QEMU died
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DomainState {
    Off,
    /// Between a start call and running; libvirt shows it only while it loads the machine.
    Starting,
    Running,
    Paused,
    /// Off with its memory kept on disk (managed save).
    Saved,
    ShuttingDown,
    Crashed,
    /// The hypervisor gave no state, or one we do not know.
    Unknown,
}

impl DomainState {
    /// A process exists for it.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Paused | Self::ShuttingDown)
    }
}

/// Why the domain is in its state. Only what somebody acts on has a literal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateReason {
    /// Nothing special, or not told.
    None,
    /// Somebody asked for it.
    User,
    /// Paused because a disk failed (its server is away): resume once it is back.
    IoError,
    /// Off because the guest shut down.
    GuestShutdown,
    /// Off because it was destroyed.
    Destroyed,
    /// Off or crashed because QEMU died, or the guest panicked.
    Crashed,
    /// Off because the start failed.
    Failed,
    /// Migration, dump, snapshot or save in progress.
    Job,
}

/// One row of [`crate::Hypervisor::list`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainStatus {
    pub vm: VmId,
    pub name: String,
    pub state: DomainState,
    pub reason: StateReason,
    /// Has a definition that outlives power-off.
    pub persistent: bool,
    /// Carries our metadata: made by Muster. Never touch the others.
    pub ours: bool,
    /// The guest agent's channel is open in the guest. `None`: the hypervisor does not say.
    pub agent_connected: Option<bool>,
}

/// Counters of one disk since the domain's start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStats {
    pub target: String,
    pub read_requests: u64,
    pub read_bytes: u64,
    pub write_requests: u64,
    pub write_bytes: u64,
    pub flush_requests: u64,
}

/// Counters of one network card since the domain's start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStats {
    pub device: String,
    pub received_bytes: u64,
    pub received_packets: u64,
    pub sent_bytes: u64,
    pub sent_packets: u64,
}

/// Statistics of one domain. Counters start at zero with the domain's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainStats {
    pub vm: VmId,
    pub state: DomainState,
    /// Processor time of the whole QEMU process, nanoseconds.
    pub cpu_time_ns: u64,
    pub vcpus: u32,
    /// What the guest has now (balloon).
    pub memory: Option<ByteLen>,
    /// Ceiling of the balloon.
    pub memory_maximum: Option<ByteLen>,
    /// Resident size of the QEMU process.
    pub memory_resident: Option<ByteLen>,
    /// Free for applications by the guest's own account; needs its balloon driver.
    pub memory_usable: Option<ByteLen>,
    /// One for each disk the hypervisor counts. A vhost-user disk is none of them: its server counts.
    pub block: Vec<BlockStats>,
    pub net: Vec<NetStats>,
}

/// Result of a program run in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecResult {
    /// Exit status; `None` when a signal ended it.
    pub exit: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// The guest agent cut one of the outputs.
    pub truncated: bool,
}

/// A program to run in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// Program (absolute path, or found in the agent's PATH) and arguments.
    pub argv: Vec<String>,
    pub input: Vec<u8>,
    /// How long to wait for the end. The program is not killed when it passes: the result is `Unknown`.
    pub timeout: Duration,
}

impl ExecRequest {
    /// No input, 30 seconds.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self { argv: argv.into_iter().map(Into::into).collect(), input: Vec::new(), timeout: Duration::from_secs(30) }
    }
}

/// Something that happened to a domain. Never count events (one reset gives 4 to 16): re-read the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HypervisorEvent {
    Lifecycle {
        vm: VmId,
        state: DomainState,
        reason: StateReason,
    },
    Rebooted {
        vm: VmId,
    },
    /// A disk failed; with our error policy the domain is paused now. `disk` is the hypervisor's name for it
    /// (libvirt: `virtio-disk0`), for people.
    IoError {
        vm: VmId,
        disk: String,
        /// Its server had no room for what the guest wrote.
        no_space: bool,
    },
    GuestAgent {
        vm: VmId,
        connected: bool,
    },
    /// The connection to the hypervisor broke; domains go on. Open again.
    ConnectionLost,
    /// The receiver was too slow and events were dropped: list everything again.
    Overflow,
}
