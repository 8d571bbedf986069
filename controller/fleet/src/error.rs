//! Why a request cannot be decided as asked.

use muster_common::ErrorCode;

/// A refusal. Names to offer instead are in [`FleetError::near`], not in the text: whoever prints it appends them once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FleetError {
    #[error("no {what} named {name:?}")]
    Unknown { what: &'static str, name: String, near: Vec<String> },
    #[error("{name:?} is ambiguous")]
    Ambiguous { name: String, candidates: Vec<String> },
    #[error("{target} names no {what}")]
    Empty { target: String, what: &'static str },
    #[error("{what} {name:?} exists already")]
    Exists { what: &'static str, name: String },
    #[error("{name:?} cannot be used as {what} name: {rule}")]
    InvalidName { what: &'static str, name: String, rule: &'static str },
    #[error("group {inner:?} cannot be put into {outer:?}: {outer:?} lies in it ({path})")]
    Cycle { outer: String, inner: String, path: String },
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    NoSpace(String),
    #[error("{what} {name:?} has changed: its version is {actual}, not {expected}")]
    Conflict { what: &'static str, name: String, expected: u64, actual: u64 },
}

impl FleetError {
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Unknown { .. } => ErrorCode::NotFound,
            Self::Ambiguous { .. } => ErrorCode::Ambiguous,
            Self::Exists { .. } => ErrorCode::AlreadyExists,
            Self::Cycle { .. } => ErrorCode::GroupCycle,
            Self::NoSpace(_) => ErrorCode::NoSpace,
            Self::Conflict { .. } => ErrorCode::Conflict,
            Self::Empty { .. } | Self::InvalidName { .. } | Self::Invalid(_) => ErrorCode::InvalidArgument,
        }
    }
    /// Names to offer instead.
    pub fn near(&self) -> &[String] {
        match self {
            Self::Unknown { near, .. } => near,
            Self::Ambiguous { candidates, .. } => candidates,
            _ => &[],
        }
    }
}
