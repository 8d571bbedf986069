use std::{
    collections::HashMap,
    ops::ControlFlow,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

use muster_common::{ByteLen, Digest};
use parking_lot::Mutex;

use crate::{error::RepositoryError, ingest::Progress, manifest::ChunkRef, repository::Repository};

/// What is wrong with a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Defect {
    /// The repository does not have it.
    Missing,
    /// Its bytes do not hash to its name.
    Damaged,
    /// It cannot be read; the text is the reason.
    Unreadable(String),
}

/// A chunk that is wrong, and where in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadChunk {
    pub offset: u64,
    pub len: u64,
    pub digest: Digest,
    pub defect: Defect,
}

/// What reading a whole image gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Distinct chunks read.
    pub chunks: u64,
    pub bytes: ByteLen,
    /// By offset; a chunk used at several places is listed at each.
    pub bad: Vec<BadChunk>,
}

impl VerifyReport {
    pub fn is_good(&self) -> bool {
        self.bad.is_empty()
    }
}

impl Repository {
    /// Reads every chunk of an image and compares it with its name. Fails only when the manifest itself cannot be read or
    /// the callback says stop; bad chunks are in the report. Ingesting the same content again repairs them.
    pub fn verify(
        &self,
        digest: &Digest,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<VerifyReport, RepositoryError> {
        let manifest = self.manifest(digest)?;
        let mut seen = HashMap::<Digest, usize>::new();
        let mut chunks: Vec<ChunkRef> = Vec::new();
        for chunk in manifest.chunks() {
            seen.entry(chunk.digest).or_insert_with(|| {
                chunks.push(chunk);
                chunks.len() - 1
            });
        }
        let total = ByteLen(chunks.iter().map(|c| c.len as u64).sum());
        // heard at least once, also when the other threads take all chunks of a small image
        if progress(Progress { done: ByteLen::ZERO, total, new_bytes: ByteLen::ZERO }).is_break() {
            return Err(RepositoryError::Cancelled);
        }
        let (next, done, stop) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
        let bad = Mutex::new(HashMap::<Digest, Defect>::new());
        let work = |mut each: Option<&mut dyn FnMut(Progress) -> ControlFlow<()>>| {
            while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                if let Some(defect) = self.defect(chunk) {
                    bad.lock().insert(chunk.digest, defect);
                }
                let done = ByteLen(done.fetch_add(chunk.len as u64, Ordering::Relaxed) + chunk.len as u64);
                if let Some(each) = &mut each
                    && each(Progress { done, total, new_bytes: ByteLen::ZERO }).is_break()
                {
                    stop.store(true, Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..crate::ingest::workers() {
                scope.spawn(|| work(None));
            }
            work(Some(progress));
        });
        if stop.load(Ordering::Relaxed) {
            return Err(RepositoryError::Cancelled);
        }
        let bad = bad.into_inner();
        let wrong = |c: ChunkRef| {
            let defect = bad.get(&c.digest)?.clone();
            Some(BadChunk { offset: c.offset, len: c.len as u64, digest: c.digest, defect })
        };
        Ok(VerifyReport {
            chunks: chunks.len() as u64,
            bytes: total,
            bad: if bad.is_empty() { Vec::new() } else { manifest.chunks().filter_map(wrong).collect() },
        })
    }

    fn defect(&self, chunk: &ChunkRef) -> Option<Defect> {
        match self.read_chunk(&chunk.digest) {
            Ok(bytes) if bytes.len() == chunk.len => None,
            Ok(_) | Err(RepositoryError::Damaged { .. }) => Some(Defect::Damaged),
            Err(RepositoryError::UnknownChunk { .. }) => Some(Defect::Missing),
            Err(e) => Some(Defect::Unreadable(muster_common::Chain(&e).to_string())),
        }
    }
}
