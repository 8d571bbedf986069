//! What a domain is made of. Data only; `xml` turns it into libvirt's language.

use std::path::PathBuf;

use muster_common::id::VmId;
use muster_common::units::ByteLen;
use serde::{Deserialize, Serialize};

/// How guest code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// The processor's virtualization, through `/dev/kvm`.
    Kvm,
    /// QEMU's translator: any machine, 10 to 30 times slower.
    Tcg,
}

/// What the firmware or QEMU starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Boot {
    /// QEMU loads the kernel itself; the disk needs no boot loader. Files on the host.
    Direct { kernel: PathBuf, initrd: Option<PathBuf>, cmdline: String },
    /// The first disk's boot loader.
    Disk,
}

/// One virtual disk, served over NBD on a unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Name in the guest's bus order: `vda`, `vdb`, ...
    pub target: String,
    /// Unix socket of the NBD server.
    pub export_socket: PathBuf,
    /// Export name, by our rule `<volume uuid>.<generation>`.
    pub export_name: String,
    /// The guest sees a write-protected disk.
    pub read_only: bool,
    /// Serial number shown to the guest (at most 20 characters of `[A-Za-z0-9._-]`).
    pub serial: Option<String>,
}

/// Where the first serial port goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Console {
    /// No serial port.
    None,
    /// A pseudo terminal; everything is also appended to the log when there is one.
    Pty { log: Option<PathBuf> },
    /// QEMU listens on a unix socket: whoever connects reads and writes the port (one client at a time). What the
    /// guest says is appended to the log also while nobody is connected.
    Socket { path: PathBuf, log: Option<PathBuf> },
}

/// One network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSpec {
    /// Host bridge the card is plugged into.
    pub bridge: String,
    /// Fixed hardware address; derived from the VM id and the card's index when absent.
    pub mac: Option<String>,
}

/// Everything needed to define a domain. The domain's UUID is the VM id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainSpec {
    pub vm: VmId,
    /// Unique on the host: letters, digits, `.`, `_`, `-` and blanks; names may change, ids do not.
    pub name: String,
    /// Processors at start.
    pub vcpus: u32,
    /// Ceiling for adding processors later; at least `vcpus`.
    pub max_vcpus: u32,
    pub memory: ByteLen,
    pub disks: Vec<DiskSpec>,
    pub boot: Boot,
    /// QEMU machine type, normally [`DomainSpec::MACHINE`].
    pub machine: String,
    pub accel: Accel,
    /// Unix socket QEMU listens on for RFB; no display at all when absent.
    pub vnc_socket: Option<PathBuf>,
    pub console: Console,
    pub nics: Vec<NicSpec>,
    /// The channel for `qemu-guest-agent`.
    pub guest_agent: bool,
    /// Free PCI Express root ports for devices plugged in later.
    pub root_ports: u32,
}

impl DomainSpec {
    /// The machine type every desktop uses unless its template says otherwise.
    pub const MACHINE: &'static str = "q35";

    /// A diskless machine with the usual devices; fill in disks, display and console.
    pub fn new(vm: VmId, name: impl Into<String>, memory: ByteLen, boot: Boot, accel: Accel) -> Self {
        Self {
            vm,
            name: name.into(),
            vcpus: 1,
            max_vcpus: 1,
            memory,
            disks: Vec::new(),
            boot,
            machine: Self::MACHINE.to_owned(),
            accel,
            vnc_socket: None,
            console: Console::None,
            nics: Vec::new(),
            guest_agent: true,
            root_ports: 4,
        }
    }
}
