//! Domain XML: a pure function from [`DomainSpec`], snapshot-tested.
//!
//! Everything that comes from outside passes `check` and `escape`. The text is libvirt's input and nobody's wire
//! format: it may change, knowingly (the snapshots).

use std::fmt::Write;
use std::path::{Path, PathBuf};

use muster_common::id::VmId;

use crate::error::{HypervisorError, HypervisorErrorKind, Result};
use crate::spec::{Accel, Boot, Console, DiskSpec, DiskTransport, DomainSpec};

/// Namespace of our metadata element: what makes a domain ours.
pub const METADATA_NAMESPACE: &str = "urn:muster:domain:1";

/// Name of the guest agent's channel, fixed by `qemu-guest-agent`.
pub(super) const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// `sun_path` without its terminating zero.
const SOCKET_PATH_MAX: usize = 107;

/// How long QEMU waits between attempts to reach a vhost-user server that went away. The shortest there is: the guest's
/// requests wait as long.
const RECONNECT_SECONDS: u32 = 1;

/// Whose parser will read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour<'a> {
    Qemu {
        /// Where the guest agent's socket goes. libvirt's own choice is 81 bytes below its root, which leaves an
        /// embedded root 26.
        agent_sockets: Option<&'a Path>,
    },
    /// libvirt's mock: no accelerator, no devices it would not understand.
    Test,
}

/// The domain XML for a specification, or `InvalidSpec` with what is wrong.
pub fn domain_xml(spec: &DomainSpec, flavour: Flavour<'_>) -> Result<String> {
    check(spec)?;
    Ok(render(spec, flavour).unwrap_or_default())
}

fn invalid(what: impl Into<String>) -> HypervisorError {
    HypervisorError::new(HypervisorErrorKind::InvalidSpec, what)
}

/// XML 1.0 has no way to write most control characters, not even escaped.
fn writable(text: &str) -> bool {
    text.chars().all(|c| !c.is_control() && c != '\u{fffe}' && c != '\u{ffff}')
}

fn path_text<'a>(what: &str, path: &'a Path) -> Result<&'a str> {
    let text = path.to_str().filter(|t| writable(t));
    match text {
        Some(text) if path.is_absolute() => Ok(text),
        _ => Err(invalid(format!("{what} {path:?} is not an absolute path in plain text"))),
    }
}

fn check_socket(what: &str, path: &Path) -> Result<()> {
    let text = path_text(what, path)?;
    if text.len() > SOCKET_PATH_MAX {
        return Err(invalid(format!(
            "{what} {text} is longer than {SOCKET_PATH_MAX} bytes, the limit of a unix socket"
        )));
    }
    Ok(())
}

