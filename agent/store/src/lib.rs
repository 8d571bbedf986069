//! The images and volumes of one host, resident in memory, deduplicated and copy-on-write. (Interface first; the body follows.)
mod config;
mod error;
mod image;
mod stats;
mod store;
mod volume;

pub use config::{PageKind, Pages, StoreConfig, VolumeSpec};
pub use error::StoreError;
pub use image::{Image, ImageBuilder};
pub use stats::{AuditReport, ImageInfo, StoreStats, VerifyReport, VolumeStats};
pub use store::Store;
pub use volume::{Snapshot, Volume};
