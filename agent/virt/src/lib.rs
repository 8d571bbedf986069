//! The hypervisor behind one trait: libvirt's drivers for real guests, a simulator for fleets.
//!
//! Main types: [`Hypervisor`] (what can be asked), [`DomainSpec`] (what a domain is made of), [`DomainState`],
//! [`DomainStatus`], [`DomainStats`], [`HypervisorEvent`], [`HypervisorError`]; [`open`] makes one from a URI;
//! [`Pool`] calls it from named threads with deadlines; [`simulator::Simulator`] is the one without guests;
//! [`conformance`] is the suite every implementation passes; [`probe`] finds out whether KVM works.
//!
//! Invariants:
//! 1. A domain's UUID is the VM id, and a domain of ours carries our metadata element. Nobody else's domain is touched.
//! 2. A call whose deadline passed while it ran is `Unknown`: it may still take effect, the state has to be read.
//!    A call that never started is `Busy`: nothing happened.
//! 3. Domains outlive this process. An embedded hypervisor opened again on the same root finds them running.
//! 4. Every string that reaches domain XML is validated or escaped (`xml`); guest output is bytes, never trusted text.
//! 5. `unsafe` is in `libvirt::ffi` only.
//!
//! Threads and locks: one process-wide thread `libvirt-event` runs libvirt's event loop from the first [`open`] on and
//! never ends (libvirt cannot unregister its loop). A [`Pool`] owns `libvirt-N` and `libvirt-deadline`. libvirt's
//! own locks order calls for one domain; here only the pool's queue, the subscriber list and the simulator's state have
//! a lock, each a leaf.
//!
//! libvirt writes warnings about each domain to stderr on its own. Programs that mind start with
//! `LIBVIRT_LOG_FILTERS="4:qemu 4:security"` in their environment (libvirt reads it once, there is no call for it).
//!
//! What it does not do: create volumes or exports, decide retries, remember specifications (libvirt keeps the
//! definition, the agent the intention), cancel a libvirt call (nobody can).

#![deny(unsafe_code)]

mod base64;
pub mod conformance;
mod error;
mod hypervisor;
pub mod libvirt;
mod pool;
pub mod probe;
mod screenshot;
pub mod simulator;
mod spec;
mod state;
mod subscribers;

pub use error::{HypervisorError, HypervisorErrorKind, Result};
pub use hypervisor::{Capabilities, Hypervisor, HypervisorInfo, HypervisorKind, ShutdownMode};
pub use pool::{Lane, Pool, PoolConfig};
pub use probe::{KvmProbe, probe_kvm};
pub use screenshot::Screenshot;
pub use spec::{Accel, Boot, Console, DiskSpec, DiskTransport, DomainSpec, NicSpec};
pub use state::{
    BlockStats, DomainState, DomainStats, DomainStatus, ExecRequest, ExecResult, HypervisorEvent, NetStats, StateReason,
};

use std::sync::Arc;

/// Opens a hypervisor by URI:
/// - `qemu:///embed?root=DIR`: QEMU driver in this process, everything under DIR (absolute, short: at most
///   [`libvirt::MAX_ROOT_LENGTH`] bytes). Needs no daemon. Several processes use several roots.
/// - `qemu:///system`: the system daemon (also `qemu+unix:///system?socket=PATH`).
/// - `test:///default`: libvirt's mock, for tests.
/// - `sim:///?seed=N`: our simulator on the machine's clock.
///
/// `NotInstalled` says which package is missing, `Connection` that it is there and refused.
pub fn open(uri: &str) -> Result<Arc<dyn Hypervisor>> {
    if uri.starts_with("qemu:") || uri.starts_with("qemu+unix:") || uri.starts_with("test:") {
        return Ok(Arc::new(libvirt::Libvirt::open(uri)?));
    }
    if uri.starts_with("sim:") {
        return Ok(Arc::new(simulator::Simulator::from_uri(uri)?));
    }
    Err(HypervisorError::new(
        HypervisorErrorKind::InvalidSpec,
        format!("open hypervisor {uri}: expected qemu:///embed?root=DIR, qemu:///system, test:///default or sim:///"),
    ))
}
