//! Backups of volumes: capture a set of them into a repository, list, verify, restore, retire.
//!
//! A backup is one point in time of a set of volumes (those of a VM, of several, or of the whole host) with what is needed
//! to define their VMs again. Volumes are given as [`BlockDevice`]s that do not change (snapshots); their chunks go to a
//! content-addressed repository, so an unchanged chunk is never written again, whichever volume or backup it came from.
//! The record is published last, as one atomic step: a backup exists whole or not at all.
//!
//! Main types: [`Backups`] (the store), [`Plan`] (what to capture), [`BackupRecord`] (what is there),
//! [`retention::Policy`] and [`retention::plan`] (which backups may go; pure).
//!
//! Invariants:
//! 1. A listed backup's manifests and chunks are all in the repository (unless the medium lost them: [`Backups::verify`]).
//! 2. A chunk is verified before a byte of it is written to a restore's target; a restore of which a chunk is known to be
//!    missing does not touch the target.
//! 3. After a restore that returned `Ok`, the target equals the captured volume, holes included, and was flushed.
//! 4. The newest backup of a VM is never removed by retention.
//! 5. A backup that is being restored or verified cannot be deleted.
//!
//! Threads: restore writes from one scoped thread a core, joined before it returns; capture and verify use those of the
//! repository. One lock (`busy`), held for a look-up only.
//!
//! Does not: take snapshots, freeze guests, schedule, decide where a restored volume goes (the agent does); continuous
//! backup, other targets than a directory (later).
#![forbid(unsafe_code)]

mod capture;
mod error;
mod record;
mod restore;
pub mod retention;
mod source;

use std::{
    collections::{HashMap, HashSet},
    ops::ControlFlow,
    path::Path,
    sync::Arc,
};

use muster_common::{ByteLen, VmId, VolumeId};
use muster_repository::{
    PruneReport, Repository, RepositoryError, RepositoryStats, VerifyReport,
    storage::{DirectoryStorage, Storage},
};
use parking_lot::Mutex;

pub use capture::{Captured, Plan, VolumeToBackUp};
pub use error::BackupError;
/// The seam to volumes, named here for those who only back up.
pub use muster_block::BlockDevice;
pub use record::{BackedVm, BackedVolume, BackupId, BackupRecord};
pub use restore::Restored;
pub use source::DeviceSource;

/// How far a capture, restore or verification is, over all of its volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The volume at work.
    pub volume: VolumeId,
    pub done: ByteLen,
    pub total: ByteLen,
    /// Bytes that were not in the repository before (capture only).
    pub new_bytes: ByteLen,
}

/// Called on the caller's thread; `Break` cancels.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// All readable backups, and what could not be read.
#[derive(Debug, Default)]
pub struct Listing {
    /// Oldest first.
    pub records: Vec<BackupRecord>,
    /// Name of the record and why. One damaged record does not hide the others.
    pub unreadable: Vec<(String, BackupError)>,
}

/// The verification of one volume of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeVerified {
    pub volume: VolumeId,
    pub report: VerifyReport,
}

/// The backups in one repository. Clones share it; all methods may be called from any thread and block.
#[derive(Clone)]
pub struct Backups {
    repository: Repository,
    /// Backups being read, with how many readers.
    busy: Arc<Mutex<HashMap<BackupId, usize>>>,
}

impl Backups {
    /// Opens the backups in a directory of this host, making it when it is absent (its parent must be there). One process
    /// at a time.
    pub fn open(directory: &Path) -> Result<Self, BackupError> {
        let storage = DirectoryStorage::open(directory).map_err(RepositoryError::from)?;
        Self::open_storage(Arc::new(storage))
    }

    /// Opens the backups in any storage.
    pub fn open_storage(storage: Arc<dyn Storage>) -> Result<Self, BackupError> {
        Ok(Self { repository: Repository::open(storage)?, busy: Arc::default() })
    }

    /// All backups, oldest first.
    pub fn list(&self) -> Result<Listing, BackupError> {
        let mut listing = Listing::default();
        for name in self.repository.references(record::REFERENCE_PREFIX)? {
            match self.read_record(&name) {
                Ok(record) => listing.records.push(record),
                // deleted since it was listed
                Err(BackupError::Repository(RepositoryError::UnknownReference { .. })) => {}
                Err(e) => listing.unreadable.push((name, e)),
            }
        }
        listing.records.sort_by_key(|r| (r.created_at_us, r.id));
        Ok(listing)
    }

