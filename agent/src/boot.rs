//! Kernels and initrds of direct boot. QEMU reads them from files when it starts, so they are kept as files in memory: on
//! the tmpfs of `run_dir`, or, when that is on a disk, below `/dev/shm`. Only when neither is a tmpfs are they on a disk;
//! then each power-on counts in `guest_file_reads`.

use std::{
    io,
    path::{Path, PathBuf},
};

use muster_common::{Digest, HostId};
use rustix::fs::statfs;

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` (linux/magic.h).
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// Where boot files are.
#[derive(Clone, Debug)]
pub struct BootFiles {
    directory: PathBuf,
    in_memory: bool,
}

fn is_in_memory(path: &Path) -> bool {
    // the type's width differs by architecture
    #[allow(clippy::unnecessary_cast)]
    statfs(path).is_ok_and(|s| IN_MEMORY.contains(&(s.f_type as u64 & 0xffff_ffff)))
}

impl BootFiles {
    /// Chooses the directory; it is made with the first file.
    pub fn choose(run_dir: &Path, host: HostId) -> Self {
        let shared = Path::new("/dev/shm");
        let (directory, in_memory) = if is_in_memory(run_dir) {
            (run_dir.join("boot"), true)
        } else if is_in_memory(shared) {
            (shared.join(format!("muster-{}", host.short())).join("boot"), true)
        } else {
            tracing::warn!(
                run_dir = %run_dir.display(),
                "neither run_dir nor /dev/shm is a tmpfs: kernels of guests are read from a disk at power-on"
            );
            (run_dir.join("boot"), false)
        };
        Self { directory, in_memory }
    }

    /// Whether powering on reads no disk.
    pub fn in_memory(&self) -> bool {
        self.in_memory
    }

    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(digest.to_string())
    }

    pub fn has(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Keeps verified bytes. Atomic: a file of this name is whole.
    pub fn keep(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        std::fs::create_dir_all(&self.directory)?;
        let path = self.path(digest);
        let temporary = self.directory.join(format!("{digest}.{}", muster_common::CommandId::now()));
        std::fs::write(&temporary, bytes)?;
        std::fs::rename(&temporary, &path)
    }

    /// At an orderly stop: memory outside of `run_dir` is given back. The files are fetched again, as images are.
    pub fn leave(&self) {
        if let Some(own) = self.directory.parent().filter(|d| d.starts_with("/dev/shm")) {
            // what stays costs memory and nothing else
            let _ = std::fs::remove_dir_all(own);
        }
    }

    /// Removes those no VM names.
    pub fn sweep(&self, used: &[Digest]) {
        let names: Vec<String> = used.iter().map(Digest::to_string).collect();
        for entry in std::fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !names.contains(&name) {
                // one that stays costs memory and nothing else
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}
