//! Templates: an image plus the settings of a VM.

use muster_common::{ByteLen, Digest};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::BootFiles;

/// What VMs are cut from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    pub name: String,
    #[schema(value_type = String)]
    pub image: Digest,
    /// `name@revision` of the image.
    pub image_name: String,
    pub vcpus: u32,
    #[schema(value_type = u64)]
    pub memory: ByteLen,
    /// Size of the personal data volume; none: there is none.
    #[schema(value_type = Option<u64>)]
    pub data_volume: Option<ByteLen>,
    /// Images attached read-only, as disks `vdc` and on.
    #[serde(default)]
    pub applications: Vec<Application>,
    /// The image's boot files, or the template's own.
    pub boot: BootFiles,
    pub network: NetworkMode,
    pub created_at_us: u64,
    /// VMs made from it.
    pub vms: u32,
    /// Resource version.
    pub version: u64,
}

/// An image attached read-only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Application {
    #[schema(value_type = String)]
    pub image: Digest,
    /// `name@revision` of the image.
    pub image_name: String,
}

/// How VMs are connected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum NetworkMode {
    #[default]
    None,
    /// A bridge of the host.
    Bridge { name: String },
}

/// Makes a template.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTemplate {
    pub name: String,
    /// Digest, name or name@revision.
    pub image: String,
    pub vcpus: u32,
    /// Bytes, or text such as "512MiB".
    #[schema(value_type = u64)]
    pub memory: ByteLen,
    #[serde(default)]
    #[schema(value_type = Option<u64>)]
    pub data_volume: Option<ByteLen>,
    /// Images to attach read-only: digest, name or name@revision.
    #[serde(default)]
    pub applications: Vec<String>,
    /// None: those of the image.
    #[serde(default)]
    pub boot: Option<BootFiles>,
    #[serde(default)]
    pub network: NetworkMode,
}

/// Changes a template; what is left out stays. VMs made from it before stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeTemplate {
    /// Digest, name or name@revision. Boot files that were the old image's become those of the new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// All of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applications: Option<Vec<String>>,
}
