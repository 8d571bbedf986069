//! What can go wrong on a bus.

use std::net::IpAddr;

use muster_common::ErrorCode;

#[derive(Debug, thiserror::Error)]
pub enum BusError {
    #[error("join cell {cell}: cells are 0 to {}", crate::config::MAX_CELL)]
    CellOutOfRange { cell: u16 },
    #[error("use interface {wanted}: this machine has no such address; it has {}", list(.available))]
    NoSuchInterface { wanted: IpAddr, available: Vec<(String, IpAddr)> },
    #[error(
        "discover by multicast on interface {interface} ({address}): it cannot multicast; set multicast = false and name peers"
    )]
    NoMulticast { interface: String, address: IpAddr },
    #[error("bind UDP port {port} of cell {cell}: {purpose}")]
    PortInUse {
        cell: u16,
        port: u16,
        purpose: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("{attempted}")]
    Io {
        attempted: String,
        #[source]
        source: std::io::Error,
    },
    /// The DDS library refused; its text says why.
    #[error("{attempted}: {reason}")]
    Dds { attempted: String, reason: String },
    #[error("publish on {topic}: a reader has not acknowledged earlier samples, waited {waited_ms} ms")]
    Timeout { topic: &'static str, waited_ms: u64 },
    #[error("use topic {topic}: it is not in the table of topics")]
    UnknownTopic { topic: &'static str },
    #[error("{attempted}: not valid CDR: {reason}")]
    Cdr { attempted: String, reason: String },
    #[error("use topic {topic}: the bus is closed")]
    Closed { topic: &'static str },
}

impl BusError {
    /// The stable code of this error.
    pub fn code(&self) -> ErrorCode {
        match self {
            BusError::CellOutOfRange { .. } | BusError::NoSuchInterface { .. } | BusError::NoMulticast { .. } => {
                ErrorCode::InvalidArgument
            }
            BusError::PortInUse { .. } => ErrorCode::AddressInUse,
            BusError::Io { .. } => ErrorCode::Io,
            BusError::Timeout { .. } => ErrorCode::Timeout,
            BusError::UnknownTopic { .. } => ErrorCode::NotFound,
            BusError::Cdr { .. } => ErrorCode::Corrupt,
            BusError::Dds { .. } | BusError::Closed { .. } => ErrorCode::Unavailable,
        }
    }
}

fn list(interfaces: &[(String, IpAddr)]) -> String {
    if interfaces.is_empty() {
        return "none".to_string();
    }
    interfaces.iter().map(|(name, address)| format!("{address} ({name})")).collect::<Vec<_>>().join(", ")
}
