//! The images and volumes of one host, resident in memory, deduplicated and copy-on-write.
mod arena;
mod config;
mod disk;
mod error;
mod frames;
mod image;
mod index;
mod map;
mod pool;
mod stats;
mod store;
mod sync;
mod volume;

pub use config::{PageKind, Pages, StoreConfig, VolumeSpec};
pub use error::StoreError;
pub use image::{Image, ImageBuilder};
pub use stats::{AuditReport, ImageInfo, StoreStats, VerifyReport, VolumeStats};
pub use store::Store;
pub use volume::{Snapshot, Volume};
