use muster_block::BlockError;
use muster_common::{ErrorCode, VolumeId};
use muster_repository::{FormatError, RepositoryError};

use crate::BackupId;

/// Why a backup operation was not done.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("no backup {id}")]
    Unknown { id: BackupId },
    #[error("backup {id} is being read")]
    InUse { id: BackupId },
    #[error("backup {id} has no volume {volume}")]
    UnknownVolume { id: BackupId, volume: VolumeId },
    #[error("a backup of no volumes was asked for")]
    NoVolumes,
    #[error("volume {volume} is named twice, or its VM is not in the plan")]
    InvalidPlan { volume: VolumeId },
    #[error("read backup record {name}")]
    Record {
        name: String,
        #[source]
        source: FormatError,
    },
    #[error("volume {volume} is {have} bytes long, its backup {need}")]
    SizeDiffers { volume: VolumeId, have: u64, need: u64 },
    /// Found before the target was touched.
    #[error("{missing} chunks of volume {volume} are missing from the backup repository; nothing was written")]
    ChunksMissing { volume: VolumeId, missing: u64 },
    #[error("back up volume {volume}")]
    Capture {
        volume: VolumeId,
        #[source]
        source: RepositoryError,
    },
    #[error("read volume {volume} from its backup; the target is partly written")]
    Read {
        volume: VolumeId,
        #[source]
        source: RepositoryError,
    },
    #[error("write volume {volume}; it is partly written")]
    Target {
        volume: VolumeId,
        #[source]
        source: BlockError,
    },
    /// The progress callback said stop.
    #[error("cancelled")]
    Cancelled,
}

impl BackupError {
    /// The code that travels.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Repository(e) | Self::Capture { source: e, .. } | Self::Read { source: e, .. } => e.code(),
            Self::Unknown { .. } | Self::UnknownVolume { .. } => ErrorCode::NotFound,
            Self::InUse { .. } => ErrorCode::InUse,
            Self::NoVolumes | Self::InvalidPlan { .. } | Self::SizeDiffers { .. } => ErrorCode::InvalidArgument,
            Self::Record { source, .. } if source.is_unsupported() => ErrorCode::Unsupported,
            Self::Record { .. } | Self::ChunksMissing { .. } => ErrorCode::Corrupt,
            Self::Target { source, .. } => source.kind().code(),
            Self::Cancelled => ErrorCode::Cancelled,
        }
    }
}
