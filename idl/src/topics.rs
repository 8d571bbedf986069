//! The table of topics: name, type, key, quality of service, direction.

use serde::{Serialize, de::DeserializeOwned};

use crate::v1;

/// Who writes a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Written by agents, read by controllers and dashboards.
    AgentToAll,
    /// Written by controllers, read by agents and dashboards.
    ControllerToAll,
}

/// DDS RELIABILITY (OMG DDS 1.4, section 2.2.3.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reliability {
    BestEffort,
    Reliable,
}

/// DDS DURABILITY (OMG DDS 1.4, section 2.2.3.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    Volatile,
    TransientLocal,
}

/// The quality of service of a topic, the same on its writers and on our own readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    pub reliability: Reliability,
    pub durability: Durability,
    /// KEEP_LAST depth; 0 is KEEP_ALL within `max_samples`. RustDDS counts the depth of a transient-local writer
    /// per writer, not per instance, so a topic with many instances a writer needs a depth that holds them all.
    pub history_depth: u16,
    /// RESOURCE_LIMITS max_samples on both ends. The default of RustDDS (64) loses samples silently at a slow reader.
    pub max_samples: u32,
}

impl Profile {
    /// Periodic readings: the next one replaces a lost one.
    pub const TELEMETRY: Profile = Profile {
        reliability: Reliability::BestEffort,
        durability: Durability::Volatile,
        history_depth: 1,
        max_samples: 4096,
    };
    /// One instance a writer whose last value a late joiner must get.
    pub const SNAPSHOT: Profile = Profile {
        reliability: Reliability::Reliable,
        durability: Durability::TransientLocal,
        history_depth: 1,
        max_samples: 4096,
    };
    /// Many instances a writer. Depth covers the VMs of one host with changes in between; the agent also writes
    /// every instance again every few seconds.
    pub const STATE: Profile = Profile {
        reliability: Reliability::Reliable,
        durability: Durability::TransientLocal,
        history_depth: 256,
        max_samples: 4096,
    };
    /// Orders and answers: none may be lost on the way, none may reach a reader that came later.
    pub const COMMAND: Profile = Profile {
        reliability: Reliability::Reliable,
        durability: Durability::Volatile,
        history_depth: 0,
        max_samples: 8192,
    };
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopicInfo {
    pub name: &'static str,
    pub type_name: &'static str,
    pub profile: Profile,
    pub direction: Direction,
}

/// A type that travels on a topic of its own. The key is an owned copy of the IDL `@key` fields, in IDL order.
pub trait Topic: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// The key: serialised in IDL order it is the DDS key.
    type Key: Serialize + DeserializeOwned + Clone + Ord + std::hash::Hash + std::fmt::Debug + Send + Sync + 'static;
    const INFO: TopicInfo;
    /// The key of this sample.
    fn key(&self) -> Self::Key;
}

macro_rules! topics {
    ($($ty:ident, $name:literal, $profile:ident, $direction:ident, $key:ty, |$s:ident| $key_expr:expr;)+) => {
        $(impl Topic for v1::$ty {
            type Key = $key;
            const INFO: TopicInfo = TopicInfo {
                name: $name,
                type_name: concat!("muster::v1::", stringify!($ty)),
                profile: Profile::$profile,
                direction: Direction::$direction,
            };
            fn key(&self) -> Self::Key {
                let $s = self;
                $key_expr
            }
        })+
        /// Every topic, in the order of the table in `docs/topics.md`.
        pub const ALL: &[TopicInfo] = &[$(<v1::$ty as Topic>::INFO),+];
    };
}

use v1::{HostKey, ReplyKey, VmKey};

topics! {
    // type            topic name                        profile    direction        key
    Heartbeat,         "muster_v1_heartbeat",            TELEMETRY, AgentToAll,      HostKey,  |s| HostKey { host: s.host.clone() };
    PhysicalHost,      "muster_v1_physical_host",        SNAPSHOT,  AgentToAll,      HostKey,  |s| HostKey { host: s.host.clone() };
    HostMetrics,       "muster_v1_host_metrics",         TELEMETRY, AgentToAll,      HostKey,  |s| HostKey { host: s.host.clone() };
    StoreState,        "muster_v1_store_state",          SNAPSHOT,  AgentToAll,      HostKey,  |s| HostKey { host: s.host.clone() };
    StoreHealth,       "muster_v1_store_health",         SNAPSHOT,  AgentToAll,      HostKey,  |s| HostKey { host: s.host.clone() };
    VirtualSystem,     "muster_v1_virtual_system",       STATE,     AgentToAll,      VmKey,    |s| VmKey { host: s.host.clone(), vm: s.vm.clone() };
    VmMetrics,         "muster_v1_vm_metrics",           TELEMETRY, AgentToAll,      VmKey,    |s| VmKey { host: s.host.clone(), vm: s.vm.clone() };
    VolumeMetrics,     "muster_v1_volume_metrics",       TELEMETRY, AgentToAll,      v1::VolumeKey, |s| v1::VolumeKey { host: s.host.clone(), volume: s.volume.clone() };
    Verdict,           "muster_v1_verdict",              COMMAND,   AgentToAll,      ReplyKey, |s| ReplyKey { command: s.command.clone(), host: s.host.clone(), vm: s.vm.clone() };
    Progress,          "muster_v1_progress",             TELEMETRY, AgentToAll,      ReplyKey, |s| ReplyKey { command: s.command.clone(), host: s.host.clone(), vm: s.vm.clone() };
    Event,             "muster_v1_event",                COMMAND,   AgentToAll,      HostKey,  |s| HostKey { host: s.host.clone() };
    ControllerState,   "muster_v1_controller_state",     SNAPSHOT,  ControllerToAll, v1::ControllerKey, |s| v1::ControllerKey { controller: s.controller.clone() };
    GroupSet,          "muster_v1_group_set",            SNAPSHOT,  ControllerToAll, v1::ControllerKey, |s| v1::ControllerKey { controller: s.controller.clone() };
    GroupCommand,      "muster_v1_group_command",        COMMAND,   ControllerToAll, v1::CommandKey, |s| v1::CommandKey { id: s.id.clone() };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topic_names_carry_the_version_and_are_unique() {
        let mut names: Vec<_> = ALL.iter().map(|t| t.name).collect();
        assert!(names.iter().all(|n| n.starts_with("muster_v1_")));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
