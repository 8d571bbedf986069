//! Snapshots and backups: all volumes of a VM at one cut.

use std::{ops::ControlFlow, time::Duration};

use std::sync::Arc;

use muster_backup::{BackedVm, Captured, Plan, VolumeToBackUp};
use muster_block::BlockDevice;
use muster_common::{Chain, ErrorCode, VmId};
use muster_idl::{
    arguments::{BackupResult, BackupVolumeResult, SnapshotResult, SnapshotVolumeResult},
    v1::Severity,
};
use muster_store::Snapshot;
use muster_virt::{DomainState, HypervisorErrorKind, Lane};
use tokio::sync::oneshot;

use super::{Done, Failure, Work, guest::json};
use crate::{
    aftercare::{Care, Held, Pauses},
    arguments,
    inventory::{Entry, SnapshotSet},
    records::{DiskRecord, VmRecord},
    voice::About,
};

/// After so many thaws in vain it is said that the guest is frozen. It is tried on: a guest left frozen is worse than a
/// backup that failed.
const THAWS: u32 = 3;
/// What one freeze or thaw may take.
const CALL: Duration = Duration::from_secs(10);
const CRASH_CONSISTENT: &str = "crash-consistent: the guest agent did not freeze the file systems";

/// All volumes of a VM as they were at one moment.
struct Cut {
    disks: Vec<(DiskRecord, Snapshot)>,
    /// The guest's file systems were frozen, or it was not running.
    consistent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thaw {
    /// The guest is frozen, or may be.
    UntilDone,
    /// It is not, as far as is known.
    Once,
}

impl Work {
    async fn cut(&self, entry: &Entry) -> Result<Cut, Failure> {
        let vm = entry.record.vm;
        let running = self.host.machines.status(vm).await?.is_some_and(|s| s.state == DomainState::Running);
        // the thaw of an earlier order, not ended yet, would end this one's freeze
        let held = if running { self.host.aftercare.hold(vm, Care::Freeze) } else { None };
        if let Some(held) = held
            && self.guest_answers(vm).await
        {
            let (answer, cut) = oneshot::channel();
            let (work, record) = (self.clone(), entry.record.clone());
            self.host.aftercare.spawn(async move { work.cut_frozen(record, held, answer).await });
            return cut.await.unwrap_or_else(|_| Err(Failure::panicked()));
        }
        Ok(Cut { disks: self.snapshots(entry.record.clone()).await?, consistent: !running })
    }

    /// Outlives the order: no guest stays frozen because nobody waits for the snapshot any more.
    async fn cut_frozen(&self, record: VmRecord, held: Held, answer: oneshot::Sender<Result<Cut, Failure>>) {
        use HypervisorErrorKind::{Busy, GuestFailed, InvalidState, NotFound, Unsupported};
        let vm = record.vm;
        let time = self.call_time().min(CALL);
        let frozen = self.host.machines.call_within(Lane::Vm(vm), "freeze", time, move |h| h.fs_freeze(vm)).await;
        let disks = self.snapshots(record).await;
        let thaw = match &frozen {
            Ok(_) => Thaw::UntilDone,
            Err(e) => {
                tracing::warn!(vm = %vm, err = %Chain(e), "freezing a guest's file systems failed");
                match e.kind() {
                    // it was not asked, or said no itself: a guest agent that fails thaws what it had frozen
                    Busy | GuestFailed | InvalidState | NotFound | Unsupported => Thaw::Once,
                    _ => Thaw::UntilDone,
                }
            }
        };
        let cut = disks.map(|disks| Cut { disks, consistent: frozen.is_ok() });
        self.thaw(vm, thaw, held, answer, cut).await;
    }

    async fn snapshots(&self, record: VmRecord) -> Result<Vec<(DiskRecord, Snapshot)>, Failure> {
        self.blocking(move |host| {
            let lost = |d: &DiskRecord| Failure::failed(ErrorCode::VolumeLost, format!("volume {} is lost", d.volume));
            record
                .own_disks()
                .map(|d| {
                    let volume = host.volumes.find(d).ok_or_else(|| lost(d))?;
                    Ok((d.clone(), volume.snapshot()?))
                })
                .collect()
        })
        .await
    }

