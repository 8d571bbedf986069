//! Why the store refused something. Errors of single requests are [`muster_block::BlockError`]s.

use muster_block::BlockErrorKind;
use muster_common::{ByteLen, Digest, ErrorCode, SnapshotId, VolumeId};

/// Why an operation on the store, an image or a volume as a whole was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error("the memory budget of {budget} does not hold {needed} more: delete what is not needed, or raise it")]
    NoSpace { budget: ByteLen, needed: ByteLen },
    #[error("image {} is resident already", .0.short())]
    ImageExists(Digest),
    #[error("image {} is being built by somebody else", .0.short())]
    ImageInProgress(Digest),
    #[error("image {} is not resident", .0.short())]
    ImageNotFound(Digest),
    #[error("image {} is in use by {volumes} volumes", .digest.short())]
    ImageInUse { digest: Digest, volumes: usize },
    #[error("volume {0} exists already")]
    VolumeExists(VolumeId),
    #[error("there is no volume {0}")]
    VolumeNotFound(VolumeId),
    #[error("a volume of {size} cannot start from {base}, which is larger")]
    SmallerThanBase { size: ByteLen, base: ByteLen },
    #[error("{size} is no size for a volume: {rule}")]
    Size { size: ByteLen, rule: &'static str },
    #[error("the snapshot belongs to another store")]
    ForeignSnapshot,
    #[error("the volume was deleted")]
    Deleted,
    #[error("reserve {size} of address space for {what}")]
    Map { what: &'static str, size: ByteLen, source: std::io::Error },
    #[error(
        "take {needed} huge pages of 2 MiB for a store on hugetlb pages: {free} of the {all} that the machine has set aside \
         are free (set more aside with vm.nr_hugepages, or make the budget smaller)"
    )]
    HugePages { needed: u64, free: u64, all: u64, source: std::io::Error },
    #[error("a store on hugetlb pages spills nothing: choose other pages, or no spill file")]
    SpillFromHugetlb,
    #[error("the volume's quota of {quota} is used up")]
    Quota { quota: ByteLen },
    #[error("what was stored there is damaged and could not be repaired: restore it from a backup")]
    Damaged,
    #[error("{action} {path}", path = path.display())]
    Memory { action: &'static str, path: std::path::PathBuf, source: std::io::Error },
    #[error(
        "{path} is not in memory and this process may not mount a tmpfs there: choose a directory on a tmpfs, such as \
         one below /dev/shm, or start as root", path = path.display()
    )]
    NotInMemory { path: std::path::PathBuf },
    #[error(
        "{bytes} of the blocks in memory were spilled to a file, and {}: bring it back, and configure it as it was; or take \
         away the store's memory to begin with an empty one",
        path.as_ref().map_or("none is configured now".to_string(), |path| format!("{} does not hold them", path.display()))
    )]
    SpillMissing { bytes: ByteLen, path: Option<std::path::PathBuf> },
    #[error("the memory in {path} is in use by another process: is another agent running?", path = path.display())]
    InUse { path: std::path::PathBuf },
    #[error("{0:?} is too long for a name: at most 256 bytes")]
    Name(String),
    #[error("the store holds no more than {0} images, volumes and snapshots")]
    TooMany(u32),
    #[error("the store knows no more than 255 tenants")]
    TooManyTenants,
    #[error("there is no snapshot {0}")]
    SnapshotNotFound(SnapshotId),
    #[error("a volume of {size} is not made smaller, to {wanted}")]
    Shrink { size: ByteLen, wanted: ByteLen },
    #[error("a budget of {budget} is outside of what the store can manage ({least} to {most})")]
    Budget { budget: ByteLen, least: ByteLen, most: ByteLen },
}

impl StoreError {
    pub(crate) fn no_huge_pages(frames: u32, source: std::io::Error) -> Self {
        let needed = ((u64::from(frames) + 1) * crate::arena::BLOCK as u64).div_ceil(2 << 20);
        let (free, all) = crate::memory::huge_pages();
        Self::HugePages { needed, free, all, source }
    }

    /// The code that travels on the wire and in REST bodies.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::NoSpace { .. } | Self::Quota { .. } | Self::TooMany(_) | Self::TooManyTenants => ErrorCode::NoSpace,
            Self::ImageExists(_) | Self::VolumeExists(_) => ErrorCode::AlreadyExists,
            Self::ImageInProgress(_) => ErrorCode::Conflict,
            Self::ImageNotFound(_) | Self::VolumeNotFound(_) | Self::SnapshotNotFound(_) => ErrorCode::NotFound,
            Self::ImageInUse { .. } | Self::InUse { .. } => ErrorCode::InUse,
            Self::SmallerThanBase { .. }
            | Self::Size { .. }
            | Self::ForeignSnapshot
            | Self::Budget { .. }
            | Self::NotInMemory { .. }
            | Self::SpillFromHugetlb
            | Self::Name(_)
            | Self::Shrink { .. } => ErrorCode::InvalidArgument,
            Self::Deleted => ErrorCode::VolumeLost,
            Self::Damaged | Self::SpillMissing { .. } => ErrorCode::Corrupt,
            Self::Map { .. } | Self::Memory { .. } | Self::HugePages { .. } => ErrorCode::Unavailable,
        }
    }

    /// The nearest kind of a single request.
    pub const fn block_kind(&self) -> BlockErrorKind {
        match self {
            Self::NoSpace { .. } | Self::Quota { .. } => BlockErrorKind::NoSpace,
            Self::Damaged => BlockErrorKind::Io,
            Self::Deleted => BlockErrorKind::Fenced,
            _ => BlockErrorKind::Invalid,
        }
    }
}
