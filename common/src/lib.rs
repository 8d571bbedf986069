//! What every part of Muster may name: identities, units, error codes, configuration, logging, time.
//!
//! Main types: the ids in [`id`], [`units::ByteLen`], [`error::ErrorCode`] and [`error::Chain`],
//! [`config::load`], [`clock::Clock`].
//!
//! Invariants:
//! 1. An id type never converts into another one.
//! 2. An `ErrorCode`'s text is stable: it is wire and REST contract.
//!
//! Owns no threads and no locks. Deliberately small: a thing only one crate needs lives there.
#![forbid(unsafe_code)]

pub mod clock;
pub mod config;
pub mod error;
pub mod id;
pub mod logging;
pub mod units;

pub use clock::{Clock, SystemClock};
pub use error::{Chain, ErrorCode};
pub use id::{CommandId, ControllerId, Digest, HostId, ImageId, Incarnation, SnapshotId, TenantId, VmId, VolumeId};
pub use units::ByteLen;
