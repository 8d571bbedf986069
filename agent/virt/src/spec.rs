//! What a domain is made of. Data only; `xml` turns it into libvirt's language.

use std::path::{Path, PathBuf};

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

/// How QEMU reaches a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskTransport {
    /// QEMU is the client of an NBD server, and its own block layer carries each request.
    Nbd {
        /// Unix socket of the server; it may serve many disks.
        socket: PathBuf,
        /// Export name, by our rule `<volume uuid>.<generation>`.
        export_name: String,
    },
    /// The server reads the guest's rings itself (vhost-user-blk): no copy through a socket, and the guest only stalls
    /// while the server is away. The domain's memory becomes shared memory.
    ///
    /// What libvirt refuses for such a disk is the server's to say: write protection (`VIRTIO_BLK_F_RO`), the serial
    /// number (the device id), errors, throttling, counters.
    VhostUser {
        /// Unix socket of this disk alone. It must answer before the domain is started, see
        /// [`crate::Hypervisor::start`].
        socket: PathBuf,
        /// Request queues, 1 to [`DiskTransport::MAX_QUEUES`]. The server has to offer as many, also after each restart.
        queues: u16,
    },
}

impl DiskTransport {
    /// More queues than processors serve nobody; no host of ours gives a guest more than this.
    pub const MAX_QUEUES: u16 = 64;

    /// Where the server listens.
    pub fn socket(&self) -> &Path {
        match self {
            Self::Nbd { socket, .. } | Self::VhostUser { socket, .. } => socket,
        }
    }

    pub fn is_vhost_user(&self) -> bool {
        matches!(self, Self::VhostUser { .. })
    }
}

/// One virtual disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Name in the guest's bus order: `vda`, `vdb`, ...
    pub target: String,
    pub transport: DiskTransport,
    /// The guest sees a write-protected disk. Over vhost-user the server says so.
    pub read_only: bool,
    /// Serial number shown to the guest (at most 20 characters of `[A-Za-z0-9._-]`). Over vhost-user the server says it.
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
    /// Back the memory with huge pages of the host's default size, which the operator has reserved. Faster with nested
    /// paging; a start without enough of them fails.
    pub huge_pages: bool,
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
            huge_pages: false,
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
