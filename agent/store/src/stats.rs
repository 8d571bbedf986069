//! What the store says about itself.

use muster_common::{ByteLen, Digest, SnapshotId, TenantId, VolumeId};

use crate::{PageKind, config::WhenFull};

/// The store as a whole. All figures are of now; under load they are each right for some recent instant.
#[derive(Clone, Debug, PartialEq)]
pub struct StoreStats {
    /// What the store may take from the machine: frames and metadata together.
    pub budget: ByteLen,
    /// What it has taken: `frame_bytes` and `metadata_bytes`. Never above `budget`.
    pub resident_bytes: ByteLen,
    /// Frames taken from the machine, in use or kept for reuse.
    pub frame_bytes: ByteLen,
    /// Reference counts, index, maps, and the fixed tables.
    pub metadata_bytes: ByteLen,
    /// Frames that hold a block now. Equal blocks share one.
    pub unique_blocks: u64,
    /// `unique_blocks` in bytes.
    pub used_bytes: ByteLen,
    /// What is left of the budget, with the frames kept for reuse and after the metadata of what would fill it.
    pub available_bytes: ByteLen,
    /// Blocks that images, volumes and snapshots map to a frame (not holes), in bytes.
    pub logical_bytes: ByteLen,
    /// The sizes of all images and volumes.
    pub provisioned_bytes: ByteLen,
    /// `logical_bytes` over `used_bytes`; 1 when nothing is stored.
    pub dedup_ratio: f64,
    /// All-zero blocks written since the start; none took a frame.
    pub zero_blocks: u64,
    /// Blocks written since the start that were found to be stored already.
    pub dedup_hits: u64,
    /// Blocks written since the start that took a frame.
    pub dedup_misses: u64,
    /// Requests refused since the start because the budget was full.
    pub no_space: u64,
    pub images: usize,
    pub volumes: usize,
    /// Snapshots somebody holds or that are kept, and images being brought in.
    pub snapshots: usize,
    /// Frames kept aside for volumes with a reservation; `unique_blocks` does not count them, `frame_bytes` does.
    pub reserved_bytes: ByteLen,
    /// Blocks in the spill file. They are among `unique_blocks`, their memory is not in `frame_bytes`.
    pub spilled_bytes: ByteLen,
    /// Blocks written to the spill file, and read from it, since the start.
    pub spill_writes: u64,
    pub spill_reads: u64,
    /// Blocks that are damaged and not repaired: whoever reads them gets an error.
    pub damaged_blocks: u64,
    /// The pages the arena really got.
    pub pages: PageKind,
    /// Whether the memory outlives this process.
    pub shared: bool,
}

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeStats {
    pub id: VolumeId,
    pub generation: u64,
    pub base: Option<Digest>,
    pub size: ByteLen,
    pub read_only: bool,
    pub tenant: Option<TenantId>,
    pub quota: Option<ByteLen>,
    pub reservation: Option<ByteLen>,
    pub when_full: WhenFull,
    /// Blocks mapped to a frame, shared ones included.
    pub mapped_bytes: ByteLen,
    /// Blocks that differ in place from what the volume was made from: what a reset gives up, before dedup.
    pub changed_bytes: ByteLen,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    pub digest: Digest,
    pub name: String,
    pub size: ByteLen,
    /// Blocks mapped to a frame.
    pub mapped_bytes: ByteLen,
    /// Volumes cloned from it.
    pub volumes: usize,
}

/// One kept snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    pub id: SnapshotId,
    /// Given by whoever keeps it.
    pub label: String,
    /// The volume it is of.
    pub volume: VolumeId,
    pub size: ByteLen,
    /// When it was kept, µs since 1970.
    pub kept_us: u64,
}

/// What reading every block of an image or volume and hashing it again found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Mapped blocks checked.
    pub blocks: u64,
    /// Byte offsets of blocks whose frame no longer has the hash it was stored under (the first 1000).
    pub bad: Vec<u64>,
}

impl VerifyReport {
    pub fn is_clean(&self) -> bool {
        self.bad.is_empty()
    }
}

/// What an exact recount of all references found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditReport {
    /// Frames referenced by at least one map.
    pub frames: u64,
    /// References to frames, from all map leaves.
    pub frame_references: u64,
    /// Map nodes referenced by at least one root or node.
    pub nodes: u64,
    /// Maps counted: images, volumes, snapshots, and images being brought in.
    pub maps: usize,
    pub images: usize,
    pub volumes: usize,
    /// Everything that is not as the recount says (the first 1000). Empty in a sound store.
    pub faults: Vec<String>,
}

impl AuditReport {
    pub fn is_exact(&self) -> bool {
        self.faults.is_empty()
    }
}
