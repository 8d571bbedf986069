//! What a store is opened with.

use std::path::PathBuf;

use muster_common::{ByteLen, Digest, TenantId, VolumeId};

/// The pages asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Transparent huge pages where the kernel lends them, else 4 KiB pages.
    #[default]
    Auto,
    /// 4 KiB: every freed frame can go back to the machine.
    Small,
    /// Transparent huge pages (2 MiB): faster to fill and to read; memory goes back in whole 2 MiB at
    /// once, and in parts by [`Store::give_back`](crate::Store::give_back) or when it is needed elsewhere.
    Transparent,
    /// hugetlb pages of 2 MiB, all taken at once: opening fails when the machine has not set enough of them aside. None goes
    /// back before the store ends or is discarded; metadata lies on other pages, beside them. Nothing is spilled from them.
    Huge,
}

/// The pages in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    Small,
    Transparent,
    Huge,
}

impl PageKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Small => "4k",
            Self::Transparent => "thp",
            Self::Huge => "hugetlb",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// What frames and metadata together may take from the machine. Reserved as address space, taken as it is used.
    pub budget: ByteLen,
    pub pages: Pages,
    /// Where the memory lies, so that it outlives the process: a directory on a tmpfs, or any, when this process may mount
    /// one there. `None`: private memory, gone with the process.
    pub directory: Option<PathBuf>,
    /// Where volumes that say so spill to. `None`: they are refused like all others when memory is full.
    pub spill: Option<SpillConfig>,
}

/// Where blocks go when memory is full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpillConfig {
    /// A sparse file on a local disk. What is in it is worth nothing without the store's memory.
    pub file: PathBuf,
    /// The most that may be there.
    pub limit: ByteLen,
}

/// What a write does that finds no memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// It is refused with [`muster_block::BlockErrorKind::NoSpace`]: the VM pauses until there is room again.
    #[default]
    Refuse,
    /// It makes room: the coldest blocks that are this and other such volumes' alone go to the spill file.
    Spill,
}

impl StoreConfig {
    pub const fn new(budget: ByteLen) -> Self {
        Self { budget, pages: Pages::Auto, directory: None, spill: None }
    }
}

/// What a volume is made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    pub id: VolumeId,
    /// Counts the volume's lives: with the id it names the export. A reset makes it one more.
    pub generation: u64,
    /// The image it starts as; `None` is blank.
    pub base: Option<Digest>,
    /// `None` is the size of the base. A larger size than the base's adds zeroes at the end.
    pub size: Option<ByteLen>,
    pub read_only: bool,
    /// Blocks are shared with those of the same tenant only. An image is everybody's.
    pub tenant: Option<TenantId>,
    /// The most it may map of what it has written itself, before dedup.
    pub quota: Option<ByteLen>,
    /// So much can be written whatever others do. Taken from the budget and from the machine when the volume is made; what
    /// is written to such a volume is shared with nobody.
    pub reservation: Option<ByteLen>,
    pub when_full: WhenFull,
}

impl VolumeSpec {
    pub const fn blank(id: VolumeId, size: ByteLen) -> Self {
        Self {
            id,
            generation: 0,
            base: None,
            size: Some(size),
            read_only: false,
            tenant: None,
            quota: None,
            reservation: None,
            when_full: WhenFull::Refuse,
        }
    }

    pub const fn clone_of(id: VolumeId, image: Digest) -> Self {
        Self { base: Some(image), size: None, ..Self::blank(id, ByteLen::ZERO) }
    }
}
