//! The repository itself: its index of chunks in memory, reads, references.
//!
//! The object `format` (all integers little-endian):
//!
//! | offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 8 | magic | `MSTRREPO` |
//! | 8 | 4 | version | 1 |
//! | 12 | 4 | chunk size | 65536 |
//! | 16 | 8 | incompatible features | a reader refuses bits it does not know; none defined |
//! | 24 | 8 | compatible features | ignored when unknown; none defined |
//! | 32 | 32 | checksum | BLAKE3 of bytes 0..32 |

use std::{
    collections::{HashMap, HashSet},
    ops::ControlFlow,
    sync::Arc,
};

use muster_common::{ByteLen, Digest};
use parking_lot::{Mutex, RwLock};

use crate::{
    CHUNK_SIZE,
    error::{FormatError, RepositoryError},
    ingest::{IngestOptions, Ingested, Progress, Session},
    layout::{check_head, digest_at, layout, put, u32_at},
    manifest::Manifest,
    pack::{self, Entry, PackIndex},
    reader::Reader,
    reference::{Kept, Reference, check_name},
    source::ReadAt,
    storage::{Storage, StorageError},
};

const MAGIC: &[u8; 8] = b"MSTRREPO";
const VERSION: u32 = 1;
const WHAT: &str = "repository";
const FORMAT_KEY: &str = "format";

layout! {
    header = 64 {
        MAGIC: 0, 8; VERSION: 8, 4; CHUNK_SIZE: 12, 4; INCOMPATIBLE: 16, 8; COMPATIBLE: 24, 8; CHECKSUM: 32, 32;
    }
}

/// Blobs are kernels and initial ramdisks; this bounds what one read takes in memory.
pub const MAX_BLOB: u64 = 512 << 20;

/// A handle to a repository; clones share it. All methods may be called from any thread and block on the storage.
#[derive(Clone)]
pub struct Repository {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub storage: Arc<dyn Storage>,
    /// Held for a whole prune: one at a time.
    pub prune: Mutex<()>,
    /// Held while manifests and their reference are put, and while prune lists references and removes manifests.
    pub publish: Mutex<()>,
    pub index: RwLock<Index>,
    pub pins: Mutex<Pins>,
}

/// Number of a pack in this process; never reused.
pub(crate) type PackNumber = u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub pack: PackNumber,
    pub offset: u32,
    pub len: u32,
}

#[derive(Clone)]
pub(crate) struct PackInfo {
    pub key: Arc<str>,
    pub length: u64,
}

/// Where each chunk stands. About 60 bytes a chunk, so 1 GiB of memory for 1 TiB of unique data.
#[derive(Default)]
pub(crate) struct Index {
    chunks: HashMap<Digest, Location>,
    /// Further copies of chunks that are in `chunks`; nearly always empty.
    duplicates: HashMap<Digest, Vec<Location>>,
    packs: Vec<Option<PackInfo>>,
    /// Chunks whose bytes were found damaged: still looked for, but a session stores them again.
    bad: HashSet<Digest>,
    damaged_packs: u64,
}

/// Packs that sessions rely on; prune leaves them alone.
#[derive(Default)]
pub(crate) struct Pins {
    next_session: u64,
    sessions: HashMap<u64, HashSet<PackNumber>>,
    /// While a prune runs: packs of the sessions that ended since it began. Their manifests are not in its marks.
    touched: Option<HashSet<PackNumber>>,
}

impl Pins {
    pub fn is_pinned(&self, pack: PackNumber) -> bool {
        self.touched.as_ref().is_some_and(|t| t.contains(&pack)) || self.sessions.values().any(|s| s.contains(&pack))
    }

    /// Sessions that rely on a copy in one of these packs rely on the one in `kept` from now on.
    pub fn follow(&mut self, dropped: &[PackNumber], kept: PackNumber) {
        for packs in self.sessions.values_mut() {
            if dropped.iter().any(|pack| packs.contains(pack)) {
                packs.insert(kept);
            }
        }
    }

    pub fn begin_prune(&mut self) {
        self.touched = Some(HashSet::new());
    }

    pub fn end_prune(&mut self) {
        self.touched = None;
    }
}

