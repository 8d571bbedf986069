//! Disks for clients on other machines: NBD over TCP, with TLS 1.3 and certificates on both sides, when the configuration
//! says where to listen.
//!
//! What a client may open is written in its certificate: `muster:volume:ID` (an alternative name of kind URI) is the disk
//! of that volume in whatever generation; a name that `nbd.everything` lists may open all. What it may not open looks as if
//! it were not there. There is no way to serve disks over TCP without TLS.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use muster_export::{ExportCatalog, NbdConfig, NbdServer, Peer, Restricted, ServerError, Tls, TlsError};

use crate::config::NbdSection;

/// Before a volume's id in a certificate.
const VOLUME: &str = "muster:volume:";

#[derive(Debug, thiserror::Error)]
pub enum TcpError {
    #[error("read {key} = {path}", path = path.display())]
    Read {
        key: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("use nbd.certificate, nbd.key and nbd.authority (three files in PEM)")]
    Tls(#[from] TlsError),
    #[error("serve disks on {address} (nbd.listen)")]
    Serve {
        address: SocketAddr,
        #[source]
        source: ServerError,
    },
}

/// Starts the server; `None` when nobody asked for it.
pub fn serve(section: &NbdSection, catalog: Arc<dyn ExportCatalog>) -> Result<Option<NbdServer>, TcpError> {
    let NbdSection {
        listen: Some(address),
        certificate: Some(certificate),
        key: Some(key),
        authority: Some(authority),
        ..
    } = section
    else {
        return Ok(None);
    };
    let certificate = read("nbd.certificate", certificate)?;
    let (key, authority) = (read("nbd.key", key)?, read("nbd.authority", authority)?);
    let tls = Tls::from_pem(&certificate, &key, &authority)?;
    let everything = section.everything.clone();
    let catalog = Restricted::new(catalog, move |peer: &Peer, export: &str| match peer {
        Peer::Certified { identity, .. } => may_open(identity.names(), &everything, export),
        Peer::Local { .. } | Peer::Remote(_) | Peer::Unknown => false,
    });
    let config = NbdConfig { tls: Some(tls), ..NbdConfig::tcp(*address) };
    let server =
        NbdServer::start(config, Arc::new(catalog)).map_err(|source| TcpError::Serve { address: *address, source })?;
    tracing::info!(addresses = ?server.addresses(), "serving disks over NBD with TLS");
    Ok(Some(server))
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, TcpError> {
    std::fs::read(path).map_err(|source| TcpError::Read { key, path: path.to_owned(), source })
}

/// Whether these names of a certificate let its bearer have the export, whose name is a volume's id, a dot, a generation.
fn may_open(names: &[String], everything: &[String], export: &str) -> bool {
    let volume = export.rsplit_once('.').map(|(volume, _)| volume);
    let volume = volume.filter(|volume| !volume.is_empty());
    names.iter().any(|name| everything.contains(name) || volume.is_some() && name.strip_prefix(VOLUME) == volume)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_opens_the_volume_it_names_and_nothing_else() {
        let [one, other] = [muster_common::VolumeId::random(), muster_common::VolumeId::random()];
        let all = ["backup-host".to_string()];
        let may = |names: &[&str], export: String| {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            may_open(&names, &all, &export)
        };
        let named = format!("muster:volume:{one}");
        assert!(may(&[&named], format!("{one}.1")) && may(&["x", &named], format!("{one}.27")));
        assert!(!may(&[&named], format!("{other}.1")));
        assert!(!may(&[&named], one.to_string()), "not an export's name");
        assert!(!may(&[], format!("{one}.1")) && !may(&["muster:volume:"], ".1".into()));
        assert!(!may(&[&one.to_string()], format!("{one}.1")), "a name of another kind");
        assert!(may(&["backup-host"], format!("{other}.3")) && !may(&["backup-host-2"], format!("{other}.3")));
    }
}
