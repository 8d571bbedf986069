//! Makes images resident: manifest, then the chunks this host lacks, verified, straight into the store.
//!
//! A chunk that stands in another resident image is copied from memory; so are repeated ones. What is in the store is
//! known by the manifests kept here, one a resident image (32 bytes a chunk: 0.05 % of the data).
//!
//! A block of a resident image that was damaged is fetched the same way, alone (see `scrub`).
//!
//! A pull that fails leaves nothing behind: the builder gives its memory back. Two pulls of one image become one.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use muster_block::{BlockDevice, BlockError, BlockErrorKind};
use muster_common::{ByteLen, Digest, ErrorCode};
use muster_repository::{ChunkRef, FormatError, Manifest, digest_of};
use muster_store::{Image, ImageBuilder, Store, StoreError};
use parking_lot::Mutex;

/// Chunks asked for at once: 4 MiB, so that a lost connection costs little and a slow one shows progress.
const BATCH: usize = 64;
/// Batches on the way at once: one is being received while another is hashed and stored.
const IN_FLIGHT: usize = 3;
/// A manifest of a 2 TiB image without holes is 1 GiB; nobody boots that into memory.
const MANIFEST_LIMIT: usize = 256 << 20;
/// A kernel or an initrd.
const BLOB_LIMIT: usize = 512 << 20;

#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("pull: no controller with a stream endpoint was heard yet")]
    NoSource,
    #[error("{attempted}")]
    Http {
        attempted: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("{attempted}: the server answered {status}")]
    Status { attempted: String, status: u16 },
    #[error("{attempted}: {reason}")]
    Answer { attempted: String, reason: String },
    #[error("read the manifest of image {}", .digest.short())]
    Manifest {
        digest: Digest,
        #[source]
        source: FormatError,
    },
    #[error(
        "the image needs up to {needed} of memory, {available} are left of the store's budget of {budget}; nothing was pulled"
    )]
    NoSpace { needed: ByteLen, available: ByteLen, budget: ByteLen },
    #[error("store the image")]
    Store(#[from] StoreError),
    #[error("store a chunk of the image")]
    Block(#[from] BlockError),
    #[error("the work of a pull ended unexpectedly")]
    Panicked,
}

impl PullError {
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NoSource | Self::Http { .. } => ErrorCode::Unavailable,
            Self::Status { status: 404, .. } => ErrorCode::NotFound,
            Self::Status { .. } => ErrorCode::Unavailable,
            Self::Answer { .. } | Self::Manifest { .. } => ErrorCode::Corrupt,
            Self::NoSpace { .. } => ErrorCode::NoSpace,
            Self::Store(e) => e.code(),
            Self::Block(e) => e.kind().code(),
            Self::Panicked => ErrorCode::Internal,
        }
    }

    /// Nothing was begun that could have changed anything.
    pub fn is_refusal(&self) -> bool {
        matches!(self.code(), ErrorCode::NoSpace)
    }
}

/// What a pull did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pulled {
    pub logical: ByteLen,
    /// Bytes of chunks that came over the network.
    pub transferred: ByteLen,
    /// By how much the store's resident bytes grew.
    pub resident: ByteLen,
}

/// Done and total bytes.
pub type OnProgress = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// The resident images, and how to get more.
pub struct Images {
    store: Store,
    client: reqwest::Client,
    manifests: Mutex<HashMap<Digest, Arc<Manifest>>>,
    /// One pull at a time for one digest.
    pulls: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
}

impl Images {
    pub fn new(store: Store, timeout: Duration) -> Result<Self, PullError> {
        let client = reqwest::Client::builder()
            .read_timeout(timeout)
            .connect_timeout(timeout)
            // a proxy of the environment is not meant for hosts of the fleet
            .no_proxy()
            .build()
            .map_err(|source| PullError::Http { attempted: "make an HTTP client".into(), source })?;
        Ok(Self { store, client, manifests: Mutex::default(), pulls: Mutex::default() })
    }