fn check(spec: &DomainSpec) -> Result<()> {
    let name = spec.name.as_str();
    // libvirt makes file names of it
    let usable =
        !name.trim().is_empty() && name.len() <= 128 && writable(name) && !name.contains('/') && !name.starts_with('.');
    if !usable {
        return Err(invalid(format!(
            "domain name {name:?}: give 1 to 128 bytes without `/` and control characters, not starting with a dot"
        )));
    }
    if spec.vcpus == 0 || spec.max_vcpus < spec.vcpus {
        return Err(invalid(format!("{} processors of at most {}", spec.vcpus, spec.max_vcpus)));
    }
    if spec.memory.bytes() < 1 << 20 {
        return Err(invalid(format!("memory of {} is less than 1 MiB", spec.memory)));
    }
    let plain = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if !plain(&spec.machine) {
        return Err(invalid(format!("machine type {:?}", spec.machine)));
    }
    if let Boot::Direct { kernel, initrd, cmdline } = &spec.boot {
        path_text("kernel", kernel)?;
        initrd.as_deref().map(|p| path_text("initrd", p)).transpose()?;
        if !writable(cmdline) {
            return Err(invalid("the kernel command line contains control characters"));
        }
    } else if spec.disks.is_empty() {
        return Err(invalid("boot from disk without a disk"));
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        let letters = disk.target.strip_prefix("vd").unwrap_or_default();
        if letters.is_empty() || letters.len() > 2 || !letters.bytes().all(|b| b.is_ascii_lowercase()) {
            return Err(invalid(format!("disk target {:?} is not vda, vdb, ...", disk.target)));
        }
        if spec.disks[..index].iter().any(|other| other.target == disk.target) {
            return Err(invalid(format!("disk target {} is used twice", disk.target)));
        }
        check_socket("disk socket", disk.transport.socket())?;
        match &disk.transport {
            DiskTransport::Nbd { export_name, .. } => {
                if !plain(export_name) || export_name.len() > 256 {
                    return Err(invalid(format!("export name {export_name:?}")));
                }
            }
            DiskTransport::VhostUser { queues, socket } => {
                if *queues == 0 || *queues > DiskTransport::MAX_QUEUES {
                    let most = DiskTransport::MAX_QUEUES;
                    return Err(invalid(format!("{queues} queues of disk {}: 1 to {most} are possible", disk.target)));
                }
                // the socket is the disk: two disks on it would be one
                if spec.disks[..index].iter().any(|other| other.transport.socket() == socket) {
                    return Err(invalid(format!("disk socket {} is used twice", socket.display())));
                }
            }
        }
        if disk.serial.as_deref().is_some_and(|serial| !plain(serial) || serial.len() > 20) {
            return Err(invalid(format!("disk serial {:?}: at most 20 of letters, digits, `._-`", disk.serial)));
        }
    }
    if let Some(socket) = &spec.vnc_socket {
        check_socket("VNC socket", socket)?;
    }
    match &spec.console {
        Console::None => {}
        Console::Pty { log } => {
            log.as_deref().map(|p| path_text("console log", p)).transpose()?;
        }
        Console::Socket { path, log } => {
            check_socket("console socket", path)?;
            log.as_deref().map(|p| path_text("console log", p)).transpose()?;
        }
    }
    for nic in &spec.nics {
        // IFNAMSIZ
        if !plain(&nic.bridge) || nic.bridge.len() > 15 {
            return Err(invalid(format!("bridge {:?}", nic.bridge)));
        }
        if nic.mac.as_deref().is_some_and(|mac| !is_unicast_mac(mac)) {
            return Err(invalid(format!("hardware address {:?}", nic.mac)));
        }
    }
    Ok(())
}

fn is_unicast_mac(text: &str) -> bool {
    let bytes: Vec<Option<u8>> = text
        .split(':')
        .map(|part| (part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit())).then_some(part))
        .map(|part| u8::from_str_radix(part?, 16).ok())
        .collect();
    bytes.len() == 6 && bytes.iter().all(Option::is_some) && bytes[0].is_some_and(|first| first & 1 == 0)
}

/// A locally administered address made of 46 random bits of the VM id: the usual `52:54:00` prefix leaves 24, and a
/// thousand machines would meet a collision with 3 %.
fn derived_mac(vm: VmId, index: usize) -> String {
    let id = vm.uuid().into_bytes();
    let last = id[15].wrapping_add(index as u8);
    format!("{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{last:02x}", id[10] & 0xfc | 0x02, id[11], id[12], id[13], id[14])
}

/// The sockets of a domain's vhost-user disks, out of XML as libvirt writes it: its attributes are in a fixed order, in
/// single quotes, and quotes within values are escaped.
pub(super) fn vhost_user_sockets(xml: &str) -> Vec<PathBuf> {
    let disks = xml.split("<disk type='vhostuser'").skip(1);
    let sockets = disks.filter_map(|disk| {
        let disk = disk.split("</disk>").next()?;
        let path = disk.split_once("<source type='unix' path='")?.1.split('\'').next()?;
        Some(PathBuf::from(unescape(path)))
    });
    sockets.collect()
}

fn unescape(text: &str) -> String {
    // the ampersand last: it may have been part of what is text now
    let entities = [("&lt;", "<"), ("&gt;", ">"), ("&apos;", "'"), ("&quot;", "\""), ("&amp;", "&")];
    entities.iter().fold(text.to_owned(), |text, (entity, character)| text.replace(entity, character))
}

/// Text or attribute value, both kinds of quotes escaped.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

fn escape_path(path: &Path) -> String {
    // check() refused paths that are not UTF-8
    escape(&path.to_string_lossy())
}

