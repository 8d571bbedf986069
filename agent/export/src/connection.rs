//! One connection from its first byte to its last: drives the handshake, opens the export, runs the session.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::handshake::{Agreed, Event, Handshake, HandshakeLimits, Offer, Refusal};
use crate::registry::{Entered, Export, ExportCatalog, Peer};
use crate::session::{End, Input, Session};
use crate::transport::{Recorded, Socket, Transport, Wait};

/// How a connection ended, for the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    /// Before an export was chosen.
    Handshake(&'static str),
    /// After.
    Session(End),
}

/// Serves one client. `socket` is what [`Export::close`] stops.
pub(crate) fn serve(
    transport: &impl Transport,
    socket: Option<&Socket>,
    catalog: &dyn ExportCatalog,
    peer: &Peer,
    limits: HandshakeLimits,
    handshake_until: Instant,
    spin: Duration,
) -> io::Result<Ended> {
    let mut input = Input::new();
    match negotiate(transport, &mut input, socket, catalog, peer, limits, handshake_until)? {
        Err(why) => Ok(Ended::Handshake(why)),
        Ok((entered, offer, agreed)) => {
            tracing::debug!(export = entered.export.name(), %peer, structured = agreed.structured, "client connected");
            let end = Session::new(transport, &entered.export, &offer, agreed, input, spin).run();
            tracing::debug!(export = entered.export.name(), %peer, ?end, "client left");
            end.map(Ended::Session)
        }
    }
}

type Negotiated = Result<(Entered, Offer, Agreed), &'static str>;

fn negotiate(
    transport: &impl Transport,
    input: &mut Input,
    socket: Option<&Socket>,
    catalog: &dyn ExportCatalog,
    peer: &Peer,
    limits: HandshakeLimits,
    until: Instant,
) -> io::Result<Negotiated> {
    let mut out = Vec::new();
    let mut handshake = Handshake::new(limits, &mut out);
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
                        transport.send(&out, Some(until))?;
                        return Ok(Ok((entered, offer, agreed)));
                    }
                    (Ok(_), None) => return Ok(Err("opened without an export")),
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
            Event::Close(why) => {
                transport.send(&out, Some(until))?;
                return Ok(Err(why));
            }
            Event::NeedMore => {
                let received = input.fill(transport, Wait::Until(until))?;
                if received == Some(0) {
                    return Ok(Err("closed by the client"));
                }
            }
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
    let until = Instant::now() + Duration::from_secs(3600);
    let limits = HandshakeLimits::default();
    let _ = serve(&transport, None, catalog, &Peer::Unknown, limits, until, Duration::ZERO);
    transport.into_output()
}
