//! A snapshot in chunks named by their content, so that who copies it fetches only what he lacks.

use std::{collections::HashMap, ops::ControlFlow};

use muster_backup::DeviceSource;
use muster_block::{BlockDevice, BlockError, BlockErrorKind};
use muster_common::Digest;
use muster_repository::{RepositoryError, digest_of, manifest_of};
use muster_store::Snapshot;

/// The names of a snapshot's chunks, and where each stands. About 80 bytes a distinct chunk.
pub struct ChunkTable {
    manifest: Vec<u8>,
    places: HashMap<Digest, (u64, usize)>,
}

impl ChunkTable {
    /// Reads and hashes the whole snapshot, on all cores.
    pub fn of(snapshot: &Snapshot) -> Result<Self, RepositoryError> {
        let manifest = manifest_of(&DeviceSource::new(snapshot), &mut |_| ControlFlow::Continue(()))?;
        let places = manifest.chunks().map(|chunk| (chunk.digest, (chunk.offset, chunk.len))).collect();
        Ok(Self { manifest: manifest.encode(), places })
    }

    /// As it is stored in a repository; its digest is the name the content has as an image.
    pub fn manifest(&self) -> &[u8] {
        &self.manifest
    }

    pub fn has(&self, digest: &Digest) -> bool {
        self.places.contains_key(digest)
    }

    /// A chunk's bytes, compared with its name: a bit that flipped in memory since must not spread.
    pub fn read(&self, snapshot: &Snapshot, digest: &Digest) -> Result<Vec<u8>, BlockError> {
        let wrong = |text: String| BlockError::new(BlockErrorKind::Io, text);
        let (offset, len) = self.places.get(digest).ok_or_else(|| wrong(format!("no chunk {}", digest.short())))?;
        let mut bytes = vec![0; *len];
        snapshot.read_at(*offset, &mut bytes)?;
        if digest_of(&bytes) != *digest {
            return Err(wrong(format!("chunk {} at {offset} is not what it was", digest.short())));
        }
        Ok(bytes)
    }
}
