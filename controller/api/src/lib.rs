//! The REST contract of the controller, `/v1`: its types, its problem codes, and a typed client over a unix socket or
//! HTTP. The CLI, the web console and tests speak to the controller through this and nothing else.
//!
//! Main types: [`Client`], [`Problem`], [`Page`]; one module for each noun of the interface.
//!
//! Invariants:
//! 1. Types hold data only. Times are microseconds since the Unix epoch (`*_us`), sizes are bytes.
//! 2. Every error body is a [`Problem`] (RFC 9457) whose `code` is an [`ErrorCode`](muster_common::ErrorCode).
//! 3. Enumerations are written in kebab-case words, the same as in the command line.
//! 4. A field is never removed or given another meaning within `/v1`; readers ignore fields they do not know.
//!
//! Owns no threads and no locks. It decides nothing: what a request means is the controller's business.
#![forbid(unsafe_code)]

pub mod backup;
pub mod client;
pub mod command;
pub mod event;
pub mod group;
pub mod host;
pub mod image;
pub mod job;
pub mod metrics;
pub mod page;
pub mod problem;
pub mod status;
pub mod store;
pub mod template;
pub mod top;
pub mod vm;

pub use backup::{Backup, BackupVolume};
pub use client::{Client, ClientError, Download, Endpoint, Extents, Upload};
pub use command::{
    Command, CommandEvent, CommandQuery, CommandState, CommandSummary, CreateCommand, Member, Outcome, Progress,
    TargetKind, Verb, Verdict,
};
pub use event::{Event, EventQuery, Severity, Usage, UsageQuery};
pub use group::{ChangeGroup, CreateGroup, Group, GroupMembers, Reference};
pub use host::{Host, HostState};
pub use image::{
    Blob, BootFiles, CommitImage, Estimate, EstimateRequest, ExportFormat, ExportQuery, Image, ImageFormat,
    ImportByPath, ImportQuery, PullImage, Residency,
};
pub use job::{Job, JobEvent, JobState};
pub use metrics::{HostMetrics, VmMetrics, VolumeMetrics};
pub use page::{ListQuery, Page};
pub use problem::Problem;
pub use status::{Alarm, Cell, Check, CheckResult, Doctor, Status};
pub use store::{Store, StoreHealth, StoreImage, StoreNode};
pub use template::{
    Application, ChangeLimits, ChangeTemplate, CreateTemplate, DiskLimits, NetworkMode, Template, WhenFull,
};
pub use top::{Top, TopHost, TopVm};
pub use vm::{CreateVms, CreatedVms, Disk, Placed, Vm, VmQuery, VmStanding, VmState, Volume, VolumeQuery};

/// The header that every answer of a controller in lab mode carries, with the value `true`.
pub const LAB_HEADER: &str = "muster-lab";
/// The header by which a repeated POST is known: the first answer is replayed.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// The header of an export that says how many bytes of data the image has, zeros left out.
pub const DATA_HEADER: &str = "muster-data-bytes";
/// Media type of error bodies (RFC 9457).
pub const PROBLEM_JSON: &str = "application/problem+json";
/// The protocol named in `Upgrade` for raw byte streams (console, VNC).
pub const STREAM_PROTOCOL: &str = "muster-stream";