fn render(spec: &DomainSpec, flavour: Flavour<'_>) -> Result<String, std::fmt::Error> {
    let qemu = flavour != Flavour::Test;
    let kind = match (flavour, spec.accel) {
        (Flavour::Test, _) => "test",
        (Flavour::Qemu { .. }, Accel::Kvm) => "kvm",
        (Flavour::Qemu { .. }, Accel::Tcg) => "qemu",
    };
    let mut x = String::new();
    writeln!(x, "<domain type='{kind}'>")?;
    writeln!(x, "  <name>{}</name>", escape(&spec.name))?;
    writeln!(x, "  <uuid>{}</uuid>", spec.vm)?;
    writeln!(x, "  <metadata>")?;
    writeln!(x, "    <muster:domain xmlns:muster='{METADATA_NAMESPACE}' vm='{}'/>", spec.vm)?;
    writeln!(x, "  </metadata>")?;
    writeln!(x, "  <memory unit='b'>{}</memory>", spec.memory.bytes())?;
    if qemu {
        render_memory_backing(&mut x, spec)?;
    }
    writeln!(x, "  <vcpu placement='static' current='{}'>{}</vcpu>", spec.vcpus, spec.max_vcpus)?;
    writeln!(x, "  <os>")?;
    if qemu {
        writeln!(x, "    <type arch='x86_64' machine='{}'>hvm</type>", escape(&spec.machine))?;
        if let Boot::Direct { kernel, initrd, cmdline } = &spec.boot {
            writeln!(x, "    <kernel>{}</kernel>", escape_path(kernel))?;
            if let Some(initrd) = initrd {
                writeln!(x, "    <initrd>{}</initrd>", escape_path(initrd))?;
            }
            writeln!(x, "    <cmdline>{}</cmdline>", escape(cmdline))?;
        }
    } else {
        writeln!(x, "    <type>hvm</type>")?;
    }
    writeln!(x, "  </os>")?;
    writeln!(x, "  <features><acpi/><apic/></features>")?;
    if qemu {
        // every feature the accelerator offers; with KVM without those that forbid live migration
        match spec.accel {
            Accel::Kvm => writeln!(x, "  <cpu mode='host-passthrough' check='none' migratable='on'/>")?,
            Accel::Tcg => writeln!(x, "  <cpu mode='maximum' check='none'/>")?,
        }
    }
    writeln!(x, "  <clock offset='utc'/>")?;
    writeln!(x, "  <on_poweroff>destroy</on_poweroff>")?;
    writeln!(x, "  <on_reboot>restart</on_reboot>")?;
    writeln!(x, "  <on_crash>destroy</on_crash>")?;
    writeln!(x, "  <devices>")?;
    if let Flavour::Qemu { agent_sockets } = flavour {
        render_devices(&mut x, spec, agent_sockets)?;
    }
    writeln!(x, "  </devices>")?;
    writeln!(x, "</domain>")?;
    Ok(x)
}

/// A server that reads the guest's rings needs the guest's memory: it becomes a file that QEMU hands over.
fn render_memory_backing(x: &mut String, spec: &DomainSpec) -> std::fmt::Result {
    let shared = spec.disks.iter().any(|disk| disk.transport.is_vhost_user());
    if !shared && !spec.huge_pages {
        return Ok(());
    }
    writeln!(x, "  <memoryBacking>")?;
    if spec.huge_pages {
        writeln!(x, "    <hugepages/>")?;
    }
    if shared {
        writeln!(x, "    <source type='memfd'/>")?;
        writeln!(x, "    <access mode='shared'/>")?;
    }
    writeln!(x, "  </memoryBacking>")
}