impl Index {
    fn add_pack(&mut self, key: Arc<str>, length: u64, entries: &[Entry]) -> PackNumber {
        let pack = self.packs.len() as PackNumber;
        self.packs.push(Some(PackInfo { key, length }));
        for entry in entries {
            let here = Location { pack, offset: entry.offset, len: entry.len };
            match self.chunks.get_mut(&entry.digest) {
                None => {
                    self.chunks.insert(entry.digest, here);
                }
                Some(first) => {
                    let mut other = here;
                    if self.bad.remove(&entry.digest) {
                        other = std::mem::replace(first, here);
                    }
                    self.duplicates.entry(entry.digest).or_default().push(other);
                }
            }
        }
        pack
    }

    pub fn packs(&self) -> Vec<(PackNumber, PackInfo)> {
        let numbered = self.packs.iter().enumerate();
        numbered.filter_map(|(n, p)| Some((n as PackNumber, p.clone()?))).collect()
    }

    /// Whether the chunk at this place is the copy that reads go to first.
    pub fn is_first(&self, pack: PackNumber, entry: &Entry) -> bool {
        self.chunks.get(&entry.digest).is_some_and(|at| at.pack == pack && at.offset == entry.offset)
    }

    pub fn duplicated(&self) -> Vec<Digest> {
        self.duplicates.keys().copied().collect()
    }

    /// All copies, the preferred one first.
    pub fn copies(&self, digest: &Digest) -> Vec<(Location, Arc<str>)> {
        let first = self.chunks.get(digest).into_iter();
        let others = self.duplicates.get(digest).into_iter().flatten();
        first
            .chain(others)
            .filter_map(|at| Some((*at, self.packs.get(at.pack as usize)?.as_ref()?.key.clone())))
            .collect()
    }

    /// Keeps only this copy of the chunk. The packs of those that were dropped.
    pub fn keep_only(&mut self, digest: &Digest, copy: Location) -> Vec<PackNumber> {
        let first = self.chunks.insert(*digest, copy);
        let others = self.duplicates.remove(digest).unwrap_or_default();
        self.bad.remove(digest);
        first.into_iter().chain(others).filter(|at| *at != copy).map(|at| at.pack).collect()
    }

    /// Forgets a pack; copies elsewhere take over. Refused (false) when a chunk of `live` would have no copy left.
    pub fn remove_pack(&mut self, pack: PackNumber, entries: &[Entry], live: &HashSet<Digest>) -> bool {
        let elsewhere = |index: &Self, digest: &Digest| {
            let first = index.chunks.get(digest).into_iter();
            first.chain(index.duplicates.get(digest).into_iter().flatten()).copied().find(|at| at.pack != pack)
        };
        if entries.iter().any(|e| live.contains(&e.digest) && elsewhere(self, &e.digest).is_none()) {
            return false;
        }
        for Entry { digest, .. } in entries {
            match elsewhere(self, digest) {
                None => {
                    self.chunks.remove(digest);
                    self.duplicates.remove(digest);
                    self.bad.remove(digest);
                }
                Some(other) => {
                    let first_leaves = self.chunks.get(digest).is_none_or(|at| at.pack == pack);
                    if let Some(copies) = self.duplicates.get_mut(digest) {
                        copies.retain(|at| at.pack != pack && !(first_leaves && *at == other));
                        if copies.is_empty() {
                            self.duplicates.remove(digest);
                        }
                    }
                    if first_leaves {
                        self.chunks.insert(*digest, other);
                    }
                }
            }
        }
        self.packs[pack as usize] = None;
        true
    }
}

/// What the repository holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepositoryStats {
    pub packs: u64,
    /// Distinct chunks, referenced or not.
    pub chunks: u64,
    /// Bytes of all packs.
    pub stored_bytes: ByteLen,
    /// Packs whose index cannot be read; their chunks are missing, `prune` leaves them alone.
    pub damaged_packs: u64,
}

