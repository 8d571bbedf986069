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
    /// None when another program holds the port for itself alone: then RustDDS cannot have it either.
    pub fn hold(port: u16) -> Result<Option<Guard>, BusError> {
        // processes of ours that make their participants just now hold it for some milliseconds: wait for those
        match within(GUARD_TIMEOUT, || bind_port(port, false)) {
            Ok(socket) => Ok(Some(Guard { _socket: socket })),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
            Err(source) => Err(BusError::Io { attempted: format!("hold UDP port {port}"), source }),
        }
    }
}

/// RustDDS goes without the port of multicast discovery when it cannot have it, and then sees nobody: look first.
pub(super) fn check_discovery_port(cell: u16) -> Result<(), BusError> {
    let port = discovery_multicast(cell);
    within(GUARD_TIMEOUT, || bind_port(port, true)).map(drop).map_err(|source| BusError::PortInUse {
        cell,
        port,
        purpose: "multicast discovery needs it, and another program has it for itself alone; use another cell",
        source,
    })
}

fn within(limit: Duration, mut attempt: impl FnMut() -> io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    let deadline = Instant::now() + limit;
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                // nothing announces that a port is free
                std::thread::park_timeout(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// Binds a port as DDS does, shared with sockets that are there and share (other vendors' participants); with
/// `sharing` also with those that come.
fn bind_port(port: u16, sharing: bool) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(ipproto::UDP))?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    bind(&socket, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
    // Linux looks at both flags at each later bind: without them nobody else gets in
    sockopt::set_socket_reuseaddr(&socket, sharing)?;
    sockopt::set_socket_reuseport(&socket, sharing)?;
    Ok(socket)
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
        let sharing = || bind_port(port, true);
        let before = sharing().unwrap();
        let guard = Guard::hold(port).unwrap();
        assert!(guard.is_some());
        assert!(sharing().is_err(), "a later socket is kept out");
        drop(guard);
        drop(sharing().unwrap());
        drop(before);
    }

    #[test]
    fn a_discovery_port_in_use_is_a_clear_error() {
        let domain = crate::testing::free_domain();
        let port = discovery_multicast(domain.cell());
        let _greedy = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
        let error = crate::Bus::dds(&BusConfig { cell: domain.cell(), ..BusConfig::default() }).unwrap_err();
        assert_eq!(error.code(), muster_common::ErrorCode::AddressInUse);
        assert!(error.to_string().starts_with(&format!("bind UDP port {port} of cell {}", domain.cell())), "{error}");
        // and without multicast nobody needs it
        assert!(domain.bus().is_ok());
    }
}
