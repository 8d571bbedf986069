//! Removing what no reference reaches: mark and sweep, in an order that a crash at any step leaves safe.
//!
//! 1. Under the `publish` lock: read all references, remove manifests and blobs that none of them keeps.
//! 2. Mark: read the kept manifests, collect their chunks.
//! 3. Of chunks stored twice, keep one copy that was read and found good.
//! 4. Packs without a live chunk are removed. Packs with less than half of their bytes live are rewritten: first the new
//!    packs are durable, then the index points there, then the old ones are removed.
//!
//! A session that runs meanwhile is safe because each pack it wrote or found a chunk in is pinned, and stays pinned for a
//! prune that began before the session ended. When step 3 drops a copy in such a pack, the pack of the kept copy is pinned
//! for the session, too: later prunes may find nobody else who needs that copy. One unreadable reference or kept manifest
//! stops the prune before anything of step 4: what it keeps is not known.

use std::collections::HashSet;

use muster_common::{ByteLen, Digest};

use crate::{
    error::RepositoryError,
    pack::{self, Entry, PackBuilder, PackIndex},
    reference::Kept,
    repository::{Inner, PackInfo, PackNumber, Repository, blob_key, manifest_key},
};

/// What a prune did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PruneReport {
    pub manifests_removed: u64,
    pub blobs_removed: u64,
    pub packs_removed: u64,
    /// Of these, packs whose live chunks were copied to new packs.
    pub packs_rewritten: u64,
    /// Bytes of removed packs less the bytes written anew.
    pub freed: ByteLen,
    /// Packs left alone because a session uses them.
    pub packs_in_use: u64,
    /// Packs left alone because they, or a live chunk in them, cannot be read.
    pub packs_damaged: u64,
}

/// Ends the pinning for prunes also when prune returns early.
struct Marking<'a>(&'a Inner);

impl Drop for Marking<'_> {
    fn drop(&mut self) {
        self.0.pins.lock().end_prune();
    }
}

struct Candidate {
    number: PackNumber,
    info: PackInfo,
    entries: Vec<Entry>,
    rewritten: bool,
}

impl Repository {
    /// Removes manifests, blobs, chunks and packs that no reference reaches. May run beside sessions and reads.
    pub fn prune(&self) -> Result<PruneReport, RepositoryError> {
        let inner = &*self.inner;
        let _one = inner.prune.lock();
        inner.pins.lock().begin_prune();
        let _marking = Marking(inner);
        let mut report = PruneReport::default();

        let kept = self.remove_unreferenced(&mut report)?;
        let mut live = HashSet::new();
        for digest in &kept {
            live.extend(self.manifest(digest)?.chunks().map(|c| c.digest));
        }
        self.resolve_duplicates(&live);

        let mut removed = Vec::new();
        let mut written = 0;
        let mut builder = PackBuilder::new();
        let packs = inner.index.read().packs();
        for (number, info) in packs {
            if inner.pins.lock().is_pinned(number) {
                report.packs_in_use += 1;
                continue;
            }
            let entries = match pack::read_index(&*inner.storage, &info.key)? {
                PackIndex::Good { entries, .. } => entries,
                PackIndex::Bad(_) => {
                    report.packs_damaged += 1;
                    continue;
                }
            };
            let needed: Vec<Entry> = {
                let index = inner.index.read();
                entries.iter().filter(|e| live.contains(&e.digest) && index.is_first(number, e)).copied().collect()
            };
            let bytes = |list: &[Entry]| list.iter().map(|e| u64::from(e.len)).sum::<u64>();
            if needed.len() == entries.len() || bytes(&needed) * 2 > bytes(&entries) {
                continue;
            }
            let rewritten = !needed.is_empty();
            if rewritten {
                match self.copy_chunks(&needed, &mut builder, &mut written)? {
                    true => {}
                    false => {
                        report.packs_damaged += 1;
                        continue;
                    }
                }
            }
            removed.push(Candidate { number, info, entries, rewritten });
        }
        if !builder.is_empty() {
            let sealed = builder.seal();
            written += sealed.bytes.len() as u64;
            inner.store_pack(None, sealed)?;
        }
        // every copy is durable now
        for candidate in removed {
            let gone = {
                let mut index = inner.index.write();
                let pinned = inner.pins.lock().is_pinned(candidate.number);
                !pinned && index.remove_pack(candidate.number, &candidate.entries, &live)
            };
            if !gone {
                report.packs_in_use += 1;
                continue;
            }
            inner.storage.delete(&candidate.info.key)?;
            report.packs_removed += 1;
            report.packs_rewritten += u64::from(candidate.rewritten);
            report.freed.0 += candidate.info.length;
        }
        report.freed.0 = report.freed.0.saturating_sub(written);
        Ok(report)
    }

