//! One error type: kind (what a caller branches on), context (what was attempted on what), source.

use std::error::Error as StdError;
use std::fmt;

use muster_common::id::VmId;

/// What a caller may branch on. Text is for people only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HypervisorErrorKind {
    /// No such domain.
    NotFound,
    /// The domain is in a state in which the call is refused; nothing was changed.
    InvalidState,
    /// A domain of that id or name exists with other contents.
    AlreadyExists,
    /// This hypervisor, or this configuration of it, cannot do it.
    Unsupported,
    /// The call was running when its deadline passed. It may still take effect: read the state again.
    Unknown,
    /// The call never started before its deadline, or the queue is full. Nothing was done.
    Busy,
    /// The guest agent is missing, not connected or does not answer.
    AgentUnavailable,
    /// The guest agent answered with an error (e.g. file not found in the guest).
    GuestFailed,
    /// The hypervisor cannot be reached or opened.
    Connection,
    /// Something needed is not installed on this host; the context says what to install.
    NotInstalled,
    /// The server of one of the domain's disks is not there. Nothing was done.
    DiskUnavailable,
    /// The caller's specification is wrong.
    InvalidSpec,
    /// Anything else, see the source.
    Other,
}

/// Why a hypervisor call did not do what was asked.
#[derive(Debug)]
pub struct HypervisorError {
    kind: HypervisorErrorKind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl HypervisorError {
    /// An error without a cause below it.
    pub fn new(kind: HypervisorErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// An error caused by another one.
    pub fn with_source(
        kind: HypervisorErrorKind,
        context: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self { kind, context: context.into(), source: Some(source.into()) }
    }

    pub(crate) fn not_found(vm: VmId) -> Self {
        Self::new(HypervisorErrorKind::NotFound, format!("find domain {vm}"))
    }

    pub(crate) fn unsupported(what: &str) -> Self {
        Self::new(HypervisorErrorKind::Unsupported, format!("{what} is not supported by this hypervisor"))
    }

    /// What to branch on.
    pub fn kind(&self) -> HypervisorErrorKind {
        self.kind
    }

    /// What was attempted on what.
    pub fn context(&self) -> &str {
        &self.context
    }

    /// True when the call may still take effect.
    pub fn is_unknown(&self) -> bool {
        self.kind == HypervisorErrorKind::Unknown
    }
}

impl fmt::Display for HypervisorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl StdError for HypervisorError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// Result of every call of this crate.
pub type Result<T, E = HypervisorError> = std::result::Result<T, E>;
