//! The latest readings.

use muster_common::{HostId, VmId, VolumeId};
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

/// A disk as its export counts it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VolumeMetrics {
    #[schema(value_type = String)]
    pub volume: VolumeId,
    pub generation: u64,
    #[schema(value_type = String)]
    pub vm: VmId,
    pub vm_name: String,
    #[schema(value_type = String)]
    pub host: HostId,
    /// Its name in the VM.
    pub target: String,
    /// `vhost-user` or `nbd`.
    pub transport: String,
    pub sampled_at_us: u64,
    /// Who is connected.
    pub sessions: u32,
    /// Requests since it is offered, failed ones included.
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    /// Trims and zeroings.
    pub discards: u64,
    /// Requests of any kind that failed.
    pub errors: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// The latencies below are of the requests of so long a time before the sample; 0 when there were none.
    pub latency_window_us: u64,
    pub read_p50_us: f64,
    pub read_p99_us: f64,
    pub read_max_us: f64,
    pub write_p50_us: f64,
    pub write_p99_us: f64,
    pub write_max_us: f64,
    /// Requests taken and not yet answered; 0 over NBD.
    pub in_flight: u32,
    /// Queues whose first write waits because the store is full.
    pub waiting_for_space: u32,
    /// Requests that had to wait for the limits, and how long, all together.
    pub throttled_requests: u64,
    pub throttled_us: u64,
    /// Requests and bytes a second; 0: no limit.
    pub limit_requests: u64,
    pub limit_bytes: u64,
}