fn render_devices(x: &mut String, spec: &DomainSpec, agent_sockets: Option<&Path>) -> std::fmt::Result {
    writeln!(x, "    <controller type='usb' model='none'/>")?;
    // q35 plugs PCI Express devices into root ports only; libvirt makes none to spare. Balloon and random numbers are
    // always there, the rest counts below.
    let tablet = u32::from(spec.vnc_socket.is_some());
    let serial = u32::from(spec.guest_agent);
    let devices = 2 + tablet + serial + spec.disks.len() as u32 + spec.nics.len() as u32;
    if spec.machine.contains("q35") {
        writeln!(x, "    <controller type='pci' index='0' model='pcie-root'/>")?;
        for index in 1..=devices + spec.root_ports {
            writeln!(x, "    <controller type='pci' index='{index}' model='pcie-root-port'/>")?;
        }
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        render_disk(x, disk, index == 0 && spec.boot == Boot::Disk)?;
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        let mac = nic.mac.clone().unwrap_or_else(|| derived_mac(spec.vm, index));
        writeln!(x, "    <interface type='bridge'>")?;
        writeln!(x, "      <mac address='{}'/>", escape(&mac))?;
        writeln!(x, "      <source bridge='{}'/>", escape(&nic.bridge))?;
        writeln!(x, "      <model type='virtio'/>")?;
        writeln!(x, "    </interface>")?;
    }
    let log_element = |x: &mut String, log: Option<&Path>| match log {
        Some(log) => writeln!(x, "      <log file='{}' append='on'/>", escape_path(log)),
        None => Ok(()),
    };
    match &spec.console {
        Console::None => {}
        Console::Pty { log } => {
            writeln!(x, "    <serial type='pty'>")?;
            log_element(x, log.as_deref())?;
            writeln!(x, "      <target port='0'/>\n    </serial>")?;
        }
        Console::Socket { path, log } => {
            writeln!(x, "    <serial type='unix'>")?;
            writeln!(x, "      <source mode='bind' path='{}'/>", escape_path(path))?;
            log_element(x, log.as_deref())?;
            writeln!(x, "      <target port='0'/>\n    </serial>")?;
        }
    }
    if spec.guest_agent {
        writeln!(x, "    <channel type='unix'>")?;
        if let Some(dir) = agent_sockets {
            writeln!(x, "      <source mode='bind' path='{}'/>", escape_path(&dir.join(spec.vm.to_string())))?;
        }
        writeln!(x, "      <target type='virtio' name='{AGENT_CHANNEL}'/>")?;
        writeln!(x, "    </channel>")?;
    }
    if let Some(socket) = &spec.vnc_socket {
        writeln!(x, "    <graphics type='vnc'>")?;
        writeln!(x, "      <listen type='socket' socket='{}'/>", escape_path(socket))?;
        writeln!(x, "    </graphics>")?;
        // an absolute pointer, so that the viewer's and the guest's do not drift apart
        writeln!(x, "    <input type='tablet' bus='virtio'/>")?;
        writeln!(x, "    <video><model type='vga' vram='16384' heads='1' primary='yes'/></video>")?;
        writeln!(x, "    <audio id='1' type='none'/>")?;
    } else {
        writeln!(x, "    <video><model type='none'/></video>")?;
    }
    // what the guest frees goes back to the host. Not of reserved huge pages: one given back may be gone when the guest wants
    // it again, and that ends QEMU
    let reporting = if spec.huge_pages { "" } else { " freePageReporting='on'" };
    writeln!(x, "    <memballoon model='virtio' autodeflate='on'{reporting}><stats period='5'/></memballoon>")?;
    writeln!(x, "    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>")
}

fn render_disk(x: &mut String, disk: &DiskSpec, boot: bool) -> std::fmt::Result {
    let server_says_the_rest = disk.transport.is_vhost_user();
    match &disk.transport {
        DiskTransport::Nbd { socket, export_name } => {
            writeln!(x, "    <disk type='network' device='disk'>")?;
            // stop: the guest is paused when its disk is away instead of being told of I/O errors
            writeln!(
                x,
                "      <driver name='qemu' type='raw' cache='none' io='threads' discard='unmap' detect_zeroes='unmap' \
                 error_policy='stop' rerror_policy='stop'/>"
            )?;
            writeln!(x, "      <source protocol='nbd' name='{}'>", escape(export_name))?;
            writeln!(x, "        <host transport='unix' socket='{}'/>", escape_path(socket))?;
            writeln!(x, "      </source>")?;
        }
        DiskTransport::VhostUser { socket, queues } => {
            writeln!(x, "    <disk type='vhostuser' device='disk'>")?;
            writeln!(x, "      <driver name='qemu' type='raw' queues='{queues}'/>")?;
            writeln!(x, "      <source type='unix' path='{}'>", escape_path(socket))?;
            writeln!(x, "        <reconnect enabled='yes' timeout='{RECONNECT_SECONDS}'/>")?;
            writeln!(x, "      </source>")?;
        }
    }
    writeln!(x, "      <target dev='{}' bus='virtio'/>", escape(&disk.target))?;
    if disk.read_only && !server_says_the_rest {
        writeln!(x, "      <readonly/>")?;
    }
    if let Some(serial) = disk.serial.as_ref().filter(|_| !server_says_the_rest) {
        writeln!(x, "      <serial>{}</serial>", escape(serial))?;
    }
    if boot {
        writeln!(x, "      <boot order='1'/>")?;
    }
    writeln!(x, "    </disk>")
}

#[cfg(test)]
mod tests {
    use muster_common::units::ByteLen;

    use super::*;
    use crate::spec::NicSpec;

    const QEMU: Flavour<'_> = Flavour::Qemu { agent_sockets: None };

    fn vm() -> VmId {
        "0b5c7a3e-9d21-4c6f-8a10-5e3d2c1b0a99".parse().unwrap()
    }