    /// Tries until the guest is thawed or gone. The order goes on when it is, or when it was said that it is not.
    async fn thaw(
        &self,
        vm: VmId,
        thaw: Thaw,
        held: Held,
        answer: oneshot::Sender<Result<Cut, Failure>>,
        cut: Result<Cut, Failure>,
    ) {
        let mut waiting = Some((answer, cut));
        let mut pauses = Pauses::new();
        for attempt in 1_u32.. {
            match self.host.machines.call_within(Lane::Vm(vm), "thaw", CALL, move |h| h.fs_thaw(vm)).await {
                Ok(_) => break,
                Err(e) => tracing::warn!(vm = %vm, attempt, err = %Chain(&e), "thawing failed"),
            }
            if thaw == Thaw::Once || self.is_gone(vm).await {
                break;
            }
            if let Some((answer, cut)) = waiting.take_if(|(answer, _)| attempt >= THAWS || answer.is_closed()) {
                let text =
                    "the guest's file systems could not be thawed after a snapshot: it is tried again; or reset it";
                self.say_of(vm, Severity::Error, "guest-frozen", text);
                // an order given up has its verdict
                let _ = answer.send(cut);
            }
            pauses.wait().await;
        }
        // before the order ends: the next one may freeze
        drop(held);
        match waiting {
            Some((answer, cut)) => {
                let _ = answer.send(cut);
            }
            None => self.say_of(vm, Severity::Info, "guest-thawed", "the guest's file systems are frozen no more"),
        }
    }

    /// It does not run any more, and nothing in it is frozen.
    async fn is_gone(&self, vm: VmId) -> bool {
        match self.host.machines.status(vm).await {
            Ok(Some(status)) => !status.state.is_active(),
            Ok(None) => true,
            Err(_) => false,
        }
    }

    fn say_of(&self, vm: VmId, severity: Severity, kind: &str, text: &str) {
        let about = About { vm: vm.to_string(), command: self.order.command.to_string(), ..About::default() };
        self.host.voice.event(severity, kind, text, about);
    }

    pub(super) async fn snapshot(&self) -> Result<Done, Failure> {
        let name = arguments::snapshot_name(&self.order)?;
        let keep = arguments::keep(&self.order)?;
        let entry = self.entry()?;
        if entry.snapshots.contains_key(&name) {
            let text = format!("the VM has a snapshot {name:?} already");
            return Err(Failure::refused(ErrorCode::AlreadyExists, text));
        }
        let cut = self.cut(&entry).await?;
        let taken_us = self.host.now_us();
        let result = SnapshotResult {
            name: name.clone(),
            taken_at_us: taken_us,
            consistent: cut.consistent,
            volumes: cut
                .disks
                .iter()
                .map(|(d, _)| SnapshotVolumeResult {
                    volume: d.volume.to_string(),
                    role: d.role.as_str().into(),
                    size_bytes: d.size.bytes(),
                    image: d.image.map(|i| i.to_string()).unwrap_or_default(),
                })
                .collect(),
        };
        let volumes: Vec<_> = cut.disks.into_iter().map(|(d, s)| (d.volume, s)).collect();
        if keep.is_none() {
            // so that the next run finds it with the volumes
            for (volume, snapshot) in &volumes {
                self.host.volumes.store.keep_snapshot(snapshot, *volume, &name)?;
            }
        }
        let set = SnapshotSet::new(taken_us, volumes, keep);
        self.host.inventory.update(entry.record.vm, |e| {
            e.snapshots.insert(name, set);
        });
        let message = if cut.consistent { "" } else { CRASH_CONSISTENT };
        Ok(Done { message: message.into(), result: json(&result)? })
    }

