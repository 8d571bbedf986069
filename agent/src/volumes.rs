//! Volumes of VMs: made in the store, offered as exports, taken away again. Synchronous; called off the runtime's threads.
//!
//! Order, so that no generation is ever used for two contents and no export shows another volume's bytes:
//! record the generation durably -> make the volume -> offer the export; the other way round to take away. Offering a disk
//! over vhost-user makes its socket, which has to be there before QEMU is started.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use muster_block::BlockDevice;
use muster_cim::{DiskLimits, LimitError};
use muster_common::{ByteLen, Chain, Digest, ErrorCode, TenantId, VmId, VolumeId};
use muster_export::{
    Export, Limits, Registry, RegistryError,
    vhost::{VhostError, VhostServer},
};
use muster_store::{Snapshot, Store, StoreError, Volume, VolumeSpec, WhenFull};

use crate::records::{DiskRecord, RecordError, Transport, VmRecord};

/// How long a session may take to end before its socket is cut; and again after that.
const GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("make volume {volume}")]
    Make {
        volume: VolumeId,
        #[source]
        source: StoreError,
    },
    #[error("{action} volume {volume}")]
    Change {
        action: &'static str,
        volume: VolumeId,
        #[source]
        source: StoreError,
    },
    #[error("{action} export {name}")]
    Export {
        action: &'static str,
        name: String,
        #[source]
        source: RegistryError,
    },
    #[error("{action} disk socket of {name}")]
    Socket {
        action: &'static str,
        name: String,
        #[source]
        source: VhostError,
    },
    #[error("read the limits of volume {volume}")]
    Limits {
        volume: VolumeId,
        #[source]
        source: LimitError,
    },
    #[error("volume {volume} of VM {vm} is lost")]
    Lost { vm: VmId, volume: VolumeId },
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl VolumeError {
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Make { source, .. } | Self::Change { source, .. } => source.code(),
            Self::Export { source: RegistryError::Busy { .. }, .. } => ErrorCode::InUse,
            Self::Socket { source: VhostError::Busy(_), .. } => ErrorCode::InUse,
            Self::Export { .. } | Self::Socket { .. } => ErrorCode::Internal,
            Self::Limits { .. } => ErrorCode::InvalidArgument,
            Self::Lost { .. } => ErrorCode::VolumeLost,
            Self::Record(e) => e.code(),
        }
    }
}

/// Store and exports together.
#[derive(Clone)]
pub struct Volumes {
    pub store: Store,
    /// Every disk that is offered, however it is served.
    pub exports: Arc<Registry>,
    /// The sockets of those that are served over vhost-user.
    pub sockets: Arc<VhostServer>,
    /// What one disk may do a second.
    pub limits: Limits,
}

impl Volumes {
    /// What a disk's volume is made with.
    pub fn spec(disk: &DiskRecord) -> Result<VolumeSpec, VolumeError> {
        let limits = DiskLimits::read(disk.limits.as_ref())
            .map_err(|source| VolumeError::Limits { volume: disk.volume, source })?;
        Ok(VolumeSpec {
            generation: disk.generation,
            base: disk.image,
            read_only: disk.is_read_only(),
            tenant: disk.tenant.as_deref().map(tenant),
            quota: limits.quota,
            reservation: limits.reservation,
            when_full: match limits.when_full {
                muster_cim::WhenFull::Pause => WhenFull::Refuse,
                muster_cim::WhenFull::Spill => WhenFull::Spill,
            },
            ..VolumeSpec::blank(disk.volume, disk.size)
        })
    }

    /// Makes what a disk says: a clone of its image or blank. Not offered yet.
    pub fn make(&self, disk: &DiskRecord) -> Result<Arc<Volume>, VolumeError> {
        let spec = Self::spec(disk)?;
        self.store.create_volume(spec).map_err(|source| VolumeError::Make { volume: disk.volume, source })
    }

