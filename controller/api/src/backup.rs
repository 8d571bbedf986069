//! Backups, as the agents that hold them reported them.

use muster_common::{CommandId, Digest, HostId, VmId, VolumeId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One backup of one VM. Restoring is the command `restore` with the argument `backup` = its id, or "latest".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Backup {
    pub id: String,
    #[schema(value_type = String)]
    pub host: HostId,
    pub host_name: String,
    #[schema(value_type = String)]
    pub vm: VmId,
    pub vm_name: String,
    pub taken_at_us: u64,
    #[schema(value_type = String)]
    pub command: CommandId,
    pub volumes: Vec<BackupVolume>,
    pub logical_bytes: u64,
    /// What it added to the target.
    pub new_bytes: u64,
}

/// A volume within a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BackupVolume {
    #[schema(value_type = String)]
    pub volume: VolumeId,
    pub role: String,
    pub size_bytes: u64,
    pub new_bytes: u64,
    #[schema(value_type = Option<String>)]
    pub manifest: Option<Digest>,
}
