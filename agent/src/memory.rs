//! Opens the store: as an earlier run of the agent left it, or fresh. What becomes of it at the end is decided in
//! [`crate::stop`].

use muster_store::{AttachReport, Attached, Pages, Store, StoreConfig, StoreError};

use crate::config::{Config, PageChoice};

/// Whether a later run finds the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It ends with this process, and why.
    Ends(&'static str),
    /// It is there until it is given back.
    Stays,
    /// Whoever embeds this agent keeps it.
    Lent,
}

impl Fate {
    /// Why volumes cannot be left to the next run; `None`: they can.
    pub fn cannot_keep(self) -> Option<&'static str> {
        match self {
            Self::Ends(why) => Some(why),
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
    let fate = match &directory {
        Some(_) => Fate::Stays,
        None => Fate::Ends("the configuration says store.survive = false"),
    };
    let spill = config.spill();
    if let Some(directory) = spill.as_ref().and_then(|spill| spill.file.parent()) {
        let failed = |source| StoreError::Memory { action: "make spill directory", path: directory.to_owned(), source };
        std::fs::create_dir_all(directory).map_err(failed)?;
    }
    let config = StoreConfig { pages, directory, spill, ..StoreConfig::new(config.store.budget) };
    match Store::open_or_attach(config.clone()) {
        Ok((store, attached)) => Ok(Memory { store, attached, fate }),
        Err(error @ StoreError::NotInMemory { .. }) => {
            // an agent without rights still serves, as it did before there was such a store
            tracing::warn!(reason = %error, "the store will end with this process");
            let store = Store::open(StoreConfig { directory: None, ..config })?;
            let fate = Fate::Ends("run_dir is not in memory, and this process may not mount a tmpfs there");
            Ok(Memory { store, attached: Attached::Fresh(None), fate })
        }
        Err(error) => Err(error),
    }
}
