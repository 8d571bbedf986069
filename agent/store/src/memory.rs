//! Where a store's memory lies: private to the process, or in files of a directory in memory, which outlive it.
//!
//! ```text
//!   DIR/store     header and records (records.rs); its lock says that a store is open
//!   DIR/frames    the blocks                  on huge pages where they are to be had
//!   DIR/words     counts and tags             8 bytes a frame
//!   DIR/nodes     map nodes                   256 bytes each
//!   DIR/lent-*    which memory of frames and of nodes is ours, a bit a granule
//!   DIR/marks     frames whose bytes are elsewhere or damaged, two bits each
//! ```
//!
//! `DIR` lies on a tmpfs. Where we may (root), one of our own is mounted there, with `huge=advise`: the frames get huge
//! pages although shared memory has none elsewhere (`shmem_enabled` is `never` on most machines), and the tables beside
//! them small ones. Everything is sparse: what is not touched is not taken.
//!
//! hugetlb pages come from a hugetlbfs at `DIR/huge`, mounted by us unless one is there. They are taken when the store is
//! opened (arena.rs says why), all that the frames of the budget may need, and are the store's until it is discarded,
//! whatever becomes of the process. The tables still lie on the tmpfs and are charged to the same budget, so the machine
//! is without the budget and the tables.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock, statfs},
    mount::{MountFlags, UnmountFlags, mount, unmount},
};

use crate::{PageKind, Pages, StoreError};

/// `TMPFS_MAGIC`, `RAMFS_MAGIC`, `HUGETLBFS_MAGIC` (linux/magic.h).
const IN_MEMORY: [u64; 3] = [0x0102_1994, 0x8584_58f6, HUGETLBFS];
const HUGETLBFS: u64 = 0x9584_58f6;

const HEADER: &str = "store";
/// Below this a store would notice that huge pages are taken 2 MiB at a time.
const LEAST_FOR_HUGE: u64 = 1 << 30;

pub(crate) enum Memory {
    Private,
    Shared(Directory),
}

pub(crate) struct Directory {
    path: PathBuf,
    /// Locked while the store is open. The lock goes with the process, however it ends.
    header: File,
}

/// Whether the kernel lends transparent huge pages to who asks for them.
fn lends_huge_pages() -> bool {
    fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .is_ok_and(|modes| modes.contains("[madvise]") || modes.contains("[always]"))
}

/// What private memory gets.
pub(crate) fn private_pages(asked: Pages, budget: u64) -> PageKind {
    match asked {
        Pages::Small => PageKind::Small,
        Pages::Huge => PageKind::Huge,
        Pages::Auto if budget < LEAST_FOR_HUGE => PageKind::Small,
        Pages::Auto | Pages::Transparent if lends_huge_pages() => PageKind::Transparent,
        Pages::Auto | Pages::Transparent => PageKind::Small,
    }
}

fn is_on(path: &Path, kinds: &[u64]) -> bool {
    // the type's width differs by architecture
    #[allow(clippy::unnecessary_cast)]
    statfs(path).is_ok_and(|s| kinds.contains(&(s.f_type as u64 & 0xffff_ffff)))
}

fn is_in_memory(path: &Path) -> bool {
    is_on(path, &IN_MEMORY)
}

/// hugetlb pages of 2 MiB that nobody has a claim to, and all that are set aside.
pub(crate) fn huge_pages() -> (u64, u64) {
    let count = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}")).ok()?;
        text.trim().parse().ok()
    };
    let free = count("free_hugepages").zip(count("resv_hugepages")).map(|(free, claimed)| free.saturating_sub(claimed));
    (free.unwrap_or(0), count("nr_hugepages").unwrap_or(0))
}

fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev());
    let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    matches!((device(path), device(above)), (Ok(here), Ok(above)) if here != above)
}

/// Nobody else may read a guest's disk.
fn mount_ours(kind: &str, path: &Path, options: &std::ffi::CStr) -> rustix::io::Result<()> {
    mount("muster", path, kind, MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, options)
}

