//! What the hosts' exports count of the VMs' disks, in REST's words.

use muster_api as api;
use muster_common::{HostId, VmId};
use muster_idl::v1;

use super::Core;
use crate::refusal::Refusal;

impl Core {
    /// The latest readings of the disks of the VMs that `target` means.
    pub(crate) fn volume_metrics(&self, target: Option<&str>) -> Result<Vec<api::VolumeMetrics>, Refusal> {
        let wanted = self.wanted_vms(target)?;
        let names = self.names();
        let vms = names.vms.iter().filter(|(id, _)| wanted.as_ref().is_none_or(|wanted| wanted.contains(id)));
        Ok(vms
            .filter_map(|(id, (name, _))| Some((*id, name, self.heard_of(*id)?)))
            .flat_map(|(id, name, (host, entry))| {
                entry.disks.values().filter_map(move |m| volume_metrics(id, host, name.clone(), m))
            })
            .collect())
    }
}

fn volume_metrics(vm: VmId, host: HostId, vm_name: String, m: &v1::VolumeMetrics) -> Option<api::VolumeMetrics> {
    Some(api::VolumeMetrics {
        volume: m.volume.parse().ok()?,
        generation: m.generation,
        vm,
        vm_name,
        host,
        target: m.target.clone(),
        transport: m.transport.clone(),
        sampled_at_us: m.sampled_at_us,
        sessions: m.sessions,
        reads: m.reads,
        writes: m.writes,
        flushes: m.flushes,
        discards: m.discards,
        errors: m.errors,
        read_bytes: m.read_bytes,
        written_bytes: m.written_bytes,
        latency_window_us: m.latency_window_us,
        read_p50_us: m.read_p50_us,
        read_p99_us: m.read_p99_us,
        read_max_us: m.read_max_us,
        write_p50_us: m.write_p50_us,
        write_p99_us: m.write_p99_us,
        write_max_us: m.write_max_us,
        in_flight: m.in_flight,
        waiting_for_space: m.waiting_for_space,
        throttled_requests: m.throttled_requests,
        throttled_us: m.throttled_us,
        limit_requests: m.limit_requests,
        limit_bytes: m.limit_bytes,
    })
}
