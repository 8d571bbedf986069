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
