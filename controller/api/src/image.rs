//! Images: immutable, named by the digest of their manifest and by name and version.

use muster_common::{Digest, HostId};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// An image in the controller's repository. `REF` in paths is a digest, `name` (its newest version) or `name@version`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    #[schema(value_type = String)]
    pub digest: Digest,
    pub name: String,
    /// Counts from 1 under each name.
    pub revision: u32,
    /// What it was imported from.
    pub format: ImageFormat,
    pub logical_bytes: u64,
    /// What its import added to the repository.
    pub new_bytes: u64,
    /// Predicted bytes in an empty store: its unique 4 KiB blocks.
    pub resident_estimate_bytes: u64,
    pub boot: BootFiles,
    pub imported_at_us: u64,
    /// Hosts that have it in memory.
    pub resident_on: Vec<String>,
    /// The same, with what is made from it there.
    #[serde(default)]
    pub residency: Vec<Residency>,
    /// Templates that name it, for the system disk or as an application.
    pub templates: Vec<String>,
    /// VMs that are made from it, likewise.
    #[serde(default)]
    pub vms: u32,
    /// Volumes on all hosts that are clones of it.
    #[serde(default)]
    pub volumes: u32,
    /// The image that the volume it was committed from is a clone of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub parent: Option<Digest>,
    /// `name@revision` of the parent while it is in the repository.
    #[serde(default)]
    pub parent_name: String,
    /// Where it came from, when not from a file: "VM desk-01 on host1".
    #[serde(default)]
    pub origin: String,
    /// Resource version.
    pub version: u64,
}

/// An image in a host's memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Residency {
    #[schema(value_type = String)]
    pub host: HostId,
    pub host_name: String,
    /// Volumes that are clones of it there.
    pub volumes: u32,
}

/// What a VM is started with when the hypervisor boots it directly; all empty: it boots from its disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootFiles {
    /// Digest of a blob.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub kernel: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<Digest>,
    #[serde(default)]
    pub cmdline: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// By its first bytes; for import only.
    #[default]
    Auto,
    Raw,
    Qcow2,
}

/// Import of the bytes in the request body: `POST /v1/images`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ImportQuery {
    pub name: String,
    #[serde(default)]
    #[param(inline)]
    pub format: ImageFormat,
    /// Digest of the kernel, uploaded before as a blob.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub kernel: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub initrd: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// The name may exist: this becomes its next revision.
    #[serde(default)]
    pub new_revision: bool,
}

/// Import of a file the controller can read itself: `POST /v1/images/import`, unix socket only, by root or the
/// controller's own user.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportByPath {
    pub name: String,
    /// Absolute path of the image.
    pub path: String,
    #[serde(default)]
    pub format: ImageFormat,
    /// Absolute path of a kernel.
    #[serde(default)]
    pub kernel: Option<String>,
    #[serde(default)]
    pub initrd: Option<String>,
    #[serde(default)]
    pub cmdline: Option<String>,
    #[serde(default)]
    pub new_revision: bool,
}

/// A small file in the repository: a kernel or an initrd.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Blob {
    #[schema(value_type = String)]
    pub digest: Digest,
    pub bytes: u64,
}

/// Asks what an image file would take in memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EstimateRequest {
    /// Absolute path at the controller.
    pub path: String,
    #[serde(default)]
    pub format: ImageFormat,
    /// Images (digest, name or name@revision) that the store will hold as well: they are read too, so that what this one adds
    /// to them is exact.
    #[serde(default)]
    pub beside: Vec<String>,
}

/// What an image would take in memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Estimate {
    pub logical_bytes: u64,
    /// Its unique non-zero 4 KiB blocks: what it takes in an empty store.
    pub resident_bytes: u64,
    /// What it takes in a store that holds other images: those of `beside`, exactly; when none are named, all images of the
    /// repository, at most (they are compared by whole chunks of 64 KiB, without reading them).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub added_bytes: Option<u64>,
    /// The images of `beside`, in full.
    #[serde(default)]
    pub beside: Vec<String>,
    /// What its import would add to the repository on disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_bytes: Option<u64>,
    /// Hosts whose store does not have that much left, by name.
    pub too_large_for: Vec<String>,
}

/// In what form an image is read: `GET /v1/images/{image}/export`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ExportFormat {
    /// The disk's bytes, zeros and all.
    Raw,
    /// Version 3, clusters of 64 KiB, sparse, not compressed.
    Qcow2,
    /// The data of the disk without its zeros; see [`Extents`](crate::client::Extents).
    Extents,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ExportQuery {
    #[param(inline)]
    pub format: ExportFormat,
}

/// Makes the system disk of a VM, as it is at a moment, an image: `POST /v1/images/commit`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CommitImage {
    /// Name or id.
    pub vm: String,
    /// The image's name.
    pub name: String,
    /// The name may exist: this becomes its next revision.
    #[serde(default)]
    pub new_revision: bool,
    /// Seconds that the snapshot at the host may take.
    #[serde(default)]
    pub timeout_seconds: Option<u32>,
}

/// Makes an image resident on hosts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PullImage {
    /// Hosts by name, id or group path.
    pub target: Vec<String>,
    #[serde(default)]
    pub timeout_seconds: Option<u32>,
}