impl Repository {
    /// Opens the repository in this storage, or makes one when the storage is empty. Reads the index of every pack.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self, RepositoryError> {
        match storage.get(FORMAT_KEY) {
            Ok(bytes) => check_format(&bytes).map_err(|source| format_error(FORMAT_KEY, source))?,
            Err(e) if e.is_not_found() => {
                if !storage.list("")?.is_empty() {
                    return Err(RepositoryError::NotARepository);
                }
                storage.put(FORMAT_KEY, &encode_format())?;
            }
            Err(e) => return Err(e.into()),
        }
        let mut index = Index::default();
        for key in storage.list("packs/")? {
            match pack::read_index(&*storage, &key)? {
                PackIndex::Good { entries, length } => {
                    index.add_pack(key.into(), length, &entries);
                }
                PackIndex::Bad(source) if source.is_unsupported() => return Err(format_error(&key, source)),
                PackIndex::Bad(source) => {
                    tracing::warn!(pack = key, err = %source, "damaged pack: its chunks are missing");
                    index.damaged_packs += 1;
                }
            }
        }
        Ok(Self {
            inner: Arc::new(Inner {
                storage,
                prune: Mutex::default(),
                publish: Mutex::default(),
                index: RwLock::new(index),
                pins: Mutex::default(),
            }),
        })
    }

    /// Begins a set of writes that one reference will publish.
    pub fn session(&self) -> Session {
        Session::new(self.clone())
    }

    /// Stores an image and keeps it until [`Repository::forget`]. Storing the same content again writes nothing new.
    /// The callback is called on this thread, at most once a MiB; `Break` cancels.
    pub fn ingest(
        &self,
        source: &dyn ReadAt,
        options: &IngestOptions,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Ingested, RepositoryError> {
        let mut session = self.session();
        let ingested = session.ingest(source, options, progress)?;
        session.publish(&manifest_name(&ingested.digest), &[])?;
        Ok(ingested)
    }

    /// Stores a small file and keeps it until [`Repository::forget`].
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, RepositoryError> {
        let mut session = self.session();
        let digest = session.put_blob(bytes)?;
        session.publish(&blob_name(&digest), &[])?;
        Ok(digest)
    }

    /// A blob's bytes, verified.
    pub fn blob(&self, digest: &Digest) -> Result<Vec<u8>, RepositoryError> {
        let bytes = self.inner.storage.get(&blob_key(digest)).map_err(|e| match e {
            e if e.is_not_found() => RepositoryError::UnknownBlob { digest: *digest },
            e => e.into(),
        })?;
        if crate::digest_of(&bytes) != *digest {
            return Err(RepositoryError::Damaged { what: "blob", digest: *digest });
        }
        Ok(bytes)
    }

    /// A manifest's bytes as they travel to agents, verified.
    pub fn manifest_bytes(&self, digest: &Digest) -> Result<Vec<u8>, RepositoryError> {
        let bytes = self.inner.storage.get(&manifest_key(digest)).map_err(|e| match e {
            e if e.is_not_found() => RepositoryError::UnknownManifest { digest: *digest },
            e => e.into(),
        })?;
        if crate::digest_of(&bytes) != *digest {
            return Err(RepositoryError::Damaged { what: "manifest", digest: *digest });
        }
        Ok(bytes)
    }

    /// A manifest, verified and parsed.
    pub fn manifest(&self, digest: &Digest) -> Result<Manifest, RepositoryError> {
        let bytes = self.manifest_bytes(digest)?;
        Manifest::parse(&bytes).map_err(|source| format_error(&manifest_key(digest), source))
    }

    /// Reads an image back; each chunk is verified when it is read.
    pub fn reader(&self, manifest: Arc<Manifest>) -> Reader {
        Reader::new(self.clone(), manifest)
    }

    /// True when the index knows the chunk (its bytes are not read).
    pub fn contains_chunk(&self, digest: &Digest) -> bool {
        self.inner.index.read().chunks.contains_key(digest)
    }

    /// A chunk's bytes, verified. When one copy is damaged and there is another, that one is given.
    pub fn read_chunk(&self, digest: &Digest) -> Result<Vec<u8>, RepositoryError> {
        let unknown = || RepositoryError::UnknownChunk { digest: *digest };
        loop {
            let copies = self.inner.index.read().copies(digest);
            let mut error = unknown();
            for (at, key) in &copies {
                match self.inner.read_copy(digest, at, key) {
                    Ok(bytes) => return Ok(bytes),
                    Err(RepositoryError::Storage(e)) if e.is_not_found() => error = unknown(),
                    Err(e) => error = e,
                }
            }
            if copies.is_empty() {
                return Err(error);
            }
            // prune moves chunks, and each time it may do so between look-up and read. It changes the index before it deletes
            // a pack, and no pack number comes twice: copies that are still in the index were there all the time, and are lost
            let mut index = self.inner.index.write();
            if index.copies(digest) == copies {
                index.bad.insert(*digest);
                return Err(error);
            }
        }
    }

    /// The digests of all manifests in the storage, referenced or not yet removed.
    pub fn manifests(&self) -> Result<Vec<Digest>, RepositoryError> {
        self.digests("manifests/")
    }

    pub(crate) fn digests(&self, prefix: &str) -> Result<Vec<Digest>, RepositoryError> {
        let keys = self.inner.storage.list(prefix)?;
        Ok(keys.iter().filter_map(|key| key[prefix.len()..].parse().ok()).collect())
    }

    /// Names of the references that start with `prefix`, sorted.
    pub fn references(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        let keys = self.inner.storage.list("refs/")?;
        let names = keys.iter().map(|key| &key["refs/".len()..]);
        Ok(names.filter(|name| name.starts_with(prefix)).map(str::to_string).collect())
    }

    /// One reference, verified.
    pub fn reference(&self, name: &str) -> Result<Reference, RepositoryError> {
        let key = reference_key(name)?;
        let bytes = self.inner.storage.get(&key).map_err(|e| match e {
            e if e.is_not_found() => RepositoryError::UnknownReference { name: name.to_string() },
            e => e.into(),
        })?;
        Reference::parse(&bytes).map_err(|source| format_error(&key, source))
    }

    /// Drops a reference. What only it kept is removed by the next [`Repository::prune`].
    pub fn forget_reference(&self, name: &str) -> Result<(), RepositoryError> {
        let key = reference_key(name)?;
        let _publish = self.inner.publish.lock();
        self.inner.storage.len(&key).map_err(|e| match e {
            e if e.is_not_found() => RepositoryError::UnknownReference { name: name.to_string() },
            e => e.into(),
        })?;
        Ok(self.inner.storage.delete(&key)?)
    }

    /// Drops what [`Repository::ingest`] or [`Repository::put_blob`] kept under this digest.
    pub fn forget(&self, digest: &Digest) -> Result<(), RepositoryError> {
        match self.forget_reference(&manifest_name(digest)) {
            Err(RepositoryError::UnknownReference { .. }) => self.forget_reference(&blob_name(digest)),
            done => done,
        }
    }

    pub fn stats(&self) -> RepositoryStats {
        let index = self.inner.index.read();
        RepositoryStats {
            packs: index.packs.iter().flatten().count() as u64,
            chunks: index.chunks.len() as u64,
            stored_bytes: ByteLen(index.packs.iter().flatten().map(|p| p.length).sum()),
            damaged_packs: index.damaged_packs,
        }
    }
}

