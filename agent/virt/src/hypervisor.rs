//! The trait and what its implementations say about themselves.

use std::time::Duration;

use crossbeam_channel::Receiver;
use muster_common::id::VmId;

use crate::error::Result;
use crate::screenshot::Screenshot;
use crate::spec::DomainSpec;
use crate::state::{DomainStats, DomainStatus, ExecRequest, ExecResult, HypervisorEvent};

/// How to ask a guest to stop or reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ShutdownMode {
    /// Through the guest agent: certain to be heard, or a typed error.
    Agent,
    /// The power button: heard only by a guest that listens.
    Acpi,
}

/// What an implementation can do. Anything declared absent answers `Unsupported`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    pub guest_agent: bool,
    pub screenshot: bool,
    pub managed_save: bool,
    pub reset: bool,
    /// A start that is held before the first instruction.
    pub start_paused: bool,
    /// Block and network counters.
    pub device_stats: bool,
    /// Defined domains are found by another opener of the same hypervisor, after a kill too.
    pub survives_restart: bool,
    /// Live migration into this hypervisor.
    pub migration_destination: bool,
}

/// Which implementation answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HypervisorKind {
    /// QEMU driver inside this process.
    QemuEmbedded,
    /// QEMU driver of the system daemon.
    QemuSystem,
    /// libvirt's own mock.
    LibvirtTest,
    /// Ours, see [`crate::simulator`].
    Simulator,
}

/// Who answers, for logs and the host topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HypervisorInfo {
    pub kind: HypervisorKind,
    pub uri: String,
    /// libvirt's version, `9.0.0`.
    pub library_version: String,
    /// QEMU's version; empty when there is none.
    pub hypervisor_version: String,
    /// Processor architecture of guests, `x86_64`.
    pub guest_arch: String,
    pub capabilities: Capabilities,
}

/// A hypervisor. Synchronous: a call may block for as long as libvirt does, so the agent calls through
/// [`crate::Pool`]. Calls for one domain may come from several threads; the implementation keeps them in order or
/// refuses.
///
/// Definition of done: every state-changing call returns when the hypervisor accepted it; `shutdown` and `reboot`
/// return before the guest obeyed. Read the state back.
///
/// Idempotence: a call that asks for the state the domain has already (start of a running one, power_off of one that
/// is off) answers `InvalidState`; the caller decides whether that is "already".
pub trait Hypervisor: Send + Sync {
    fn info(&self) -> HypervisorInfo;

    /// Makes the domain known, off. Defining the same VM again replaces the definition (it takes effect at the next
    /// start when it is running). Another VM of the same name: `AlreadyExists`.
    fn define(&self, spec: &DomainSpec) -> Result<()>;

    /// Forgets the domain and its saved memory. `InvalidState` while it is active.
    fn undefine(&self, vm: VmId) -> Result<()>;

    /// All domains of this hypervisor, also those of others (`ours` is false).
    fn list(&self) -> Result<Vec<DomainStatus>>;

    fn status(&self, vm: VmId) -> Result<DomainStatus>;

    /// Starts a domain that is off, or brings a saved one back with its memory. The servers of its vhost-user disks have
    /// to answer: `DiskUnavailable` otherwise (QEMU would wait for them without an end).
    fn start(&self, vm: VmId) -> Result<()>;

    /// As `start`, but left paused before the first instruction.
    fn start_paused(&self, vm: VmId) -> Result<()>;

    /// Asks the guest to stop. Off comes later, or never.
    fn shutdown(&self, vm: VmId, mode: ShutdownMode) -> Result<()>;

    /// Ends it now, like pulling the plug.
    fn power_off(&self, vm: VmId) -> Result<()>;

    /// The reset button.
    fn reset(&self, vm: VmId) -> Result<()>;

    /// Asks the guest to reboot.
    fn reboot(&self, vm: VmId, mode: ShutdownMode) -> Result<()>;

    /// Stops the processors, keeps everything in memory.
    fn pause(&self, vm: VmId) -> Result<()>;

    fn resume(&self, vm: VmId) -> Result<()>;

    /// Writes the memory to disk and ends the process: state `Saved`, brought back by `start`.
    fn suspend(&self, vm: VmId) -> Result<()>;

    /// Throws a saved memory away: state `Off`.
    fn discard_saved(&self, vm: VmId) -> Result<()>;

    /// Does the guest agent answer within the time? `AgentUnavailable` is `Ok(false)` here; a domain that is not running
    /// (off, paused) is `InvalidState`.
    fn guest_ping(&self, vm: VmId, timeout: Duration) -> Result<bool>;

    /// Runs a program in the guest and waits for its end.
    fn guest_exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecResult>;

    /// Replaces a file in the guest.
    fn guest_write_file(&self, vm: VmId, path: &str, content: &[u8]) -> Result<()>;

    /// Reads a file of at most `limit` bytes; longer ones are `GuestFailed`.
    fn guest_read_file(&self, vm: VmId, path: &str, limit: usize) -> Result<Vec<u8>>;

    /// Freezes the guest's file systems; how many. Always pair with a thaw.
    fn fs_freeze(&self, vm: VmId) -> Result<u32>;

    /// Thaws them; how many.
    fn fs_thaw(&self, vm: VmId) -> Result<u32>;

    fn screenshot(&self, vm: VmId) -> Result<Screenshot>;

    fn stats(&self, vm: VmId) -> Result<DomainStats>;

    /// Statistics of every active domain of ours in one call.
    fn all_stats(&self) -> Result<Vec<DomainStats>>;

    /// A new subscription to events from now on. Bounded (4,096): a slow receiver loses events and is told by
    /// `Overflow` as soon as there is room.
    fn events(&self) -> Receiver<HypervisorEvent>;
}
