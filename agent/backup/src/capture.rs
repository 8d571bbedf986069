use std::{collections::HashSet, sync::Arc};

use muster_block::BlockDevice;
use muster_common::{ByteLen, HostId, VmId, VolumeId};
use muster_repository::{IngestOptions, RepositoryError};

use crate::{BackedVm, BackedVolume, BackupError, BackupId, BackupRecord, Backups, DeviceSource, OnProgress, Progress};

/// One volume to capture.
#[derive(Clone)]
pub struct VolumeToBackUp {
    pub id: VolumeId,
    /// The VM it belongs to; must be in the plan's `vms`.
    pub vm: Option<VmId>,
    pub generation: u64,
    /// What it is to its VM: `system`, `personal`.
    pub role: String,
    /// A snapshot: it must not change during the capture. Snapshots of one plan should be of one moment.
    pub snapshot: Arc<dyn BlockDevice>,
}

/// What to capture as one backup.
#[derive(Clone)]
pub struct Plan {
    pub host: HostId,
    /// Any words; may be empty.
    pub label: String,
    pub vms: Vec<BackedVm>,
    pub volumes: Vec<VolumeToBackUp>,
}

/// What a capture did.
#[derive(Clone, Debug, PartialEq)]
pub struct Captured {
    pub record: BackupRecord,
    /// The sizes of the volumes.
    pub logical: ByteLen,
    /// Their bytes that are not zero.
    pub data: ByteLen,
    /// Bytes that were not in the repository before.
    pub new_bytes: ByteLen,
}

impl Plan {
    /// Refuses what could not be restored unambiguously. Called by [`Backups::capture`] first.
    pub fn check(&self) -> Result<(), BackupError> {
        if self.volumes.is_empty() {
            return Err(BackupError::NoVolumes);
        }
        let vms: HashSet<VmId> = self.vms.iter().map(|vm| vm.id).collect();
        let mut seen = HashSet::new();
        for volume in &self.volumes {
            if !seen.insert(volume.id) || volume.vm.is_some_and(|vm| !vms.contains(&vm)) {
                return Err(BackupError::InvalidPlan { volume: volume.id });
            }
        }
        Ok(())
    }

    /// The sizes of the volumes together.
    pub fn logical(&self) -> ByteLen {
        ByteLen(self.volumes.iter().map(|v| v.snapshot.geometry().size.0).sum())
    }
}

impl Backups {
    /// Captures all volumes of the plan and publishes the backup as the last step. `now_us` is microseconds since 1970 UTC.
    /// When it fails, no backup is there, and what was written is removed by the next [`Backups::prune`].
    pub fn capture(&self, plan: &Plan, now_us: u64, progress: OnProgress<'_>) -> Result<Captured, BackupError> {
        plan.check()?;
        let total = plan.logical();
        let (mut done, mut new_bytes) = (0, 0);
        let mut session = self.repository.session();
        let mut volumes = Vec::new();
        for volume in &plan.volumes {
            let source = DeviceSource::new(&*volume.snapshot);
            let ingested = session
                .ingest(&source, &IngestOptions::default(), &mut |p| {
                    progress(Progress {
                        volume: volume.id,
                        done: ByteLen(done + p.done.0),
                        total,
                        new_bytes: ByteLen(new_bytes + p.new_bytes.0),
                    })
                })
                .map_err(|source| match source {
                    RepositoryError::Cancelled => BackupError::Cancelled,
                    source => BackupError::Capture { volume: volume.id, source },
                })?;
            done += ingested.logical.0;
            new_bytes += ingested.new_bytes.0;
            volumes.push(BackedVolume {
                id: volume.id,
                vm: volume.vm,
                generation: volume.generation,
                role: volume.role.clone(),
                size: ingested.logical,
                manifest: ingested.digest,
                data: ingested.data,
                new_bytes: ingested.new_bytes,
            });
        }
        let record = BackupRecord {
            id: BackupId::now(),
            created_at_us: now_us,
            host: plan.host,
            label: plan.label.clone(),
            vms: plan.vms.clone(),
            volumes,
        };
        let payload = record.encode().map_err(|source| RepositoryError::InvalidPayload { source: Box::new(source) })?;
        session.publish(&record.id.reference(), &payload)?;
        tracing::info!(backup = %record.id, volumes = record.volumes.len(), new_bytes, "backup published");
        Ok(Captured { logical: record.logical(), data: record.data(), new_bytes: record.new_bytes(), record })
    }
}
