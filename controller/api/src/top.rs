//! The live view: everything of the moment in one answer.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{CommandSummary, Host, HostMetrics, Status, Store, Vm, VmMetrics};

/// One look at the fleet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Top {
    pub status: Status,
    pub hosts: Vec<TopHost>,
    pub vms: Vec<TopVm>,
    /// Commands that have not ended, newest first.
    pub commands: Vec<CommandSummary>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TopHost {
    pub host: Host,
    pub metrics: Option<HostMetrics>,
    pub store: Option<Store>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TopVm {
    pub vm: Vm,
    pub metrics: Option<VmMetrics>,
}