    fn direct() -> Boot {
        Boot::Direct {
            kernel: "/boot/vmlinux".into(),
            initrd: Some("/boot/initrd".into()),
            cmdline: "root=/dev/vda rw console=ttyS0 quiet".into(),
        }
    }

    fn disk(target: &str, generation: u32, read_only: bool) -> DiskSpec {
        DiskSpec {
            target: target.into(),
            transport: DiskTransport::Nbd {
                socket: "/run/muster/nbd".into(),
                export_name: format!("2f1a6c1e-0000-4000-8000-00000000000{generation}.{generation}"),
            },
            read_only,
            serial: Some(format!("muster.{generation}")),
        }
    }

    fn vhost_user(target: &str, generation: u32, queues: u16) -> DiskSpec {
        let socket = format!("/run/muster/d-{generation}").into();
        DiskSpec { transport: DiskTransport::VhostUser { socket, queues }, ..disk(target, generation, true) }
    }

    /// Everything at once.
    fn desktop() -> DomainSpec {
        let mut spec = DomainSpec::new(vm(), "lab1-01", ByteLen::mib(512), direct(), Accel::Tcg);
        (spec.vcpus, spec.max_vcpus) = (2, 4);
        spec.disks = vec![disk("vda", 1, false), disk("vdb", 2, true)];
        spec.vnc_socket = Some("/run/muster/lab1-01.vnc".into());
        spec.console =
            Console::Socket { path: "/run/muster/lab1-01.con".into(), log: Some("/var/log/lab1-01.log".into()) };
        spec.nics = vec![
            NicSpec { bridge: "br0".into(), mac: None },
            NicSpec { bridge: "br1".into(), mac: Some("52:54:00:12:34:56".into()) },
        ];
        spec
    }

    #[test]
    fn a_desktop_with_everything() {
        let flavour = Flavour::Qemu { agent_sockets: Some(Path::new("/run/muster/ga")) };
        insta::assert_snapshot!(domain_xml(&desktop(), flavour).unwrap());
    }

    #[test]
    fn a_small_machine_that_boots_from_its_disk_under_kvm() {
        let mut spec = DomainSpec::new(vm(), "small", ByteLen::gib(1), Boot::Disk, Accel::Kvm);
        spec.disks = vec![disk("vda", 1, false)];
        spec.console = Console::Pty { log: None };
        spec.guest_agent = false;
        insta::assert_snapshot!(domain_xml(&spec, QEMU).unwrap());
    }

    #[test]
    fn a_desktop_on_vhost_user_disks_beside_one_over_nbd() {
        let mut spec = DomainSpec::new(vm(), "lab1-02", ByteLen::mib(512), Boot::Disk, Accel::Kvm);
        spec.disks = vec![vhost_user("vda", 1, 4), vhost_user("vdb", 2, 1), disk("vdc", 3, true)];
        insta::assert_snapshot!(domain_xml(&spec, QEMU).unwrap());
    }

    #[test]
    fn memory_is_shared_only_with_a_vhost_user_server_and_huge_only_when_asked() {
        let mut spec = desktop();
        assert!(!domain_xml(&spec, QEMU).unwrap().contains("memoryBacking"));
        spec.huge_pages = true;
        let xml = domain_xml(&spec, QEMU).unwrap();
        assert!(xml.contains("<hugepages/>") && !xml.contains("mode='shared'"), "{xml}");
        spec.disks[1] = vhost_user("vdb", 2, 1);
        let xml = domain_xml(&spec, QEMU).unwrap();
        assert!(xml.contains("<hugepages/>") && xml.contains("mode='shared'"), "{xml}");
        assert!(!domain_xml(&spec, Flavour::Test).unwrap().contains("memoryBacking"));
    }

    #[test]
    fn free_pages_go_back_to_the_host_unless_they_are_reserved_ones() {
        let mut spec = desktop();
        assert!(domain_xml(&spec, QEMU).unwrap().contains(" freePageReporting='on'"));
        spec.huge_pages = true;
        let xml = domain_xml(&spec, QEMU).unwrap();
        assert!(xml.contains("<memballoon ") && !xml.contains("freePageReporting"), "{xml}");
    }

    #[test]
    fn a_machine_of_the_mock() {
        insta::assert_snapshot!(domain_xml(&desktop(), Flavour::Test).unwrap());
    }

