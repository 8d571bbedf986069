//! One connection from its first byte to its last: drives the handshake, opens the export, runs the session.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::handshake::{Agreed, Event, Handshake, HandshakeLimits, Offer, Refusal, Security};
use crate::registry::{Entered, Export, ExportCatalog, Peer};
use crate::session::{End, Input, Session};
use crate::tls::{Tls, TlsStream};
use crate::transport::{Recorded, Socket, Transport, Wait};

/// How a connection ended, for the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    /// Before an export was chosen.
    Handshake(&'static str),
    /// After.
    Session(End),
}

/// How one client is to be served.
pub(crate) struct Terms<'a> {
    pub(crate) catalog: &'a dyn ExportCatalog,
    pub(crate) limits: HandshakeLimits,
    /// Until when an export must have been chosen.
    pub(crate) handshake_until: Instant,
    /// Told once it has been chosen.
    pub(crate) chosen: &'a dyn Fn(),
    pub(crate) spin: Duration,
}

/// Serves one client on a socket, which is also what [`Export::close`] stops. With `tls` it must begin TLS first.
pub(crate) fn serve(socket: &Socket, tls: Option<&Tls>, peer: &Peer, terms: &Terms<'_>) -> io::Result<Ended> {
    let mut out = Vec::new();
    let security = if tls.is_some() { Security::Required } else { Security::Plain };
    let mut handshake = Handshake::new(terms.limits, security, &mut out);
    let mut input = Input::new();
    let negotiated = negotiate(socket, &mut handshake, out, &mut input, Some(socket), peer, terms)?;
    if !matches!(negotiated, Negotiated::StartTls) {
        return converse(socket, negotiated, input, peer, terms);
    }
    let (Some(tls), Peer::Remote(address)) = (tls, peer) else {
        return Ok(Ended::Handshake("TLS without an address"));
    };
    // What a client, or somebody between it and us, sent in the clear must not be taken for something it said under TLS.
    if !input.unread().is_empty() {
        return Ok(Ended::Handshake("bytes in the clear behind NBD_OPT_STARTTLS"));
    }
    let (stream, identity) = TlsStream::accept(socket, tls, terms.handshake_until)?;
    handshake.encrypted();
    let peer = Peer::Certified { address: *address, identity };
    let negotiated = negotiate(&stream, &mut handshake, Vec::new(), &mut input, Some(socket), &peer, terms)?;
    let ended = converse(&stream, negotiated, input, &peer, terms);
    stream.say_goodbye();
    ended
}

/// The session that was negotiated, if one was.
fn converse(
    transport: &impl Transport,
    negotiated: Negotiated,
    input: Input,
    peer: &Peer,
    terms: &Terms<'_>,
) -> io::Result<Ended> {
    match negotiated {
        Negotiated::Closed(why) => Ok(Ended::Handshake(why)),
        Negotiated::StartTls => Ok(Ended::Handshake("TLS within TLS")),
        Negotiated::Session(entered, offer, agreed) => {
            tracing::debug!(export = entered.export.name(), %peer, structured = agreed.structured, "client connected");
            let end = Session::new(transport, &entered.export, &offer, agreed, input, terms.spin).run();
            tracing::debug!(export = entered.export.name(), %peer, ?end, "client left");
            end.map(Ended::Session)
        }
    }
}

enum Negotiated {
    Session(Entered, Offer, Agreed),
    StartTls,
    Closed(&'static str),
}

/// `out` is what the handshake has to say so far.
fn negotiate(
    transport: &impl Transport,
    handshake: &mut Handshake,
    mut out: Vec<u8>,
    input: &mut Input,
    socket: Option<&Socket>,
    peer: &Peer,
    terms: &Terms<'_>,
) -> io::Result<Negotiated> {
    let (catalog, until) = (terms.catalog, terms.handshake_until);
    loop {
        transport.send(&out, Some(until))?;
        out.clear();
        let (used, event) = handshake.advance(input.unread(), &mut out);
        input.consume(used);
        let event = match event {
            Event::Open(name) => {
                let found = catalog.open(&name, peer).and_then(|export| enter(&export, peer, socket));
                let (result, entered) = match found {
                    Ok((entered, offer)) => (Ok(offer.clone()), Some((entered, offer))),
                    Err(refusal) => (Err(refusal), None),
                };
                match (handshake.opened(result, &mut out), entered) {
                    (Ok(agreed), Some((entered, offer))) => {
                        // First: the client may come back as soon as it has the answer.
                        (terms.chosen)();
                        transport.send(&out, Some(until))?;
                        return Ok(Negotiated::Session(entered, offer, agreed));
                    }
                    (Ok(_), None) => return Ok(Negotiated::Closed("opened without an export")),
                    (Err(event), _) => event,
                }
            }
            Event::Describe(name) => handshake.described(catalog.describe(&name, peer), &mut out),
            Event::List => {
                let names = catalog.list(peer);
                handshake.listed(names.as_ref().map(|names| names.iter().map(String::as_str)), &mut out)
            }
            other => other,
        };
        match event {
            Event::StartTls => {
                transport.send(&out, Some(until))?;
                return Ok(Negotiated::StartTls);
            }
            Event::Close(why) => {
                transport.send(&out, Some(until))?;
                return Ok(Negotiated::Closed(why));
            }
            Event::NeedMore => {
                let received = input.fill(transport, Wait::Until(until))?;
                if received == Some(0) {
                    return Ok(Negotiated::Closed("closed by the client"));
                }
            }
            _ if Instant::now() > until => return Err(io::ErrorKind::TimedOut.into()),
            _ => {}
        }
    }
}

fn enter(export: &Arc<Export>, peer: &Peer, socket: Option<&Socket>) -> Result<(Entered, Offer), Refusal> {
    let entered = export.enter(peer.clone(), socket.cloned())?;
    let offer = export.offer();
    Ok((entered, offer))
}

/// A whole connection over recorded bytes: what the server would have sent. Never panics, whatever the bytes are; this
/// is the entry for fuzzing. `piece` is the longest run of bytes received at once.
pub fn replay(input: &[u8], piece: usize, catalog: &dyn ExportCatalog) -> Vec<u8> {
    let transport = Recorded::new(input, piece);
    let terms = Terms {
        catalog,
        limits: HandshakeLimits::default(),
        handshake_until: Instant::now() + Duration::from_secs(3600),
        chosen: &|| {},
        spin: Duration::ZERO,
    };
    let mut out = Vec::new();
    let mut handshake = Handshake::new(terms.limits, Security::Plain, &mut out);
    let mut input = Input::new();
    let peer = Peer::Unknown;
    let _ = negotiate(&transport, &mut handshake, out, &mut input, None, &peer, &terms)
        .and_then(|negotiated| converse(&transport, negotiated, input, &peer, &terms));
    transport.into_output()
}
