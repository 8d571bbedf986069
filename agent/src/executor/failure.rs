//! Why an order was not done, as its verdict will say it.

use muster_backup::BackupError;
use muster_common::{Chain, ErrorCode};
use muster_idl::v1::Outcome;
use muster_store::StoreError;
use muster_virt::HypervisorError;

use crate::{
    arguments::ArgumentError, images::PullError, machines::code_of, records::RecordError, volumes::VolumeError,
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub outcome: Outcome,
    pub code: ErrorCode,
    pub message: String,
}

impl Failure {
    pub fn failed(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { outcome: Outcome::Failed, code, message: message.into() }
    }

    /// Nothing was begun.
    pub fn refused(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { outcome: Outcome::Refused, code, message: message.into() }
    }

    pub fn timeout(message: impl Into<String>) -> Self {
        Self::failed(ErrorCode::Timeout, message)
    }

    pub fn no_such_vm() -> Self {
        Self::failed(ErrorCode::NotFound, "no such VM on this host")
    }

    pub fn panicked() -> Self {
        Self::failed(ErrorCode::Internal, "a part of the agent panicked; its log says where")
    }

    /// Says what was attempted before the reason.
    #[must_use]
    pub fn while_doing(mut self, what: &str) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl From<HypervisorError> for Failure {
    fn from(e: HypervisorError) -> Self {
        let outcome = if e.is_unknown() { Outcome::Indeterminate } else { Outcome::Failed };
        Self { outcome, code: code_of(e.kind()), message: Chain(&e).to_string() }
    }
}

impl From<ArgumentError> for Failure {
    fn from(e: ArgumentError) -> Self {
        Self::refused(e.code(), e.to_string())
    }
}

impl From<PullError> for Failure {
    fn from(e: PullError) -> Self {
        let text = Chain(&e).to_string();
        if e.is_refusal() { Self::refused(e.code(), text) } else { Self::failed(e.code(), text) }
    }
}

macro_rules! failed_from {
    ($($error:ty),+) => {
        $(impl From<$error> for Failure {
            fn from(e: $error) -> Self {
                Self::failed(e.code(), Chain(&e).to_string())
            }
        })+
    };
}
failed_from!(VolumeError, RecordError, BackupError, StoreError);

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        Self::failed(ErrorCode::Io, Chain(&e).to_string())
    }
}
