//! The JSON inside `Argument.value` and `Verdict.result`, where it is structured: one type each, shared by the
//! controller that writes arguments and the agent that reads them (and the other way round for results).
//!
//! JSON and not CDR, because it may grow: readers ignore fields they do not know.

use serde::{Deserialize, Serialize};

/// Names of arguments in `GroupCommand.arguments`.
pub mod name {
    /// [`TemplateSpec`](super::TemplateSpec), for create.
    pub const TEMPLATE: &str = "template";
    /// "fail" or "power-off", for shutdown: what to do when the guest has not shut down in time.
    pub const POLICY: &str = "policy";
    /// Name of a snapshot.
    pub const NAME: &str = "name";
    /// For snapshot, in seconds: it is dropped when nobody has read of it for so long. Absent: it stays.
    pub const KEEP_SECONDS: &str = "keep_seconds";
    /// Backup id or "latest", for restore.
    pub const BACKUP: &str = "backup";
    /// JSON list of texts, for exec.
    pub const ARGV: &str = "argv";
    /// Path in the guest, for file-write.
    pub const PATH: &str = "path";
    /// Base64 (RFC 4648, section 4), for file-write.
    pub const CONTENT: &str = "content";
    /// Image digest, for image-pull and image-drop.
    pub const DIGEST: &str = "digest";
    /// Image name for people, for image-pull.
    pub const IMAGE_NAME: &str = "image_name";
    /// "system" or "data", for resize.
    pub const DISK: &str = "disk";
    /// For resize: what the disk's size is to be. Absent: it stays.
    pub const SIZE_BYTES: &str = "size_bytes";
    /// For resize: what the disk's quota is to be, 0 for none. Absent: it stays.
    pub const QUOTA_BYTES: &str = "quota_bytes";
    /// Base URL to pull from; the controller's stream endpoint when absent.
    pub const SOURCE: &str = "source";
}

/// What VMs are cut from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TemplateSpec {
    /// The template's name.
    pub name: String,
    /// Digest of the image, 64 hexadecimal digits.
    pub image: String,
    pub image_name: String,
    pub vcpus: u32,
    pub memory_bytes: u64,
    /// Size of the personal data volume; none: there is none.
    pub data_volume_bytes: Option<u64>,
    /// Images of applications: each becomes a read-only disk, `vdc` and on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub applications: Vec<ApplicationSpec>,
    pub boot: BootSpec,
    /// Host bridge the VM is connected to; none: not connected.
    pub bridge: Option<String>,
    /// What the system disk may take of its host's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_limits: Option<LimitSpec>,
    /// What the data disk may take of its host's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_limits: Option<LimitSpec>,
    /// Blocks of the VM's disks are shared with those of VMs of the same name of tenant only; none: with those of all VMs
    /// without one. Images are everybody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
}

/// What a disk may take of its host's memory, and what happens when there is none left.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitSpec {
    /// The most it may hold of what its guest has written, before dedup; none: its size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota_bytes: Option<u64>,
    /// So much can be written to it whatever other disks do; none: nothing is kept for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation_bytes: Option<u64>,
    /// "pause": the VM stands still until there is room; "spill": its coldest blocks go to a file on the host's disk; none:
    /// "pause".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when_full: Option<String>,
}

/// An image that is attached to a VM read-only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplicationSpec {
    /// Digest of the image, 64 hexadecimal digits.
    pub image: String,
    pub image_name: String,
}

/// Direct kernel boot; all empty: boot from the system disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BootSpec {
    /// Digest of a blob.
    pub kernel: Option<String>,
    pub initrd: Option<String>,
    pub cmdline: String,
}

/// Result of backup, one a VM; for a host a list of these.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackupResult {
    pub id: String,
    pub vm: String,
    pub vm_name: String,
    pub taken_at_us: u64,
    pub volumes: Vec<BackupVolumeResult>,
    pub logical_bytes: u64,
    /// What it added to the target.
    pub new_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackupVolumeResult {
    pub volume: String,
    pub role: String,
    pub size_bytes: u64,
    pub new_bytes: u64,
    /// Digest of the volume's manifest.
    pub manifest: String,
}

/// Result of snapshot. Disks that only repeat an image (applications) are not in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotResult {
    pub name: String,
    pub taken_at_us: u64,
    /// The guest's file systems were frozen, or it was not running.
    pub consistent: bool,
    pub volumes: Vec<SnapshotVolumeResult>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotVolumeResult {
    pub volume: String,
    pub role: String,
    pub size_bytes: u64,
    /// Digest of the image it is a clone of; empty for one that began blank.
    pub image: String,
}

/// Result of exec. Output is text; what is not UTF-8 is replaced.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExecResult {
    pub exit_status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Result of image-pull.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PullResult {
    pub logical_bytes: u64,
    /// Bytes that came over the network.
    pub transferred_bytes: u64,
    /// By how much the store's resident bytes grew.
    pub resident_bytes: u64,
}
