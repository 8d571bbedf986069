//! Whether the agent may stop: its memory is its VMs' disks.
//!
//! | how | volumes attached | what happens |
//! |---|---|---|
//! | orderly (SIGTERM, first SIGINT, `muster-agent stop`) | no | it stops; volumes of VMs that are off are lost too, and it says so |
//! | orderly | yes | refused, with the VMs' names; it runs on |
//! | force (`force_stop`, second SIGINT within 5 s, `muster-agent stop --force`) | yes | running VMs are paused first, then it stops |
//!
//! The disks of a paused VM do not come back by themselves: after the next start its volumes are `lost`, and it is restored
//! from a backup or its session is reset.

use std::fmt;

use muster_virt::{DomainState, Lane};

use crate::host::Host;

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Orderly,
    Force,
}

/// Why an orderly stop was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopRefused {
    /// Names of VMs whose volumes are in use.
    pub vms: Vec<String>,
    /// Exports with connections.
    pub exports: usize,
}

impl fmt::Display for StopRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "volumes are attached ({} exports in use, VMs up: {}): shut the VMs down first, or stop with --force, which \
             pauses them and loses their volumes",
            self.exports,
            if self.vms.is_empty() { "none".to_string() } else { self.vms.join(", ") }
        )
    }
}

impl std::error::Error for StopRefused {}

/// Checks and prepares a stop. Returns what the operator should know.
pub async fn prepare_stop(host: &Host, how: Stop) -> Result<String, StopRefused> {
    let entries = host.inventory.all();
    // a VM whose volumes are lost already has nothing left to lose
    let up: Vec<_> = entries
        .iter()
        .filter(|e| e.state.is_active() && !crate::inventory::is_lost(&e.record, &host.volumes.store))
        .collect();
    let exports = host.volumes.attached().len();
    let force = how == Stop::Force || host.config.force_stop;
    if !force && (!up.is_empty() || exports > 0) {
        let refused = StopRefused { vms: up.iter().map(|e| e.record.name.clone()).collect(), exports };
        tracing::warn!(reason = %refused, "stop refused, running on");
        return Err(refused);
    }
    for entry in up.iter().filter(|e| e.state == DomainState::Running) {
        let vm = entry.record.vm;
        match host.machines.call(Lane::Urgent, "pause", move |h| h.pause(vm)).await {
            Ok(()) => tracing::info!(vm = %vm, name = entry.record.name, "paused, the agent stops by force"),
            // its disk errors will pause it
            Err(e) => host.complain("a VM was not paused before a forced stop", &e),
        }
    }
    let lost = host.volumes.store.stats().volumes;
    let remark = if lost == 0 { String::new() } else { format!("{lost} volumes in memory are lost with this stop") };
    if lost > 0 {
        tracing::warn!(volumes = lost, "volumes in memory are lost with this stop");
    }
    Ok(remark)
}
