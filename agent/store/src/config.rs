//! What a store is opened with.

use muster_common::{ByteLen, Digest, VolumeId};

/// The pages asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Transparent huge pages where the kernel lends them, else 4 KiB pages.
    #[default]
    Auto,
    /// 4 KiB: every freed frame can go back to the machine.
    Small,
    /// Transparent huge pages (2 MiB): faster to fill and to read; memory goes back in whole 2 MiB only.
    Transparent,
    /// hugetlb pages, reserved at once: opening fails when the machine has not set enough of them aside.
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
}

impl StoreConfig {
    pub const fn new(budget: ByteLen) -> Self {
        Self { budget, pages: Pages::Auto }
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
}

impl VolumeSpec {
    pub const fn blank(id: VolumeId, size: ByteLen) -> Self {
        Self { id, generation: 0, base: None, size: Some(size), read_only: false }
    }

    pub const fn clone_of(id: VolumeId, image: Digest) -> Self {
        Self { id, generation: 0, base: Some(image), size: None, read_only: false }
    }
}
