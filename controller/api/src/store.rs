//! The memory-resident stores.

use muster_common::{Digest, HostId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The store of one host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Store {
    #[schema(value_type = String)]
    pub host: HostId,
    pub host_name: String,
    pub sampled_at_us: u64,
    pub budget_bytes: u64,
    pub resident_bytes: u64,
    pub metadata_bytes: u64,
    /// What images and volumes would take without deduplication.
    pub logical_bytes: u64,
    pub provisioned_bytes: u64,
    pub unique_blocks: u64,
    pub dedup_ratio: f64,
    /// Reads of a file or block device made to serve a guest: 0 is the promise.
    pub guest_file_reads: u64,
    pub page_kind: String,
    pub images: Vec<StoreImage>,
    pub volumes: u32,
    /// None: the host has not said it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<StoreHealth>,
}

/// How sound a store's memory is, and where it lies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StoreHealth {
    pub sampled_at_us: u64,
    /// False: nobody looks for damage.
    pub scrubbing: bool,
    /// Blocks of 4 KiB that were hashed and compared since the agent's start.
    pub blocks_checked: u64,
    /// Those found damaged.
    pub blocks_damaged: u64,
    /// Those of them that were repaired.
    pub blocks_repaired: u64,
    /// Damaged and not repaired now: reading one is an I/O error.
    pub blocks_unreadable: u64,
    /// Times the whole store was looked through since the agent's start.
    pub passes: u64,
    /// When the last of them ended; 0: none has.
    pub last_pass_at_us: u64,
    /// Empty when the store's memory ends with the agent.
    pub nodes: Vec<StoreNode>,
}

/// Memory of one NUMA node of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StoreNode {
    pub node: u32,
    pub memory_bytes: u64,
    /// What the store has there.
    pub store_bytes: u64,
}

/// An image that is resident.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StoreImage {
    #[schema(value_type = String)]
    pub digest: Digest,
    pub name: String,
    pub logical_bytes: u64,
    /// Volumes that are clones of it.
    pub volumes: u32,
}