impl Inner {
    pub fn begin_session(&self) -> u64 {
        let mut pins = self.pins.lock();
        let id = pins.next_session;
        pins.next_session += 1;
        pins.sessions.insert(id, HashSet::new());
        id
    }

    pub fn end_session(&self, session: u64) {
        let mut pins = self.pins.lock();
        let packs = pins.sessions.remove(&session);
        if let (Some(touched), Some(packs)) = (&mut pins.touched, packs) {
            touched.extend(packs);
        }
    }

    /// True when the chunk is here and good as far as known; its pack then stays until the session ends.
    pub fn find_and_pin(&self, session: u64, digest: &Digest) -> bool {
        // prune removes a pack under the write lock, after a look at the pins: between these two lines it cannot
        let index = self.index.read();
        match index.chunks.get(digest) {
            Some(at) if !index.bad.contains(digest) => {
                if let Some(packs) = self.pins.lock().sessions.get_mut(&session) {
                    packs.insert(at.pack);
                }
                true
            }
            _ => false,
        }
    }

    /// Stores a pack and makes its chunks known. Gives the pack's memory back.
    pub fn store_pack(&self, session: Option<u64>, sealed: pack::SealedPack) -> Result<Vec<u8>, StorageError> {
        // time-ordered names: a later pack is read later at open; never reused, so a delete cannot hit a new pack
        let key: Arc<str> = format!("packs/{}", uuid::Uuid::now_v7().simple()).into();
        self.storage.put(&key, &sealed.bytes)?;
        let mut index = self.index.write();
        let number = index.add_pack(key, sealed.bytes.len() as u64, &sealed.entries);
        if let Some(packs) = session.and_then(|s| self.pins.lock().sessions.get_mut(&s).map(|p| p.insert(number))) {
            debug_assert!(packs, "a pack number is new");
        }
        Ok(sealed.bytes)
    }

