//! What this host knows of its VMs across restarts: one JSON file a VM in `state_dir/vms`, replaced atomically.
//!
//! A record says what a VM is made of; whether its volumes' contents are there, the store says. After a restart of the
//! agent they are, as a rule; after one of the machine the records are all there and every volume is lost, until it is
//! restored or made anew.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use muster_common::{ByteLen, Digest, ErrorCode, VmId, VolumeId};
use muster_idl::arguments::{LimitSpec, TemplateSpec};
use serde::{Deserialize, Serialize};

use crate::identity::{remove_durably, write_durably};

const VERSION: u32 = 1;

/// What a disk is to its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskRole {
    System,
    Data,
    /// A read-only clone of an image: nothing in it is the VM's own, so it is neither snapshot nor backed up.
    Application,
}

impl DiskRole {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Data => "data",
            Self::Application => "application",
        }
    }
}

/// How a disk is served. In the record, because a QEMU that runs keeps to it whatever the configuration says meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// On the one NBD socket, by export name. What records that do not say were made with.
    #[default]
    Nbd,
    /// On a vhost-user socket of its own. The number of queues must be the same after each restart.
    VhostUser { queues: u16 },
}

/// Who paused a VM that runs otherwise. In the record: nobody else is to resume it, after a restart of the agent either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PausedBy {
    /// A command. Only a command resumes it.
    Command,
    /// The agent, or a disk: a volume had no memory left to write to. It is resumed when there is some.
    Space,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskRecord {
    pub role: DiskRole,
    /// `vda`, `vdb`; applications from `vdc` on.
    pub target: String,
    pub volume: VolumeId,
    /// Written here before a volume of this generation exists: no generation is ever used for two contents.
    pub generation: u64,
    pub size: ByteLen,
    /// Image it is a clone of; none: it began blank.
    pub image: Option<Digest>,
    #[serde(default)]
    pub transport: Transport,
    /// What it may take of the host's memory; none: whatever there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitSpec>,
    /// Whose other disks it shares blocks with; none: those of everybody who has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
}

impl DiskRecord {
    pub fn is_read_only(&self) -> bool {
        self.role == DiskRole::Application
    }

    /// Export names are by volume and generation, never by a VM's name.
    pub fn export_name(&self) -> String {
        format!("{}.{}", self.volume, self.generation)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    pub version: u32,
    pub vm: VmId,
    pub name: String,
    pub template: TemplateSpec,
    pub disks: Vec<DiskRecord>,
    pub created_at_us: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_by: Option<PausedBy>,
}

impl VmRecord {
    pub fn new(vm: VmId, name: String, template: TemplateSpec, disks: Vec<DiskRecord>, now_us: u64) -> Self {
        Self { version: VERSION, vm, name, template, disks, created_at_us: now_us, paused_by: None }
    }

    /// Disks that hold something of the VM's own.
    pub fn own_disks(&self) -> impl Iterator<Item = &DiskRecord> {
        self.disks.iter().filter(|d| !d.is_read_only())
    }

    pub fn applications(&self) -> impl Iterator<Item = &DiskRecord> {
        self.disks.iter().filter(|d| d.is_read_only())
    }

    pub fn disk(&self, role: DiskRole) -> Option<&DiskRecord> {
        self.disks.iter().find(|d| d.role == role)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{action} VM record {path}", path = path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("read VM record {path}", path = path.display())]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("read VM record {path}: version {version} is not supported (this program reads version {VERSION})", path = path.display())]
    Version { path: PathBuf, version: u32 },
}

impl RecordError {
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Io { .. } => ErrorCode::Io,
            Self::Json { .. } => ErrorCode::Corrupt,
            Self::Version { .. } => ErrorCode::Unsupported,
        }
    }
}

/// The directory.
#[derive(Clone, Debug)]
pub struct Records(PathBuf);

impl Records {
    /// Opens it and reads every record. One that cannot be read does not hide the others: it is returned as an error,
    /// and left where it is.
    pub fn open(state_dir: &Path) -> Result<(Self, Vec<VmRecord>, Vec<RecordError>), RecordError> {
        let directory = state_dir.join("vms");
        let io = |action| {
            let path = directory.clone();
            move |source| RecordError::Io { action, path, source }
        };
        fs::create_dir_all(&directory).map_err(io("make the directory of"))?;
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&directory).map_err(io("list the directory of"))? {
            let path = entry.map_err(io("list the directory of"))?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read(&path) {
                Ok(record) => good.push(record),
                Err(e) => bad.push(e),
            }
        }
        good.sort_by_key(|r| (r.created_at_us, r.vm));
        Ok((Self(directory), good, bad))
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.0.join(format!("{vm}.json"))
    }

    /// Durable when it returns.
    pub fn save(&self, record: &VmRecord) -> Result<(), RecordError> {
        let path = self.path(record.vm);
        let mut bytes =
            serde_json::to_vec_pretty(record).map_err(|source| RecordError::Json { path: path.clone(), source })?;
        bytes.push(b'\n');
        write_durably(&path, &bytes).map_err(|source| RecordError::Io { action: "write", path, source })
    }

    /// Durable when it returns; an absent record is not an error.
    pub fn remove(&self, vm: VmId) -> Result<(), RecordError> {
        let path = self.path(vm);
        remove_durably(&path).map_err(|source| RecordError::Io { action: "remove", path, source })
    }
}

