//! The host's own figures: sysinfo where it has them, procfs for totals since boot.

use muster_idl::v1::HostMetrics;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

/// What does not change while the machine runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    pub operating_system: String,
    pub kernel: String,
    pub processor_model: String,
    pub processors: u32,
    pub memory_bytes: u64,
}

pub struct Sampler {
    /// None where sysinfo cannot read this machine; the figures are 0 then.
    system: Option<System>,
    facts: HostFacts,
}

impl Sampler {
    pub fn new() -> Self {
        let kind = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing().with_usage())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(kind).ok();
        let cpus = system.as_ref().map(System::cpus).unwrap_or_default();
        let facts = HostFacts {
            operating_system: System::long_os_version().unwrap_or_default(),
            kernel: System::kernel_version().unwrap_or_default(),
            processor_model: cpus.first().map(|c| c.brand().trim().to_string()).unwrap_or_default(),
            processors: cpus.len() as u32,
            memory_bytes: system.as_ref().map_or(0, System::total_memory),
        };
        Self { system, facts }
    }

    pub fn facts(&self) -> &HostFacts {
        &self.facts
    }

    pub fn host_metrics(&mut self, host: &str, now_us: u64, running_vms: u32) -> HostMetrics {
        if let Some(system) = &mut self.system {
            system.refresh_cpu_usage();
            system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
        }
        let system = self.system.as_ref();
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let (received, sent) = network_totals(&read("/proc/self/net/dev"));
        let (disk_read, disk_written) = disk_totals(&read("/proc/diskstats"));
        HostMetrics {
            host: host.to_string(),
            sampled_at_us: now_us,
            processor_percent: system.map_or(0.0, |s| f64::from(s.global_cpu_usage())).clamp(0.0, 100.0),
            load_average_1m: System::load_average().map_or(0.0, |l| l.one),
            memory_total_bytes: system.map_or(0, System::total_memory),
            memory_available_bytes: system.map_or(0, System::available_memory),
            network_received_bytes: received,
            network_sent_bytes: sent,
            disk_read_bytes: disk_read,
            disk_written_bytes: disk_written,
            running_vms,
        }
    }
}

/// Received and sent bytes of all interfaces but loopback (proc_pid_net(5), `/proc/pid/net/dev`).
fn network_totals(text: &str) -> (u64, u64) {
    let mut totals = (0u64, 0u64);
    for line in text.lines().skip(2) {
        let Some((name, rest)) = line.split_once(':') else { continue };
        if name.trim() == "lo" {
            continue;
        }
        let fields: Vec<u64> = rest.split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
        totals.0 = totals.0.saturating_add(fields.first().copied().unwrap_or(0));
        totals.1 = totals.1.saturating_add(fields.get(8).copied().unwrap_or(0));
    }
    totals
}

/// Read and written bytes of all whole block devices (Documentation/admin-guide/iostats.rst; sectors are 512 bytes there).
/// Partitions repeat their disk's, device-mapper and loop devices those below them: both are left out.
fn disk_totals(text: &str) -> (u64, u64) {
    let mut totals = (0u64, 0u64);
    let mut last_disk = String::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (Some(name), Some(read), Some(written)) = (fields.get(2), fields.get(5), fields.get(9)) else { continue };
        let stacked = ["loop", "ram", "dm-", "md", "zram"].iter().any(|p| name.starts_with(p));
        let partition = !last_disk.is_empty() && name.starts_with(last_disk.as_str()) && *name != last_disk;
        if stacked || partition {
            continue;
        }
        last_disk = (*name).to_string();
        totals.0 = totals.0.saturating_add(read.parse::<u64>().unwrap_or(0).saturating_mul(512));
        totals.1 = totals.1.saturating_add(written.parse::<u64>().unwrap_or(0).saturating_mul(512));
    }
    totals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_partitions_are_not_counted_twice() {
        let net = "Inter-|   Receive\n face |bytes\n    lo: 5 0 0 0 0 0 0 0 5 0\n  eth0:100 1 0 0 0 0 0 0 200 2\n br0: 1 0 0 0 0 0 0 0 2 0\n";
        assert_eq!(network_totals(net), (101, 202));
        let disk = "   8 0 sda 1 0 10 0 1 0 20 0 0 0 0\n   8 1 sda1 1 0 9 0 1 0 19 0 0 0 0\n   7 0 loop0 1 0 99 0 1 0 99 0 0\n 259 0 nvme0n1 1 0 1 0 1 0 2 0\n 259 1 nvme0n1p1 1 0 1 0 1 0 2 0\n";
        assert_eq!(disk_totals(disk), (11 * 512, 22 * 512));
    }

    #[test]
    fn this_host_has_figures() {
        let mut sampler = Sampler::new();
        let metrics = sampler.host_metrics("h", 1, 3);
        assert!(metrics.memory_total_bytes > 0 && sampler.facts().processors > 0);
        assert!((0.0..=100.0).contains(&metrics.processor_percent));
    }
}
