//! What the benches against other servers share.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A child that is ended with us.
pub struct Peer(pub Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A tmpfs of our own where we may mount one, else the machine's.
pub struct Tmpfs {
    pub path: PathBuf,
    mounted: bool,
}

impl Tmpfs {
    pub fn new(at: &Path) -> std::io::Result<Tmpfs> {
        std::fs::create_dir(at)?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "muster-bench"])
            .arg(at)
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if mounted {
            return Ok(Tmpfs { path: at.to_owned(), mounted });
        }
        let path = PathBuf::from(format!("/dev/shm/muster-bench-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Tmpfs { path, mounted })
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg(&self.path).status();
        } else {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
