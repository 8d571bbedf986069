//! vhost-user-blk: the export as a virtio disk whose requests a local VM's driver puts into shared memory and we take
//! out of it, without a system call on either side while both are busy.
//!
//! [`VhostServer`] serves exports of a catalog, each on a unix socket of its own; QEMU connects to it with a
//! `vhost-user-blk` device. Below it: `session` (one connection: messages, memory, descriptors), `event` (the descriptors),
//! `pool` (threads and polling), `queue` (requests), and without I/O `ring` (virtqueues), `request` (virtio-blk), `memory`,
//! `inflight`.
//!
//! Invariants:
//! 1. Every byte a guest can change is read once, into memory of ours, and checked before anything is decided on it. A
//!    write's data is copied out before the device sees it: what is hashed is what is stored.
//! 2. Guest memory is touched only through bounds-checked slices of what the frontend mapped. This crate has no `unsafe`.
//! 3. A driver that breaks the rules of its ring stops that queue, and no other. One that asks for nonsense within the
//!    rules gets an error status.
//! 4. The memory a queue takes is fixed: 256 KiB for writes and room for one chain of 1024 descriptors.
//! 5. A queue's requests are done one after the other, in the order the driver made them available; queues do not wait
//!    for each other.
//! 6. A request whose answer the driver has not seen when this process dies is done again by the next one (the record of
//!    requests in flight is kept by the frontend). No guest sees an error for it.
//! 7. No space is no error: such a write waits, and with it its queue, until there is space, the export is fenced or
//!    withdrawn, or [`VhostConfig::space_wait`] is over.
//!
//! Threads: `vu-ctl-<n>` for each served export, `vu-<n>` for all queues of the server ([`VhostConfig::threads`]); a device
//! that may wait for a disk ([`BlockDevice::may_wait`](muster_block::BlockDevice::may_wait)) has as many of its own while
//! its frontend is connected. Locks: the pool's list, then a queue's, which a thread has while it serves the queue and
//! the session takes to change it; no other is taken under it but the export's limits.
//!
//! Who can hold others up: a request is bounded (32 MiB of data, 16 ranges of 4 GiB to discard) and occupies one of the
//! threads while it is done. What a frontend has us write to is an eventfd that does not wait, or the frontend is turned
//! away. A frontend, that is a QEMU that was taken over, could still clear the non-blocking flag of an eventfd it shares
//! with us, fill it and hold the threads that call it: the kernel has no write to an eventfd that never waits. A guest
//! cannot.
//!
//! Deliberately not here: packed rings, live migration of a connected frontend (logged writes), requests of one queue
//! done at the same time.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

mod event;
mod fuzz;
mod inflight;
mod log;
mod memory;
mod pool;
mod queue;
mod request;
mod ring;
mod server;
mod session;

pub use fuzz::fuzz_queue;
pub use server::{VhostError, VhostServer};

/// Something happened to a served export that whoever runs the VM wants to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ExportEvent {
    /// A write waits for space; the first one that does. The VM should be paused until there is some.
    SpaceWanted,
    /// No write waits for space any more.
    SpaceBack,
    /// The driver broke the rules of this queue, which is served no more until the driver starts it again.
    QueueBroken {
        /// Which.
        queue: u16,
    },
}

/// Told of events, with the export's name. Called on the threads that serve the guest: it must not block.
pub type Observer = dyn Fn(&str, ExportEvent) + Send + Sync;

/// Configuration of a server.
#[derive(Clone)]
pub struct VhostConfig {
    /// Where the sockets are made.
    pub directory: PathBuf,
    /// Permissions of the sockets: who may connect.
    pub mode: u32,
    /// Queues offered: the most a VM may have, at most 256. QEMU takes one per virtual processor unless it is told
    /// otherwise.
    pub queues: u16,
    /// Threads that serve all queues of all VMs.
    pub threads: u16,
    /// How long a thread looks for the next request before it sleeps, at most. It adapts: less where that is in vain.
    /// Trades processor time for latency.
    pub spin: Duration,
    /// How long a write may wait for space before the guest gets an I/O error. `None`: as long as it takes.
    pub space_wait: Option<Duration>,
    /// Demand guest memory that cannot shrink (a sealed memfd, as QEMU makes them): a frontend that cuts it off under us
    /// would end this process and the disks of every VM.
    pub sealed_memory: bool,
    /// Who is told of events.
    pub observer: Option<Arc<Observer>>,
}

impl std::fmt::Debug for VhostConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhostConfig")
            .field("directory", &self.directory)
            .field("mode", &format_args!("{:#o}", self.mode))
            .field("queues", &self.queues)
            .field("threads", &self.threads)
            .field("spin", &self.spin)
            .field("space_wait", &self.space_wait)
            .field("sealed_memory", &self.sealed_memory)
            .finish_non_exhaustive()
    }
}

impl VhostConfig {
    /// Sockets in this directory that only this user may connect to.
    pub fn new(directory: impl Into<PathBuf>) -> VhostConfig {
        VhostConfig {
            directory: directory.into(),
            mode: 0o600,
            queues: 64,
            threads: default_threads(),
            spin: Duration::from_micros(50),
            space_wait: None,
            sealed_memory: true,
            observer: None,
        }
    }

    fn settings(&self) -> Settings {
        Settings {
            queues: self.queues.clamp(1, 256),
            spin: self.spin,
            space_wait: self.space_wait,
            sealed_memory: self.sealed_memory,
            observer: self.observer.clone(),
        }
    }
}

/// As many as there are processors, up to 16: copying memory is all they do, and memory has no more to give.
fn default_threads() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    processors.min(16) as u16
}

/// The part of the configuration a session needs.
#[derive(Clone)]
struct Settings {
    queues: u16,
    spin: Duration,
    space_wait: Option<Duration>,
    sealed_memory: bool,
    observer: Option<Arc<Observer>>,
}

/// Numbers threads.
#[derive(Default)]
struct Names(AtomicU64);

impl Names {
    fn next(&self, what: &str) -> String {
        format!("{what}-{}", self.0.fetch_add(1, Ordering::Relaxed))
    }
}

/// A UUID at the front of a name loses its hyphens: socket paths are short.
fn socket_name(name: &str) -> String {
    let front = name.get(..36).unwrap_or_default();
    let is_uuid = front.bytes().enumerate().all(|(at, byte)| match at {
        8 | 13 | 18 | 23 => byte == b'-',
        _ => byte.is_ascii_hexdigit(),
    });
    if front.is_empty() || !is_uuid { name.to_owned() } else { front.replace('-', "") + &name[36..] }
}

/// What the guest sees as the disk's serial number: the start of the export's name without hyphens.
fn device_name(name: &str) -> [u8; request::NAME_BYTES] {
    let mut out = [0; request::NAME_BYTES];
    for (to, from) in out.iter_mut().zip(name.bytes().filter(|byte| *byte != b'-')) {
        *to = from;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_named_after_its_export_and_shorter() {
        let name = "0f4c9c2e-6f1f-4a5e-9d59-6b6f3a3f7d11.18446744073709551615";
        let socket = socket_name(name);
        assert_eq!(socket, "0f4c9c2e6f1f4a5e9d596b6f3a3f7d11.18446744073709551615");
        assert!(44 + 1 + socket.len() <= 107);
        assert_eq!(socket_name("disk.1"), "disk.1");
        assert_eq!(socket_name(""), "");
        assert_eq!(&device_name(name), b"0f4c9c2e6f1f4a5e9d59");
        assert_eq!(device_name("a-b"), *b"ab\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }
}