    /// Makes the image resident, if it is not. Cancelling it (dropping the future) leaves nothing behind.
    pub async fn ensure(
        &self,
        source: Option<String>,
        digest: Digest,
        name: &str,
        progress: OnProgress,
    ) -> Result<(Arc<Image>, Option<Pulled>), PullError> {
        let gate = Arc::clone(self.pulls.lock().entry(digest).or_default());
        let _only = gate.lock().await;
        if let Some(image) = self.store.image(&digest) {
            return Ok((image, None));
        }
        let source = source.ok_or(PullError::NoSource)?;
        let (image, pulled) = self.pull(&source, digest, name, progress).await?;
        Ok((image, Some(pulled)))
    }

    async fn pull(
        &self,
        source: &str,
        digest: Digest,
        name: &str,
        progress: OnProgress,
    ) -> Result<(Arc<Image>, Pulled), PullError> {
        let manifest = Arc::new(self.manifest(source, digest).await?);
        let before = self.store.stats().resident_bytes.bytes();

        // where each distinct chunk goes, and which are in memory already
        let mut places: HashMap<Digest, Vec<ChunkRef>> = HashMap::new();
        for chunk in manifest.chunks() {
            places.entry(chunk.digest).or_default().push(chunk);
        }
        let found = self.find_resident(&places);
        let mut missing: Vec<Digest> = Vec::new();
        let mut seen = HashSet::new();
        for chunk in manifest.chunks() {
            if !found.contains_key(&chunk.digest) && seen.insert(chunk.digest) {
                missing.push(chunk.digest);
            }
        }
        let needed = ByteLen(missing.iter().filter_map(|d| places[d].first()).map(|c| c.len as u64).sum());
        if !self.store.would_fit(needed) {
            let stats = self.store.stats();
            return Err(PullError::NoSpace { needed, available: stats.available_bytes, budget: stats.budget });
        }

        let builder = Arc::new(self.store.image_builder(digest, name, manifest.size())?);
        let total: u64 = manifest.data_bytes().bytes();
        let done = Arc::new(AtomicU64::new(0));
        let places = Arc::new(places);
        progress(0, total);
        self.copy_resident(&builder, &places, found, &done, total, &progress).await?;

        let batches: Vec<Vec<Digest>> = missing.chunks(BATCH).map(<[Digest]>::to_vec).collect();
        let transferred = AtomicU64::new(0);
        stream::iter(batches.into_iter().map(Ok))
            .try_for_each_concurrent(IN_FLIGHT, |batch: Vec<Digest>| {
                let (builder, places, done, progress) =
                    (Arc::clone(&builder), Arc::clone(&places), Arc::clone(&done), Arc::clone(&progress));
                let transferred = &transferred;
                async move {
                    let answer = self.fetch(source, &batch).await?;
                    transferred.fetch_add(answer.len() as u64, Ordering::Relaxed);
                    let work = move || store_batch(&builder, &places, &batch, &answer, &done);
                    let now = tokio::task::spawn_blocking(work).await.map_err(|_| PullError::Panicked)??;
                    progress(now, total);
                    Ok::<(), PullError>(())
                }
            })
            .await?;

        let builder = Arc::into_inner(builder).ok_or(PullError::Panicked)?;
        let image = tokio::task::spawn_blocking(move || builder.finish()).await.map_err(|_| PullError::Panicked)??;
        self.manifests.lock().insert(digest, Arc::clone(&manifest));
        let resident = self.store.stats().resident_bytes.bytes().saturating_sub(before);
        let pulled = Pulled {
            logical: manifest.size(),
            transferred: ByteLen(transferred.into_inner()),
            resident: ByteLen(resident),
        };
        Ok((image, pulled))
    }

