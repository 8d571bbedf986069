//! For tests of this and other crates: cells that no other test process uses, and waiting for a condition.

use std::{
    fs::File,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};

use crate::{Bus, BusConfig, BusError, config::MAX_CELL};

/// A cell of our own until this is dropped, also when the process is killed.
#[derive(Debug)]
pub struct Domain {
    cell: u16,
    _lock: File,
}

impl Domain {
    pub fn cell(&self) -> u16 {
        self.cell
    }

    /// A bus in this cell for processes of this machine only.
    ///
    /// # Errors
    /// As [`Bus::dds`].
    pub fn bus(&self) -> Result<Bus, BusError> {
        Bus::dds(&BusConfig::loopback(self.cell))
    }
}

/// A cell that no test of another process has now. Cell 0 is left to real ones.
///
/// # Panics
/// When 100 tests hold all cells.
pub fn free_domain() -> Domain {
    let first = std::env::var("NEXTEST_TEST_GLOBAL_SLOT")
        .ok()
        .and_then(|slot| slot.parse::<u32>().ok())
        .unwrap_or_else(std::process::id);
    for step in 0..u32::from(MAX_CELL) {
        let cell = 1 + first.wrapping_add(step) % u32::from(MAX_CELL);
        let path = std::env::temp_dir().join(format!("muster-test-cell-{cell}.lock"));
        let Ok(file) = File::options().create(true).append(true).open(&path) else { continue };
        // the lock ends with the file: nothing to clean up after a crash
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Domain { cell: cell as u16, _lock: file };
        }
    }
    panic!(
        "all {MAX_CELL} cells are in use by tests (locks {}/muster-test-cell-*.lock)",
        std::env::temp_dir().display()
    );
}

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not in time; `what` says what was waited for.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {limit:?} in vain until {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}
