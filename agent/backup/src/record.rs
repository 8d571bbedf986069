//! The backup record: the payload of the reference that keeps a backup's manifests alive.
//!
//! | offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 8 | magic | `MSTRBKUP` |
//! | 8 | 4 | version | 1, little-endian |
//! | 12 | 4 | reserved | zero |
//! | 16 | 8 | incompatible features | a reader refuses bits it does not know; none defined |
//! | 24 | .. | record | JSON of [`BackupRecord`]; unknown members are ignored |
//!
//! Checksum coverage: the reference around it carries a BLAKE3 over all of its bytes.

use std::{fmt, str::FromStr};

use muster_common::{ByteLen, Digest, HostId, VmId, VolumeId};
use muster_repository::FormatError;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub(crate) const REFERENCE_PREFIX: &str = "backup-";
const MAGIC: &[u8; 8] = b"MSTRBKUP";
const VERSION: u32 = 1;
const WHAT: &str = "backup record";
const HEADER_LEN: usize = 24;
const _: () = assert!(8 + 4 + 4 + 8 == HEADER_LEN);

/// One backup (a UUID version 7: sorts by time).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BackupId(Uuid);

impl BackupId {
    /// A fresh id.
    pub fn now() -> Self {
        Self(Uuid::now_v7())
    }

    pub const fn from_uuid(uuid: Uuid) -> Self {
        Self(uuid)
    }

    pub(crate) fn reference(self) -> String {
        format!("{REFERENCE_PREFIX}{self}")
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl fmt::Debug for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BackupId({})", self.0)
    }
}

/// A text that is not a backup id.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text:?} is not a backup id: expected a UUID")]
pub struct ParseBackupIdError {
    text: String,
}

impl FromStr for BackupId {
    type Err = ParseBackupIdError;
    fn from_str(text: &str) -> Result<Self, ParseBackupIdError> {
        Uuid::try_parse(text).map(Self).map_err(|_| ParseBackupIdError { text: text.to_string() })
    }
}

/// A VM in a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackedVm {
    pub id: VmId,
    pub name: String,
    /// What the agent needs to define the VM again; opaque here.
    pub spec: serde_json::Value,
}

/// A volume in a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackedVolume {
    pub id: VolumeId,
    /// The VM it belongs to, if any.
    pub vm: Option<VmId>,
    pub generation: u64,
    /// What it is to its VM: `system`, `personal`.
    pub role: String,
    pub size: ByteLen,
    /// Its content.
    pub manifest: Digest,
    /// Bytes that were not zero.
    pub data: ByteLen,
    /// Bytes this backup added to the repository.
    pub new_bytes: ByteLen,
}

/// What is known of a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackupRecord {
    pub id: BackupId,
    /// Microseconds since 1970-01-01 UTC, when the capture began.
    pub created_at_us: u64,
    pub host: HostId,
    /// The caller's words; may be empty.
    pub label: String,
    pub vms: Vec<BackedVm>,
    pub volumes: Vec<BackedVolume>,
}

impl BackupRecord {
    /// The sizes of all volumes together.
    pub fn logical(&self) -> ByteLen {
        ByteLen(self.volumes.iter().map(|v| v.size.0).sum())
    }

    /// The bytes of all volumes that were not zero.
    pub fn data(&self) -> ByteLen {
        ByteLen(self.volumes.iter().map(|v| v.data.0).sum())
    }

    /// The bytes this backup added to the repository.
    pub fn new_bytes(&self) -> ByteLen {
        ByteLen(self.volumes.iter().map(|v| v.new_bytes.0).sum())
    }

    /// The volumes of one VM.
    pub fn volumes_of(&self, vm: VmId) -> impl Iterator<Item = &BackedVolume> {
        self.volumes.iter().filter(move |v| v.vm == Some(vm))
    }

    /// The record's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = vec![0; HEADER_LEN];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        serde_json::to_writer(&mut bytes, self)?;
        Ok(bytes)
    }

    /// Parses and checks bytes from anywhere.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() < 8 || bytes[..8] != MAGIC[..] {
            return Err(FormatError::Magic { what: WHAT });
        }
        let Some((head, body)) = bytes.split_at_checked(HEADER_LEN) else {
            return Err(FormatError::Truncated { what: WHAT, need: HEADER_LEN as u64, have: bytes.len() as u64 });
        };
        let version = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
        if version != VERSION {
            return Err(FormatError::Version { what: WHAT, version, supported: VERSION });
        }
        let mut bits = [0; 8];
        bits.copy_from_slice(&head[16..24]);
        match u64::from_le_bytes(bits) {
            0 => {}
            bits => return Err(FormatError::Features { what: WHAT, bits }),
        }
        serde_json::from_slice(body)
            .map_err(|_| FormatError::Invalid { what: WHAT, reason: "its JSON is not that of a backup record" })
    }
}
