//! TLS 1.3 with certificates on both sides (`NBD_OPT_STARTTLS`), and who a certificate says the client is.
//!
//! Both sides must show a certificate; the client's has to come from one of the configured authorities. Nothing older
//! than TLS 1.3, no tickets and no resumption: each connection is verified anew. What a verified client may open is not
//! decided here but by the catalog, which is told its [`Identity`] (see [`Peer::Certified`](crate::Peer::Certified) and
//! [`Restricted`](crate::Restricted)).

use std::cell::RefCell;
use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use crate::transport::{Socket, Transport, Wait};

/// Plaintext given to the record layer at once.
const PLAIN_PIECE: usize = 64 * 1024;
/// Ciphertext received at once.
const CIPHER_LEN: usize = 256 * 1024;
/// Time to say good-bye to a client that does not read any more.
const GOODBYE: Duration = Duration::from_secs(1);

/// Certificates could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not PEM, or not what it should be.
    #[error("read {what} as PEM")]
    Pem {
        /// Which of the texts.
        what: &'static str,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// There is no certificate in it.
    #[error("no certificate in {0}")]
    Empty(&'static str),
    /// An authority cannot be one.
    #[error("use a client authority")]
    Authority(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Certificate and key do not fit each other, or are of an unknown kind.
    #[error("use the server's certificate and key")]
    Server(#[source] rustls::Error),
}

/// The server's certificate and key, and the authorities whose clients it lets in.
#[derive(Clone)]
pub struct Tls(Arc<ServerConfig>);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls(..)")
    }
}

impl Tls {
    /// From PEM: the server's certificate and those between it and its authority, its private key, and the authorities of
    /// clients (what other NBD servers call `server-cert.pem`, `server-key.pem`, `ca-cert.pem`).
    pub fn from_pem(certificate: &[u8], key: &[u8], client_authorities: &[u8]) -> Result<Tls, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in certificates(client_authorities, "the client authorities")? {
            roots.add(authority).map_err(|error| TlsError::Authority(error.into()))?;
        }
        let chain = certificates(certificate, "the server's certificate")?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|source| TlsError::Pem { what: "the server's private key", source })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| TlsError::Authority(error.into()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Server)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(TlsError::Server)?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Tls(Arc::new(config)))
    }
}

fn certificates(pem: &[u8], what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|source| TlsError::Pem { what, source })?;
    if found.is_empty() { Err(TlsError::Empty(what)) } else { Ok(found) }
}

/// Who a verified certificate was made out to: its alternative names (URIs, then DNS names), or, when it has neither, the
/// common name of its subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    names: Vec<String>,
}

impl Identity {
    /// Its names; may be empty.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether `name` is one of them, letter for letter.
    pub fn is(&self, name: &str) -> bool {
        self.names.iter().any(|own| own == name)
    }

    /// Reads a certificate that the record layer has verified.
    fn of(certificate: &CertificateDer<'_>) -> Identity {
        let Ok(parsed) = webpki::EndEntityCert::try_from(certificate) else { return Identity { names: Vec::new() } };
        let mut names: Vec<String> = parsed.valid_uri_names().map(str::to_owned).collect();
        names.extend(parsed.valid_dns_names().map(str::to_owned));
        if names.is_empty() {
            names.extend(common_name(parsed.subject()).map(str::to_owned));
        }
        Identity { names }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.names.first() {
            Some(name) => write!(f, "{name:?}"),
            None => f.write_str("(no name)"),
        }
    }
}

/// The common name of a subject, when there is exactly one and it is text. `subject` is the contents of a `Name`: sets of
/// (object identifier, string) pairs.
fn common_name(subject: &[u8]) -> Option<&str> {
    const SEQUENCE: u8 = 0x30;
    const SET: u8 = 0x31;
    const OBJECT_IDENTIFIER: u8 = 0x06;
    const UTF8_STRING: u8 = 0x0c;
    const PRINTABLE_STRING: u8 = 0x13;
    const COMMON_NAME: [u8; 3] = [0x55, 0x04, 0x03];
    let mut found = None;
    let mut sets = subject;
    while !sets.is_empty() {
        let (tag, mut pairs, rest) = element(sets)?;
        sets = rest;
        if tag != SET {
            return None;
        }
        while !pairs.is_empty() {
            let (tag, pair, rest) = element(pairs)?;
            pairs = rest;
            let (kind, identifier, value) = element(pair)?;
            let (text, value, rest) = element(value)?;
            if tag != SEQUENCE || kind != OBJECT_IDENTIFIER || !rest.is_empty() {
                return None;
            }
            if identifier == COMMON_NAME {
                if found.is_some() || !matches!(text, UTF8_STRING | PRINTABLE_STRING) {
                    return None;
                }
                found = Some(std::str::from_utf8(value).ok()?);
            }
        }
    }
    found
}

/// The DER element at the front: tag, contents, and what follows it. Lengths up to 65,535, more than any name has.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (len, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81 => rest.split_first().map(|(&len, rest)| (usize::from(len), rest))?,
        0x82 => rest.split_first_chunk::<2>().map(|(len, rest)| (usize::from(u16::from_be_bytes(*len)), rest))?,
        _ => return None,
    };
    let (contents, rest) = rest.split_at_checked(len)?;
    Some((tag, contents, rest))
}

/// A socket under TLS.
pub(crate) struct TlsStream {
    socket: Socket,
    inner: RefCell<Inner>,
}

