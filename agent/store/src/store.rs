//! The store: what the rest of the agent holds.

use std::sync::Arc;

use muster_common::{ByteLen, Digest, VolumeId};

use crate::{
    AuditReport, Image, ImageBuilder, ImageInfo, Snapshot, StoreConfig, StoreError, StoreStats, VerifyReport, Volume,
    VolumeSpec,
};

/// The images and volumes of one host, in memory. Cheap to clone: a handle.
#[derive(Clone)]
pub struct Store {}

#[allow(clippy::unimplemented, unused_variables, missing_docs)]
impl Store {
    pub fn open(config: StoreConfig) -> Result<Store, StoreError> {
        unimplemented!()
    }
    pub fn image_builder(&self, digest: Digest, name: &str, size: ByteLen) -> Result<ImageBuilder, StoreError> {
        unimplemented!()
    }
    pub fn images(&self) -> Vec<ImageInfo> {
        unimplemented!()
    }
    pub fn image(&self, digest: &Digest) -> Option<Arc<Image>> {
        unimplemented!()
    }
    pub fn drop_image(&self, digest: &Digest) -> Result<(), StoreError> {
        unimplemented!()
    }
    /// A snapshot kept as an image: how a session's changes become a new version.
    pub fn commit(&self, snapshot: &Snapshot, digest: Digest, name: &str) -> Result<Arc<Image>, StoreError> {
        unimplemented!()
    }
    pub fn create_volume(&self, spec: VolumeSpec) -> Result<Arc<Volume>, StoreError> {
        unimplemented!()
    }
    /// As [`Store::create_volume`], starting as the snapshot (`spec.base` only names the lineage).
    pub fn create_volume_from(&self, spec: VolumeSpec, snapshot: &Snapshot) -> Result<Arc<Volume>, StoreError> {
        unimplemented!()
    }
    pub fn volumes(&self) -> Vec<Arc<Volume>> {
        unimplemented!()
    }
    pub fn volume(&self, id: VolumeId) -> Option<Arc<Volume>> {
        unimplemented!()
    }
    /// Frees its memory now; requests on handles that are still about fail as fenced.
    pub fn delete_volume(&self, id: VolumeId) -> Result<(), StoreError> {
        unimplemented!()
    }
    pub fn verify_volume(&self, id: VolumeId) -> Result<VerifyReport, StoreError> {
        unimplemented!()
    }
    pub fn verify_image(&self, digest: &Digest) -> Result<VerifyReport, StoreError> {
        unimplemented!()
    }
    pub fn audit(&self) -> AuditReport {
        unimplemented!()
    }
    pub fn stats(&self) -> StoreStats {
        unimplemented!()
    }
    /// Whether this many bytes of blocks the store has never seen fit now, their metadata included.
    pub fn would_fit(&self, new_unique: ByteLen) -> bool {
        unimplemented!()
    }
}