    /// Step 1; gives the kept manifests.
    fn remove_unreferenced(&self, report: &mut PruneReport) -> Result<HashSet<Digest>, RepositoryError> {
        let inner = &*self.inner;
        let _publish = inner.publish.lock();
        let mut manifests = HashSet::new();
        let mut blobs = HashSet::new();
        for (_, kept) in inner.all_references()? {
            for kept in kept {
                match kept {
                    Kept::Manifest(digest) => manifests.insert(digest),
                    Kept::Blob(digest) => blobs.insert(digest),
                };
            }
        }
        for digest in self.digests("manifests/")? {
            if !manifests.contains(&digest) {
                inner.storage.delete(&manifest_key(&digest))?;
                report.manifests_removed += 1;
            }
        }
        for digest in self.digests("blobs/")? {
            if !blobs.contains(&digest) {
                inner.storage.delete(&blob_key(&digest))?;
                report.blobs_removed += 1;
            }
        }
        Ok(manifests)
    }

    /// Step 3. A chunk without any good copy keeps all of its copies.
    fn resolve_duplicates(&self, live: &HashSet<Digest>) {
        let inner = &*self.inner;
        let duplicated = inner.index.read().duplicated();
        for digest in duplicated.iter().filter(|d| live.contains(d)) {
            let copies = inner.index.read().copies(digest);
            if let Some((good, _)) = copies.iter().find(|(at, key)| inner.read_copy(digest, at, key).is_ok()) {
                // a session may have written a dropped copy, and who keeps this one may forget it before the session publishes
                let mut index = inner.index.write();
                let dropped = index.keep_only(digest, *good);
                inner.pins.lock().follow(&dropped, good.pack);
            }
        }
    }

