//! Hosts: one agent each.

use muster_common::{HostId, Incarnation};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A host as the controller knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    #[schema(value_type = String)]
    pub id: HostId,
    pub name: String,
    pub cell: u16,
    pub state: HostState,
    /// The agent run that spoke last; none before the first heartbeat since the controller's start.
    #[schema(value_type = Option<String>)]
    pub incarnation: Option<Incarnation>,
    /// When the last heartbeat arrived; 0: not since the controller knows the host.
    pub last_seen_us: u64,
    /// True while the host takes no new work.
    pub draining: bool,
    /// Two live agents claim this host id.
    pub duplicate_incarnation: bool,
    /// What is wrong with it, for people; empty when nothing is.
    pub alarm: String,
    pub agent_version: String,
    pub operating_system: String,
    pub kernel: String,
    pub processor_model: String,
    pub processors: u32,
    pub memory_bytes: u64,
    pub hardware_uuid: String,
    pub boot: String,
    /// CIM HealthState: 5 OK, 20 major failure, 0 unknown.
    pub health_state: u16,
    pub hypervisor_uri: String,
    pub hypervisor_version: String,
    /// "kvm", "tcg", "simulated" or "none".
    pub accelerator: String,
    pub hypervisor_remark: String,
    pub stream_endpoint: String,
    pub lab: bool,
    pub started_at_us: u64,
    /// Groups that name it directly.
    pub groups: Vec<String>,
    pub vms: u32,
    pub vms_running: u32,
    /// Resource version.
    pub version: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    Online,
    /// No heartbeat for longer than the configured time.
    Offline,
}
