//! A vhost-user server with one export, and devices for it.
#![allow(dead_code, reason = "each program uses its part")]
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use muster_block::model::MemoryDevice;
use muster_block::{BlockDevice, BlockError, BlockErrorKind, Extent, Geometry, WriteFlags, ZeroFlags};
use muster_common::ByteLen;
use muster_export::Registry;
use muster_export::vhost::{VhostConfig, VhostServer};
use parking_lot::{Condvar, Mutex};

use crate::common::NAME;
use crate::frontend::{Client, Options};

pub const GRACE: Duration = Duration::from_secs(10);

/// A server with one export.
pub struct Served {
    pub registry: Arc<Registry>,
    pub server: VhostServer,
    pub socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Served {
    pub fn new(device: Arc<dyn BlockDevice>) -> Served {
        Served::with(device, |_| {})
    }

    pub fn with(device: Arc<dyn BlockDevice>, change: impl FnOnce(&mut VhostConfig)) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let registry = Arc::new(Registry::new());
        registry.add(NAME, device).unwrap();
        let mut config = VhostConfig::new(directory.path().join("vu"));
        change(&mut config);
        let server = VhostServer::start(config, registry.clone()).unwrap();
        let socket = server.serve(NAME).unwrap();
        Served { registry, server, socket, _directory: directory }
    }

    pub fn connect(&self, options: Options) -> Client {
        Client::connect(&self.socket, options)
    }
}

pub fn memory(size: ByteLen) -> Arc<dyn BlockDevice> {
    Arc::new(MemoryDevice::new(size))
}

/// Waits at a gate in each write; does what it is told.
pub struct Puppet {
    pub inner: MemoryDevice,
    pub size: AtomicU64,
    pub full: AtomicBool,
    pub panics: AtomicBool,
    pub held: Mutex<bool>,
    pub let_go: Condvar,
    pub inside: AtomicUsize,
}

impl Puppet {
    pub fn new(size: ByteLen) -> Arc<Puppet> {
        Arc::new(Puppet {
            inner: MemoryDevice::new(ByteLen(size.bytes() * 2)),
            size: AtomicU64::new(size.bytes()),
            full: AtomicBool::new(false),
            panics: AtomicBool::new(false),
            held: Mutex::new(false),
            let_go: Condvar::new(),
            inside: AtomicUsize::new(0),
        })
    }

    pub fn hold(&self, held: bool) {
        *self.held.lock() = held;
        self.let_go.notify_all();
    }
}

impl BlockDevice for Puppet {
    fn geometry(&self) -> Geometry {
        Geometry::memory(ByteLen(self.size.load(Relaxed)), false)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        assert!(!self.panics.load(Relaxed), "told to");
        self.geometry().check(offset, buf.len() as u64)?;
        self.inner.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
        self.inside.fetch_add(1, Relaxed);
        let mut held = self.held.lock();
        while *held {
            self.let_go.wait(&mut held);
        }
        drop(held);
        self.geometry().check(offset, data.len() as u64)?;
        if self.full.load(Relaxed) {
            return Err(BlockError::new(BlockErrorKind::NoSpace, "told to"));
        }
        self.inner.write_at(offset, data, flags)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
        self.inner.write_zeroes(offset, len, flags)
    }
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.inner.trim(offset, len)
    }
    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }
    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        self.inner.block_status(offset, len, out)
    }
}

pub fn soon() -> Instant {
    Instant::now() + GRACE
}
