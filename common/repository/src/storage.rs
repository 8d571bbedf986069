//! Where objects live. An object is a key and bytes; `put` is atomic and durable, everything above is built on that.
//!
//! [`DirectoryStorage`] keeps them in files, [`MemoryStorage`] in memory, [`fault::FaultStorage`] fails or "loses power"
//! at a chosen step. All pass [`conformance::run`].

pub mod conformance;
mod directory;
pub mod fault;
mod memory;

use std::path::PathBuf;

use muster_common::ErrorCode;

pub use directory::DirectoryStorage;
pub use memory::MemoryStorage;

/// Why a storage did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("no object {key}")]
    NotFound { key: String },
    #[error("{key:?} is not an object key")]
    InvalidKey { key: String },
    #[error("object {key} has {have} bytes, {need} are needed")]
    OutOfRange { key: String, need: u64, have: u64 },
    #[error("{action} {path}", path = path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is in use by another process", path = path.display())]
    InUse { path: PathBuf },
    /// Only [`fault::FaultStorage`] gives this.
    #[error("injected fault at step {step}")]
    Injected { step: u64 },
}

impl StorageError {
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// The code that travels.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NotFound { .. } => ErrorCode::NotFound,
            Self::InvalidKey { .. } => ErrorCode::InvalidArgument,
            Self::OutOfRange { .. } => ErrorCode::Corrupt,
            Self::InUse { .. } => ErrorCode::InUse,
            Self::Injected { .. } => ErrorCode::Io,
            Self::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorCode::NoSpace,
                std::io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
                _ => ErrorCode::Io,
            },
        }
    }
}

/// A flat set of immutable-by-habit objects. All methods may be called from any thread and may block.
///
/// Keys are one to four components of `a-z 0-9 . _ -` joined by `/`; none starts with a dot.
pub trait Storage: Send + Sync {
    /// Stores the object. Atomic: a reader, or whoever opens the storage after a crash, sees all of the old object or all of
    /// the new one. Durable: when this returns `Ok`, a power loss does not undo it. On `Err` either may be there.
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), StorageError>;
    /// The whole object.
    fn get(&self, key: &str) -> Result<Vec<u8>, StorageError>;
    /// Exactly `len` bytes from `offset`; [`StorageError::OutOfRange`] when the object is shorter.
    fn get_range(&self, key: &str, offset: u64, len: usize) -> Result<Vec<u8>, StorageError>;
    /// The object's length.
    fn len(&self, key: &str) -> Result<u64, StorageError>;
    /// All keys that start with `prefix`, sorted.
    fn list(&self, prefix: &str) -> Result<Vec<String>, StorageError>;
    /// Removes the object, durably. An absent object is not an error.
    fn delete(&self, key: &str) -> Result<(), StorageError>;
}

/// Refuses what is not a key, so that a key can be a path below a directory.
pub(crate) fn check_key(key: &str) -> Result<(), StorageError> {
    let good = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
    };
    if key.len() > 250 || key.split('/').count() > 4 || !key.split('/').all(good) {
        return Err(StorageError::InvalidKey { key: key.to_string() });
    }
    Ok(())
}
