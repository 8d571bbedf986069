//! Long work within the controller, such as an import.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Problem;

/// One piece of long work. `GET /v1/jobs/{id}?after=<version>&wait_seconds=<s>` waits for a change;
/// `/v1/jobs/{id}/events` streams [`JobEvent`]s.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    pub id: String,
    /// "image-import".
    pub kind: String,
    /// What it works on, for people.
    pub subject: String,
    pub state: JobState,
    pub phase: String,
    pub done: u64,
    /// 0 when unknown.
    pub total: u64,
    /// What came of it: for an import the image. Present when done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
    /// Present when failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
    pub started_at_us: u64,
    /// 0 while it runs.
    pub ended_at_us: u64,
    /// Grows with each change.
    pub version: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    Running,
    Done,
    Failed,
}

/// One server-sent event of a job: the whole job, again; the last has a state other than running.
pub type JobEvent = Job;
