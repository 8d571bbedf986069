//! Opens the store: as an earlier run of the agent left it, or fresh. What becomes of it at the end is decided in
//! [`crate::stop`].

use muster_store::{AttachReport, Attached, Pages, Store, StoreConfig, StoreError};

use crate::config::{Config, PageChoice};

/// Whether a later run finds the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It ends with this process: so the configuration wants it.
    Ends,
    /// It is there until it is given back.
    Stays,
    /// Whoever embeds this agent keeps it.
    Lent,
}

impl Fate {
    /// Why volumes cannot be left to the next run; `None`: they can.
    pub fn cannot_keep(self) -> Option<&'static str> {
        match self {
            Self::Ends => Some("the configuration says store.survive = false"),
            Self::Stays | Self::Lent => None,
        }
    }
}

/// A store with its past and future.
pub struct Memory {
    pub store: Store,
    pub attached: Attached,
    pub fate: Fate,
}

/// Takes the one that is given, or opens what the configuration says.
pub fn open(config: &Config, given: Option<Store>) -> Result<Memory, StoreError> {
    if let Some(store) = given {
        return Ok(Memory { store, attached: Attached::Warm(AttachReport::default()), fate: Fate::Lent });
    }
    let pages = match config.store.pages {
        PageChoice::Auto => Pages::Auto,
        PageChoice::Small => Pages::Small,
        PageChoice::Thp => Pages::Transparent,
        PageChoice::Hugetlb => Pages::Huge,
    };
    let directory = config.store.survive.then(|| config.store_directory());
    let fate = if directory.is_some() { Fate::Stays } else { Fate::Ends };
    let config = StoreConfig { pages, directory, ..StoreConfig::new(config.store.budget) };
    let (store, attached) = Store::open_or_attach(config)?;
    Ok(Memory { store, attached, fate })
}
