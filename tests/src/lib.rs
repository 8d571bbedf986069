//! Support of the whole-system tests: waiting for conditions, outside tools, processes that end with the test.
//!
//! The tests themselves are in `tests/tests/`, one file a subject. Nothing in the product names this crate.
#![forbid(unsafe_code)]

pub mod fleet;

pub use fleet::{Agents, Fleet, Host, Network, outcomes, program};

use std::{
    path::PathBuf,
    process::{Child, Command},
    time::{Duration, Instant},
};

/// Polls until `condition` yields a value.
///
/// # Panics
/// When it has not by the deadline; the message names what was waited for.
#[track_caller]
pub fn wait_for<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(started.elapsed() < deadline, "waited {deadline:?} for {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// The path of an outside program. A missing one fails the test and names the Debian package, unless
/// `MUSTER_ALLOW_SKIP=1`: then the caller gets `None`, after a line that says what was skipped.
///
/// # Panics
/// When the program is missing and skipping is not allowed.
pub fn tool(program: &str, package: &str) -> Option<PathBuf> {
    let found = std::env::var_os("PATH")
        .and_then(|path| std::env::split_paths(&path).map(|dir| dir.join(program)).find(|p| p.is_file()));
    if found.is_none() {
        let hint = format!("{program} is missing: apt-get install {package}, or run cargo xtask setup");
        assert!(std::env::var_os("MUSTER_ALLOW_SKIP").is_some(), "{hint}");
        eprintln!("skipped: {hint}");
    }
    found
}

/// The top of the source tree.
pub fn source_root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map(Into::into).unwrap_or_default()
}

/// A child process that does not outlive the test.
pub struct Process(Child);

impl Process {
    pub fn spawn(command: &mut Command) -> std::io::Result<Self> {
        command.spawn().map(Self)
    }
    pub fn id(&self) -> u32 {
        self.0.id()
    }
    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) -> std::io::Result<()> {
        self.0.kill()?;
        self.0.wait().map(|_| ())
    }
    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // it may have ended by itself: nothing to do then
        let _ = self.kill();
    }
}
