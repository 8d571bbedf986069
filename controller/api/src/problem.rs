//! Error bodies, RFC 9457.

use muster_common::ErrorCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why a request was not answered as asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `urn:muster:problem:<code>`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code in words.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What went wrong this time, for people.
    pub detail: String,
    /// Stable; programs branch on this.
    pub code: String,
    /// Names close to an unknown or ambiguous one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub near: Vec<String>,
}

impl Problem {
    pub fn new(status: u16, code: ErrorCode, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("urn:muster:problem:{code}"),
            title: code.as_str().replace('-', " "),
            status,
            detail: detail.into(),
            code: code.as_str().to_string(),
            near: Vec::new(),
        }
    }
}
