//! What "no file is read to serve a guest" means here, and the evidence for it.
//!
//! **`guest_file_reads`** counts reads of a file or a block device that this host does to serve a guest:
//! 1. a disk request of a guest answered from anything but memory. Every export's device is a volume of the store, and the
//!    store has no file at all: there is no code that could count here, and a test of the export path would have to invent
//!    one. This part is 0 by construction.
//! 2. a kernel or initrd handed to QEMU from a file that is not on a tmpfs (see `boot`): counted at each power-on.
//!
//! Not counted, because they serve no guest: the agent's own program and state, a restore's reading of a backup, QEMU's
//! program, libraries and firmware.
//!
//! **Evidence** that does not depend on our counting: `read_bytes` of `/proc/PID/io` (bytes this process really caused to
//! be fetched from storage) of the agent and of each QEMU that is connected to an export. After the page cache was dropped a
//! first QEMU reads its own program; that a guest's boot reads no more than that is what the demo shows.

use std::collections::BTreeMap;

use muster_export::Peer;
use serde::Serialize;

use crate::host::Host;

/// Storage reads of a process, as the kernel counts them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StorageReads {
    pub pid: u32,
    pub read_bytes: u64,
}

/// The evidence as JSON, on the stream endpoint's ping and in `muster-agent status`.
#[derive(Clone, Debug, Serialize)]
pub struct Evidence {
    pub guest_file_reads: u64,
    pub agent: StorageReads,
    /// By export name: the hypervisor process connected to it.
    pub hypervisor: BTreeMap<String, Vec<StorageReads>>,
}

fn read_bytes(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("read_bytes: ")?.trim().parse().ok())
}

fn of(pid: u32) -> Option<StorageReads> {
    read_bytes(pid).map(|read_bytes| StorageReads { pid, read_bytes })
}

/// Reads procfs now.
pub fn evidence(host: &Host) -> Evidence {
    let own = std::process::id();
    let hypervisor = host
        .volumes
        .exports
        .exports()
        .iter()
        .map(|export| {
            let pids = export.peers().into_iter().filter_map(|peer| match peer {
                Peer::Local { pid, .. } => u32::try_from(pid).ok().filter(|pid| *pid != own),
                Peer::Remote(_) | Peer::Certified { .. } | Peer::Unknown => None,
            });
            (export.name().to_string(), pids.filter_map(of).collect::<Vec<_>>())
        })
        .filter(|(_, reads)| !reads.is_empty())
        .collect();
    Evidence {
        guest_file_reads: host.guest_file_reads.load(std::sync::atomic::Ordering::Relaxed),
        agent: of(own).unwrap_or_default(),
        hypervisor,
    }
}
