//! Why a request is not answered as asked, on its way to a problem body.

use std::error::Error;

use muster_api::Problem;
use muster_common::{Chain, ErrorCode};
use muster_fleet::FleetError;
use muster_repository::{RepositoryError, source::SourceError};

use crate::db::DbError;

/// A refusal with its stable code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: ErrorCode,
    pub detail: String,
    pub near: Vec<String>,
    /// The database failed: what the core has in memory may be ahead of it.
    pub database: bool,
}

impl Refusal {
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), near: Vec::new(), database: false }
    }
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidArgument, detail)
    }
    fn of(code: ErrorCode, error: &(dyn Error + 'static)) -> Self {
        Self::new(code, Chain(error).to_string())
    }

    pub fn into_problem(self) -> Problem {
        let mut problem = Problem::new(status_of(self.code), self.code, self.detail);
        problem.near = self.near;
        problem
    }
}

/// The HTTP status a code is answered with.
pub fn status_of(code: ErrorCode) -> u16 {
    match code {
        ErrorCode::Ok => 200,
        ErrorCode::InvalidArgument | ErrorCode::Ambiguous => 400,
        ErrorCode::PermissionDenied => 403,
        ErrorCode::NotFound => 404,
        ErrorCode::AlreadyExists
        | ErrorCode::InvalidState
        | ErrorCode::InUse
        | ErrorCode::GroupCycle
        | ErrorCode::StaleIncarnation
        | ErrorCode::HostDraining
        | ErrorCode::VolumeLost => 409,
        ErrorCode::Conflict => 412,
        ErrorCode::UnsupportedFormat | ErrorCode::ExternalReference | ErrorCode::Corrupt => 422,
        ErrorCode::Unsupported => 501,
        ErrorCode::Hypervisor | ErrorCode::GuestAgent => 502,
        ErrorCode::HostOffline | ErrorCode::Unavailable | ErrorCode::AddressInUse | ErrorCode::Cancelled => 503,
        ErrorCode::Timeout | ErrorCode::Expired | ErrorCode::Indeterminate => 504,
        ErrorCode::NoSpace => 507,
        ErrorCode::Io | ErrorCode::Internal => 500,
    }
}

impl From<FleetError> for Refusal {
    fn from(error: FleetError) -> Self {
        Self { near: error.near().to_vec(), ..Self::of(error.code(), &error) }
    }
}
impl From<DbError> for Refusal {
    fn from(error: DbError) -> Self {
        Self { database: true, ..Self::of(error.code(), &error) }
    }
}
impl From<RepositoryError> for Refusal {
    fn from(error: RepositoryError) -> Self {
        Self::of(error.code(), &error)
    }
}
impl From<SourceError> for Refusal {
    fn from(error: SourceError) -> Self {
        Self::of(error.code(), &error)
    }
}
