//! The contract of Muster on the wire: every DDS topic, as Rust types that mirror `idl/*.idl`.
//!
//! Data only. `idl/muster_v1.idl` is what other vendors compile; [`v1`] is its Rust mirror, field by field in
//! the same order, because XCDR1 of a `@final` type is the fields in IDL order and nothing else. [`topics`] is
//! the table of all topics: read it first. [`arguments`] is the JSON inside arguments and results.
//!
//! Invariants:
//! 1. A `@final` type cannot grow. A changed type is a new version: new module, new topic names (`muster_v2_…`).
//! 2. Field order and type of the IDL file and of the Rust mirror are equal (a test compares them).
//! 3. Enumerations count from 0 without gaps; CIM enumerations travel as `uint16` with CIM's own values.
//! 4. There are no optional fields. What may be absent is a sequence of at most one element, or an empty string
//!    where the comment says so.
//! 5. Times are microseconds since the Unix epoch, UTC (`_us`); sizes are bytes (`_bytes`); ratios are plain doubles.
//!
//! Owns no threads and no locks. Deliberately knows nothing of rustdds: `muster-bus` wraps these types.
#![forbid(unsafe_code)]

pub mod arguments;
#[cfg(feature = "samples")]
pub mod samples;
pub mod topics;
pub mod v1;

pub use topics::{Direction, Durability, Profile, Reliability, Topic, TopicInfo};