    /// Chunks of the new image that stand in a resident one, and where.
    fn find_resident(&self, wanted: &HashMap<Digest, Vec<ChunkRef>>) -> HashMap<Digest, (Arc<Image>, ChunkRef)> {
        let manifests: Vec<(Digest, Arc<Manifest>)> =
            self.manifests.lock().iter().map(|(d, m)| (*d, Arc::clone(m))).collect();
        let mut found = HashMap::new();
        for (digest, manifest) in manifests {
            let Some(image) = self.store.image(&digest) else { continue };
            for chunk in manifest.chunks().filter(|c| wanted.contains_key(&c.digest)) {
                found.entry(chunk.digest).or_insert_with(|| (Arc::clone(&image), chunk));
            }
        }
        found
    }

    async fn copy_resident(
        &self,
        builder: &Arc<ImageBuilder>,
        places: &Arc<HashMap<Digest, Vec<ChunkRef>>>,
        found: HashMap<Digest, (Arc<Image>, ChunkRef)>,
        done: &Arc<AtomicU64>,
        total: u64,
        progress: &OnProgress,
    ) -> Result<(), PullError> {
        let (builder, places, done, progress) =
            (Arc::clone(builder), Arc::clone(places), Arc::clone(done), Arc::clone(progress));
        let work = move || {
            for (copied, (digest, (image, chunk))) in found.iter().enumerate() {
                let mut bytes = vec![0; chunk.len];
                image.read_at(chunk.offset, &mut bytes)?;
                // memory is verified like the network: a flipped bit must not spread
                if digest_of(&bytes) != *digest {
                    let text = format!("chunk {} of resident image {}", digest.short(), image.digest().short());
                    return Err(PullError::Block(BlockError::new(BlockErrorKind::Io, text)));
                }
                for place in &places[digest] {
                    builder.write_chunk(place.offset, &bytes)?;
                    done.fetch_add(place.len as u64, Ordering::Relaxed);
                }
                if copied % BATCH == BATCH - 1 {
                    progress(done.load(Ordering::Relaxed), total);
                }
            }
            Ok(())
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| PullError::Panicked)?
    }

    async fn fetch(&self, source: &str, batch: &[Digest]) -> Result<Bytes, PullError> {
        let url = format!("{source}/bulk/v1/chunks");
        let attempted = || format!("fetch {} chunks from {url}", batch.len());
        let body: Vec<u8> = batch.iter().flat_map(|d| *d.as_bytes()).collect();
        let response = self
            .client
            .post(&url)
            .body(body)
            .send()
            .await
            .map_err(|source| PullError::Http { attempted: attempted(), source })?;
        let limit = batch.len() * (muster_repository::CHUNK_SIZE + 4);
        read_body(response, limit, &attempted()).await
    }

    async fn get(&self, url: &str, limit: usize) -> Result<Bytes, PullError> {
        let attempted = format!("fetch {url}");
        let response = self
            .client
            .get(url)
            .send()
            .await
            .map_err(|source| PullError::Http { attempted: attempted.clone(), source })?;
        read_body(response, limit, &attempted).await
    }

    /// The block of `len` bytes at `offset` of an image as it is in the repository, verified all the way; `None` when the image
    /// has only zeroes there. It may not cross a multiple of [`muster_repository::CHUNK_SIZE`].
    pub async fn block(
        &self,
        source: Option<String>,
        digest: Digest,
        offset: u64,
        len: usize,
    ) -> Result<Option<Vec<u8>>, PullError> {
        let source = source.ok_or(PullError::NoSource)?;
        let known = self.manifests.lock().get(&digest).cloned();
        let manifest = match known {
            Some(manifest) => manifest,
            None => self.keep_manifest(&source, digest).await?,
        };
        let Some(chunk) = manifest.chunk_at(offset) else { return Ok(None) };
        let answer = self.fetch(&source, &[chunk.digest]).await?;
        let (bytes, rest) = next_chunk(&answer, &chunk.digest)?;
        let at = (offset - chunk.offset) as usize;
        match bytes.get(at..bytes.len().min(at + len)) {
            Some(block) if rest.is_empty() && bytes.len() == chunk.len => Ok(Some(block.to_vec())),
            _ => Err(wrong_answer("a chunk has another length than the manifest says")),
        }
    }

