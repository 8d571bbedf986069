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
    /// What the system disk may take of its host's memory.
    #[serde(default)]
    pub system_limits: DiskLimits,
    /// What the data disk may take of its host's memory.
    #[serde(default)]
    pub data_limits: DiskLimits,
    /// VMs of one tenant share blocks among themselves only; none: with all that have none.
    #[serde(default)]
    pub tenant: Option<String>,
    pub created_at_us: u64,
    /// VMs made from it.
    pub vms: u32,
    /// Resource version.
    pub version: u64,
}

/// What a disk may take of its host's memory, and what happens when there is none left.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskLimits {
    /// The most it may hold of what its guest has written, before deduplication; none: its size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub quota: Option<ByteLen>,
    /// So much can be written to it whatever other disks do; none: nothing is kept for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub reservation: Option<ByteLen>,
    #[serde(default)]
    pub when_full: WhenFull,
}

/// What happens to a disk whose host has no memory left for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WhenFull {
    /// The VM stands still until there is room again.
    #[default]
    Pause,
    /// Its coldest blocks go to a file on the host's disk.
    Spill,
}

impl WhenFull {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Spill => "spill",
        }
    }
}

impl DiskLimits {
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// For people: "at most 4 GiB, 1 GiB reserved, spill"; empty when there are none.
impl std::fmt::Display for DiskLimits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let quota = self.quota.map(|quota| format!("at most {quota}"));
        let reserved = self.reservation.map(|reservation| format!("{reservation} reserved"));
        let spills = (self.when_full != WhenFull::default()).then(|| self.when_full.as_str().to_string());
        f.pad(&[quota, reserved, spills].into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
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
    #[serde(default)]
    pub system_limits: DiskLimits,
    #[serde(default)]
    pub data_limits: DiskLimits,
    /// 1 to 63 lower-case letters, digits, dots, hyphens and underscores.
    #[serde(default)]
    pub tenant: Option<String>,
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_limits: Option<ChangeLimits>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_limits: Option<ChangeLimits>,
    /// A template's tenant is what it was made with: any other is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
}

/// Changes the limits of one disk; what is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeLimits {
    /// 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub quota: Option<ByteLen>,
    /// 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub reservation: Option<ByteLen>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when_full: Option<WhenFull>,
}
