//! Writing: a session takes sources and blobs in and publishes them under one reference.

use std::{
    collections::HashSet,
    ops::ControlFlow,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
};

use muster_common::{ByteLen, Digest};
use parking_lot::Mutex;

use crate::{
    CHUNK_SIZE,
    error::RepositoryError,
    estimate::BlockSet,
    manifest::{MAX_LOGICAL_SIZE, Manifest, ManifestBuilder},
    pack::{PackBuilder, SealedPack},
    reference::{Kept, Reference},
    repository::{MAX_BLOB, Repository, format_error, manifest_key},
    source::{ReadAt, SourceError},
};

pub(crate) use crate::scan::workers;

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes looked at, holes included.
    pub done: ByteLen,
    pub total: ByteLen,
    /// Bytes of chunks that were not there before (ingest only).
    pub new_bytes: ByteLen,
}

/// What an ingest does beside storing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IngestOptions {
    /// Also count unique 4 KiB blocks in the same pass ([`Ingested::resident`]); costs about half of the hashing speed.
    pub estimate: bool,
}

/// What an ingest did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ingested {
    /// The image's name: the digest of its manifest.
    pub digest: Digest,
    /// The image's size.
    pub logical: ByteLen,
    /// Bytes of its chunks that are not all zero.
    pub data: ByteLen,
    /// Bytes of the chunks that were not in the repository before.
    pub new_bytes: ByteLen,
    pub chunks: u64,
    pub new_chunks: u64,
    /// Predicted resident bytes in a store of 4 KiB frames, when asked for.
    pub resident: Option<ByteLen>,
}

