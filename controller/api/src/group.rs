//! Named sets of hosts and VMs, nested.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A group. `school/lab1` lies in `school`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Group {
    pub path: String,
    pub hosts: Vec<Reference>,
    pub vms: Vec<Reference>,
    /// Paths of the groups directly in it.
    pub groups: Vec<String>,
    /// Hosts in it and in all groups below, each once.
    pub total_hosts: u32,
    pub total_vms: u32,
    /// Resource version.
    pub version: u64,
}

/// An id with the name people use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Reference {
    pub id: String,
    pub name: String,
}

/// Makes a group, and its parents where they are missing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateGroup {
    pub path: String,
    #[serde(default)]
    pub members: GroupMembers,
}

/// Members by name or id, groups by path.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupMembers {
    #[serde(default)]
    pub hosts: Vec<String>,
    #[serde(default)]
    pub vms: Vec<String>,
    #[serde(default)]
    pub groups: Vec<String>,
}

/// Adds and removes members in one step; all of it or nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeGroup {
    #[serde(default)]
    pub add: GroupMembers,
    #[serde(default)]
    pub remove: GroupMembers,
}
