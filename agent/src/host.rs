//! Everything the agent's tasks share. Handles only: each field has its own lock, or none.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use muster_backup::Backups;
use muster_bus::Bus;
use muster_common::{Chain, Clock, Digest, HostId, Incarnation, VmId};
use muster_virt::{Boot, Console, DiskSpec, DiskTransport, DomainSpec, HypervisorKind, NicSpec};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::{
    aftercare::Aftercare,
    arguments::{Template, check_template},
    boot::BootFiles,
    config::Config,
    executor::Failure,
    identity::DrainMark,
    images::Images,
    inventory::Inventory,
    machines::Machines,
    memory::Fate,
    presence::Presence,
    records::{DiskRecord, PausedBy, RecordError, Records, Transport, VmRecord},
    scrub,
    telemetry::Beat,
    voice::Voice,
    volumes::{VolumeError, Volumes},
};

/// See the module.
pub struct Host {
    pub config: Config,
    pub id: HostId,
    pub incarnation: Incarnation,
    pub boot_id: String,
    pub hardware_uuid: String,
    pub name: String,
    pub started_us: u64,
    pub clock: Arc<dyn Clock>,
    pub bus: Bus,
    pub volumes: Volumes,
    pub store_fate: Fate,
    /// Why there are no backups, when there are none.
    pub backups: Result<Backups, String>,
    pub machines: Machines,
    pub inventory: Inventory,
    pub aftercare: Aftercare,
    pub records: Records,
    /// Held while a record that exists is changed, on disk and in the inventory: two changes at once would undo each other.
    pub record_changes: Mutex<()>,
    pub draining: DrainMark,
    pub images: Images,
    pub scrub: scrub::Counters,
    pub boot_files: BootFiles,
    pub presence: Mutex<Presence>,
    pub voice: Voice,
    /// Asks for a heartbeat out of turn.
    pub beats: mpsc::Sender<Beat>,
    /// Base URL of the stream endpoint.
    pub stream_endpoint: Mutex<String>,
    /// See `accounting`.
    pub guest_file_reads: AtomicU64,
    /// Ending as by SIGKILL: nothing more is said.
    pub silent: AtomicBool,
}

impl Host {
    /// Forgets the named snapshots of a VM.
    pub fn clear_snapshots(&self, vm: VmId) {
        if let Some(entry) = self.inventory.get(vm) {
            entry.record.disks.iter().for_each(|disk| self.volumes.forget_snapshots(disk.volume));
        }
        self.inventory.update(vm, |entry| entry.snapshots.clear());
    }

    pub fn now_us(&self) -> u64 {
        self.clock.now_us()
    }

    pub fn log_path(&self, vm: VmId) -> PathBuf {
        self.config.state_dir.join("console").join(format!("{vm}.log"))
    }
    pub fn console_socket(&self, vm: VmId) -> PathBuf {
        // 24 bytes: run_dir may have 44, a socket's path 107
        self.config.run_dir.join(format!("c-{}", vm.uuid().simple()))
    }
    pub fn vnc_socket(&self, vm: VmId) -> PathBuf {
        self.config.run_dir.join(format!("v-{}", vm.uuid().simple()))
    }

    /// The domain for a VM as its record is now.
    pub fn domain(&self, record: &VmRecord) -> Result<DomainSpec, Failure> {
        let template = check_template(record.template.clone())?;
        let boot = match &template.kernel {
            None => Boot::Disk,
            Some(kernel) => Boot::Direct {
                kernel: self.boot_files.path(kernel),
                initrd: template.initrd.as_ref().map(|d| self.boot_files.path(d)),
                // the one thing a template cannot know; a blank would part the word
                cmdline: template.spec.boot.cmdline.replace("{name}", &record.name.replace(' ', "-")),
            },
        };
        let mut spec = DomainSpec::new(record.vm, record.name.clone(), template.memory, boot, self.machines.accel());
        spec.vcpus = template.spec.vcpus;
        spec.max_vcpus = template.spec.vcpus;
        spec.huge_pages = self.config.hypervisor.huge_pages;
        spec.vnc_socket = Some(self.vnc_socket(record.vm));
        spec.console = Console::Socket { path: self.console_socket(record.vm), log: Some(self.log_path(record.vm)) };
        spec.nics = template.spec.bridge.iter().map(|b| NicSpec { bridge: b.clone(), mac: None }).collect();
        spec.disks = record
            .disks
            .iter()
            .map(|disk| {
                Ok(DiskSpec {
                    target: disk.target.clone(),
                    transport: self.disk_transport(disk)?,
                    // over vhost-user the export says so
                    read_only: disk.is_read_only(),
                    // what a vhost-user export says of itself, too
                    serial: Some(disk.volume.uuid().simple().to_string()[..20].to_string()),
                })
            })
            .collect::<Result<_, VolumeError>>()?;
        Ok(spec)
    }

