//! Images, and how they are brought in.

use std::{collections::HashSet, sync::Arc};

use muster_block::{BlockDevice, BlockError, WriteFlags};
use muster_common::{ByteLen, Digest, VolumeId};

use crate::{
    StoreError,
    disk::Disk,
    records::{Kind, Record, Variant},
    store::{Inner, now_us},
};

/// An immutable disk: a read-only [`BlockDevice`], and what volumes are cloned from.
pub struct Image {
    pub(crate) disk: Disk,
    digest: Digest,
    name: String,
}

impl Image {
    /// What is written down of it.
    pub(crate) fn record(disk: &Disk, digest: Digest, name: &str) -> Record {
        Record {
            kind: Kind::Image,
            id: VolumeId::from_bytes([0; 16]),
            digest: Some(digest),
            read_only: true,
            origin: 0,
            tenant: disk.map.domain.number,
            of: VolumeId::from_bytes([0; 16]),
            made_us: now_us(),
            label: name.to_owned(),
            variant: Variant { top: disk.map.top(), size: disk.map.size(), ..Variant::default() },
        }
    }

    pub(crate) fn new(mut disk: Disk, digest: Digest, name: &str) -> Image {
        disk.read_only = true;
        Image { disk, digest, name: name.to_owned() }
    }

    pub fn digest(&self) -> Digest {
        self.digest
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn size(&self) -> ByteLen {
        self.disk.size()
    }
}

/// An image being brought in. Blocks are deduplicated as they come; nobody else sees the image before
/// [`ImageBuilder::finish`]. Dropping the builder gives its memory back.
pub struct ImageBuilder {
    disk: Disk,
    claim: Claim,
    name: String,
}

/// Keeps others from building the same image at the same time.
struct Claim {
    inner: Arc<Inner>,
    digest: Digest,
}

impl Claim {
    fn building(&self) -> parking_lot::MutexGuard<'_, HashSet<Digest>> {
        self.inner.building.lock()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.building().remove(&self.digest);
    }
}

impl ImageBuilder {
    /// The caller is inside the world, and found no image of this digest.
    pub(crate) fn new(inner: &Arc<Inner>, digest: Digest, name: &str, disk: Disk) -> Result<Self, StoreError> {
        if !inner.building.lock().insert(digest) {
            return Err(StoreError::ImageInProgress(digest));
        }
        Ok(Self { disk, claim: Claim { inner: Arc::clone(inner), digest }, name: name.to_owned() })
    }

    pub fn size(&self) -> ByteLen {
        self.disk.size()
    }

    /// In any order, from any threads at once. What is never written is zero and takes no memory.
    pub fn write_chunk(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.disk.write_at(offset, data, WriteFlags::default())
    }

    /// Fills `buf` with what was written so far.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.disk.read_at(offset, buf)
    }

    /// The image becomes visible to everybody.
    pub fn finish(self) -> Result<Arc<Image>, StoreError> {
        let Self { disk, claim, name } = self;
        claim.inner.add_image(Image::new(disk, claim.digest, &name))
    }
}
