//! What happened, and what was used.

use muster_common::{HostId, VmId};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// An entry of the event log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Position in the controller's log; grows.
    pub sequence: u64,
    /// None: the controller's own event.
    #[schema(value_type = Option<String>)]
    pub host: Option<HostId>,
    pub host_name: String,
    #[schema(value_type = Option<String>)]
    pub vm: Option<VmId>,
    pub vm_name: String,
    pub occurred_at_us: u64,
    pub received_at_us: u64,
    pub severity: Severity,
    /// Stable kind, e.g. "vm-state", "host-offline".
    pub kind: String,
    pub message: String,
    pub from_state: u16,
    pub to_state: u16,
    /// Command that caused it; empty when none.
    pub command: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    Info,
    Warning,
    Error,
}

/// Which events are asked for. Oldest first from the cursor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// `next` of the page before; "end" for what comes from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// Host by name or id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// VM by name or id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Waits at most so long when there is nothing yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_seconds: Option<u32>,
}

/// One minute of one host or VM in the usage log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    pub sequence: u64,
    /// Start of the minute.
    pub minute_us: u64,
    #[schema(value_type = String)]
    pub host: HostId,
    /// None: the host itself.
    #[schema(value_type = Option<String>)]
    pub vm: Option<VmId>,
    pub samples: u32,
    /// Mean over the minute.
    pub processor_percent: f64,
    /// Highest in the minute.
    pub memory_bytes: u64,
    pub network_bytes: u64,
    pub disk_bytes: u64,
}

/// Which usage is asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct UsageQuery {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
}
