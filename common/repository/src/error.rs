//! What can go wrong, by kind. Messages name what was attempted; the source carries the rest.

use muster_common::{Digest, ErrorCode};

use crate::{source::SourceError, storage::StorageError};

/// Bytes that are not the format they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    #[error("{what}: wrong magic, this is not a {what}")]
    Magic { what: &'static str },
    #[error("{what}: version {version} is not supported (this program reads version {supported})")]
    Version { what: &'static str, version: u32, supported: u32 },
    #[error("{what}: needs features this program does not have (incompatible bits {bits:#x}); use a newer version")]
    Features { what: &'static str, bits: u64 },
    #[error("{what}: truncated, {need} bytes needed and {have} found")]
    Truncated { what: &'static str, need: u64, have: u64 },
    #[error("{what}: checksum differs, the bytes are damaged")]
    Checksum { what: &'static str },
    #[error("{what}: {reason}")]
    Invalid { what: &'static str, reason: &'static str },
}

impl FormatError {
    /// True when a newer program may read what this one refuses.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::Version { .. } | Self::Features { .. })
    }
}

/// Why the repository did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("read {object}")]
    Format {
        object: String,
        #[source]
        source: FormatError,
    },
    #[error("no manifest {digest} in this repository")]
    UnknownManifest { digest: Digest },
    #[error("no blob {digest} in this repository")]
    UnknownBlob { digest: Digest },
    #[error("no chunk {digest} in this repository")]
    UnknownChunk { digest: Digest },
    #[error("no reference {name:?} in this repository")]
    UnknownReference { name: String },
    /// The stored bytes do not hash to their name: the medium damaged them.
    #[error("{what} {digest} is damaged: its bytes do not hash to its name")]
    Damaged { what: &'static str, digest: Digest },
    #[error("{name:?} is not a reference name: 1 to 200 of a-z 0-9 . _ - and not starting with a dot")]
    InvalidName { name: String },
    #[error("a reference named {name:?} exists already")]
    ReferenceExists { name: String },
    #[error("{what} of {size} bytes exceeds the limit of {limit} bytes")]
    TooLarge { what: &'static str, size: u64, limit: u64 },
    #[error("the storage holds objects but no repository header: not a repository, or its header was lost")]
    NotARepository,
    #[error("encode a reference's payload")]
    InvalidPayload {
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The progress callback said stop. What was written is garbage that prune removes.
    #[error("cancelled")]
    Cancelled,
}

impl RepositoryError {
    /// The code that travels.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Storage(e) => e.code(),
            Self::Source(e) => e.code(),
            Self::Format { source, .. } if source.is_unsupported() => ErrorCode::Unsupported,
            Self::Format { .. } | Self::Damaged { .. } | Self::NotARepository => ErrorCode::Corrupt,
            Self::UnknownManifest { .. }
            | Self::UnknownBlob { .. }
            | Self::UnknownChunk { .. }
            | Self::UnknownReference { .. } => ErrorCode::NotFound,
            Self::InvalidName { .. } | Self::TooLarge { .. } | Self::InvalidPayload { .. } => {
                ErrorCode::InvalidArgument
            }
            Self::ReferenceExists { .. } => ErrorCode::AlreadyExists,
            Self::Cancelled => ErrorCode::Cancelled,
        }
    }
}
