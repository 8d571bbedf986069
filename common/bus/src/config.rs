//! Where on the network a bus lives.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The highest cell. Domain ids above 100 put RTPS ports into the ephemeral range (32768 and up), where any
/// program's outgoing connection may sit on them.
pub const MAX_CELL: u16 = 100;

/// How a bus finds its peers. The keys of the `[bus]` table in a configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BusConfig {
    /// The cell: the DDS domain id, 0 to 100. A host belongs to one.
    pub cell: u16,
    /// Address of the one interface to use and to advertise. None: all of them.
    pub interface: Option<IpAddr>,
    /// Addresses of hosts to look for when multicast does not reach them. A port is not needed: discovery tries the
    /// first participants of the domain on each.
    pub peers: Vec<IpAddr>,
    /// Discover by multicast (239.255.0.1). False: only `peers` and this machine's own processes are looked for. On an
    /// interface that can multicast RustDDS still announces itself there every 10 s; nothing depends on an answer.
    pub multicast: bool,
}

impl Default for BusConfig {
    fn default() -> Self {
        Self { cell: 0, interface: None, peers: Vec::new(), multicast: true }
    }
}

impl BusConfig {
    /// Only processes of this machine, over the loopback interface.
    pub fn loopback(cell: u16) -> Self {
        Self { cell, interface: Some(IpAddr::from([127, 0, 0, 1])), peers: Vec::new(), multicast: false }
    }

    /// The same place in another cell.
    pub fn with_cell(&self, cell: u16) -> Self {
        Self { cell, ..self.clone() }
    }
}
