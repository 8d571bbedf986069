//! The repository as its users see it: ingest, deduplication, reading back, verification, forgetting, pruning, crashes.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic")]

use std::{
    collections::HashSet,
    ops::ControlFlow,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use muster_common::{ByteLen, Chain, Digest, ErrorCode};
use muster_repository::{
    CHUNK_SIZE, Defect, IngestOptions, Ingested, Kept, Progress, Repository, RepositoryError,
    estimate::{Estimator, estimate},
    source::{ReadAt, SourceError, Span},
    storage::{
        DirectoryStorage, MemoryStorage, Storage, StorageError,
        fault::{Fault, FaultStorage},
    },
};
use proptest::prelude::*;
use tempfile::TempDir;

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn put(repository: &Repository, bytes: &[u8]) -> Ingested {
    repository.ingest(&bytes.to_vec(), &IngestOptions::default(), &mut go).unwrap()
}

fn read(repository: &Repository, digest: &Digest) -> Result<Vec<u8>, String> {
    let manifest = repository.manifest(digest).map_err(|e| Chain(&e).to_string())?;
    let reader = repository.reader(Arc::new(manifest));
    let mut bytes = vec![0xaa; reader.size().0 as usize];
    for (i, piece) in bytes.chunks_mut(70_001).enumerate() {
        reader.read_at(i as u64 * 70_001, piece).map_err(|e| Chain(&e).to_string())?;
    }
    Ok(bytes)
}

/// An image of chunks told by numbers: 0 is zeros, others are contents of their own.
fn image(chunks: &[u8]) -> Vec<u8> {
    chunks.iter().flat_map(|&n| (0..CHUNK_SIZE).map(move |i| if n == 0 { 0 } else { n ^ (i / 256) as u8 })).collect()
}

fn memory() -> (Arc<MemoryStorage>, Repository) {
    let storage = Arc::new(MemoryStorage::new());
    let repository = Repository::open(storage.clone()).unwrap();
    (storage, repository)
}

#[test]
fn an_image_reads_back_as_it_was_and_its_name_depends_on_content_only() {
    let dir = TempDir::new().unwrap();
    let mut bytes = image(&[1, 0, 0, 2, 3, 1, 0, 4]);
    bytes.truncate(bytes.len() - CHUNK_SIZE + 1536);
    let (_, other) = memory();
    let expected = put(&other, &bytes);
    {
        let repository = Repository::open(Arc::new(DirectoryStorage::open(dir.path()).unwrap())).unwrap();
        let done = put(&repository, &bytes);
        assert_eq!(done, expected);
        assert_eq!(done.logical.0, bytes.len() as u64);
        assert_eq!(done.data.0, 4 * CHUNK_SIZE as u64 + 1536);
        assert_eq!(done.new_bytes.0, 3 * CHUNK_SIZE as u64 + 1536, "the repeated chunk is stored once");
        assert_eq!((done.chunks, done.new_chunks), (5, 4));
    }
    let repository = Repository::open(Arc::new(DirectoryStorage::open(dir.path()).unwrap())).unwrap();
    assert_eq!(repository.manifests().unwrap(), [expected.digest]);
    assert_eq!(read(&repository, &expected.digest).unwrap(), bytes);
    let manifest = repository.manifest(&expected.digest).unwrap();
    assert_eq!(manifest.digest(), expected.digest);
    let reader = repository.reader(Arc::new(manifest));
    let mut spans = Vec::new();
    reader.spans(100, u64::MAX, &mut spans).unwrap();
    let chunk = CHUNK_SIZE as u64;
    let expected = [(chunk - 100, false), (2 * chunk, true), (3 * chunk, false), (chunk, true), (1536, false)];
    assert_eq!(spans, expected.map(|(len, zero)| Span { len, zero }));
    let again = put(&repository, &bytes);
    assert_eq!((again.new_chunks, again.new_bytes.0), (0, 0));
}

#[test]
fn two_images_that_overlap_share_their_chunks() {
    let (_, repository) = memory();
    let first: Vec<u8> = (1..=100).collect();
    let second: Vec<u8> = (21..=120).collect();
    let a = put(&repository, &image(&first));
    let b = put(&repository, &image(&second));
    assert_eq!(a.new_chunks, 100);
    assert_eq!(b.new_chunks, 20);
    assert_eq!(repository.stats().chunks, 120);
    let unique = 120 * CHUNK_SIZE as u64;
    assert!(repository.stats().stored_bytes.0 < unique + unique / 100, "packs cost less than 1 %");
    assert_eq!(read(&repository, &a.digest).unwrap(), image(&first));
    assert_eq!(read(&repository, &b.digest).unwrap(), image(&second));
}

#[test]
fn blobs_are_kept_by_their_digest() {
    let (storage, repository) = memory();
    let digest = repository.put_blob(b"a kernel").unwrap();
    assert_eq!(repository.put_blob(b"a kernel").unwrap(), digest);
    repository.prune().unwrap();
    assert_eq!(repository.blob(&digest).unwrap(), b"a kernel");
    storage.damage(&format!("blobs/{digest}"), 2, 1);
    assert_eq!(repository.blob(&digest).unwrap_err().code(), ErrorCode::Corrupt);
    repository.put_blob(b"a kernel").unwrap();
    assert_eq!(repository.blob(&digest).unwrap(), b"a kernel", "storing it again heals it");
    repository.forget(&digest).unwrap();
    assert_eq!(repository.prune().unwrap().blobs_removed, 1);
    assert_eq!(repository.blob(&digest).unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(repository.forget(&digest).unwrap_err().code(), ErrorCode::NotFound);
}

#[test]
fn verify_names_bad_chunks_by_offset_and_a_new_ingest_repairs_them() {
    let (storage, repository) = memory();
    let bytes = image(&[1, 2, 3, 2, 0, 4]);
    let done = put(&repository, &bytes);
    let report = repository.verify(&done.digest, &mut go).unwrap();
    assert!(report.is_good());
    assert_eq!((report.chunks, report.bytes.0), (4, 4 * CHUNK_SIZE as u64));

    let pack = storage.list("packs/").unwrap().remove(0);
    // the second chunk of the pack
    assert!(storage.damage(&pack, 32 + CHUNK_SIZE + 5, 0x10));
    let report = repository.verify(&done.digest, &mut go).unwrap();
    let found: Vec<_> = report.bad.iter().map(|b| (b.offset, b.defect.clone())).collect();
    let at = |n: u64| (n * CHUNK_SIZE as u64, Defect::Damaged);
    assert_eq!(found, [at(1), at(3)], "a chunk used twice is named twice");
    assert!(read(&repository, &done.digest).is_err(), "damaged bytes are never given");

    let again = put(&repository, &bytes);
    assert_eq!(again.new_chunks, 1, "only the bad chunk is stored again");
    assert!(repository.verify(&done.digest, &mut go).unwrap().is_good());
    // also after a restart, whichever copy is found first, and after prune dropped the bad one
    let repository = Repository::open(storage.clone()).unwrap();
    assert!(repository.verify(&done.digest, &mut go).unwrap().is_good());
    repository.prune().unwrap();
    assert_eq!(read(&repository, &done.digest).unwrap(), bytes);
    assert_eq!(read(&Repository::open(storage).unwrap(), &done.digest).unwrap(), bytes);
}

#[test]
fn a_damaged_pack_index_costs_its_chunks_but_not_the_repository() {
    let (storage, repository) = memory();
    let good = put(&repository, &image(&[9, 8]));
    let bad = put(&repository, &image(&[1, 2]));
    let packs = storage.list("packs/").unwrap();
    let end = storage.len(&packs[1]).unwrap() as usize - 1;
    storage.damage(&packs[1], end, 1);
    let repository = Repository::open(storage.clone()).unwrap();
    assert_eq!(repository.stats().damaged_packs, 1);
    assert!(repository.verify(&good.digest, &mut go).unwrap().is_good());
    let report = repository.verify(&bad.digest, &mut go).unwrap();
    assert!(report.bad.iter().all(|b| b.defect == Defect::Missing) && report.bad.len() == 2);
    repository.prune().unwrap();
    assert_eq!(storage.list("packs/").unwrap(), packs, "what cannot be read is not removed");
    put(&repository, &image(&[1, 2]));
    assert!(repository.verify(&bad.digest, &mut go).unwrap().is_good());
}

#[test]
fn a_repository_of_a_newer_version_or_without_its_header_is_refused() {
    let (storage, _) = memory();
    storage.damage("format", 16, 2);
    let error = Repository::open(storage).err().unwrap();
    assert_eq!(error.code(), ErrorCode::Unsupported);
    let storage = Arc::new(MemoryStorage::new());
    storage.put("packs/x", b"").unwrap();
    assert!(matches!(Repository::open(storage).err().unwrap(), RepositoryError::NotARepository));
    let (storage, repository) = memory();
    put(&repository, &image(&[1]));
    let pack = storage.list("packs/").unwrap().remove(0);
    storage.damage(&pack, 16, 1);
    assert_eq!(Repository::open(storage).err().unwrap().code(), ErrorCode::Unsupported);
}

#[test]
fn prune_removes_what_is_forgotten_and_nothing_else() {
    let (storage, repository) = memory();
    let a = put(&repository, &image(&(1..=60).collect::<Vec<_>>()));
    let b = put(&repository, &image(&(41..=100).collect::<Vec<_>>()));
    let before = repository.stats().stored_bytes;
    assert_eq!(repository.prune().unwrap(), Default::default(), "nothing to do");
    repository.forget(&a.digest).unwrap();
    assert!(read(&repository, &a.digest).is_ok(), "forgotten is not removed yet");
    let report = repository.prune().unwrap();
    assert_eq!((report.manifests_removed, report.packs_removed, report.packs_rewritten), (1, 1, 1));
    assert_eq!(repository.stats().stored_bytes.0, before.0 - report.freed.0);
    assert!(report.freed.0 > 39 * CHUNK_SIZE as u64);
    assert_eq!(read(&repository, &b.digest).unwrap(), image(&(41..=100).collect::<Vec<_>>()));
    assert_eq!(repository.manifest(&a.digest).unwrap_err().code(), ErrorCode::NotFound);
    let repository = Repository::open(storage.clone()).unwrap();
    assert!(repository.verify(&b.digest, &mut go).unwrap().is_good());
    repository.forget(&b.digest).unwrap();
    repository.prune().unwrap();
    assert_eq!(storage.list("").unwrap(), ["format"]);
}

#[test]
fn an_unreadable_reference_or_manifest_stops_prune_before_any_pack_is_removed() {
    let (storage, repository) = memory();
    let kept = put(&repository, &image(&[1, 2, 3]));
    let gone = put(&repository, &image(&[4, 5, 6]));
    repository.forget(&gone.digest).unwrap();
    let packs = storage.list("packs/").unwrap();
    let key = format!("refs/manifest-{}", kept.digest);
    storage.damage(&key, 45, 1);
    assert_eq!(repository.prune().unwrap_err().code(), ErrorCode::Corrupt);
    storage.damage(&key, 45, 1);
    let key = format!("manifests/{}", kept.digest);
    storage.damage(&key, 70, 1);
    assert_eq!(repository.prune().unwrap_err().code(), ErrorCode::Corrupt);
    assert_eq!(storage.list("packs/").unwrap(), packs);
    storage.damage(&key, 70, 1);
    repository.prune().unwrap();
    assert_eq!(read(&repository, &kept.digest).unwrap(), image(&[1, 2, 3]));
}

#[test]
fn prune_leaves_alone_what_an_unfinished_session_found_or_wrote() {
    let (_, repository) = memory();
    let old = put(&repository, &image(&[1, 2, 3]));
    let mut session = repository.session();
    let new = session.ingest(&image(&[2, 3, 4]), &IngestOptions::default(), &mut go).unwrap();
    assert_eq!(new.new_chunks, 1);
    repository.forget(&old.digest).unwrap();
    let report = repository.prune().unwrap();
    assert_eq!(report.packs_in_use, 1);
    session.publish("mine", b"payload").unwrap();
    assert_eq!(read(&repository, &new.digest).unwrap(), image(&[2, 3, 4]));
    let reference = repository.reference("mine").unwrap();
    assert_eq!(reference.kept, [Kept::Manifest(new.digest)]);
    assert_eq!(reference.payload, b"payload");
    repository.prune().unwrap();
    assert_eq!(read(&repository, &new.digest).unwrap(), image(&[2, 3, 4]));
    // a session that is dropped leaves garbage that goes
    let mut session = repository.session();
    session.ingest(&image(&[50, 51]), &IngestOptions::default(), &mut go).unwrap();
    drop(session);
    repository.prune().unwrap();
    assert_eq!(repository.stats().chunks, 4, "chunk 1 is dead, in a pack that is not worth rewriting");
}

#[test]
fn another_content_under_a_published_name_is_refused() {
    let (_, repository) = memory();
    let publish = |bytes: &[u8]| {
        let mut session = repository.session();
        session.put_blob(bytes).unwrap();
        session.publish("name", b"")
    };
    publish(b"1").unwrap();
    publish(b"1").unwrap();
    assert_eq!(publish(b"2").unwrap_err().code(), ErrorCode::AlreadyExists);
    assert_eq!(repository.session().publish("no/name", b"").unwrap_err().code(), ErrorCode::InvalidArgument);
    assert_eq!(repository.references("na").unwrap(), ["name"]);
}

/// A source that fails, or shrinks, in the middle.
struct Failing(u64);

impl ReadAt for Failing {
    fn size(&self) -> ByteLen {
        ByteLen(64 << 20)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        if offset >= self.0 {
            return Err(SourceError::Read { offset, source: "unplugged".into() });
        }
        buf.iter_mut().enumerate().for_each(|(i, b)| *b = (i / 65_536 + 1) as u8);
        Ok(())
    }
}

#[test]
fn a_source_that_fails_and_a_callback_that_says_stop_leave_nothing_visible() {
    let (storage, repository) = memory();
    let error = repository.ingest(&Failing(40 << 20), &IngestOptions::default(), &mut go).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Io);
    let mut calls = 0;
    let stop = &mut |_: Progress| {
        calls += 1;
        if calls == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let error = repository.ingest(&image(&[7; 2000]), &IngestOptions::default(), stop).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Cancelled);
    assert_eq!(repository.references("").unwrap(), Vec::<String>::new());
    repository.prune().unwrap();
    assert_eq!(storage.list("").unwrap(), ["format"]);
    assert_eq!(
        repository.ingest(&Vec::new(), &IngestOptions::default(), &mut go).unwrap_err().code(),
        ErrorCode::Corrupt
    );
}

#[test]
fn progress_grows_to_the_total() {
    let (_, repository) = memory();
    let bytes = image(&(0..=255).collect::<Vec<_>>());
    let mut last = Progress { done: ByteLen(0), total: ByteLen(0), new_bytes: ByteLen(0) };
    repository
        .ingest(&bytes, &IngestOptions::default(), &mut |p| {
            assert!(p.done >= last.done && p.new_bytes >= last.new_bytes);
            last = p;
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(last.done, last.total);
    assert_eq!(last.new_bytes.0, 255 * CHUNK_SIZE as u64);
}

#[test]
fn the_estimate_counts_distinct_non_zero_blocks_of_4_kib() {
    let mut bytes = vec![0; 10 << 20];
    // 500 blocks of 300 contents, spread
    for i in 0..500usize {
        bytes[i * 5 * 4096..][..8].copy_from_slice(&(1 + (i % 300) as u64).to_le_bytes());
    }
    assert_eq!(estimate(&bytes).unwrap(), ByteLen(300 * 4096));
    let (_, repository) = memory();
    let done = repository.ingest(&bytes, &IngestOptions { estimate: true }, &mut go).unwrap();
    assert_eq!(done.resident, Some(ByteLen(300 * 4096)));
    // a second image adds only what is its own; the last, short block is padded as the store pads it
    let mut second = bytes[..1 << 20].to_vec();
    second.extend([9; 512]);
    let mut estimator = Estimator::new();
    assert_eq!(estimator.add(&bytes, &mut go).unwrap().added.0, 300 * 4096);
    assert_eq!(estimator.add(&second, &mut go).unwrap().added.0, 4096);
    let mut padded = second.clone();
    padded.resize(second.len() + 3584, 0);
    assert_eq!(estimator.add(&padded, &mut go).unwrap().added.0, 0);
    assert_eq!(estimator.resident().0, 301 * 4096);
}

#[test]
fn the_estimate_beside_a_repository_counts_what_its_chunks_lack() {
    let (_, repository) = memory();
    put(&repository, &image(&[1, 2, 3]));
    let mut estimator = Estimator::new();
    // 1 is there; 4 is not, and shares no block with it; the second 4 is the first
    let beside = estimator.add_beside(&image(&[1, 0, 4, 4]), &repository, &mut go).unwrap();
    assert_eq!(beside.new_bytes.0, CHUNK_SIZE as u64);
    assert_eq!(beside.estimate.resident, estimate(&image(&[1, 4])).unwrap());
    assert_eq!(beside.unknown, estimate(&image(&[4])).unwrap());
    // moved by a block, nothing is known by its chunks, and all of it by its blocks
    let mut moved = vec![7; 4096];
    moved.extend(image(&[1, 2, 3]));
    let beside = estimator.add_beside(&moved, &repository, &mut go).unwrap();
    assert!(beside.unknown > ByteLen(100 * 1024), "{beside:?}");
    let mut exact = Estimator::new();
    exact.add(&image(&[1, 2, 3]), &mut go).unwrap();
    assert_eq!(exact.add(&moved, &mut go).unwrap().added.0, 4096);
}

#[test]
fn chunks_that_come_from_elsewhere_make_the_same_image() {
    let (_, repository) = memory();
    put(&repository, &image(&[1, 2]));
    let mut bytes = image(&[1, 0, 3, 4, 3]);
    bytes.truncate(bytes.len() - 512);
    let manifest = muster_repository::manifest_of(&bytes, &mut go).unwrap();
    let (_, other) = memory();
    assert_eq!(manifest.digest(), put(&other, &bytes).digest, "the same name as an ingest gives it");

    let mut session = repository.session();
    let missing = session.put_manifest(&manifest.encode()).unwrap_err();
    assert!(matches!(missing, RepositoryError::UnknownChunk { .. }), "{missing}");
    let mut added = 0;
    for chunk in manifest.chunks() {
        let range = chunk.offset as usize..chunk.offset as usize + chunk.len;
        let wrong = session.put_chunk(&chunk.digest, &[9; 100]).unwrap_err();
        assert_eq!(wrong.code(), ErrorCode::Corrupt);
        added += session.put_chunk(&chunk.digest, &bytes[range]).unwrap().0;
    }
    // 1 was there; 3 is a whole chunk and a short one, 4 is one
    assert_eq!(added, 3 * CHUNK_SIZE as u64 - 512);
    assert_eq!(session.put_manifest(&manifest.encode()).unwrap(), manifest.digest());
    assert_eq!(
        session.put_chunk(&manifest.digest(), &vec![1; CHUNK_SIZE + 1]).unwrap_err().code(),
        ErrorCode::InvalidArgument
    );
    session.publish("committed", &[]).unwrap();
    repository.prune().unwrap();
    assert!(read(&repository, &manifest.digest()).unwrap() == bytes);
}

#[test]
fn a_cold_file_reads_past_the_page_cache_as_it_is_and_any_thread_sees_each_byte_once() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("cold.raw");
    let mut bytes: Vec<u8> = (0..9_000_000u32).flat_map(|i| (i / 700).to_le_bytes()).collect();
    bytes.truncate(bytes.len() / 512 * 512);
    bytes[5 << 20..7 << 20].fill(0);
    let file = std::fs::File::create(&path).unwrap();
    use std::os::unix::fs::FileExt;
    file.write_all_at(&bytes[..5 << 20], 0).unwrap();
    file.write_all_at(&bytes[7 << 20..], 7 << 20).unwrap();
    file.sync_all().unwrap();
    let open = || muster_repository::source::open_image(&path, muster_repository::source::ImageFormat::Raw).unwrap();
    let check = |source: &dyn ReadAt| {
        let seen = std::sync::Mutex::new(vec![0u8; bytes.len()]);
        muster_repository::source::read_data(source, |offset, piece| {
            assert!(piece.len() <= 1 << 20);
            let mut seen = seen.lock().unwrap();
            for (i, byte) in piece.iter().enumerate() {
                assert_eq!(seen[offset as usize + i], 0, "twice at {offset} + {i}");
                seen[offset as usize + i] = *byte;
            }
            Ok::<_, SourceError>(())
        })
        .unwrap();
        assert!(*seen.lock().unwrap() == bytes);
    };
    assert!(!open().is_cold(), "just written: read from the page cache");
    check(&*open());
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    // where the file system takes direct reads, this one goes past the page cache
    check(&*open());
    let cold = open();
    let (_, repository) = memory();
    let digest = repository.ingest(&*cold, &IngestOptions::default(), &mut go).unwrap().digest;
    assert!(read(&repository, &digest).unwrap() == bytes);
    let failed =
        muster_repository::source::read_data(
            &*cold,
            |offset, _| {
                if offset > 3 << 20 { Err(SourceError::Empty) } else { Ok(()) }
            },
        );
    assert!(matches!(failed, Err(SourceError::Empty)));
}

/// What is done in the crash test. Each part is acknowledged or not; what was acknowledged must be there afterwards.
fn story(storage: Arc<dyn Storage>, acknowledged: &mut Vec<(Digest, Vec<u8>)>) -> Result<(), RepositoryError> {
    let repository = Repository::open(storage)?;
    let keep = |bytes: Vec<u8>, list: &mut Vec<(Digest, Vec<u8>)>| {
        let done = repository.ingest(&bytes, &IngestOptions::default(), &mut go)?;
        list.push((done.digest, bytes));
        Ok::<_, RepositoryError>(done.digest)
    };
    let a = keep(image(&[1, 2, 3, 4, 5, 6]), acknowledged)?;
    keep(image(&[5, 6, 7, 0, 8]), acknowledged)?;
    let mut session = repository.session();
    session.ingest(&image(&[20, 1]), &IngestOptions::default(), &mut go)?;
    session.put_blob(b"kernel")?;
    session.publish("record", b"two things")?;
    acknowledged.retain(|(digest, _)| *digest != a);
    repository.forget(&a)?;
    repository.prune()?;
    keep(image(&[1, 2, 30]), acknowledged)?;
    repository.forget_reference("record")?;
    repository.prune()?;
    Ok(())
}

#[test]
fn a_crash_or_failure_at_any_step_loses_nothing_acknowledged_and_prune_removes_the_rest() {
    let counting = FaultStorage::new(Arc::new(MemoryStorage::new()), u64::MAX, Fault::CrashBefore);
    let counting = Arc::new(counting);
    story(counting.clone(), &mut Vec::new()).unwrap();
    let steps = counting.steps();
    assert!(steps > 20, "{steps}");
    for fault in [Fault::CrashBefore, Fault::CrashAfter, Fault::FailOnce] {
        for at in 0..steps {
            let storage = Arc::new(FaultStorage::new(Arc::new(MemoryStorage::new()), at, fault));
            let mut acknowledged = Vec::new();
            story(storage.clone(), &mut acknowledged).unwrap_err();
            assert!(storage.is_broken());
            let left = storage.surviving();
            // twice: also what a crash during the repair of a crash leaves
            for round in 0..2 {
                let repository = Repository::open(left.clone()).unwrap();
                let referenced = referenced(&repository);
                for (digest, bytes) in &acknowledged {
                    assert!(referenced.contains(digest), "{fault:?} at {at}: an acknowledged image is gone");
                    assert_eq!(&read(&repository, digest).unwrap(), bytes, "{fault:?} at {at}");
                }
                for digest in &referenced {
                    assert!(repository.verify(digest, &mut go).unwrap().is_good(), "{fault:?} at {at} round {round}");
                }
                repository.prune().unwrap();
                let manifests: HashSet<Digest> = repository.manifests().unwrap().into_iter().collect();
                assert_eq!(manifests, referenced, "{fault:?} at {at}: garbage manifests stay");
            }
            // with every reference gone nothing is left
            let repository = Repository::open(left.clone()).unwrap();
            for name in repository.references("").unwrap() {
                repository.forget_reference(&name).unwrap();
            }
            repository.prune().unwrap();
            assert_eq!(left.list("").unwrap(), ["format"], "{fault:?} at {at}");
        }
    }
}

fn referenced(repository: &Repository) -> HashSet<Digest> {
    let names = repository.references("").unwrap();
    let kept = names.iter().flat_map(|name| repository.reference(name).unwrap().kept);
    kept.filter_map(|k| match k {
        Kept::Manifest(digest) => Some(digest),
        Kept::Blob(_) => None,
    })
    .collect()
}

/// Calls a hook before each read of a part of an object, except for reads that the hook makes itself.
#[derive(Default)]
struct Hooked {
    below: MemoryStorage,
    before_read: Mutex<Option<Box<dyn FnMut() + Send>>>,
}

impl Storage for Hooked {
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), StorageError> {
        self.below.put(key, bytes)
    }
    fn get(&self, key: &str) -> Result<Vec<u8>, StorageError> {
        self.below.get(key)
    }
    fn get_range(&self, key: &str, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
        let hook = self.before_read.lock().unwrap().take();
        if let Some(mut hook) = hook {
            hook();
            *self.before_read.lock().unwrap() = Some(hook);
        }
        self.below.get_range(key, offset, len)
    }
    fn len(&self, key: &str) -> Result<u64, StorageError> {
        self.below.len(key)
    }
    fn list(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        self.below.list(prefix)
    }
    fn delete(&self, key: &str) -> Result<(), StorageError> {
        self.below.delete(key)
    }
}

#[test]
fn a_read_follows_its_chunk_as_often_as_prune_moves_it() {
    let storage = Arc::new(Hooked::default());
    let repository = Repository::open(storage.clone()).unwrap();
    // each image is the beginning of the larger one, so that without the larger one its pack is rewritten
    let sizes = [243, 81, 27, 9, 3, 1].map(|n: u8| image(&(1..=n).collect::<Vec<_>>()));
    let mut images: Vec<_> = sizes.iter().map(|bytes| put(&repository, bytes).digest).collect();
    let smallest = images.pop().unwrap();
    let moves = Arc::new(AtomicU64::new(0));
    let (pruned, counted) = (repository.clone(), moves.clone());
    let mut images = images.into_iter();
    *storage.before_read.lock().unwrap() = Some(Box::new(move || {
        if let Some(digest) = images.next() {
            pruned.forget(&digest).unwrap();
            counted.fetch_add(pruned.prune().unwrap().packs_rewritten, Ordering::Relaxed);
        }
    }));
    let bytes = read(&repository, &smallest);
    *storage.before_read.lock().unwrap() = None;
    assert_eq!(moves.load(Ordering::Relaxed), 5);
    assert_eq!(bytes.unwrap(), image(&[1]));
}

#[test]
fn a_pack_that_is_gone_is_noticed_and_a_new_ingest_repairs_its_images() {
    let (storage, repository) = memory();
    let bytes = image(&[1, 2]);
    let done = put(&repository, &bytes);
    storage.delete(&storage.list("packs/").unwrap()[0]).unwrap();
    let report = repository.verify(&done.digest, &mut go).unwrap();
    assert!(report.bad.iter().all(|b| b.defect == Defect::Missing) && report.bad.len() == 2);
    assert_eq!(put(&repository, &bytes).new_chunks, 2);
    assert_eq!(read(&repository, &done.digest).unwrap(), bytes);
}

#[test]
fn a_chunk_that_a_session_wrote_stays_when_prune_keeps_another_copy_of_it() {
    let (storage, repository) = memory();
    // enough to fill a pack, which is then stored before the session publishes; its first chunk is shared
    let bytes: Vec<u8> = (0..600u32).flat_map(|n| [n + 1; CHUNK_SIZE / 4]).flat_map(u32::to_le_bytes).collect();
    let mut session = repository.session();
    let mut other = None;
    let done = session
        .ingest(&bytes, &IngestOptions::default(), &mut |_| {
            // the session has looked for its first chunk, and has stored nothing yet
            other.get_or_insert_with(|| put(&repository, &bytes[..CHUNK_SIZE]));
            ControlFlow::Continue(())
        })
        .unwrap();
    let other = other.unwrap();
    assert_eq!((done.new_chunks, other.new_chunks), (600, 1), "both store the shared chunk");
    assert_eq!(storage.list("packs/").unwrap().len(), 2);
    // of the two copies the other image's is kept, then that image goes
    repository.prune().unwrap();
    repository.forget(&other.digest).unwrap();
    repository.prune().unwrap();
    session.publish("mine", b"").unwrap();
    assert!(read(&repository, &done.digest).unwrap() == bytes);
    repository.prune().unwrap();
    for repository in [repository, Repository::open(storage).unwrap()] {
        assert!(repository.verify(&done.digest, &mut go).unwrap().is_good());
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn sessions_readers_forgetting_and_pruning_at_the_same_time_lose_nothing() {
    let (storage, repository) = memory();
    let base = put(&repository, &image(&(1..=40).collect::<Vec<_>>()));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // also when a writer panics: the scope waits for the other threads, and they wait for this
        let stopping = SetOnDrop(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                repository.prune().unwrap();
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(read(&repository, &base.digest).unwrap().len(), 40 * CHUNK_SIZE);
            }
        });
        let writers: Vec<_> = (0..3u8)
            .map(|w| {
                let repository = &repository;
                scope.spawn(move || {
                    for round in 0..40u8 {
                        // shared with the base, with other writers, with forgotten rounds, and new
                        let bytes = image(&[1 + round % 40, 100 + round % 7, 120 + w, 200 + (round + w) % 30]);
                        let name = format!("w{w}-{round}");
                        let mut session = repository.session();
                        let done = session.ingest(&bytes, &IngestOptions::default(), &mut go).unwrap();
                        session.publish(&name, b"").unwrap();
                        assert_eq!(read(repository, &done.digest).unwrap(), bytes);
                        if round % 3 != 0 {
                            repository.forget_reference(&name).unwrap();
                        }
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        drop(stopping);
    });
    for repository in [repository, Repository::open(storage).unwrap()] {
        for digest in referenced(&repository) {
            assert!(repository.verify(&digest, &mut go).unwrap().is_good());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_sparse_source_reads_back(
        chunks in proptest::collection::vec(0u8..6, 1..60),
        tail in 0usize..CHUNK_SIZE / 512,
        unit in 1u64..200_000,
    ) {
        /// Reports holes exactly, in spans of odd lengths.
        struct Sparse(Vec<u8>, u64);
        impl ReadAt for Sparse {
            fn size(&self) -> ByteLen {
                self.0.size()
            }
            fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
                self.0.read_at(offset, buf)
            }
            fn spans(&self, offset: u64, len: u64, out: &mut Vec<Span>) -> Result<(), SourceError> {
                let len = len.min(self.1);
                let part = &self.0[offset as usize..(offset + len) as usize];
                out.push(Span { len, zero: part.iter().all(|&b| b == 0) });
                Ok(())
            }
        }
        let mut bytes = image(&chunks);
        bytes.truncate(bytes.len() - tail * 512);
        prop_assume!(!bytes.is_empty());
        let (_, repository) = memory();
        let done = repository.ingest(&Sparse(bytes.clone(), unit), &IngestOptions::default(), &mut go).unwrap();
        prop_assert_eq!(done.digest, put(&repository, &bytes).digest);
        prop_assert_eq!(read(&repository, &done.digest).unwrap(), bytes);
    }
}
