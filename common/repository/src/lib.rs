//! A content-addressed repository of chunks: disk images at the controller, backups of volumes at the agents.
//!
//! An image or volume is cut into 64 KiB chunks named by their BLAKE3-256; zero chunks are left out. Chunks are kept in
//! packs, each content once. A [`Manifest`] says which chunk stands where; its own digest names the image. A *reference*
//! (a name, a list of digests, and a payload of the caller's) keeps manifests and blobs alive; what no reference reaches,
//! [`Repository::prune`] removes.
//!
//! Main types: [`Repository`] and [`Session`] (write), [`Reader`] (read an image back), [`Manifest`],
//! [`storage::Storage`] (where objects live), [`source::ReadAt`] and [`source::open_image`] (what is read in),
//! [`estimate::Estimator`] (how much memory an image will need), [`export::Qcow2Writer`] (an image as a file again).
//!
//! ```text
//! format                 repository header           repository.rs
//! packs/<uuid v7>        chunks + index + footer     pack.rs
//! manifests/<digest>     chunk table of an image     manifest.rs
//! blobs/<digest>         small files (kernel)        the bytes themselves
//! refs/<name>            what is kept, and why       reference.rs
//! ```
//!
//! Invariants:
//! 1. Objects are never changed after their `put`; references may be removed.
//! 2. Order of writing: packs and blobs, then manifests, then the reference. Order of removal: reference, then manifests and
//!    blobs, then packs. So at any moment, also after a crash between any two steps, everything a reference reaches is
//!    there; what a crash leaves over is garbage that `prune` removes.
//! 3. No bytes leave the repository unverified: each read hashes what it read and compares it with the name.
//! 4. A chunk may stand in two packs (concurrent sessions, a crash in `prune`, a repair). `prune` drops a copy only after it
//!    read the other one and found it good. A session that relied on the dropped copy relies on the other one then.
//! 5. One [`Repository`] (with its clones) works on one storage; [`storage::DirectoryStorage`] holds a lock for it.
//!
//! Concurrent operations:
//!
//! | | session (ingest) | read, verify | forget | prune |
//! |---|---|---|---|---|
//! | session | may store a chunk twice (inv. 4) | independent | independent | prune leaves packs that a session uses or used since prune began |
//! | read | | independent | independent | a moved chunk is looked up again, as often as it moves; a forgotten image stops being readable |
//! | forget | | | independent | what is forgotten during a prune goes with this one or the next |
//! | prune | | | | one at a time: the second waits |
//!
//! Threads: `ingest`, `verify`, `estimate` and `read_data` start scoped threads, one a core (and six more where a cold source
//! makes them wait for its disk), joined before they return. Locks, in the order
//! they may be taken: `prune` -> `publish` -> `index` -> `pins`; none is held across a read of a source.
//!
//! Does not: name or version images (the controller's database does), compress, encrypt (feature bits leave room), lock
//! against other processes beyond the storage's own lock.
#![forbid(unsafe_code)]

mod buffer;
pub mod error;
pub mod estimate;
pub mod export;
pub mod fuzz;
mod ingest;
mod layout;
pub mod manifest;
mod pack;
mod prune;
mod reader;
pub mod reference;
mod repository;
mod scan;
pub mod source;
pub mod storage;
mod verify;

use muster_common::Digest;

pub use error::{FormatError, RepositoryError};
pub use ingest::{IngestOptions, Ingested, Progress, Session, manifest_of};
pub use manifest::{ChunkRef, Manifest, ManifestBuilder};
pub use prune::PruneReport;
pub use reader::Reader;
pub use reference::{Kept, Reference};
pub use repository::{Repository, RepositoryStats};
pub use verify::{BadChunk, Defect, VerifyReport};

/// Bytes in a chunk. 64 KiB: BLAKE3 runs at its full speed from there on (3.8-4.5 GB/s a core against 2.3-3.0 at 4 KiB), the
/// table costs 0.05 % of the data, and a desktop's changed 4 KiB costs at most 16 times itself in a backup.
pub const CHUNK_SIZE: usize = 64 * 1024;

/// The name of these bytes.
pub fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_bytes(*blake3::hash(bytes).as_bytes())
}

/// True when all bytes are zero. Written so that the compiler uses vector instructions.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(512).all(|part| part.iter().fold(0, |seen, byte| seen | byte) == 0)
}
