//! The controller itself.

use muster_common::{ControllerId, HostId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One look at the controller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    #[schema(value_type = String)]
    pub controller: ControllerId,
    pub name: String,
    /// Version of the program.
    pub version: String,
    /// True: without authentication on the bus and on the streams.
    pub lab: bool,
    /// Grows at each start.
    pub epoch: u64,
    /// Grows at each change of a group.
    pub group_epoch: u64,
    pub started_at_us: u64,
    pub now_us: u64,
    /// Base URL that agents pull images from.
    pub stream_endpoint: String,
    pub cells: Vec<Cell>,
    pub hosts: u32,
    pub hosts_online: u32,
    pub vms: u32,
    pub images: u32,
    pub open_commands: u32,
    pub alarms: Vec<Alarm>,
}

/// One DDS domain the controller has joined.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Cell {
    /// The domain id.
    pub cell: u16,
    /// GUID of the controller's participant, or what it is instead.
    pub participant: String,
    pub hosts_online: u32,
    /// Domain, interface, peers and ports, for people.
    pub diagnosis: String,
}

/// Something that is wrong now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Alarm {
    /// Stable kind, e.g. "duplicate-incarnation".
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub host: Option<HostId>,
    pub message: String,
    pub since_us: u64,
}

/// What the controller finds when it examines itself and its fleet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Doctor {
    pub lab: bool,
    pub checks: Vec<Check>,
}

/// One thing examined.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    pub name: String,
    pub result: CheckResult,
    pub message: String,
    /// What to do about it; empty when all is well.
    pub remedy: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CheckResult {
    Good,
    Warning,
    Bad,
}