    /// Changes a VM's record, durably, and then what is shown of it; `None` when there is no such VM (any more). Blocks for a
    /// write to disk.
    pub fn change_record(&self, vm: VmId, change: impl FnOnce(&mut VmRecord)) -> Result<Option<VmRecord>, RecordError> {
        let _alone = self.record_changes.lock();
        let Some(mut record) = self.inventory.get(vm).map(|e| e.record) else { return Ok(None) };
        let before = record.clone();
        change(&mut record);
        if record != before {
            self.records.save(&record)?;
            let shown = record.clone();
            self.inventory.update(vm, |e| e.record = shown);
        }
        Ok(Some(record))
    }

    /// Forgets a VM, durably. Blocks for a write to disk.
    pub fn forget_record(&self, vm: VmId) -> Result<(), RecordError> {
        let _alone = self.record_changes.lock();
        self.records.remove(vm)?;
        self.inventory.remove(vm);
        Ok(())
    }

    /// Notes who paused a VM, or that nobody did; false when that could not be written.
    pub async fn mark_paused(self: &Arc<Self>, vm: VmId, by: Option<PausedBy>) -> bool {
        let Some(entry) = self.inventory.get(vm) else { return true };
        if entry.no_space && by.is_none() {
            self.inventory.update(vm, |e| e.no_space = false);
        }
        if entry.record.paused_by == by {
            return true;
        }
        let host = Arc::clone(self);
        let changed = tokio::task::spawn_blocking(move || host.change_record(vm, |record| record.paused_by = by)).await;
        match changed {
            Ok(Ok(_)) => true,
            Ok(Err(e)) => {
                self.complain("who paused a VM was not recorded", &e);
                false
            }
            Err(_) => false,
        }
    }

    fn disk_transport(&self, disk: &DiskRecord) -> Result<DiskTransport, VolumeError> {
        Ok(match disk.transport {
            Transport::Nbd => {
                DiskTransport::Nbd { socket: self.config.export_socket(), export_name: disk.export_name() }
            }
            Transport::VhostUser { queues } => DiskTransport::VhostUser { socket: self.volumes.socket(disk)?, queues },
        })
    }

    /// How disks of a VM that starts now are to be served. Where there is no QEMU nobody would come to a socket.
    pub fn wanted_transport(&self, processors: u32) -> Transport {
        match self.machines.info().map(|info| info.kind) {
            Some(HypervisorKind::QemuEmbedded | HypervisorKind::QemuSystem) => self.config.export.transport(processors),
            Some(HypervisorKind::LibvirtTest | HypervisorKind::Simulator) | None => Transport::Nbd,
        }
    }

    /// Digests of boot files some VM needs.
    pub fn used_boot_files(&self) -> Vec<Digest> {
        let of = |record: VmRecord| {
            let template = check_template(record.template).ok();
            template.into_iter().flat_map(|t: Template| [t.kernel, t.initrd]).flatten()
        };
        self.inventory.all().into_iter().flat_map(|e| of(e.record)).collect()
    }

    /// Where bulk bytes for a command come from.
    pub fn source_for(&self, controller: &str) -> Option<String> {
        self.presence.lock().stream_endpoint(controller)
    }

    pub fn count_guest_file_reads(&self, reads: u64) {
        self.guest_file_reads.fetch_add(reads, Ordering::Relaxed);
    }

    /// Returns when a heartbeat was published that says what is so now; at once when the agent is stopping.
    pub async fn beat_now(&self) {
        let (beat, published) = oneshot::channel();
        if self.beats.send(beat).await.is_ok() {
            // an error: it stopped meanwhile
            let _ = published.await;
        }
    }

    /// Logs an error that only matters to the operator.
    pub fn complain(&self, what: &'static str, error: &(dyn std::error::Error + 'static)) {
        tracing::error!(host = %self.name, err = %Chain(error), "{what}");
    }
}
