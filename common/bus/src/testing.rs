//! For tests of this and other crates: cells that no other test process uses, hosts as network namespaces, and
//! waiting for a condition.

use std::{
    fs::File,
    io,
    net::Ipv4Addr,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
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

/// Two hosts on one cable: network namespaces that are gone when this is dropped.
#[derive(Debug)]
pub struct Namespaces {
    names: [String; 2],
}

fn ip(words: &str) -> io::Result<()> {
    let output = Command::new("ip").args(words.split_whitespace()).output()?;
    if output.status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("ip {words}: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }
}

impl Namespaces {
    pub const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2)];

    /// None, after a line that says so, for those who are not root.
    ///
    /// # Panics
    /// When root cannot make them.
    pub fn make() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: network namespaces need root");
            return None;
        }
        static MADE: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}n{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let this = Self { names: [format!("mt{id}a"), format!("mt{id}b")] };
        let [a, b] = &this.names;
        let mut steps = vec![
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("-n {a} link add eth0 type veth peer name eth0 netns {b}"),
        ];
        for (name, address) in this.names.iter().zip(Self::ADDRESSES) {
            steps.push(format!("-n {name} address add {address}/24 dev eth0"));
            steps.push(format!("-n {name} link set eth0 up"));
            steps.push(format!("-n {name} link set lo up"));
        }
        for step in steps {
            ip(&step).unwrap_or_else(|e| panic!("make two network namespaces: {e}"));
        }
        Some(this)
    }

    /// Name of a namespace, for `ip netns exec`.
    pub fn name(&self, host: usize) -> &str {
        &self.names[host]
    }

    /// Pulls the plug, or puts it back.
    ///
    /// # Panics
    /// When `ip` refuses.
    pub fn cable(&self, plugged: bool) {
        let state = if plugged { "up" } else { "down" };
        ip(&format!("-n {} link set eth0 {state}", self.names[1])).unwrap_or_else(|e| panic!("{e}"));
    }

    /// The network between them carries no multicast (IGMP snooping without a querier, a cloud's network).
    ///
    /// # Panics
    /// When `nft` refuses.
    pub fn drop_multicast(&self) {
        for name in &self.names {
            for rule in [
                "add table ip muster",
                "add chain ip muster in { type filter hook input priority 0 ; }",
                "add rule ip muster in ip daddr 224.0.0.0/4 iifname eth0 drop",
            ] {
                let output = Command::new("ip").args(["netns", "exec", name, "nft"]).arg(rule).output();
                assert!(output.as_ref().is_ok_and(|o| o.status.success()), "nft {rule}: {output:?}");
            }
        }
    }

    /// Does `work` on a thread of its own inside a namespace; threads and sockets it makes stay inside.
    ///
    /// # Panics
    /// As `work` does.
    pub fn inside<R: Send>(&self, host: usize, work: impl FnOnce() -> R + Send) -> R {
        let path = format!("/run/netns/{}", self.names[host]);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let entered = File::open(&path).and_then(|file| {
                    use std::os::fd::AsFd;
                    let kind = rustix::thread::LinkNameSpaceType::Network;
                    Ok(rustix::thread::move_into_link_name_space(file.as_fd(), Some(kind))?)
                });
                entered.unwrap_or_else(|e| panic!("enter {path}: {e}"));
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(error) = ip(&format!("netns delete {name}")) {
                eprintln!("{error}");
            }
        }
    }
}
