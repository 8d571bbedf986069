//! The root directory of an embedded QEMU driver.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{HypervisorError, HypervisorErrorKind, Result};

/// A unix socket's path has at most 107 bytes. libvirt puts its monitor at
/// `ROOT/lib/qemu/domain-NUMBER-NAME/monitor.sock`, the name cut at 20 bytes: 56 with a number of five digits.
pub const MAX_ROOT_LENGTH: usize = 48;

const MARK: &str = "# written by muster at every start; remove this line to keep your own version\n";

/// No privileges are dropped and nothing is confined: this is what works in containers and under any user. A hardened
/// host runs the system daemon instead (`qemu:///system`), or removes the mark and writes its own file.
const QEMU_CONF: &str = r#"
# log files instead of the virtlogd daemon, which an embedded driver does not have
stdio_handler = "file"
security_driver = "none"
dynamic_ownership = 0
remember_owner = 0
# no cgroups and no private /dev: both need privileges a container withholds
cgroup_controllers = []
namespaces = []
"#;

/// QEMU runs as we do. Without these lines a driver of root runs it as libvirt-qemu; with them a driver of anybody else
/// does not start, because it cannot give its files to root.
const RUN_AS_ROOT: &str = "user = \"root\"\ngroup = \"root\"\n";

/// What goes into the file for a driver of the user with this id.
fn configuration(user: u32) -> String {
    format!("{MARK}{QEMU_CONF}{}", if user == 0 { RUN_AS_ROOT } else { "" })
}

/// The directory named by an embed URI.
pub(super) fn root_of(uri: &str) -> Result<PathBuf> {
    let invalid =
        |why: &str| HypervisorError::new(HypervisorErrorKind::InvalidSpec, format!("open hypervisor {uri}: {why}"));
    let query = uri.split_once('?').map(|(_, query)| query).unwrap_or_default();
    let root = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("root="))
        .ok_or_else(|| invalid("an embedded hypervisor needs ?root=DIRECTORY"))?;
    if root.contains(['%', '#', '+']) || !Path::new(root).is_absolute() {
        return Err(invalid("the root must be an absolute path without `%`, `#` and `+`"));
    }
    let root = root.trim_end_matches('/');
    if root.len() > MAX_ROOT_LENGTH {
        return Err(invalid(&format!(
            "the root is {} bytes long, {MAX_ROOT_LENGTH} are possible (unix socket paths below it)",
            root.len()
        )));
    }
    Ok(PathBuf::from(root))
}

/// Where the sockets of guest agents are: ours to choose, see `xml::Flavour`.
pub(super) fn agent_sockets(root: &Path) -> PathBuf {
    root.join("ga")
}

/// Creates the root and its configuration.
pub(super) fn prepare(root: &Path) -> Result<()> {
    let file = root.join("etc/qemu.conf");
    let failed = |what: &str| {
        let context = format!("{what} {}", file.display());
        move |e: std::io::Error| HypervisorError::with_source(HypervisorErrorKind::Connection, context, e)
    };
    fs::create_dir_all(root.join("etc")).map_err(failed("create the directory of"))?;
    fs::create_dir_all(agent_sockets(root)).map_err(failed("create a directory beside"))?;
    // a process's entry in /proc belongs to its effective user
    let wanted = configuration(fs::metadata("/proc/self").map_err(failed("find out who runs this, for"))?.uid());
    match fs::read_to_string(&file) {
        Ok(present) if present == wanted || !present.starts_with(MARK) => return Ok(()),
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed("read")(e)),
    }
    let temporary = root.join("etc/qemu.conf.new");
    let write = || {
        let mut out = fs::File::create(&temporary)?;
        out.write_all(wanted.as_bytes())?;
        out.sync_all()?;
        fs::rename(&temporary, &file)
    };
    write().map_err(failed("write"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_an_embed_uri_is_absolute_and_short() {
        assert_eq!(root_of("qemu:///embed?root=/run/m/h1").unwrap(), PathBuf::from("/run/m/h1"));
        assert_eq!(root_of("qemu:///embed?x=1&root=/a/").unwrap(), PathBuf::from("/a"));
        for bad in ["qemu:///embed", "qemu:///embed?root=rel", "qemu:///embed?root=/a%20b"] {
            assert_eq!(root_of(bad).unwrap_err().kind(), HypervisorErrorKind::InvalidSpec, "{bad}");
        }
        let long = format!("qemu:///embed?root=/{}", "x".repeat(MAX_ROOT_LENGTH));
        assert!(root_of(&long).unwrap_err().context().contains("socket"));
    }

    #[test]
    fn only_a_driver_of_root_is_told_to_run_qemu_as_root() {
        assert!(configuration(0).contains("user = \"root\""));
        assert!(!configuration(1000).contains("user ="));
    }

    #[test]
    fn an_operators_own_configuration_is_kept_and_ours_is_renewed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("etc/qemu.conf");
        prepare(dir.path()).unwrap();
        assert!(fs::read_to_string(&file).unwrap().contains("stdio_handler"));
        fs::write(&file, format!("{MARK}old")).unwrap();
        prepare(dir.path()).unwrap();
        assert!(fs::read_to_string(&file).unwrap().contains("stdio_handler"));
        fs::write(&file, "user = \"me\"\n").unwrap();
        prepare(dir.path()).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "user = \"me\"\n");
    }
}