    /// Of an image that an earlier run pulled; kept while the image is resident.
    async fn keep_manifest(&self, source: &str, digest: Digest) -> Result<Arc<Manifest>, PullError> {
        let manifest = Arc::new(self.manifest(source, digest).await?);
        if self.store.image(&digest).is_some() {
            self.manifests.lock().insert(digest, Arc::clone(&manifest));
        }
        Ok(manifest)
    }

    async fn manifest(&self, source: &str, digest: Digest) -> Result<Manifest, PullError> {
        let bytes = self.get(&format!("{source}/bulk/v1/manifests/{digest}"), MANIFEST_LIMIT).await?;
        Manifest::parse_named(&bytes, &digest).map_err(|source| PullError::Manifest { digest, source })
    }

    /// A small file by its digest.
    pub async fn blob(&self, source: Option<String>, digest: Digest) -> Result<Bytes, PullError> {
        let url = format!("{}/bulk/v1/blobs/{digest}", source.ok_or(PullError::NoSource)?);
        let bytes = self.get(&url, BLOB_LIMIT).await?;
        if digest_of(&bytes) != digest {
            return Err(PullError::Answer { attempted: format!("fetch {url}"), reason: "the digest differs".into() });
        }
        Ok(bytes)
    }

    /// Forgets an image no volume is made from.
    pub fn discard(&self, digest: &Digest) -> Result<(), StoreError> {
        self.store.drop_image(digest)?;
        self.manifests.lock().remove(digest);
        Ok(())
    }
}

async fn read_body(response: reqwest::Response, limit: usize, attempted: &str) -> Result<Bytes, PullError> {
    if !response.status().is_success() {
        return Err(PullError::Status { attempted: attempted.into(), status: response.status().as_u16() });
    }
    let mut body = Vec::with_capacity(response.content_length().unwrap_or(0).min(limit as u64) as usize);
    let mut stream = response.bytes_stream();
    while let Some(part) = stream.next().await {
        let part = part.map_err(|source| PullError::Http { attempted: attempted.into(), source })?;
        if body.len() + part.len() > limit {
            let reason = format!("longer than {limit} bytes");
            return Err(PullError::Answer { attempted: attempted.into(), reason });
        }
        body.extend_from_slice(&part);
    }
    Ok(body.into())
}

fn wrong_answer(reason: &str) -> PullError {
    PullError::Answer { attempted: "read fetched chunks".into(), reason: reason.into() }
}

/// Takes the next chunk (u32 little-endian length, bytes) off an answer, verified; and what is left.
fn next_chunk<'a>(answer: &'a [u8], digest: &Digest) -> Result<(&'a [u8], &'a [u8]), PullError> {
    let (head, tail) = answer.split_first_chunk::<4>().ok_or_else(|| wrong_answer("cut short"))?;
    let len = u32::from_le_bytes(*head) as usize;
    let (bytes, rest) = tail.split_at_checked(len).ok_or_else(|| wrong_answer("cut short"))?;
    if digest_of(bytes) != *digest {
        return Err(wrong_answer("a chunk is not the one asked for"));
    }
    Ok((bytes, rest))
}

/// Parses an answer (each chunk in order), verifies and stores it. Returns the bytes done so far.
fn store_batch(
    builder: &ImageBuilder,
    places: &HashMap<Digest, Vec<ChunkRef>>,
    batch: &[Digest],
    answer: &[u8],
    done: &AtomicU64,
) -> Result<u64, PullError> {
    let mut rest = answer;
    for digest in batch {
        let (bytes, tail) = next_chunk(rest, digest)?;
        rest = tail;
        for place in places.get(digest).map(Vec::as_slice).unwrap_or_default() {
            if place.len != bytes.len() {
                return Err(wrong_answer("a chunk has another length than the manifest says"));
            }
            builder.write_chunk(place.offset, bytes)?;
            done.fetch_add(place.len as u64, Ordering::Relaxed);
        }
    }
    if !rest.is_empty() {
        return Err(wrong_answer("longer than asked for"));
    }
    Ok(done.load(Ordering::Relaxed))
}
