//! Whether the agent may stop: its memory is its VMs' disks (docs/decisions/0013).
//!
//! | how | volumes attached | what happens |
//! |---|---|---|
//! | orderly (SIGTERM, first SIGINT, `muster-agent stop`) | no | it stops; volumes of VMs that are off are lost too, and it says so |
//! | orderly | yes | refused, with the VMs' names; it runs on |
//! | force (`force_stop`, second SIGINT within 5 s, `muster-agent stop --force`) | yes | running VMs are paused first, then it stops |
//!
//! | keep (SIGUSR1, `muster-agent stop --keep`) | either | nothing is paused, nothing given back: the next start finds VMs and volumes as they are. For upgrades |
//!
//! After `keep` (and after a kill) guests on vhost-user disks wait for the next start; those on NBD disks are paused by their
//! first request, and resumed by the next start.
//!
//! After the others the disks of a paused VM do not come back by themselves: its volumes are `lost`, and it is restored from
//! a backup or its session is reset.

use std::fmt;

use muster_virt::{DomainState, Lane};

use crate::host::Host;

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Orderly,
    Force,
    Keep,
}

/// Why an orderly stop was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopRefused {
    /// Names of VMs whose volumes are in use.
    pub vms: Vec<String>,
    /// Exports with connections.
    pub exports: usize,
    /// Why the volumes cannot be left to the next run, when that was asked for.
    pub cannot_keep: Option<&'static str>,
}

impl fmt::Display for StopRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vms = if self.vms.is_empty() { "none".to_string() } else { self.vms.join(", ") };
        write!(f, "volumes are attached ({} exports in use, VMs up: {vms}): ", self.exports)?;
        match self.cannot_keep {
            Some(why) => write!(f, "they cannot be kept, {why}: ")?,
            None => f.write_str("stop with --keep, after which the next start goes on with them, or ")?,
        }
        f.write_str("shut the VMs down first, or stop with --force, which pauses them and loses their volumes")
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
    let cannot_keep = host.store_fate.cannot_keep();
    if how == Stop::Keep && cannot_keep.is_none() {
        return Ok("VMs and volumes are left to the next start".into());
    }
    let force = how == Stop::Force || how != Stop::Keep && host.config.force_stop;
    if !force && (!up.is_empty() || exports > 0) {
        let vms = up.iter().map(|e| e.record.name.clone()).collect();
        let refused = StopRefused { vms, exports, cannot_keep };
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
