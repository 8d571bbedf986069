//! Why a request was not done. The kind is what callers branch on; the front end turns it into an errno.

use std::{error::Error, fmt};

use muster_common::ErrorCode;

/// What went wrong, as far as a front end must tell cases apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockErrorKind {
    /// The range is not within the device.
    OutOfRange,
    /// The device takes no changes.
    ReadOnly,
    /// The memory budget or quota does not hold it. The write may succeed later.
    NoSpace,
    /// The data could not be read or written: bad checksum, failed disk.
    Io,
    /// The device was withdrawn (deleted, superseded, or fenced after a fault): no request will succeed again.
    Fenced,
    /// The device cannot do this kind of request.
    Unsupported,
    /// The request makes no sense.
    Invalid,
}

impl BlockErrorKind {
    /// What was wrong, for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OutOfRange => "out of range",
            Self::ReadOnly => "read-only",
            Self::NoSpace => "no space",
            Self::Io => "input/output error",
            Self::Fenced => "fenced",
            Self::Unsupported => "unsupported",
            Self::Invalid => "invalid request",
        }
    }

    /// The code that travels on the wire and in REST bodies.
    pub const fn code(self) -> ErrorCode {
        match self {
            Self::OutOfRange | Self::Invalid => ErrorCode::InvalidArgument,
            Self::ReadOnly => ErrorCode::PermissionDenied,
            Self::NoSpace => ErrorCode::NoSpace,
            Self::Io => ErrorCode::Io,
            Self::Fenced => ErrorCode::VolumeLost,
            Self::Unsupported => ErrorCode::Unsupported,
        }
    }
}

/// A request that was not done: kind, what was attempted, and the cause.
#[derive(Debug)]
pub struct BlockError {
    kind: BlockErrorKind,
    context: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl BlockError {
    /// `context` says what was attempted and on what, in lower case and without a full stop.
    pub fn new(kind: BlockErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// The same with its cause.
    pub fn with_source(
        kind: BlockErrorKind,
        context: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self { kind, context: context.into(), source: Some(source.into()) }
    }

    pub const fn kind(&self) -> BlockErrorKind {
        self.kind
    }
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.context, self.kind.as_str())
    }
}

impl Error for BlockError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_is_printed_by_the_chain_and_not_by_the_error() {
        let error = BlockError::with_source(BlockErrorKind::Io, "read frame 7", std::io::Error::other("bad checksum"));
        assert_eq!(error.to_string(), "read frame 7 (input/output error)");
        assert_eq!(muster_common::Chain(&error).to_string(), "read frame 7 (input/output error): bad checksum");
    }
}
