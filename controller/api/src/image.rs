//! Images: immutable, named by the digest of their manifest and by name and version.

use muster_common::Digest;
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
    /// Templates that name it.
    pub templates: Vec<String>,
    /// Resource version.
    pub version: u64,
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
}

/// What an image would take in memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Estimate {
    pub logical_bytes: u64,
    /// Its unique non-zero 4 KiB blocks.
    pub resident_bytes: u64,
    /// Hosts whose store does not have that much left, by name.
    pub too_large_for: Vec<String>,
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
