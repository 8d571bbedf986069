//! Volumes of VMs: made in the store, offered as exports, taken away again. Synchronous; called off the runtime's threads.
//!
//! Order, so that no generation is ever used for two contents and no export shows another volume's bytes:
//! record the generation durably -> make the volume -> offer the export; the other way round to take away.

use std::{sync::Arc, time::Duration};

use muster_block::BlockDevice;
use muster_common::{Digest, ErrorCode, VmId, VolumeId};
use muster_export::{Registry, RegistryError};
use muster_store::{Store, StoreError, Volume, VolumeSpec};

use crate::records::{DiskRecord, RecordError};

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
            Self::Export { .. } => ErrorCode::Internal,
            Self::Lost { .. } => ErrorCode::VolumeLost,
            Self::Record(e) => e.code(),
        }
    }
}

/// Store and exports together.
#[derive(Clone)]
pub struct Volumes {
    pub store: Store,
    pub exports: Arc<Registry>,
}

impl Volumes {
    /// Makes what a disk says: a clone of its image or blank. Not offered yet.
    pub fn make(&self, disk: &DiskRecord) -> Result<Arc<Volume>, VolumeError> {
        let spec = VolumeSpec {
            generation: disk.generation,
            base: disk.image,
            read_only: disk.is_read_only(),
            ..VolumeSpec::blank(disk.volume, disk.size)
        };
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
            Ok(_) | Err(RegistryError::Exists(_)) => Ok(()),
            Err(source) => Err(VolumeError::Export { action: "offer", name, source }),
        }
    }

    /// Takes the export away and waits until nobody uses the volume.
    pub fn withdraw(&self, disk: &DiskRecord) -> Result<(), VolumeError> {
        let name = disk.export_name();
        match self.exports.remove(&name, GRACE) {
            Ok(()) | Err(RegistryError::Unknown(_)) => Ok(()),
            Err(source) => Err(VolumeError::Export { action: "withdraw", name, source }),
        }
    }

    /// Withdraws and deletes; an absent volume is fine.
    pub fn destroy(&self, disk: &DiskRecord) -> Result<(), VolumeError> {
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

#[cfg(test)]
mod tests {
    use muster_block::WriteFlags;
    use muster_common::ByteLen;
    use muster_store::StoreConfig;

    use super::*;
    use crate::records::DiskRole;

    fn volumes() -> Volumes {
        Volumes { store: Store::open(StoreConfig::new(ByteLen::mib(64))).unwrap(), exports: Arc::default() }
    }

    #[test]
    fn a_renewed_disk_is_the_image_again_under_a_new_export_name() {
        let v = volumes();
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
