//! The images and volumes of one host, resident in memory, deduplicated and copy-on-write.
//!
//! Main types: [`Store`] is the whole; [`ImageBuilder`] brings an [`Image`] in; a [`Volume`] is a clone of an image or a
//! snapshot, or blank; a [`Snapshot`] is a volume at one instant. Images, volumes and snapshots are
//! [`muster_block::BlockDevice`]s. [`StoreStats`] says what all that takes, [`AuditReport`] whether every count is right.
//!
//! ```text
//!   Image, Volume, Snapshot, ImageBuilder        volume.rs image.rs store.rs, store/ (opening, snapshots)
//!      | each has a
//!   Disk  (range checks, errors, the books)      disk.rs
//!      | which is a
//!   Map   16 stripes: lock + tree of nodes       map.rs, map/   4 bytes a block, shared between clones
//!      |                                           differences.rs: what two maps do not share
//!      | limited by
//!   Account: quota, reservation, policy          account.rs
//!      | whose leaves name
//!   Frame 4 KiB, written once, counted           frames.rs   8 bytes a frame
//!      | found by content through
//!   Index hash -> frame, 1024 shards             index.rs    10 to 14 bytes a frame
//!      | perhaps elsewhere, or damaged
//!   Marks, Spill, scrub                          marks.rs spill.rs scrub.rs    2 bits a frame
//!      | in memory dealt by
//!   Pool, Budget                                 pool.rs
//!      | from
//!   Region                                       arena.rs    all the `unsafe` there is
//!      | private, or in files that outlive the process
//!   Memory, Records                              memory.rs records.rs          attach.rs believes them
//! ```
//!
//! # Invariants
//! 1. A frame's bytes never change between its publication and the loss of its last reference.
//! 2. A frame's count is the number of leaf entries that name it (plus those of writes under way); a node's count the
//!    number of roots and inner entries that name it. Counts stick at the top: such a frame is kept for ever.
//! 3. Two frames that are listed in the index never hold equal bytes of one tenant. A hash is a hint: bytes are always
//!    compared. (After an attach two may, when one of them had not been listed before.)
//! 4. An all-zero block is a hole, and a hole takes no frame.
//! 5. A node with more than one reference is never changed; a node with one is changed only under the stripe lock of the
//!    map that reaches it.
//! 6. A new reference is counted before an old one is dropped.
//! 7. What is charged to the budget is what the machine has lent us, frames and metadata, and never more than the budget,
//!    unless an attach finds more than the budget it was given: then nothing new is taken until it fits.
//!    (hugetlb pages are all the store's from its opening on: with them the charge says what of them is in use.)
//!    (Up to 2 MiB less with huge pages, which are charged before they are touched; heap for lists of free numbers,
//!    0.1 % of what is free, and 260 KiB through which blocks go to the spill file, is not charged.)
//! 8. A refused write changes whole blocks or nothing: never a part of a block.
//! 9. Whenever the process ends, every record names a whole tree, in which each block of a write under way is as before or
//!    as after (`map.rs` says why). Nothing else is believed by whoever attaches.
//! 10. A disk's error is its own: quotas, refusals, damage and spilling of one volume are never another one's.
//!
//! # Which operations may meet
//!
//! `world` is taken by everybody who changes references; only the audit stops it. `stripe` is one of a map's 16 locks,
//! `shard` one of the index's 1024. A write does all that is slow (hash, compare, copy) before it takes the stripe.
//!
//! | | read | write, zero, trim | clone, snapshot | reset, revert | delete, drop | import | verify | audit |
//! |---|---|---|---|---|---|---|---|---|
//! | **read** | stripe shared: never wait for each other | same volume: stripe, held by the write for a pointer swap (a partial block: for one block's work); a frame replaced is released after the lock, so no reader still copies it | both shared | exclusive on all stripes for a swap of 16 roots; the old trees are released after | as reset; afterwards reads are refused as fenced | nobody reads what is being built | shared | reads go on: they change nothing |
//! | **write, zero, trim** | | same volume: the stripe orders them, partial blocks are read and written under it, so no sector is lost; different volumes meet in shards and pools only | the copy takes all stripes shared, in order, and counts the roots up: it sees each write wholly applied or not, block by block; later writes find those nodes shared and copy them | ordered by the stripes: before it and gone, or after it | ordered by the stripes: before and freed, or after and refused, its frame given back | as different volumes | verifies a copy | waits outside the world |
//! | **clone, snapshot** | | | shared | the roots are swapped under all stripes, so a copy has all of the old or all of the new | refused after; a copy made before counts its own references | an image is cloned when it is finished | shared | waits |
//! | **reset, revert** | | | | ordered by the stripes | as write | apart | verifies a copy | waits |
//! | **delete, drop** | | | | | tables are locked exclusively: one finds it, the other does not; an image is dropped under the lock that a clone of it holds shared | a second builder of the same digest is refused while one is at work | verifies a copy, which keeps the frames | waits |
//! | **import** | | | | | | different images as different volumes; chunks of one image as writes of one volume | apart | waits; what is being built is counted too |
//! | **verify** | | | | | | | shared | its copy is on the books |
//!
//! Two that look for the same block: the shard's lock is held over search, comparison and listing, so one stores it and
//! the other finds it. Scrub hashes a frame under that lock too, so that it is not freed and filled anew meanwhile; who
//! reads a frame that is being marked or mended finds out by its sequence and reads again. Spilling chooses blocks with the
//! stripe shared and counts them up, holds nothing while the disk writes, and renames what nobody changed meanwhile with the
//! stripe and then the shard exclusive: whoever read the frame is done, whoever looks for the block finds one of the two. A backup
//! reads a snapshot, and so meets nobody. One that finds a frame and one that drops its last reference: the count goes to 0 only under that
//! lock. Two that own nodes below a shared one: each copies it, the second to let go frees it.
//!
//! `schedules/mod.rs` tries such meetings out, with a scheduler that chooses at each lock and atomic operation who goes on.
//!
//! # Threads and locks
//! No threads of its own. Order: world, images, volumes, then building or books, then the stripes of a map (ascending), a
//! shard, a pool's cache, its central list. Purges of a pool exclude each other by a lock taken before its caches. Whoever
//! makes room by spilling takes the hand of the clock first, with the world held and perhaps the table of volumes, and the lock
//! of what takes room in the file under it; below a shard, the slot of a frame that is away is locked while it is read. Nobody
//! calls out of the crate with a lock held, but for the sink of `read_with`, which is called with a stripe shared and must not
//! come back to the store.
//!
//! # What it does not do
//! Durability (a journal's and the backup's): memory that outlives the process does not outlive the machine. Naming and
//! counting of exports (the agent's), reading image formats (the repository's), deciding when to scrub and when to give back
//! huge pages that are free in part (no threads).

#[cfg(all(feature = "shuttle", not(test)))]
compile_error!("the feature shuttle is for one test: cargo test -p muster-store --features shuttle --lib schedules");

mod account;
#[cfg_attr(feature = "shuttle", path = "schedules/arena.rs")]
mod arena;
mod attach;
mod audit;
mod config;
mod differences;
mod disk;
mod error;
mod frames;
mod image;
mod index;
mod map;
mod marks;
mod memory;
mod pool;
mod records;
#[cfg(feature = "shuttle")]
mod schedules;
mod scrub;
mod spill;
mod stats;
mod store;
mod sync;
mod volume;

pub use attach::AttachReport;
pub use config::{PageKind, Pages, SpillConfig, StoreConfig, VolumeSpec, WhenFull};
pub use error::StoreError;
pub use image::{Image, ImageBuilder};
pub use scrub::{Bring, Damage, Place, ScrubStep};
pub use stats::{AuditReport, ImageInfo, SnapshotInfo, StoreStats, VerifyReport, VolumeStats};
pub use store::{Attached, Store};
pub use volume::{Snapshot, Volume};