    /// The volume a disk names, if it is there in that generation.
    pub fn find(&self, disk: &DiskRecord) -> Option<Arc<Volume>> {
        self.store.volume(disk.volume).filter(|v| v.generation() == disk.generation)
    }

    /// Offers a disk's volume; offered already is fine.
    pub fn offer(&self, vm: VmId, disk: &DiskRecord) -> Result<(), VolumeError> {
        let volume = self.find(disk).ok_or(VolumeError::Lost { vm, volume: disk.volume })?;
        let name = disk.export_name();
        match self.exports.add(name.clone(), volume as Arc<dyn BlockDevice>) {
            Ok(export) => export.set_limits(self.limits),
            Err(RegistryError::Exists(_)) => {}
            Err(source) => return Err(VolumeError::Export { action: "offer", name, source }),
        }
        if disk.transport == Transport::Nbd {
            return Ok(());
        }
        match self.sockets.serve(&name) {
            Ok(_) | Err(VhostError::Exists(_)) => Ok(()),
            Err(source) => Err(VolumeError::Socket { action: "make", name, source }),
        }
    }

    /// Offers what is there of a VM's disks: nothing of one that has lost a volume, which must not go on.
    pub fn offer_again(&self, record: &VmRecord) -> Result<bool, VolumeError> {
        if record.disks.iter().any(|disk| self.find(disk).is_none()) {
            return Ok(false);
        }
        record.disks.iter().try_for_each(|disk| self.offer(record.vm, disk)).map(|()| true)
    }

    /// Where a disk's vhost-user socket is, or will be.
    pub fn socket(&self, disk: &DiskRecord) -> Result<PathBuf, VolumeError> {
        let name = disk.export_name();
        self.sockets.socket_path(&name).map_err(|source| VolumeError::Socket { action: "name", name, source })
    }

    pub fn export(&self, disk: &DiskRecord) -> Option<Arc<Export>> {
        self.exports.get(&disk.export_name())
    }

    /// A write of the guest is held because there is no memory for it.
    pub fn waits_for_space(&self, disk: &DiskRecord) -> bool {
        self.export(disk).is_some_and(|export| export.waiting_for_space())
    }

    /// Makes the volume larger and tells whoever is connected; see [`Volumes::announce`].
    pub fn grow(&self, volume: &Volume, disk: &DiskRecord, size: ByteLen) -> Result<bool, VolumeError> {
        if size > volume.size() {
            volume.grow(size).map_err(|source| VolumeError::Change { action: "grow", volume: disk.volume, source })?;
        }
        Ok(self.announce(disk))
    }

    /// Has the guest look at the disk's size. False when it cannot be told: nobody is connected, or over NBD, where a client
    /// learns the size when it connects.
    pub fn announce(&self, disk: &DiskRecord) -> bool {
        match disk.transport {
            Transport::Nbd => false,
            Transport::VhostUser { .. } => self.sockets.notify_resize(&disk.export_name()).unwrap_or(false),
        }
    }

    /// Whether a disk's next writes will be taken, as far as can be foreseen. `stuck`: a write of it waits now; then room in
    /// the spill file does not count, for nothing could be spilled.
    pub fn has_room(&self, disk: &DiskRecord, room: ByteLen, stuck: bool) -> bool {
        let Some(volume) = self.find(disk) else { return false };
        let can_spill = || {
            !stuck
                && volume.when_full() == WhenFull::Spill
                && !volume.quota_is_used_up()
                && self.store.spill_room().is_some_and(|left| left >= room)
        };
        volume.would_fit(room) || can_spill()
    }

    /// The disk stands still because its coldest blocks find no place on the disk either.
    pub fn spill_is_used_up(&self, disk: &DiskRecord, room: ByteLen) -> bool {
        let spills = self.find(disk).is_some_and(|volume| volume.when_full() == WhenFull::Spill);
        spills && self.store.spill_room().is_some_and(|left| left < room)
    }