fn read(path: &Path) -> Result<VmRecord, RecordError> {
    let json = |source| RecordError::Json { path: path.into(), source };
    let bytes = fs::read(path).map_err(|source| RecordError::Io { action: "read", path: path.into(), source })?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(json)?;
    let version = value.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0) as u32;
    if version != VERSION {
        return Err(RecordError::Version { path: path.into(), version });
    }
    serde_json::from_value(value).map_err(json)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn template(image: &str) -> TemplateSpec {
        TemplateSpec {
            name: "desk".into(),
            image: image.into(),
            image_name: "debian".into(),
            vcpus: 1,
            memory_bytes: 256 << 20,
            data_volume_bytes: Some(64 << 20),
            applications: Vec::new(),
            boot: Default::default(),
            bridge: None,
            system_limits: None,
            data_limits: None,
            tenant: None,
        }
    }

    pub(crate) fn record(name: &str) -> VmRecord {
        let disk = |role, target: &str| DiskRecord {
            role,
            target: target.into(),
            volume: VolumeId::random(),
            generation: 1,
            size: ByteLen::mib(64),
            image: None,
            transport: Transport::default(),
            limits: None,
            tenant: None,
        };
        let disks = vec![disk(DiskRole::System, "vda"), disk(DiskRole::Data, "vdb")];
        VmRecord::new(VmId::random(), name.into(), template("x"), disks, 1)
    }

    #[test]
    fn a_record_of_before_transports_is_one_of_nbd_disks() {
        let mut record = record("a");
        record.disks[0].transport = Transport::VhostUser { queues: 2 };
        record.paused_by = Some(PausedBy::Space);
        let mut value = serde_json::to_value(&record).unwrap();
        assert_eq!(value["disks"][0]["transport"]["vhost-user"]["queues"], 2);
        assert_eq!(serde_json::from_value::<VmRecord>(value.clone()).unwrap(), record);
        for disk in value["disks"].as_array_mut().unwrap() {
            disk.as_object_mut().unwrap().remove("transport");
        }
        value.as_object_mut().unwrap().remove("paused_by");
        let old: VmRecord = serde_json::from_value(value).unwrap();
        assert_eq!((old.disks[0].transport, old.paused_by), (Transport::Nbd, None));
    }

    #[test]
    fn a_record_written_before_there_were_applications_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let old = record("old");
        let mut value = serde_json::to_value(&old).unwrap();
        for later in ["system_limits", "data_limits", "tenant"] {
            assert!(value["template"].get(later).is_none(), "{later}");
        }
        assert!(value["disks"][0].get("limits").is_none() && value["disks"][0].get("tenant").is_none());
        assert!(value["template"].get("applications").is_none(), "a template without any is written as before");
        value["template"]["later"] = 1.into();
        fs::create_dir_all(dir.path().join("vms")).unwrap();
        fs::write(dir.path().join("vms/old.json"), value.to_string()).unwrap();
        let (_, good, bad) = Records::open(dir.path()).unwrap();
        assert_eq!((good, bad.len()), (vec![old], 0));
    }

    #[test]
    fn records_survive_and_a_damaged_one_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (records, ..) = Records::open(dir.path()).unwrap();
        let (a, b) = (record("a"), record("b"));
        records.save(&a).unwrap();
        records.save(&b).unwrap();
        fs::write(dir.path().join("vms/x.json"), "{").unwrap();
        fs::write(dir.path().join("vms/y.json"), "{\"version\": 9}").unwrap();
        fs::write(dir.path().join("vms/z.json.new"), "half").unwrap();
        let (records, good, bad) = Records::open(dir.path()).unwrap();
        assert_eq!(good.len(), 2);
        assert!(good.contains(&a) && good.contains(&b));
        assert_eq!(bad.len(), 2);
        records.remove(a.vm).unwrap();
        records.remove(a.vm).unwrap();
        assert_eq!(Records::open(dir.path()).unwrap().1, [b]);
    }
}
