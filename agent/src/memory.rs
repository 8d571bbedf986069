//! Opens the store: as an earlier run of the agent left it, or fresh. What becomes of it at the end is decided in
//! [`crate::stop`].

use std::time::Duration;

use muster_store::{Pages, Store, StoreConfig, StoreError};

use crate::config::{Config, PageChoice};

/// How the store came to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attached {
    /// Empty, and why.
    Fresh(String),
    /// As an earlier run left it; how long it took to take it over.
    Warm(Duration),
}

/// Whether a later run finds the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It ends with this process, and why.
    Ends(&'static str),
    /// Whoever embeds this agent keeps it.
    Lent,
}

impl Fate {
    /// Why volumes cannot be left to the next run; `None`: they can.
    pub fn cannot_keep(self) -> Option<&'static str> {
        match self {
            Self::Ends(why) => Some(why),
            Self::Lent => None,
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
        return Ok(Memory { store, attached: Attached::Warm(Duration::ZERO), fate: Fate::Lent });
    }
    let pages = match config.store.pages {
        PageChoice::Auto => Pages::Auto,
        PageChoice::Small => Pages::Small,
        PageChoice::Thp => Pages::Transparent,
        PageChoice::Hugetlb => Pages::Huge,
    };
    let store = Store::open(StoreConfig { budget: config.store.budget, pages })?;
    let why = "this store lives and dies with its process";
    Ok(Memory { store, attached: Attached::Fresh(why.into()), fate: Fate::Ends(why) })
}