/// The manifest of a source, without a repository: reads and hashes all of it, on all cores.
pub fn manifest_of(
    source: &dyn ReadAt,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Manifest, RepositoryError> {
    let size = source.size();
    if size.0 == 0 {
        return Err(SourceError::Empty.into());
    }
    if size.0 > MAX_LOGICAL_SIZE {
        return Err(SourceError::TooLarge { size: size.0, limit: MAX_LOGICAL_SIZE }.into());
    }
    let mut manifest = ManifestBuilder::new(size);
    crate::scan::scan(source, true, None, &mut |unit| {
        for chunk in unit.chunks {
            manifest.push(chunk.index, chunk.digest);
        }
        match progress(Progress { done: ByteLen(unit.end), total: size, new_bytes: ByteLen::ZERO }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(RepositoryError::Cancelled),
        }
    })?;
    Ok(manifest.finish())
}

/// A set of writes. Dropped without [`Session::publish`], it leaves only garbage that prune removes.
///
/// While a session lives, prune leaves alone every pack it wrote or found a chunk in.
pub struct Session {
    repository: Repository,
    id: u64,
    /// Chunks this session wrote or is about to write.
    pending: HashSet<Digest>,
    pack: PackBuilder,
    manifests: Vec<(Digest, Vec<u8>)>,
    blobs: Vec<(Digest, Vec<u8>)>,
    kept: Vec<Kept>,
}

impl Session {
    pub(crate) fn new(repository: Repository) -> Self {
        let id = repository.inner.begin_session();
        Self {
            repository,
            id,
            pending: HashSet::new(),
            pack: PackBuilder::new(),
            manifests: Vec::new(),
            blobs: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Reads a source in. Its chunks are stored as they come; its manifest waits for [`Session::publish`].
    /// The callback is called on this thread; `Break` cancels.
    pub fn ingest(
        &mut self,
        source: &dyn ReadAt,
        options: &IngestOptions,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Ingested, RepositoryError> {
        let size = source.size();
        if size.0 == 0 {
            return Err(SourceError::Empty.into());
        }
        if size.0 > MAX_LOGICAL_SIZE {
            return Err(SourceError::TooLarge { size: size.0, limit: MAX_LOGICAL_SIZE }.into());
        }
        let repository = self.repository.clone();
        let id = self.id;
        let spare = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            // no place in the channel: one pack is written while the next one is filled, no third one waits in memory
            let (send, receive): (SyncSender<SealedPack>, Receiver<SealedPack>) = sync_channel(0);
            let spare = &spare;
            let writer = scope.spawn(move || {
                while let Ok(sealed) = receive.recv() {
                    let memory = repository.inner.store_pack(Some(id), sealed)?;
                    *spare.lock() = memory;
                }
                Ok::<(), RepositoryError>(())
            });
            let scanned = self.scan_into(source, options, progress, &send, spare);
            drop(send);
            // the writer's error is the cause when it stopped first
            match writer.join() {
                Ok(written) => written?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
            scanned
        })
    }

    fn scan_into(
        &mut self,
        source: &dyn ReadAt,
        options: &IngestOptions,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
        packs: &SyncSender<SealedPack>,
        spare: &Mutex<Vec<u8>>,
    ) -> Result<Ingested, RepositoryError> {
        let size = source.size();
        let mut blocks = options.estimate.then(BlockSet::new);
        let mut manifest = ManifestBuilder::new(size);
        let (mut data, mut new_bytes, mut chunks, mut new_chunks) = (0u64, 0u64, 0u64, 0u64);
        let key = blocks.as_ref().map(BlockSet::key);
        crate::scan::scan(source, true, key, &mut |unit| {
            for crate::scan::ScannedChunk { index, digest, range, .. } in unit.chunks {
                manifest.push(*index, *digest);
                chunks += 1;
                data += range.len() as u64;
                if self.pending.contains(digest) || self.repository.inner.find_and_pin(self.id, digest) {
                    continue;
                }
                if self.pack.is_full() {
                    let sealed = self.pack.seal_reusing(std::mem::take(&mut *spare.lock()));
                    if packs.send(sealed).is_err() {
                        return Err(RepositoryError::Cancelled); // the writer failed; its own error is reported
                    }
                }
                self.pack.push(*digest, &unit.bytes[range.clone()]);
                self.pending.insert(*digest);
                new_chunks += 1;
                new_bytes += range.len() as u64;
            }
            if let Some(blocks) = &mut blocks {
                blocks.extend(unit.blocks);
            }
            let now = Progress { done: ByteLen(unit.end), total: size, new_bytes: ByteLen(new_bytes) };
            if progress(now).is_break() { Err(RepositoryError::Cancelled) } else { Ok(()) }
        })?;
        let manifest = manifest.finish().encode();
        let digest = crate::digest_of(&manifest);
        self.manifests.push((digest, manifest));
        self.kept.push(Kept::Manifest(digest));
        let _ = progress(Progress { done: size, total: size, new_bytes: ByteLen(new_bytes) });
        Ok(Ingested {
            digest,
            logical: size,
            data: ByteLen(data),
            new_bytes: ByteLen(new_bytes),
            chunks,
            new_chunks,
            resident: blocks.map(|b| b.resident()),
        })
    }

    /// True when a chunk is in the repository, or was put by this session; it stays until the session ends. A chunk known to
    /// be damaged is not there: putting it repairs it.
    pub fn holds(&self, digest: &Digest) -> bool {
        self.pending.contains(digest) || self.repository.inner.find_and_pin(self.id, digest)
    }

    /// Stores one chunk that came from elsewhere, after a look whether it is what its name says. One that is there already is
    /// not stored again. How many bytes were added.
    pub fn put_chunk(&mut self, digest: &Digest, bytes: &[u8]) -> Result<ByteLen, RepositoryError> {
        if bytes.len() > CHUNK_SIZE {
            let (size, limit) = (bytes.len() as u64, CHUNK_SIZE as u64);
            return Err(RepositoryError::TooLarge { what: "chunk", size, limit });
        }
        if bytes.is_empty() || crate::digest_of(bytes) != *digest {
            return Err(RepositoryError::Damaged { what: "chunk", digest: *digest });
        }
        if self.holds(digest) {
            return Ok(ByteLen::ZERO);
        }
        if self.pack.is_full() {
            self.store_pack()?;
        }
        self.pack.push(*digest, bytes);
        self.pending.insert(*digest);
        Ok(ByteLen(bytes.len() as u64))
    }

    /// Takes in a manifest that came from elsewhere, once every chunk of it is held; its name.
    pub fn put_manifest(&mut self, bytes: &[u8]) -> Result<Digest, RepositoryError> {
        let digest = crate::digest_of(bytes);
        let manifest = Manifest::parse(bytes).map_err(|source| format_error(&manifest_key(&digest), source))?;
        if let Some(missing) = manifest.chunks().find(|chunk| !self.holds(&chunk.digest)) {
            return Err(RepositoryError::UnknownChunk { digest: missing.digest });
        }
        self.manifests.push((digest, bytes.to_vec()));
        self.kept.push(Kept::Manifest(digest));
        Ok(digest)
    }

    /// Adds a small file; it is written by [`Session::publish`].
    pub fn put_blob(&mut self, bytes: &[u8]) -> Result<Digest, RepositoryError> {
        if bytes.len() as u64 > MAX_BLOB {
            return Err(RepositoryError::TooLarge { what: "blob", size: bytes.len() as u64, limit: MAX_BLOB });
        }
        let digest = crate::digest_of(bytes);
        self.blobs.push((digest, bytes.to_vec()));
        self.kept.push(Kept::Blob(digest));
        Ok(digest)
    }

    /// Stores the chunks that wait for their pack to fill.
    pub(crate) fn store_pack(&mut self) -> Result<(), RepositoryError> {
        if !self.pack.is_empty() {
            self.repository.inner.store_pack(Some(self.id), self.pack.seal())?;
        }
        Ok(())
    }

    /// Makes all of it durable and, as the last step, visible under `name`. Publishing the same again is fine; other content
    /// under an existing name is refused.
    pub fn publish(mut self, name: &str, payload: &[u8]) -> Result<(), RepositoryError> {
        crate::reference::check_name(name)?;
        self.store_pack()?;
        let reference = Reference { kept: std::mem::take(&mut self.kept), payload: payload.to_vec() };
        self.repository.inner.publish(name, &reference, &self.blobs, &self.manifests)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.repository.inner.end_session(self.id);
    }
}

const _: () = assert!(CHUNK_SIZE.is_multiple_of(4096), "a chunk holds whole 4 KiB blocks");
