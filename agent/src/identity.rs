//! Who this agent is: the host id that lives in the state directory, the lock that keeps a second agent out of it, the
//! incarnation of this run, and what the machine calls itself.
//!
//! ```text
//! state_dir/lock       held with flock(2) while an agent lives; its text is the holder's process id, for people
//! state_dir/host-id    one UUID and a line feed; written once
//! state_dir/draining   exists while the host takes no new work
//! ```

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
};

use muster_common::{ErrorCode, HostId, Incarnation};
use rustix::fs::{FlockOperation, flock};

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{action} {path}", path = path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "lock state directory {path}: another agent runs with it (process {holder}); stop it, or give this one a state_dir of its own",
        path = path.display()
    )]
    Locked { path: PathBuf, holder: String },
    #[error("read the host id from {path}: {text:?} is not a UUID; restore the file, or remove it to become a new host", path = path.display())]
    Malformed { path: PathBuf, text: String },
}

impl IdentityError {
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Io { .. } => ErrorCode::Io,
            Self::Locked { .. } => ErrorCode::AddressInUse,
            Self::Malformed { .. } => ErrorCode::Corrupt,
        }
    }
}

/// Who this run is. Holds the state directory's lock until dropped.
#[derive(Debug)]
pub struct Identity {
    pub host: HostId,
    pub incarnation: Incarnation,
    /// Kernel boot id: another one after a restart of the machine. Empty when unreadable.
    pub boot: String,
    /// DMI system UUID; empty when unreadable. Containers and clones share it.
    pub hardware_uuid: String,
    _lock: File,
}

impl Identity {
    /// Takes the state directory and reads or makes the host id.
    pub fn open(state_dir: &Path) -> Result<Self, IdentityError> {
        fs::create_dir_all(state_dir).map_err(|source| IdentityError::Io {
            action: "create state directory",
            path: state_dir.into(),
            source,
        })?;
        let lock = lock(state_dir)?;
        Ok(Self {
            host: host_id(state_dir)?,
            incarnation: Incarnation::random(),
            boot: read_trimmed("/proc/sys/kernel/random/boot_id"),
            hardware_uuid: read_trimmed("/sys/class/dmi/id/product_uuid").to_ascii_lowercase(),
            _lock: lock,
        })
    }
}

fn read_trimmed(path: &str) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_string()).unwrap_or_default()
}

fn lock(state_dir: &Path) -> Result<File, IdentityError> {
    let path = state_dir.join("lock");
    let io = |action| {
        let path = path.clone();
        move |source| IdentityError::Io { action, path, source }
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io("open lock file"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            // the text is for people; without it the refusal is as good
            let _ = file.read_to_string(&mut holder);
            return Err(IdentityError::Locked { path: state_dir.into(), holder: holder.trim().to_string() });
        }
        Err(e) => return Err(io("lock")(e.into())),
    }
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    write(&mut file).map_err(io("write lock file"))?;
    Ok(file)
}

fn host_id(state_dir: &Path) -> Result<HostId, IdentityError> {
    let path = state_dir.join("host-id");
    match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| IdentityError::Malformed { path, text: text.trim().into() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let id = HostId::random();
            write_durably(&path, format!("{id}\n").as_bytes()).map_err(|source| IdentityError::Io {
                action: "write host id",
                path,
                source,
            })?;
            Ok(id)
        }
        Err(source) => Err(IdentityError::Io { action: "read host id", path, source }),
    }
}

/// Replaces a file so that after a crash it is the old or the new one, and durable when this returns.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().ok_or_else(|| io::Error::other("a file has a directory"))?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}

/// Removes a file, durably. An absent one is not an error.
pub fn remove_durably(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    }
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

/// Whether the host takes new work survives a restart.
#[derive(Debug)]
pub struct DrainMark(PathBuf);

impl DrainMark {
    pub fn new(state_dir: &Path) -> Self {
        Self(state_dir.join("draining"))
    }
    pub fn is_set(&self) -> bool {
        self.0.exists()
    }
    pub fn set(&self, draining: bool) -> io::Result<()> {
        if draining { write_durably(&self.0, b"1\n") } else { remove_durably(&self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_keeps_its_id_and_each_run_has_its_incarnation() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::open(dir.path()).unwrap();
        let (host, incarnation) = (first.host, first.incarnation);
        drop(first);
        let second = Identity::open(dir.path()).unwrap();
        assert_eq!(second.host, host);
        assert_ne!(second.incarnation, incarnation);
    }

    #[test]
    fn a_second_agent_on_the_same_state_directory_is_refused_and_told_who_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Identity::open(dir.path()).unwrap();
        let error = Identity::open(dir.path()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::AddressInUse);
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    }

    #[test]
    fn a_damaged_host_id_is_not_silently_replaced() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("host-id"), "garbage").unwrap();
        assert!(matches!(Identity::open(dir.path()), Err(IdentityError::Malformed { .. })));
    }

    #[test]
    fn draining_survives() {
        let dir = tempfile::tempdir().unwrap();
        let mark = DrainMark::new(dir.path());
        assert!(!mark.is_set());
        mark.set(true).unwrap();
        assert!(DrainMark::new(dir.path()).is_set());
        mark.set(false).unwrap();
        mark.set(false).unwrap();
        assert!(!mark.is_set());
    }
}