struct Inner {
    connection: ServerConnection,
    /// Ciphertext received and not yet given to the record layer, which takes it in small pieces.
    cipher: Box<[u8]>,
    start: usize,
    end: usize,
    /// Ciphertext to send.
    out: Vec<u8>,
}

impl TlsStream {
    /// Does the handshake of TLS on a socket whose peer is about to begin it. An error says why it failed; the client
    /// has been told.
    pub(crate) fn accept(socket: &Socket, tls: &Tls, until: Instant) -> io::Result<(TlsStream, Identity)> {
        let connection = ServerConnection::new(Arc::clone(&tls.0)).map_err(io::Error::other)?;
        let mut inner =
            Inner { connection, cipher: vec![0; CIPHER_LEN].into_boxed_slice(), start: 0, end: 0, out: Vec::new() };
        while inner.connection.is_handshaking() {
            inner.flush(socket, Some(until))?;
            match inner.pump(socket, Wait::Until(until)) {
                Ok(Some(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) => {
                    // The alert that says so is worth sending, but not waiting for.
                    let _ = inner.flush(socket, Some(until));
                    return Err(error);
                }
            }
        }
        inner.flush(socket, Some(until))?;
        let identity = inner
            .connection
            .peer_certificates()
            .and_then(|chain| chain.first())
            .map(Identity::of)
            .ok_or_else(|| io::Error::new(io::ErrorKind::PermissionDenied, "the client showed no certificate"))?;
        Ok((TlsStream { socket: socket.clone(), inner: RefCell::new(inner) }, identity))
    }

    /// Tells the client that nothing more comes.
    pub(crate) fn say_goodbye(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.connection.send_close_notify();
        let _ = inner.flush(&self.socket, Some(Instant::now() + GOODBYE));
    }
}

impl Inner {
    /// Gives the record layer one piece of ciphertext, received when there is none left. `Some(0)`: the stream has ended;
    /// `None`: nothing there yet.
    fn pump(&mut self, socket: &Socket, wait: Wait) -> io::Result<Option<usize>> {
        if self.start == self.end {
            match socket.receive(&mut self.cipher, wait)? {
                None => return Ok(None),
                Some(0) => return Ok(Some(0)),
                Some(received) => (self.start, self.end) = (0, received),
            }
        }
        let mut unread = &self.cipher[self.start..self.end];
        let taken = self.connection.read_tls(&mut unread)?;
        self.start += taken;
        self.connection.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some(taken))
    }

    /// Sends what the record layer has to say.
    fn flush(&mut self, socket: &Socket, until: Option<Instant>) -> io::Result<()> {
        self.out.clear();
        while self.connection.wants_write() {
            self.connection.write_tls(&mut self.out)?;
        }
        socket.send(&self.out, until)
    }
}

impl Transport for TlsStream {
    fn receive(&self, buffer: &mut [u8], wait: Wait) -> io::Result<Option<usize>> {
        let mut inner = self.inner.borrow_mut();
        let mut filled = 0;
        loop {
            match inner.connection.reader().read(&mut buffer[filled..]) {
                // A client that said good-bye to TLS.
                Ok(0) => return Ok(Some(filled)),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            // Everything that has come already is taken, so that one call brings many requests.
            if filled == buffer.len() || filled > 0 && inner.start == inner.end {
                return Ok(Some(filled));
            }
            match inner.pump(&self.socket, wait)? {
                Some(0) if inner.start == inner.end => return Ok(Some(filled)),
                Some(_) => {}
                None => return Ok(None),
            }
            if inner.connection.wants_write() {
                inner.flush(&self.socket, None)?;
            }
        }
    }

    fn send(&self, bytes: &[u8], until: Option<Instant>) -> io::Result<()> {
        let mut inner = self.inner.borrow_mut();
        for piece in bytes.chunks(PLAIN_PIECE) {
            let mut left = piece;
            while !left.is_empty() {
                let taken = inner.connection.writer().write(left)?;
                left = &left[taken..];
                inner.flush(&self.socket, until)?;
            }
        }
        Ok(())
    }

    fn settle(&self) {
        self.socket.settle();
    }

    fn is_draining(&self) -> bool {
        self.socket.is_draining()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pair as a set of its own, as certificates have them.
    fn rdn(identifier: [u8; 3], tag: u8, value: &[u8]) -> Vec<u8> {
        let mut pair = vec![0x06, 3];
        pair.extend(identifier);
        pair.extend([tag, value.len() as u8]);
        pair.extend(value);
        let mut out = vec![0x31, pair.len() as u8 + 2, 0x30, pair.len() as u8];
        out.extend(pair);
        out
    }

    #[test]
    fn the_common_name_is_found_behind_other_names_and_only_when_it_is_the_only_one() {
        let organisation = rdn([0x55, 4, 10], 0x0c, b"example");
        let name = rdn([0x55, 4, 3], 0x0c, b"host-1");
        assert_eq!(common_name(&[organisation.clone(), name.clone()].concat()), Some("host-1"));
        assert_eq!(common_name(&organisation), None);
        assert_eq!(common_name(&[name.clone(), name.clone()].concat()), None, "two names");
        assert_eq!(common_name(&rdn([0x55, 4, 3], 0x0c, &[0xff])), None, "not UTF-8");
        for cut in 1..name.len() {
            assert_eq!(common_name(&name[..cut]), None, "cut at {cut}");
        }
    }
}