    /// The disk stands still because of its own quota, whatever memory there is.
    pub fn quota_is_used_up(&self, disk: &DiskRecord) -> bool {
        self.find(disk).is_some_and(|volume| volume.quota_is_used_up())
    }

    /// Takes the export away and waits until nobody uses the volume.
    pub fn withdraw(&self, disk: &DiskRecord) -> Result<(), VolumeError> {
        let name = disk.export_name();
        match self.sockets.withdraw(&name, GRACE) {
            Ok(()) | Err(VhostError::Unknown(_)) => {}
            Err(source) => return Err(VolumeError::Socket { action: "take away", name, source }),
        }
        match self.exports.remove(&name, GRACE) {
            Ok(()) | Err(RegistryError::Unknown(_)) => Ok(()),
            Err(source) => Err(VolumeError::Export { action: "withdraw", name, source }),
        }
    }

    /// Takes every vhost-user socket away; whoever is connected waits for the next run.
    pub fn close_sockets(&self) {
        for name in self.sockets.served().into_keys() {
            match self.sockets.withdraw(&name, GRACE) {
                Ok(()) | Err(VhostError::Unknown(_)) => {}
                Err(e) => tracing::warn!(export = name, err = %Chain(&e), "a disk socket was not closed in time"),
            }
        }
    }

    /// Takes the kept snapshots of a volume off the store's books.
    pub fn forget_snapshots(&self, volume: VolumeId) {
        for kept in self.store.snapshots().into_iter().filter(|kept| kept.volume == volume) {
            // somebody else forgot it meanwhile
            let _ = self.store.drop_snapshot(kept.id);
        }
    }

    /// The snapshots of these disks that an earlier run kept, by name: when they were taken, and of which volumes.
    pub fn kept_snapshots(&self, disks: &[DiskRecord]) -> BTreeMap<String, (u64, Vec<(VolumeId, Snapshot)>)> {
        let mut sets: BTreeMap<String, (u64, Vec<(VolumeId, Snapshot)>)> = BTreeMap::new();
        for kept in self.store.snapshots().into_iter().filter(|kept| disks.iter().any(|d| d.volume == kept.volume)) {
            if let Some(snapshot) = self.store.snapshot(kept.id) {
                let set = sets.entry(kept.label).or_insert((kept.kept_us, Vec::new()));
                set.1.push((kept.volume, snapshot));
            }
        }
        sets
    }

    /// Withdraws and deletes; an absent volume is fine.
    pub fn destroy(&self, disk: &DiskRecord) -> Result<(), VolumeError> {
        self.forget_snapshots(disk.volume);
        self.withdraw(disk)?;
        match self.store.delete_volume(disk.volume) {
            Ok(()) | Err(StoreError::VolumeNotFound(_)) => Ok(()),
            Err(source) => Err(VolumeError::Change { action: "delete", volume: disk.volume, source }),
        }
    }

    /// The system disk as its image is, in the generation the (already saved) record names: in place when it descends
    /// from the image, else made anew.
    pub fn renew(&self, disk: &DiskRecord, image: Digest) -> Result<(), VolumeError> {
        let change = |source| VolumeError::Change { action: "reset", volume: disk.volume, source };
        match self.store.volume(disk.volume) {
            Some(volume) if volume.base() == Some(image) && volume.generation() + 1 == disk.generation => {
                volume.reset().map_err(change)?;
            }
            Some(_) => {
                self.store.delete_volume(disk.volume).map_err(change)?;
                self.make(disk)?;
            }
            None => {
                self.make(disk)?;
            }
        }
        Ok(())
    }

    /// Exports somebody is connected to.
    pub fn attached(&self) -> Vec<String> {
        self.exports.exports().iter().filter(|e| e.sessions() > 0).map(|e| e.name().to_string()).collect()
    }
}

/// The dedup domain of everybody who says this name.
fn tenant(name: &str) -> TenantId {
    let mut id = [0; 16];
    id.copy_from_slice(&blake3::derive_key("muster 2026 tenant of a volume", name.as_bytes())[..16]);
    TenantId::from_bytes(id)
}

