//! Virtual systems and their volumes.

use std::fmt;

use muster_common::{ByteLen, CommandId, Digest, HostId, VmId, VolumeId};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::DiskLimits;

/// A VM: what the controller wants and what its host says of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    #[schema(value_type = String)]
    pub id: VmId,
    pub name: String,
    #[schema(value_type = String)]
    pub host: HostId,
    pub host_name: String,
    pub standing: VmStanding,
    pub state: VmState,
    /// CIM EnabledState; 5 (not applicable) while nothing was heard of it.
    pub enabled_state: u16,
    pub requested_state: u16,
    pub health_state: u16,
    /// True while the guest agent answers.
    pub guest_up: bool,
    pub vcpus: u32,
    pub memory_bytes: u64,
    pub disks: Vec<Disk>,
    pub template: String,
    /// For people; empty when there is nothing to say.
    pub remark: String,
    pub changed_at_us: u64,
    /// When its host last spoke of it; 0: never.
    pub sampled_at_us: u64,
    /// True when its host is offline: the state is the last one heard.
    pub stale: bool,
    /// Groups that name it directly.
    pub groups: Vec<String>,
    /// Whose VMs share blocks with it; none: all that have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Resource version.
    pub version: u64,
}

/// How a VM stands with the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmStanding {
    /// Its create command has not ended.
    Creating,
    /// Wanted, and its host has it.
    Present,
    /// Wanted, but its host does not speak of it.
    Missing,
    /// Its delete command has not ended.
    Deleting,
    /// Creating or deleting it ended without a clear word.
    Doubtful,
    /// A host has it, the controller did not make it.
    Unmanaged,
}

/// CIM EnabledState in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    Running,
    Off,
    ShuttingDown,
    Saved,
    Paused,
    Starting,
    Unknown,
}

impl VmState {
    pub const fn from_enabled_state(state: u16) -> Self {
        match state {
            2 => Self::Running,
            3 => Self::Off,
            4 => Self::ShuttingDown,
            6 => Self::Saved,
            9 => Self::Paused,
            10 => Self::Starting,
            _ => Self::Unknown,
        }
    }
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Off => "off",
            Self::ShuttingDown => "shutting-down",
            Self::Saved => "saved",
            Self::Paused => "paused",
            Self::Starting => "starting",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// "system", "data" or "application".
    pub role: String,
    #[schema(value_type = String)]
    pub volume: VolumeId,
    pub generation: u64,
    pub size_bytes: u64,
    /// The image it is a clone of; none for a blank one.
    #[schema(value_type = Option<String>)]
    pub image: Option<Digest>,
    /// "volatile", "lost".
    pub condition: String,
    /// As they were ordered; none for a VM that the controller did not make.
    #[serde(default, skip_serializing_if = "DiskLimits::is_none")]
    pub limits: DiskLimits,
}

/// Which VMs are asked for, beside the page.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct VmQuery {
    /// Names, ids, group paths or hosts, separated by commas; none: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// Makes VMs from a template. Exactly one of `names`, `count` and `per_host` says how many.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVms {
    pub template: String,
    /// Names of the VMs to be.
    #[serde(default)]
    pub names: Vec<String>,
    /// So many in all, spread evenly.
    #[serde(default)]
    pub count: Option<u32>,
    /// So many on each host.
    #[serde(default)]
    pub per_host: Option<u32>,
    /// With `{n}` for the number and `{host}` for the host's name; `<template>-{n}` when not said.
    #[serde(default)]
    pub pattern: Option<String>,
    /// Hosts, by name, id or group path; empty: all that are online and take work.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// Groups the new VMs are put in; created when missing.
    #[serde(default)]
    pub groups: Vec<String>,
    #[serde(default)]
    pub timeout_seconds: Option<u32>,
}

/// What is being made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CreatedVms {
    /// The command that makes them: its verdicts say when they stand.
    #[schema(value_type = String)]
    pub command: CommandId,
    pub vms: Vec<Placed>,
}

/// Where a new VM goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Placed {
    #[schema(value_type = String)]
    pub id: VmId,
    pub name: String,
    #[schema(value_type = String)]
    pub host: HostId,
    pub host_name: String,
}

/// A volume, as its host speaks of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    #[schema(value_type = String)]
    pub id: VolumeId,
    pub generation: u64,
    pub role: String,
    #[schema(value_type = String)]
    pub vm: VmId,
    pub vm_name: String,
    #[schema(value_type = String)]
    pub host: HostId,
    pub host_name: String,
    #[schema(value_type = u64)]
    pub size: ByteLen,
    #[schema(value_type = Option<String>)]
    pub image: Option<Digest>,
    pub image_name: String,
    pub condition: String,
}

/// Which volumes are asked for.
pub type VolumeQuery = VmQuery;
