//! Who may have which export: a catalog in front of another one.

use std::sync::Arc;

use crate::handshake::{Offer, Refusal};
use crate::registry::{Export, ExportCatalog, Peer};

/// Decides whether this client may know of and open the export of that name.
pub type Rule = dyn Fn(&Peer, &str) -> bool + Send + Sync;

/// A catalog that shows each client only what a rule lets it have. What it may not have looks as if it did not exist, so
/// that names cannot be found out by trying.
///
/// The rule is asked when an export is listed, described or opened, not again while a session goes on: to take an export
/// away from a client, remove it and add it again.
pub struct Restricted<C> {
    catalog: C,
    rule: Box<Rule>,
}

impl<C> Restricted<C> {
    /// Shows of `catalog` what `rule` lets the client have.
    pub fn new(catalog: C, rule: impl Fn(&Peer, &str) -> bool + Send + Sync + 'static) -> Restricted<C> {
        Restricted { catalog, rule: Box::new(rule) }
    }
}

impl<C: ExportCatalog> ExportCatalog for Restricted<C> {
    fn open(&self, name: &str, peer: &Peer) -> Result<Arc<Export>, Refusal> {
        if (self.rule)(peer, name) { self.catalog.open(name, peer) } else { Err(Refusal::Unknown) }
    }

    fn describe(&self, name: &str, peer: &Peer) -> Result<Offer, Refusal> {
        if (self.rule)(peer, name) { self.catalog.describe(name, peer) } else { Err(Refusal::Unknown) }
    }

    fn list(&self, peer: &Peer) -> Option<Vec<String>> {
        let mut names = self.catalog.list(peer)?;
        names.retain(|name| (self.rule)(peer, name));
        Some(names)
    }
}

impl<C: ExportCatalog + ?Sized> ExportCatalog for Arc<C> {
    fn open(&self, name: &str, peer: &Peer) -> Result<Arc<Export>, Refusal> {
        (**self).open(name, peer)
    }
    fn describe(&self, name: &str, peer: &Peer) -> Result<Offer, Refusal> {
        (**self).describe(name, peer)
    }
    fn list(&self, peer: &Peer) -> Option<Vec<String>> {
        (**self).list(peer)
    }
}