    pub(super) async fn backup(&self) -> Result<Done, Failure> {
        let (result, consistent) = self.back_up(&self.entry()?).await?;
        let message = if consistent { String::new() } else { CRASH_CONSISTENT.into() };
        Ok(Done { message, result: json(&result)? })
    }

    /// All VMs of the host whose volumes are there, one backup each.
    pub(super) async fn backup_host(&self) -> Result<Done, Failure> {
        let (mut results, mut failed, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
        for entry in self.host.inventory.all() {
            if crate::inventory::is_lost(&entry.record, &self.host.volumes.store) {
                skipped.push(entry.record.name);
                continue;
            }
            if self.left().is_zero() {
                failed.push(format!("{}: the deadline passed", entry.record.name));
                continue;
            }
            match self.back_up(&entry).await {
                Ok((result, _)) => results.push(result),
                Err(f) => failed.push(format!("{}: {}", entry.record.name, f.message)),
            }
        }
        if !failed.is_empty() {
            let text = format!("{} backed up, not: {}", results.len(), failed.join("; "));
            return Err(Failure::failed(ErrorCode::Io, text));
        }
        let message =
            if skipped.is_empty() { String::new() } else { format!("left out, volumes lost: {}", skipped.join(", ")) };
        Ok(Done { message, result: json(&results)? })
    }

    async fn back_up(&self, entry: &Entry) -> Result<(BackupResult, bool), Failure> {
        let backups = match &self.host.backups {
            Ok(backups) => backups.clone(),
            Err(why) => return Err(Failure::refused(ErrorCode::Unavailable, format!("no backup directory: {why}"))),
        };
        let cut = self.cut(entry).await?;
        let record = entry.record.clone();
        let spec = serde_json::to_value(&record)
            .map_err(|e| Failure::failed(ErrorCode::Internal, format!("write the VM's record: {e}")))?;
        let plan = Plan {
            host: self.host.id,
            // how a restarted agent finds out that a command's backup is there
            label: self.order.command.to_string(),
            vms: vec![BackedVm { id: record.vm, name: record.name.clone(), spec }],
            volumes: cut
                .disks
                .into_iter()
                .map(|(disk, snapshot)| VolumeToBackUp {
                    id: disk.volume,
                    vm: Some(record.vm),
                    generation: disk.generation,
                    role: disk.role.as_str().into(),
                    snapshot: Arc::new(snapshot) as Arc<dyn BlockDevice>,
                })
                .collect(),
        };
        let order = self.order.clone();
        let deadline_us = self.order.deadline_us;
        let captured = self
            .blocking(move |host| {
                let mut said = 0;
                let mut progress = |p: muster_backup::Progress| {
                    let now = host.now_us();
                    if now.saturating_sub(said) >= 500_000 {
                        said = now;
                        host.voice.progress(&order, "back up", p.done.bytes(), p.total.bytes());
                    }
                    if now > deadline_us { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                };
                match backups.capture(&plan, host.now_us(), &mut progress) {
                    Err(muster_backup::BackupError::Cancelled) => {
                        Err(Failure::timeout("the backup was not complete by the deadline; nothing of it is kept"))
                    }
                    other => Ok(other?),
                }
            })
            .await?;
        Ok((result_of(&captured, record.vm, &record.name), cut.consistent))
    }
}

fn result_of(captured: &Captured, vm: VmId, name: &str) -> BackupResult {
    BackupResult {
        id: captured.record.id.to_string(),
        vm: vm.to_string(),
        vm_name: name.to_string(),
        taken_at_us: captured.record.created_at_us,
        volumes: captured
            .record
            .volumes
            .iter()
            .map(|v| BackupVolumeResult {
                volume: v.id.to_string(),
                role: v.role.clone(),
                size_bytes: v.size.bytes(),
                new_bytes: v.new_bytes.bytes(),
                manifest: v.manifest.to_string(),
            })
            .collect(),
        logical_bytes: captured.logical.bytes(),
        new_bytes: captured.new_bytes.bytes(),
    }
}