    /// Copies chunks into the builder, storing packs as they fill. False when one of them cannot be read.
    fn copy_chunks(
        &self,
        needed: &[Entry],
        builder: &mut PackBuilder,
        written: &mut u64,
    ) -> Result<bool, RepositoryError> {
        for entry in needed {
            let Ok(bytes) = self.read_chunk(&entry.digest) else {
                return Ok(false);
            };
            if builder.is_full() {
                let sealed = builder.seal();
                *written += sealed.bytes.len() as u64;
                self.inner.store_pack(None, sealed)?;
            }
            builder.push(entry.digest, &bytes);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{HashSet, VecDeque},
        sync::{
            Arc,
            atomic::{AtomicBool, AtomicUsize, Ordering},
        },
    };

    use muster_common::{ByteLen, Digest};
    use parking_lot::Mutex;
    use proptest::prelude::*;

    use crate::{
        CHUNK_SIZE, ManifestBuilder, Repository, Session,
        storage::{MemoryStorage, Storage, StorageError},
    };

    /// What happens; the first number is a session's place.
    #[derive(Clone, Debug)]
    enum Step {
        Put(usize, u8),
        /// Stores the session's pack, as if it were full.
        Store(usize),
        Publish(usize),
        Abandon(usize),
        Forget(usize),
        /// The next steps happen in the middle of it, one before each access to a pack.
        Prune(usize),
        Nothing,
    }

    fn step() -> impl Strategy<Value = Step> {
        let session = 0..3usize;
        prop_oneof![
            6 => (session.clone(), 1..9u8).prop_map(|(s, chunk)| Step::Put(s, chunk)),
            3 => session.clone().prop_map(Step::Store),
            2 => session.clone().prop_map(Step::Publish),
            1 => session.prop_map(Step::Abandon),
            3 => any::<usize>().prop_map(Step::Forget),
            4 => (0..9usize).prop_map(Step::Prune),
            2 => Just(Step::Nothing),
        ]
    }

    struct World {
        repository: Repository,
        steps: VecDeque<Step>,
        sessions: [Option<(Session, Vec<u8>)>; 3],
        published: Vec<(String, Vec<u8>)>,
        names: u32,
    }

    fn chunk(n: u8) -> (Digest, Vec<u8>) {
        let bytes = vec![n; CHUNK_SIZE];
        (crate::digest_of(&bytes), bytes)
    }

    impl World {
        fn act(&mut self, step: Step) {
            match step {
                Step::Put(s, n) => {
                    let (session, chunks) =
                        self.sessions[s].get_or_insert_with(|| (self.repository.session(), Vec::new()));
                    let (digest, bytes) = chunk(n);
                    session.put_chunk(&digest, &bytes).unwrap();
                    chunks.push(n);
                }
                Step::Store(s) => {
                    if let Some((session, _)) = &mut self.sessions[s] {
                        session.store_pack().unwrap();
                    }
                }
                Step::Publish(s) => {
                    let Some((mut session, chunks)) = self.sessions[s].take() else { return };
                    let mut manifest = ManifestBuilder::new(ByteLen((chunks.len() * CHUNK_SIZE) as u64));
                    for (i, n) in chunks.iter().enumerate() {
                        manifest.push(i as u64, chunk(*n).0);
                    }
                    session.put_manifest(&manifest.finish().encode()).unwrap();
                    self.names += 1;
                    let name = format!("image-{}", self.names);
                    session.publish(&name, b"").unwrap();
                    self.published.push((name, chunks));
                }
                Step::Abandon(s) => self.sessions[s] = None,
                Step::Forget(at) if !self.published.is_empty() => {
                    let (name, _) = self.published.remove(at % self.published.len());
                    self.repository.forget_reference(&name).unwrap();
                }
                Step::Forget(_) | Step::Prune(_) | Step::Nothing => {}
            }
        }

        fn check(&self, repository: &Repository) {
            for n in self.published.iter().flat_map(|(_, chunks)| chunks).collect::<HashSet<_>>() {
                let (digest, bytes) = chunk(*n);
                assert!(repository.read_chunk(&digest).unwrap() == bytes);
            }
        }
    }

    /// While a prune runs, does the world's next steps before accesses to packs.
    #[derive(Default)]
    struct Interleaved {
        below: MemoryStorage,
        world: Mutex<Option<Arc<Mutex<World>>>>,
        left: AtomicUsize,
        inside: AtomicBool,
    }

    impl Interleaved {
        fn before(&self, key: &str) {
            if !key.starts_with("packs/") || self.inside.swap(true, Ordering::Relaxed) {
                return;
            }
            let more = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
            if more && let Some(world) = &*self.world.lock() {
                let mut world = world.lock();
                if let Some(step) = world.steps.pop_front() {
                    world.act(step);
                    world.check(&world.repository);
                }
            }
            self.inside.store(false, Ordering::Relaxed);
        }
    }

    impl Storage for Interleaved {
        fn put(&self, key: &str, bytes: &[u8]) -> Result<(), StorageError> {
            self.before(key);
            self.below.put(key, bytes)
        }
        fn get(&self, key: &str) -> Result<Vec<u8>, StorageError> {
            self.below.get(key)
        }
        fn get_range(&self, key: &str, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
            self.before(key);
            self.below.get_range(key, offset, len)
        }
        fn len(&self, key: &str) -> Result<u64, StorageError> {
            self.before(key);
            self.below.len(key)
        }
        fn list(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
            self.below.list(prefix)
        }
        fn delete(&self, key: &str) -> Result<(), StorageError> {
            self.before(key);
            self.below.delete(key)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn nothing_published_is_lost_and_nothing_forgotten_stays_whatever_happens_between_the_steps_of_a_prune(
            steps in proptest::collection::vec(step(), 1..60),
        ) {
            let storage = Arc::new(Interleaved::default());
            let repository = Repository::open(storage.clone()).unwrap();
            let world = Arc::new(Mutex::new(World {
                repository: repository.clone(),
                steps: steps.into(),
                sessions: Default::default(),
                published: Vec::new(),
                names: 0,
            }));
            *storage.world.lock() = Some(world.clone());
            loop {
                let Some(step) = world.lock().steps.pop_front() else { break };
                if let Step::Prune(steps) = step {
                    storage.left.store(steps, Ordering::Relaxed);
                    repository.prune().unwrap();
                    storage.left.store(0, Ordering::Relaxed);
                } else {
                    world.lock().act(step);
                }
                world.lock().check(&repository);
            }
            *storage.world.lock() = None;
            let mut world = Arc::into_inner(world).unwrap().into_inner();
            for s in 0..3 {
                world.act(Step::Publish(s));
            }
            world.check(&repository);
            repository.prune().unwrap();
            world.check(&repository);
            world.check(&Repository::open(storage.clone()).unwrap());
            while !world.published.is_empty() {
                world.act(Step::Forget(0));
            }
            repository.prune().unwrap();
            prop_assert_eq!(storage.list("").unwrap(), ["format"]);
        }
    }
}
