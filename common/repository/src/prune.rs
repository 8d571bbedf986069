//! Removing what no reference reaches: mark and sweep, in an order that a crash at any step leaves safe.
//!
//! 1. Under the `publish` lock: read all references, remove manifests and blobs that none of them keeps.
//! 2. Mark: read the kept manifests, collect their chunks.
//! 3. Of chunks stored twice, keep one copy that was read and found good.
//! 4. Packs without a live chunk are removed. Packs with less than half of their bytes live are rewritten: first the new
//!    packs are durable, then the index points there, then the old ones are removed.
//!
//! A session that runs meanwhile is safe because each pack it wrote or found a chunk in is pinned, and stays pinned for a
//! prune that began before the session ended. One unreadable reference or kept manifest stops the prune before anything of
//! step 4: what it keeps is not known.

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
                inner.index.write().keep_only(digest, *good);
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