    /// Reads one copy and compares it with its name.
    pub fn read_copy(&self, digest: &Digest, at: &Location, key: &str) -> Result<Vec<u8>, RepositoryError> {
        let bytes = self.storage.get_range(key, u64::from(at.offset), at.len as usize)?;
        if crate::digest_of(&bytes) != *digest {
            return Err(RepositoryError::Damaged { what: "chunk", digest: *digest });
        }
        Ok(bytes)
    }

    /// Puts manifests and blobs, then the reference that keeps them.
    pub fn publish(
        &self,
        name: &str,
        reference: &Reference,
        blobs: &[(Digest, Vec<u8>)],
        manifests: &[(Digest, Vec<u8>)],
    ) -> Result<(), RepositoryError> {
        let key = reference_key(name)?;
        let bytes = reference.encode();
        let _publish = self.publish.lock();
        match self.storage.get(&key) {
            Ok(there) if there != bytes => return Err(RepositoryError::ReferenceExists { name: name.to_string() }),
            Ok(_) => {}
            Err(e) if e.is_not_found() => {}
            Err(e) => return Err(e.into()),
        }
        // put again what is there already: this heals a damaged object, and costs little
        for (digest, bytes) in blobs {
            self.storage.put(&blob_key(digest), bytes)?;
        }
        for (digest, bytes) in manifests {
            self.storage.put(&manifest_key(digest), bytes)?;
        }
        Ok(self.storage.put(&key, &bytes)?)
    }

    /// All references, parsed. An unreadable one is an error: what it keeps is unknown.
    pub fn all_references(&self) -> Result<Vec<(String, Vec<Kept>)>, RepositoryError> {
        let mut all = Vec::new();
        for key in self.storage.list("refs/")? {
            let bytes = self.storage.get(&key)?;
            let reference = Reference::parse(&bytes).map_err(|source| format_error(&key, source))?;
            all.push((key, reference.kept));
        }
        Ok(all)
    }
}

pub(crate) fn format_error(key: &str, source: FormatError) -> RepositoryError {
    RepositoryError::Format { object: key.to_string(), source }
}

pub(crate) fn manifest_key(digest: &Digest) -> String {
    format!("manifests/{digest}")
}

pub(crate) fn blob_key(digest: &Digest) -> String {
    format!("blobs/{digest}")
}

fn manifest_name(digest: &Digest) -> String {
    format!("manifest-{digest}")
}

fn blob_name(digest: &Digest) -> String {
    format!("blob-{digest}")
}

fn reference_key(name: &str) -> Result<String, RepositoryError> {
    check_name(name)?;
    Ok(format!("refs/{name}"))
}

fn encode_format() -> Vec<u8> {
    let mut bytes = vec![0; header::LEN];
    put(&mut bytes, header::MAGIC, MAGIC);
    put(&mut bytes, header::VERSION, &VERSION.to_le_bytes());
    put(&mut bytes, header::CHUNK_SIZE, &(CHUNK_SIZE as u32).to_le_bytes());
    let sum = crate::digest_of(&bytes[..header::CHECKSUM.start]);
    put(&mut bytes, header::CHECKSUM, sum.as_bytes());
    bytes
}

fn check_format(bytes: &[u8]) -> Result<(), FormatError> {
    check_head(bytes, WHAT, MAGIC, VERSION, header::LEN)?;
    if bytes.len() != header::LEN {
        return Err(FormatError::Truncated { what: WHAT, need: header::LEN as u64, have: bytes.len() as u64 });
    }
    if crate::digest_of(&bytes[..header::CHECKSUM.start]) != digest_at(bytes, header::CHECKSUM) {
        return Err(FormatError::Checksum { what: WHAT });
    }
    if u32_at(bytes, header::CHUNK_SIZE) as usize != CHUNK_SIZE {
        return Err(FormatError::Invalid { what: WHAT, reason: "the chunk size is not 65536" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_pinned_by_golden_bytes() {
        let golden = include_bytes!("../tests/golden/format-v1.bin");
        assert_eq!(encode_format(), golden);
        check_format(golden).unwrap();
        for at in 0..golden.len() {
            let mut bytes = golden.to_vec();
            bytes[at] ^= 1;
            assert!(check_format(&bytes).is_err(), "byte {at}");
            assert!(check_format(&golden[..at]).is_err(), "cut to {at}");
        }
    }
}
