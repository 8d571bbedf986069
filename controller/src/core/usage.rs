//! The usage log: readings of a minute become one row for each host and VM.

use std::collections::BTreeMap;

use muster_api::Usage;
use muster_common::{HostId, VmId};
use muster_idl::v1::{HostMetrics, VmMetrics};

const MINUTE_US: u64 = 60_000_000;

/// Sums of the running minutes.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    open: BTreeMap<(HostId, Option<VmId>), Sum>,
    complete: Vec<Usage>,
}

#[derive(Debug, Default, Clone)]
struct Sum {
    minute_us: u64,
    samples: u32,
    processor: f64,
    memory_bytes: u64,
    network_bytes: u64,
    disk_bytes: u64,
    /// Counters at the last reading; none before the first.
    last: Option<(u64, u64)>,
}

/// What one reading says.
struct Reading {
    at_us: u64,
    processor: f64,
    memory_bytes: u64,
    /// Totals that only grow, until the machine starts again.
    network_total: u64,
    disk_total: u64,
}

impl Meter {
    pub(crate) fn host(&mut self, metrics: &HostMetrics) {
        if let Ok(host) = metrics.host.parse() {
            let reading = Reading {
                at_us: metrics.sampled_at_us,
                processor: metrics.processor_percent,
                memory_bytes: metrics.memory_total_bytes.saturating_sub(metrics.memory_available_bytes),
                network_total: metrics.network_received_bytes.saturating_add(metrics.network_sent_bytes),
                disk_total: metrics.disk_read_bytes.saturating_add(metrics.disk_written_bytes),
            };
            self.add((host, None), &reading);
        }
    }

    pub(crate) fn vm(&mut self, metrics: &VmMetrics) {
        if let (Ok(host), Ok(vm)) = (metrics.host.parse(), metrics.vm.parse()) {
            let reading = Reading {
                at_us: metrics.sampled_at_us,
                processor: metrics.processor_percent,
                memory_bytes: metrics.memory_resident_bytes,
                network_total: metrics.network_received_bytes.saturating_add(metrics.network_sent_bytes),
                disk_total: metrics.disk_read_bytes.saturating_add(metrics.disk_written_bytes),
            };
            self.add((host, Some(vm)), &reading);
        }
    }

    fn add(&mut self, key: (HostId, Option<VmId>), reading: &Reading) {
        let minute_us = reading.at_us / MINUTE_US * MINUTE_US;
        let sum = self.open.entry(key).or_default();
        if sum.minute_us != minute_us {
            let last = sum.last;
            let full = std::mem::replace(sum, Sum { minute_us, last, ..Sum::default() });
            self.complete.extend(full.into_usage(key));
        }
        if let Some(sum) = self.open.get_mut(&key) {
            sum.samples += 1;
            if reading.processor.is_finite() {
                sum.processor += reading.processor;
            }
            sum.memory_bytes = sum.memory_bytes.max(reading.memory_bytes);
            if let Some((network, disk)) = sum.last {
                // smaller than before: started again, the count begins anew
                sum.network_bytes += reading.network_total.checked_sub(network).unwrap_or(reading.network_total);
                sum.disk_bytes += reading.disk_total.checked_sub(disk).unwrap_or(reading.disk_total);
            }
            sum.last = Some((reading.network_total, reading.disk_total));
        }
    }

    /// Minutes that are over: of those still heard, and of those not heard any more.
    pub(crate) fn take_complete(&mut self, now_us: u64) -> Vec<Usage> {
        let mut complete = std::mem::take(&mut self.complete);
        self.open.retain(|key, sum| {
            let silent = now_us.saturating_sub(sum.minute_us) > 2 * MINUTE_US;
            if silent {
                complete.extend(sum.clone().into_usage(*key));
            }
            !silent
        });
        complete
    }
}

impl Sum {
    fn into_usage(self, (host, vm): (HostId, Option<VmId>)) -> Option<Usage> {
        (self.samples > 0).then(|| Usage {
            sequence: 0,
            minute_us: self.minute_us,
            host,
            vm,
            samples: self.samples,
            processor_percent: self.processor / f64::from(self.samples),
            memory_bytes: self.memory_bytes,
            network_bytes: self.network_bytes,
            disk_bytes: self.disk_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(at_us: u64, processor: f64, network_total: u64) -> Reading {
        Reading { at_us, processor, memory_bytes: at_us, network_total, disk_total: 0 }
    }

    #[test]
    fn readings_of_a_minute_become_one_row() {
        let mut meter = Meter::default();
        let key = (HostId::random(), None);
        for (second, processor, total) in [(0, 10.0, 1000), (30, 30.0, 1500), (59, 50.0, 200)] {
            meter.add(key, &reading(600 * MINUTE_US + second * 1_000_000, processor, total));
        }
        assert!(meter.take_complete(601 * MINUTE_US).is_empty());
        meter.add(key, &reading(601 * MINUTE_US, 0.0, 300));
        let rows = meter.take_complete(601 * MINUTE_US);
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].samples, rows[0].processor_percent), (3, 30.0));
        assert_eq!(rows[0].network_bytes, 700, "a counter that began anew counts from 0");
        assert_eq!(meter.take_complete(604 * MINUTE_US).len(), 1, "a host not heard any more");
    }
}