#[cfg(test)]
mod tests {
    use muster_block::WriteFlags;
    use muster_export::vhost::VhostConfig;
    use muster_store::StoreConfig;

    use super::*;
    use crate::records::DiskRole;

    fn volumes() -> (Volumes, tempfile::TempDir) {
        let dir = tempfile::Builder::new().prefix("mv").tempdir_in("/tmp").unwrap();
        let exports: Arc<Registry> = Arc::default();
        let sockets = VhostServer::start(VhostConfig::new(dir.path()), exports.clone()).unwrap();
        let store = Store::open(StoreConfig::new(ByteLen::mib(64))).unwrap();
        (Volumes { store, exports, sockets: Arc::new(sockets), limits: Limits::default() }, dir)
    }

    #[test]
    fn a_disk_over_vhost_user_has_a_socket_for_as_long_as_it_is_offered() {
        let (v, dir) = volumes();
        let record = crate::records::tests::record("a");
        let mut disk = record.disks[0].clone();
        disk.transport = Transport::VhostUser { queues: 2 };
        v.make(&disk).unwrap();
        let socket = v.socket(&disk).unwrap();
        assert!(socket.starts_with(dir.path()) && !socket.exists());
        v.offer(record.vm, &disk).unwrap();
        v.offer(record.vm, &disk).unwrap();
        assert!(socket.exists());
        let again = DiskRecord { generation: 2, ..disk.clone() };
        assert_ne!(v.socket(&again).unwrap(), socket, "another generation is another disk");
        v.withdraw(&disk).unwrap();
        assert!(!socket.exists() && v.export(&disk).is_none());
    }

    #[test]
    fn nothing_of_a_vm_that_lost_a_volume_is_offered_again() {
        let (v, _dir) = volumes();
        let record = crate::records::tests::record("a");
        v.make(&record.disks[0]).unwrap();
        assert!(!v.offer_again(&record).unwrap());
        assert!(v.exports.exports().is_empty());
        v.make(&record.disks[1]).unwrap();
        assert!(v.offer_again(&record).unwrap());
        assert_eq!(v.exports.exports().len(), 2);
    }

    #[test]
    fn a_renewed_disk_is_the_image_again_under_a_new_export_name() {
        let (v, _dir) = volumes();
        let digest = Digest::from_bytes([7; 32]);
        let image = v.store.image_builder(digest, "i", ByteLen::mib(1)).unwrap();
        image.write_chunk(0, &[5; 4096]).unwrap();
        image.finish().unwrap();
        let mut disk = DiskRecord {
            role: DiskRole::System,
            target: "vda".into(),
            volume: VolumeId::random(),
            generation: 1,
            size: ByteLen::mib(1),
            image: Some(digest),
            transport: Transport::Nbd,
            limits: None,
            tenant: None,
        };
        let vm = VmId::random();
        v.make(&disk).unwrap();
        v.offer(vm, &disk).unwrap();
        v.offer(vm, &disk).unwrap();
        v.find(&disk).unwrap().write_at(0, &[9; 4096], WriteFlags::default()).unwrap();
        let old = disk.export_name();
        v.withdraw(&disk).unwrap();
        disk.generation += 1;
        v.renew(&disk, digest).unwrap();
        v.offer(vm, &disk).unwrap();
        assert!(v.exports.get(&old).is_none());
        let mut byte = [0];
        v.exports.get(&disk.export_name()).unwrap().device().read_at(0, &mut byte).unwrap();
        assert_eq!(byte, [5]);
        v.destroy(&disk).unwrap();
        v.destroy(&disk).unwrap();
        assert!(matches!(v.offer(vm, &disk), Err(VolumeError::Lost { .. })));
        disk.generation += 1;
        v.renew(&disk, digest).unwrap();
        assert!(v.find(&disk).is_some());
    }
}