    /// One backup.
    pub fn get(&self, id: BackupId) -> Result<BackupRecord, BackupError> {
        self.read_record(&id.reference()).map_err(|e| match e {
            BackupError::Repository(RepositoryError::UnknownReference { .. }) => BackupError::Unknown { id },
            e => e,
        })
    }

    /// The newest backup that holds this VM.
    pub fn latest_of(&self, vm: VmId) -> Result<Option<BackupRecord>, BackupError> {
        let records = self.list()?.records;
        Ok(records.into_iter().rev().find(|r| r.vms.iter().any(|v| v.id == vm)))
    }

    /// What backups hold of a range of a volume, the newest first, each content once, at most `most` of them. For who looks
    /// for bytes he can tell by himself; what cannot be read or is only zeroes is left out. The range may not cross a
    /// multiple of [`muster_repository::CHUNK_SIZE`].
    pub fn versions_of(
        &self,
        volume: VolumeId,
        offset: u64,
        len: usize,
        most: usize,
    ) -> Result<Vec<Vec<u8>>, BackupError> {
        let mut chunks = HashSet::new();
        let mut versions: Vec<Vec<u8>> = Vec::new();
        for record in self.list()?.records.into_iter().rev() {
            let _reading = self.reading(record.id);
            for backed in record.volumes.iter().filter(|backed| backed.id == volume) {
                let Ok(manifest) = self.repository.manifest(&backed.manifest) else { continue };
                let Some(chunk) = manifest.chunk_at(offset).filter(|chunk| chunks.insert(chunk.digest)) else {
                    continue;
                };
                let Ok(bytes) = self.repository.read_chunk(&chunk.digest) else { continue };
                let at = (offset - chunk.offset) as usize;
                if let Some(version) = bytes.get(at..bytes.len().min(at + len))
                    && !versions.iter().any(|known| known == version)
                {
                    versions.push(version.to_vec());
                }
            }
            if versions.len() >= most {
                versions.truncate(most);
                break;
            }
        }
        Ok(versions)
    }

    fn read_record(&self, name: &str) -> Result<BackupRecord, BackupError> {
        let reference = self.repository.reference(name)?;
        BackupRecord::parse(&reference.payload).map_err(|source| BackupError::Record { name: name.to_string(), source })
    }

    /// Reads everything a backup holds. Bad chunks are in the reports.
    pub fn verify(&self, id: BackupId, progress: OnProgress<'_>) -> Result<Vec<VolumeVerified>, BackupError> {
        let _reading = self.reading(id);
        let record = self.get(id)?;
        let mut verified = Vec::new();
        let mut before = ByteLen::ZERO;
        for volume in &record.volumes {
            let report = self.repository.verify(&volume.manifest, &mut |p| {
                progress(Progress {
                    volume: volume.id,
                    done: ByteLen(before.0 + p.done.0),
                    total: ByteLen(record.data().0.max(before.0 + p.total.0)),
                    new_bytes: ByteLen::ZERO,
                })
            })?;
            before.0 += report.bytes.0;
            verified.push(VolumeVerified { volume: volume.id, report });
        }
        Ok(verified)
    }

    /// Removes a backup. Its space comes back with the next [`Backups::prune`].
    pub fn delete(&self, id: BackupId) -> Result<(), BackupError> {
        // the lock is held over the removal, so that no reader begins in between
        let busy = self.busy.lock();
        if busy.contains_key(&id) {
            return Err(BackupError::InUse { id });
        }
        self.repository.forget_reference(&id.reference()).map_err(|e| match e {
            RepositoryError::UnknownReference { .. } => BackupError::Unknown { id },
            e => e.into(),
        })
    }

    /// Gives back the space of deleted and of unfinished backups. May run beside captures and restores.
    pub fn prune(&self) -> Result<PruneReport, BackupError> {
        Ok(self.repository.prune()?)
    }

    /// Space used.
    pub fn stats(&self) -> RepositoryStats {
        self.repository.stats()
    }

    /// The repository below.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    fn reading(&self, id: BackupId) -> Reading<'_> {
        *self.busy.lock().entry(id).or_default() += 1;
        Reading { backups: self, id }
    }
}

/// Keeps a backup from being deleted.
struct Reading<'a> {
    backups: &'a Backups,
    id: BackupId,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let mut busy = self.backups.busy.lock();
        if let Some(readers) = busy.get_mut(&self.id) {
            *readers -= 1;
            if *readers == 0 {
                busy.remove(&self.id);
            }
        }
    }
}
