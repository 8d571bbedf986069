//! RTPS ports (RTPS 2.3, section 9.6.2.3), interfaces, and how RustDDS is kept from multicast.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, socket_with, sockopt};

use crate::{BusConfig, BusError, config::MAX_CELL};

pub(super) const fn discovery_multicast(cell: u16) -> u16 {
    7400 + 250 * cell
}
pub(super) const fn user_multicast(cell: u16) -> u16 {
    7401 + 250 * cell
}
/// Where the `participant`-th participant of a machine listens for discovery.
pub(super) const fn discovery_unicast(cell: u16, participant: u16) -> u16 {
    7410 + 250 * cell + 2 * participant
}

struct Interface {
    name: String,
    address: Ipv4Addr,
    loopback: bool,
    multicast: bool,
}

fn interfaces() -> Vec<Interface> {
    netdev::get_interfaces()
        .iter()
        .flat_map(|i| {
            i.ipv4.iter().map(|net| Interface {
                name: i.name.clone(),
                address: net.addr(),
                loopback: i.is_loopback(),
                multicast: i.is_multicast(),
            })
        })
        .collect()
}

/// What the configuration comes to on this machine.
pub(super) struct Place {
    /// The only addresses to use; None: all.
    pub only: Option<Vec<IpAddr>>,
    pub multicast: bool,
    /// Peers that are not this machine: RustDDS looks for local ones by itself.
    pub remote_peers: Vec<Ipv4Addr>,
}

pub(super) fn check(config: &BusConfig) -> Result<Place, BusError> {
    if config.cell > MAX_CELL {
        return Err(BusError::CellOutOfRange { cell: config.cell });
    }
    let here = interfaces();
    let available = || here.iter().map(|i| (i.name.clone(), IpAddr::V4(i.address))).collect::<Vec<_>>();
    let mut multicast = config.multicast;
    if let Some(wanted) = config.interface {
        let found = here
            .iter()
            .find(|i| IpAddr::V4(i.address) == wanted)
            .ok_or_else(|| BusError::NoSuchInterface { wanted, available: available() })?;
        if found.loopback {
            // lo has no multicast, and needs none: processes of one machine find each other without
            multicast = false;
        } else if multicast && !found.multicast {
            return Err(BusError::NoMulticast { interface: found.name.clone(), address: wanted });
        }
    }
    let remote_peers = config
        .peers
        .iter()
        .filter_map(|peer| match peer {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        })
        .filter(|peer| !peer.is_loopback() && !here.iter().any(|i| i.address == *peer))
        .collect();
    if let Some(v6) = config.peers.iter().find(|p| p.is_ipv6()) {
        return Err(BusError::Dds {
            attempted: format!("look for peer {v6}"),
            reason: "the DDS library speaks IPv4 only".into(),
        });
    }
    Ok(Place { only: config.interface.map(|i| vec![i]), multicast, remote_peers })
}

/// Holds a UDP port so that RustDDS cannot: it then goes without that multicast listener and does not advertise it,
/// and peers send to it by unicast. Held only while a participant is made; afterwards other vendors' participants of
/// this machine need the port.
pub(super) struct Guard {
    _socket: OwnedFd,
}

/// How long to wait for another process of this machine that is making its participant just now.
const GUARD_TIMEOUT: Duration = Duration::from_secs(2);

impl Guard {
    pub fn hold(cell: u16, port: u16) -> Result<Guard, BusError> {
        let deadline = Instant::now() + GUARD_TIMEOUT;
        loop {
            match Self::try_hold(port) {
                Ok(socket) => return Ok(Guard { _socket: socket }),
                Err(source) if source.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                    // a bounded wait for a bind, which nothing announces
                    std::thread::park_timeout(Duration::from_millis(5));
                }
                Err(source) => {
                    return Err(BusError::PortInUse {
                        cell,
                        port,
                        purpose: "another program holds a port of DDS discovery; use another cell",
                        source,
                    });
                }
            }
        }
    }

    fn try_hold(port: u16) -> io::Result<OwnedFd> {
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(ipproto::UDP))?;
        // shares the port with sockets that are there and share (other vendors' participants) ...
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_reuseport(&socket, true)?;
        bind(&socket, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
        // ... but not with those that come: Linux looks at both flags at each later bind
        sockopt::set_socket_reuseaddr(&socket, false)?;
        sockopt::set_socket_reuseport(&socket, false)?;
        Ok(socket)
    }
}

/// A socket on one of the ports where RustDDS looks for local participants (the first twelve).
pub(super) fn bind_local_slot(cell: u16, slots: u16) -> Result<UdpSocket, BusError> {
    let mut last = None;
    for participant in (0..slots).rev() {
        match UdpSocket::bind((Ipv4Addr::LOCALHOST, discovery_unicast(cell, participant))) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = Some(error),
        }
    }
    Err(BusError::PortInUse {
        cell,
        port: discovery_unicast(cell, slots - 1),
        purpose: "all ports for discovering configured peers are taken; use another cell",
        source: last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_interface_names_those_there_are() {
        let config = BusConfig { interface: Some(IpAddr::from([203, 0, 113, 77])), ..BusConfig::default() };
        let error = check(&config).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.starts_with("use interface 203.0.113.77: this machine has no such address; it has "), "{error}");
        assert!(error.contains("127.0.0.1 (lo)"), "{error}");
    }

    #[test]
    fn a_cell_above_the_ephemeral_limit_is_refused() {
        assert!(matches!(check(&BusConfig::loopback(101)), Err(BusError::CellOutOfRange { cell: 101 })));
    }

    #[test]
    fn a_guard_keeps_sharing_sockets_out_and_tolerates_those_that_were_there() {
        // an ephemeral port nobody else uses
        let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let sharing = || -> io::Result<OwnedFd> {
            let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
            sockopt::set_socket_reuseaddr(&socket, true)?;
            sockopt::set_socket_reuseport(&socket, true)?;
            bind(&socket, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
            Ok(socket)
        };
        let before = sharing().unwrap();
        let guard = Guard::try_hold(port).unwrap();
        assert!(sharing().is_err(), "a later socket is kept out");
        drop(guard);
        drop(sharing().unwrap());
        drop(before);
    }
}