    #[test]
    fn nothing_a_user_writes_becomes_markup() {
        let evil = "'/><evil a=\"&amp;\"></name>";
        let mut spec = desktop();
        spec.name = evil.replace('/', "|");
        spec.boot = Boot::Direct {
            kernel: format!("/k{evil}").into(),
            initrd: Some(format!("/i{evil}").into()),
            cmdline: evil.into(),
        };
        spec.vnc_socket = Some(format!("/v{evil}").into());
        spec.console = Console::Socket { path: format!("/c{evil}").into(), log: Some(format!("/l{evil}").into()) };
        spec.disks[0].transport = DiskTransport::Nbd { socket: format!("/s{evil}").into(), export_name: "x".into() };
        spec.disks[1].transport = DiskTransport::VhostUser { socket: format!("/w{evil}").into(), queues: 1 };
        let xml = domain_xml(&spec, QEMU).unwrap();
        assert!(!xml.contains("<evil") && !xml.contains("\"&amp;\""), "{xml}");
        assert_eq!(xml.matches("&lt;evil a=&quot;&amp;amp;&quot;&gt;").count(), 9, "{xml}");
    }

    #[test]
    fn sockets_of_vhost_user_disks_are_read_back_as_they_were_given() {
        let mut spec = desktop();
        spec.disks[0] = vhost_user("vda", 1, 1);
        let odd = PathBuf::from("/run/R&D &lt; 'a'\"<b>");
        spec.disks.push(DiskSpec {
            transport: DiskTransport::VhostUser { socket: odd.clone(), queues: 1 },
            ..disk("vdc", 3, false)
        });
        let xml = domain_xml(&spec, QEMU).unwrap();
        assert_eq!(vhost_user_sockets(&xml), [PathBuf::from("/run/muster/d-1"), odd]);
    }

    #[test]
    fn what_libvirt_or_the_kernel_cannot_take_is_refused_with_a_reason() {
        type Spoil = fn(&mut DomainSpec);
        let cases: &[(&str, Spoil)] = &[
            ("name", |s| s.name = "a/b".into()),
            ("name", |s| s.name = "  ".into()),
            ("name", |s| s.name = "a\nb".into()),
            ("name", |s| s.name = ".hidden".into()),
            ("name", |s| s.name = "x".repeat(129)),
            ("processors", |s| s.vcpus = 0),
            ("processors", |s| s.max_vcpus = 1),
            ("memory", |s| s.memory = ByteLen(4096)),
            ("machine", |s| s.machine = "q35'".into()),
            ("kernel", |s| s.boot = Boot::Direct { kernel: "k".into(), initrd: None, cmdline: String::new() }),
            ("command line", |s| s.boot = Boot::Direct { kernel: "/k".into(), initrd: None, cmdline: "a\0b".into() }),
            ("without a disk", |s| {
                s.boot = Boot::Disk;
                s.disks.clear();
            }),
            ("target", |s| s.disks[0].target = "sda".into()),
            ("twice", |s| s.disks[1].target = "vda".into()),
            ("export name", |s| {
                s.disks[0].transport = DiskTransport::Nbd { socket: "/s".into(), export_name: "a b".into() }
            }),
            ("disk socket", |s| {
                s.disks[0].transport = DiskTransport::Nbd { socket: "relative".into(), export_name: "a".into() }
            }),
            ("queues", |s| s.disks[0] = vhost_user("vda", 1, 0)),
            ("queues", |s| s.disks[0] = vhost_user("vda", 1, 65)),
            ("twice", |s| {
                s.disks[0] = vhost_user("vda", 1, 1);
                s.disks[1] = vhost_user("vdb", 1, 1);
            }),
            ("socket", |s| s.vnc_socket = Some(format!("/{}", "x".repeat(107)).into())),
            ("serial", |s| s.disks[0].serial = Some("x".repeat(21))),
            ("console", |s| s.console = Console::Pty { log: Some("log".into()) }),
            ("bridge", |s| s.nics[0].bridge = "a-name-that-is-too-long".into()),
            ("hardware address", |s| s.nics[1].mac = Some("01:00:5e:00:00:01".into())),
            ("hardware address", |s| s.nics[1].mac = Some("52:54:00:12:34".into())),
        ];
        for (word, spoil) in cases {
            let mut spec = desktop();
            spoil(&mut spec);
            let error = domain_xml(&spec, QEMU).unwrap_err();
            assert_eq!(error.kind(), HypervisorErrorKind::InvalidSpec);
            assert!(error.context().contains(word), "{word}: {}", error.context());
        }
    }
}
