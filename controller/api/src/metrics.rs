//! The latest readings.

use muster_common::{HostId, VmId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Load of a host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostMetrics {
    #[schema(value_type = String)]
    pub host: HostId,
    pub host_name: String,
    pub sampled_at_us: u64,
    /// 0 to 100 of all processors together.
    pub processor_percent: f64,
    pub load_average_1m: f64,
    pub memory_total_bytes: u64,
    pub memory_available_bytes: u64,
    pub network_received_bytes: u64,
    pub network_sent_bytes: u64,
    pub disk_read_bytes: u64,
    pub disk_written_bytes: u64,
    pub running_vms: u32,
}

/// Load of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmMetrics {
    #[schema(value_type = String)]
    pub vm: VmId,
    pub vm_name: String,
    #[schema(value_type = String)]
    pub host: HostId,
    pub sampled_at_us: u64,
    /// 0 to 100 times its processors.
    pub processor_percent: f64,
    pub processor_time_us: u64,
    pub memory_resident_bytes: u64,
    /// As the balloon reports it; 0 when unknown.
    pub memory_used_bytes: u64,
    pub disk_reads: u64,
    pub disk_writes: u64,
    pub disk_read_bytes: u64,
    pub disk_written_bytes: u64,
    pub network_received_bytes: u64,
    pub network_sent_bytes: u64,
}
