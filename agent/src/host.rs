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
use muster_virt::{Boot, Console, DiskSpec, DomainSpec, NicSpec};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::{
    aftercare::Aftercare,
    arguments::{Template, check_template},
    boot::BootFiles,
    config::Config,
    identity::DrainMark,
    images::Images,
    inventory::Inventory,
    machines::Machines,
    presence::Presence,
    records::{Records, VmRecord},
    telemetry::Beat,
    voice::Voice,
    volumes::Volumes,
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
    /// Why there are no backups, when there are none.
    pub backups: Result<Backups, String>,
    pub machines: Machines,
    pub inventory: Inventory,
    pub aftercare: Aftercare,
    pub records: Records,
    pub draining: DrainMark,
    pub images: Images,
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
    pub fn domain(&self, record: &VmRecord) -> Result<DomainSpec, crate::arguments::ArgumentError> {
        let template = check_template(record.template.clone())?;
        let socket = self.config.export_socket();
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
        spec.vnc_socket = Some(self.vnc_socket(record.vm));
        spec.console = Console::Socket { path: self.console_socket(record.vm), log: Some(self.log_path(record.vm)) };
        spec.nics = template.spec.bridge.iter().map(|b| NicSpec { bridge: b.clone(), mac: None }).collect();
        spec.disks = record
            .disks
            .iter()
            .map(|disk| DiskSpec {
                target: disk.target.clone(),
                export_socket: socket.clone(),
                export_name: disk.export_name(),
                read_only: disk.is_read_only(),
                serial: Some(disk.volume.uuid().simple().to_string()[..20].to_string()),
            })
            .collect();
        Ok(spec)
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
