//! Serves any [`BlockDevice`](muster_block::BlockDevice): to local VMs as a virtio disk in shared memory
//! ([`vhost`], the default), and to everybody over the NBD protocol (unix sockets and TCP; the rest of this page).
//!
//! Main types: [`VhostServer`](vhost::VhostServer) and [`NbdServer`] listen; a [`Registry`] (or any [`ExportCatalog`])
//! says what is offered; an [`Export`] is one device under one name with its sessions, its [`Limits`] and
//! [`ExportStatistics`]. Below them, without I/O: [`protocol`] (bytes), [`handshake`] (negotiation), [`transmission`]
//! (what a request means). [`replay`] runs a whole connection over recorded bytes.
//!
//! ```
//! use std::sync::Arc;
//! use muster_block::model::MemoryDevice;
//! use muster_common::ByteLen;
//! use muster_export::{NbdConfig, NbdServer, Registry};
//!
//! # let directory = tempfile::tempdir()?;
//! let registry = Arc::new(Registry::new());
//! registry.add("volume.1", Arc::new(MemoryDevice::new(ByteLen::mib(1))))?;
//! let server = NbdServer::start(NbdConfig::unix(directory.path().join("nbd.sock")), registry.clone())?;
//! // nbdinfo 'nbd+unix:///volume.1?socket=...'
//! registry.remove("volume.1", std::time::Duration::from_secs(1))?;
//! server.stop();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What is spoken: fixed newstyle negotiation with `EXPORT_NAME`, `ABORT`, `LIST`, `INFO`, `GO`, `STRUCTURED_REPLY`,
//! `LIST_META_CONTEXT`, `SET_META_CONTEXT` (`base:allocation`), `STARTTLS` (TLS 1.3, certificates on both sides, on TCP
//! when [`NbdConfig::tls`] is set, and then required); `READ` (fragments with holes, `DF`), `WRITE`, `FLUSH`,
//! `FUA`, `TRIM`, `WRITE_ZEROES` (`NO_HOLE`, `FAST_ZERO`), `BLOCK_STATUS` (`REQ_ONE`), `CACHE`, `DISC`.
//!
//! Invariants:
//! 1. Memory per connection is fixed (about 1 MiB) whatever a client sends or asks for.
//! 2. A payload is not copied between the socket buffer and the device: it is received into, and sent from, the
//!    memory the device is given.
//! 3. The device is called only with ranges inside it, and only while the export is not fenced.
//! 4. A panic of a device fences its export (every later request is an I/O error) and leaves the process, the other
//!    exports and even the connection alive.
//! 5. A reply is sent for every request received completely, unless the connection is cut; a connection that breaks the
//!    protocol is closed.
//! 6. When [`Registry::remove`] returns `Ok`, no session uses the device any more.
//! 7. A flush covers every write answered before it was received, on any connection (`CAN_MULTI_CONN`): it is the
//!    device's flush.
//! 8. Where TLS is required, nothing is told or opened before it, nothing said before it counts after it, and the catalog
//!    is asked with the name on the client's verified certificate.
//! 9. Requests of one connection are answered in any order; a long read or trim does not hold up short ones behind it.
//!
//! Threads: `nbd-accept`, and `nbd-<n>` for each connection; those of [`vhost`] are named there. Locks: see [`registry`].
//!
//! Deliberately not here: extended headers, any meaning of export names, retries, caching, ordering between requests in
//! flight. TCP without [`NbdConfig::tls`] is unprotected and meant for trusted networks and tests.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod access;
mod connection;
mod fuzz;
pub mod handshake;
pub mod protocol;
pub mod registry;
mod server;
mod session;
pub mod statistics;
mod throttle;
mod tls;
pub mod trace;
pub mod transmission;
mod transport;
pub mod vhost;

pub use access::{Restricted, Rule};
pub use connection::replay;
#[doc(hidden)]
pub use fuzz::fuzz_session;
pub use handshake::{HandshakeLimits, Offer, Refusal};
pub use registry::{Export, ExportCatalog, Peer, Registry, RegistryError};
pub use server::{Listen, NbdConfig, NbdServer, ServerError};
pub use statistics::{ExportStatistics, Operation, OperationStatistics};
pub use throttle::Limits;
pub use tls::{Identity, Tls, TlsError};
