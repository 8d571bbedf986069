//! Discovery of configured peers.
//!
//! RustDDS cannot be given initial peers, but it announces itself to the first participant ports of its own machine.
//! The relay takes one of those ports, hears the announcements of its own participant there, and sends them on to
//! the participant ports of each peer. The peer answers by itself; from then on both talk directly.
//!
//! ```text
//!   RustDDS --SPDP--> 127.0.0.1:slot = relay --same datagram--> peer:7410 + 250 cell + 2 n, n = 0..
//! ```

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::ports;
use crate::BusError;

/// RustDDS announces itself to this many participants of its own machine (its SPDP_LOCALHOST_PEER_COUNT).
const LOCAL_SLOTS: u16 = 12;
/// How many participants are looked for on a peer: those of a host's first agents, controllers and subscribers.
const PEER_SLOTS: u16 = 12;
/// A peer that starts later is found within this time; RustDDS's own period is 10 s. One datagram of some 400 bytes
/// a slot.
const PERIOD: Duration = Duration::from_secs(2);

pub(super) struct Relay {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// To be started before the participant, so that the participant does not take the port and its first
    /// announcement is heard. `participant` is told with [`Relay::follow`].
    pub fn start(
        cell: u16,
        interface: Option<IpAddr>,
        peers: Vec<Ipv4Addr>,
        prefix: PrefixCell,
    ) -> Result<Relay, BusError> {
        let io = |attempted: &str, source| BusError::Io { attempted: attempted.to_string(), source };
        let listen = ports::bind_local_slot(cell, LOCAL_SLOTS)?;
        listen
            .set_read_timeout(Some(Duration::from_millis(200)))
            .map_err(|e| io("set a time limit on the discovery relay", e))?;
        let from = interface.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let send = UdpSocket::bind((from, 0)).map_err(|e| io(&format!("bind {from} for the discovery relay"), e))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("muster-peers".into())
            .spawn(move || run(cell, &listen, &send, &peers, &prefix, &stopped))
            .map_err(|e| io("start the thread muster-peers", e))?;
        Ok(Relay { stop, thread: Some(thread) })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// GUID prefix of the participant whose announcements are relayed: known only after it was made.
#[derive(Clone, Default)]
pub(super) struct PrefixCell(Arc<parking_lot::Mutex<Option<[u8; 12]>>>);

impl PrefixCell {
    pub fn set(&self, prefix: [u8; 12]) {
        *self.0.lock() = Some(prefix);
    }
}

/// The GUID prefix in an RTPS header: "RTPS", version, vendor, prefix (RTPS 2.3, section 9.4.4).
fn prefix_of(datagram: &[u8]) -> Option<[u8; 12]> {
    (datagram.starts_with(b"RTPS")).then(|| datagram.get(8..20)?.try_into().ok()).flatten()
}

fn run(cell: u16, listen: &UdpSocket, send: &UdpSocket, peers: &[Ipv4Addr], prefix: &PrefixCell, stop: &AtomicBool) {
    let mut buffer = vec![0; 65536];
    let mut heard: Option<([u8; 12], Vec<u8>)> = None;
    let mut sent_at = None;
    while !stop.load(Ordering::Acquire) {
        let mut fresh = false;
        match listen.recv_from(&mut buffer) {
            Ok((length, _)) => {
                let datagram = &buffer[..length];
                // announcements of other local participants arrive here too: each relays its own
                if let Some(of) = prefix_of(datagram)
                    && prefix.0.lock().is_none_or(|own| own == of)
                {
                    heard = Some((of, datagram.to_vec()));
                    fresh = true;
                }
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            // an ICMP answer to an earlier datagram
            Err(error) => tracing::trace!(err = %error, "the discovery relay could not receive"),
        }
        let Some(own) = *prefix.0.lock() else { continue };
        let Some((of, datagram)) = &heard else { continue };
        if *of != own || !(fresh || sent_at.is_none_or(|at: Instant| at.elapsed() >= PERIOD)) {
            continue;
        }
        sent_at = Some(Instant::now());
        for peer in peers {
            for participant in 0..PEER_SLOTS {
                // an unreachable peer is the normal case here: it may come later
                let _ = send.send_to(datagram, (*peer, ports::discovery_unicast(cell, participant)));
            }
        }
    }
}
