//! What the exports count of each disk, as topic samples. Works alike for every way disks are served; needs no hypervisor.

use std::{collections::BTreeMap, time::Duration};

use muster_common::VolumeId;
use muster_export::{Export, ExportStatistics, Operation, OperationStatistics};
use muster_idl::v1::VolumeMetrics;

use crate::{
    host::Host,
    inventory::Entry,
    records::{DiskRecord, Transport},
};

/// Remembers what was counted when each disk was said last: latencies are those since then.
#[derive(Default)]
pub struct DiskMetrics {
    previous: BTreeMap<VolumeId, Last>,
}

struct Last {
    generation: u64,
    at_us: u64,
    statistics: ExportStatistics,
}

impl DiskMetrics {
    /// Samples of the disks whose VM runs or that somebody is connected to.
    pub fn samples(&mut self, host: &Host, entries: &[Entry], now_us: u64) -> Vec<VolumeMetrics> {
        let mut samples = Vec::new();
        let mut previous = std::mem::take(&mut self.previous);
        for entry in entries {
            for disk in &entry.record.disks {
                let Some(export) = host.volumes.export(disk) else { continue };
                let statistics = export.statistics();
                let last = previous.remove(&disk.volume).filter(|last| last.generation == disk.generation);
                // the others are looked at too, so that the first sample of one that is used has a window
                if entry.state.is_active() || export.sessions() > 0 {
                    samples.push(VolumeMetrics {
                        host: host.id.to_string(),
                        vm: entry.record.vm.to_string(),
                        ..sample(disk, &export, &statistics, last.as_ref(), now_us)
                    });
                }
                let last = Last { generation: disk.generation, at_us: now_us, statistics };
                self.previous.insert(disk.volume, last);
            }
        }
        samples
    }
}

fn sample(
    disk: &DiskRecord,
    export: &Export,
    now: &ExportStatistics,
    last: Option<&Last>,
    now_us: u64,
) -> VolumeMetrics {
    let since = |operation| match last {
        Some(last) => now.of(operation).since(last.statistics.of(operation)),
        None => now.of(operation).since(now.of(operation)),
    };
    let us = |of: &OperationStatistics, part| of.quantile(part).map_or(0.0, |latency| latency.as_nanos() as f64 / 1e3);
    let (read, written) = (since(Operation::Read), since(Operation::Write));
    let all =
        |what: fn(&OperationStatistics) -> u64| Operation::ALL.map(|operation| what(now.of(operation))).iter().sum();
    let limits = export.limits();
    VolumeMetrics {
        host: String::new(),
        volume: disk.volume.to_string(),
        generation: disk.generation,
        vm: String::new(),
        target: disk.target.clone(),
        transport: match disk.transport {
            Transport::Nbd => "nbd",
            Transport::VhostUser { .. } => "vhost-user",
        }
        .into(),
        sampled_at_us: now_us,
        sessions: export.sessions() as u32,
        reads: now.of(Operation::Read).requests,
        writes: now.of(Operation::Write).requests,
        flushes: now.of(Operation::Flush).requests,
        discards: now.of(Operation::Trim).requests + now.of(Operation::WriteZeroes).requests,
        errors: all(|of| of.errors),
        read_bytes: now.of(Operation::Read).bytes,
        written_bytes: now.of(Operation::Write).bytes,
        latency_window_us: last.map_or(0, |last| now_us.saturating_sub(last.at_us)),
        read_p50_us: us(&read, 0.5),
        read_p99_us: us(&read, 0.99),
        read_max_us: us(&read, 1.0),
        write_p50_us: us(&written, 0.5),
        write_p99_us: us(&written, 0.99),
        write_max_us: us(&written, 1.0),
        in_flight: u32::try_from(now.in_flight).unwrap_or(u32::MAX),
        waiting_for_space: export.queues_waiting_for_space() as u32,
        throttled_requests: now.throttled,
        throttled_us: micros(now.throttled_time),
        limit_requests: limits.requests_per_second.map_or(0, |limit| limit.get()),
        limit_bytes: limits.bytes_per_second.map_or(0, |limit| limit.get()),
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