impl Directory {
    /// Opens or makes the directory. The second value is true when it holds what an earlier process left.
    pub(crate) fn open(path: &Path, pages: Pages, budget: u64) -> Result<(Directory, bool), StoreError> {
        let failed = |action| move |source| StoreError::Memory { action, path: path.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make directory"))?;
        if !path.join(HEADER).exists() && !is_mount_point(path) {
            // without the right to mount it has to lie in memory already
            let small = match pages {
                Pages::Small => true,
                Pages::Auto => budget < LEAST_FOR_HUGE,
                Pages::Transparent | Pages::Huge => false,
            };
            let mounted = !(small && is_in_memory(path)) && Self::mount_tmpfs(path);
            if !mounted && !is_in_memory(path) {
                return Err(StoreError::NotInMemory { path: path.to_owned() });
            }
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let header = options.open(path.join(HEADER)).map_err(failed("open"))?;
        match flock(&header, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StoreError::InUse { path: path.to_owned() }),
            Err(e) => return Err(failed("lock")(e.into())),
        }
        let left = header.metadata().map_err(failed("look at"))?.len() > 0;
        Ok((Directory { path: path.to_owned(), header }, left))
    }

    fn mount_tmpfs(path: &Path) -> bool {
        // size=0: the budget is the limit, not the file system's default of half of the memory
        mount_ours("tmpfs", path, c"mode=0700,size=0,huge=advise").is_ok()
            // a kernel without huge pages does not know the option
            || mount_ours("tmpfs", path, c"mode=0700,size=0").is_ok()
    }

    /// What the frames of a new store get here.
    pub(crate) fn choose_pages(&self, asked: Pages, budget: u64) -> Result<PageKind, StoreError> {
        let advised = || {
            let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
            let path = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
            // of several mounts on one place the last one is seen
            let mount = mounts.lines().rfind(|line| line.split(' ').nth(1) == path.to_str());
            mount.is_some_and(|line| line.contains("huge="))
        };
        Ok(match asked {
            Pages::Small => PageKind::Small,
            Pages::Huge => {
                let place = self.huge();
                let failed = |source| StoreError::Memory { action: "mount hugetlbfs at", path: place.clone(), source };
                fs::create_dir_all(&place).map_err(failed)?;
                if !self.has_hugetlbfs() {
                    mount_ours("hugetlbfs", &place, c"mode=0700,pagesize=2M").map_err(|e| failed(e.into()))?;
                }
                PageKind::Huge
            }
            Pages::Auto if budget < LEAST_FOR_HUGE => PageKind::Small,
            Pages::Auto | Pages::Transparent if advised() => PageKind::Transparent,
            Pages::Auto | Pages::Transparent => PageKind::Small,
        })
    }

    fn huge(&self) -> PathBuf {
        self.path.join("huge")
    }

    pub(crate) fn has_hugetlbfs(&self) -> bool {
        is_on(&self.huge(), &[HUGETLBFS])
    }

    /// The file of this name, made when it is not there.
    pub(crate) fn file(&self, name: &str, pages: PageKind) -> io::Result<File> {
        if name == HEADER {
            return self.header.try_clone();
        }
        let directory = if pages == PageKind::Huge { self.huge() } else { self.path.clone() };
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(directory.join(name))
    }

    /// Takes everything away. What is mapped stays until it is unmapped, seen by nobody else.
    pub(crate) fn discard(&self) {
        let huge = self.huge();
        for place in [&huge, &self.path] {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                // a directory stays for now: it may be a mount point
                let _ = fs::remove_file(entry.path());
            }
            if is_mount_point(place) {
                let _ = unmount(place.as_path(), UnmountFlags::DETACH);
            }
            let _ = fs::remove_dir(place);
        }
    }

    /// Removes what an earlier process left and cannot be used, all but the header, which is emptied.
    pub(crate) fn clear(&self) -> io::Result<()> {
        for name in ["frames", "words", "nodes", "lent-frames", "lent-nodes", "marks", "huge/frames"] {
            match fs::remove_file(self.path.join(name)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound && e.kind() != io::ErrorKind::NotADirectory => {
                    return Err(e);
                }
                _ => {}
            }
        }
        self.header.set_len(0)
    }
}

impl Memory {
    /// Whether what frames of such pages lie on is still there.
    pub(crate) fn may_hold(&self, pages: PageKind) -> bool {
        match self {
            Memory::Shared(directory) if pages == PageKind::Huge => directory.has_hugetlbfs(),
            Memory::Private | Memory::Shared(_) => true,
        }
    }

    pub(crate) fn file(&self, name: &str, pages: PageKind) -> io::Result<Option<File>> {
        match self {
            Memory::Private => Ok(None),
            Memory::Shared(directory) => directory.file(name, pages).map(Some),
        }
    }
}
