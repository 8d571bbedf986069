//! The simulator behind a hypervisor that hangs or fails where a test wants it to.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use muster_common::VmId;
use muster_virt::{
    DomainSpec, DomainStats, DomainStatus, ExecRequest, ExecResult, Hypervisor, HypervisorError, HypervisorErrorKind,
    HypervisorEvent, HypervisorInfo, Result, Screenshot, ShutdownMode, simulator::Simulator,
};

pub struct Balky {
    pub inner: Arc<Simulator>,
    /// `define` hangs while this is set.
    pub define_hangs: AtomicBool,
    pub defines: AtomicU32,
    /// `fs_thaw` hangs while this is set.
    pub thaw_hangs: AtomicBool,
    /// So many thaws fail.
    pub thaws_to_fail: AtomicU32,
    /// So many thawed a frozen guest.
    pub thawed: AtomicU32,
    /// Guest agents answer those who wait longer than this.
    pub silent_ms: AtomicU32,
    /// So many pings are not answered.
    pub pings_to_fail: AtomicU32,
}

impl Balky {
    pub fn new(inner: &Arc<Simulator>) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::clone(inner),
            define_hangs: AtomicBool::new(false),
            defines: AtomicU32::new(0),
            thaw_hangs: AtomicBool::new(false),
            thaws_to_fail: AtomicU32::new(0),
            thawed: AtomicU32::new(0),
            silent_ms: AtomicU32::new(0),
            pings_to_fail: AtomicU32::new(0),
        })
    }
}

macro_rules! pass_on {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty;)+) => {
        $(fn $name(&self, $($argument: $type),*) -> $result {
            self.inner.$name($($argument),*)
        })+
    };
}

impl Hypervisor for Balky {
    fn define(&self, spec: &DomainSpec) -> Result<()> {
        self.defines.fetch_add(1, Ordering::Relaxed);
        while self.define_hangs.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.inner.define(spec)
    }

    fn fs_thaw(&self, vm: VmId) -> Result<u32> {
        while self.thaw_hangs.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let less = |left: u32| left.checked_sub(1);
        if self.thaws_to_fail.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok() {
            return Err(HypervisorError::new(HypervisorErrorKind::AgentUnavailable, "thaw: as the test wants it"));
        }
        let thawed = self.inner.fs_thaw(vm)?;
        if thawed > 0 {
            self.thawed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(thawed)
    }

    fn guest_ping(&self, vm: VmId, timeout: Duration) -> Result<bool> {
        let silent = Duration::from_millis(self.silent_ms.load(Ordering::Relaxed).into());
        let less = |left: u32| left.checked_sub(1);
        let fails = self.pings_to_fail.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok();
        Ok(!fails && silent < timeout && self.inner.guest_ping(vm, timeout)?)
    }

    pass_on! {
        fn info() -> HypervisorInfo;
        fn undefine(vm: VmId) -> Result<()>;
        fn list() -> Result<Vec<DomainStatus>>;
        fn status(vm: VmId) -> Result<DomainStatus>;
        fn start(vm: VmId) -> Result<()>;
        fn start_paused(vm: VmId) -> Result<()>;
        fn shutdown(vm: VmId, mode: ShutdownMode) -> Result<()>;
        fn power_off(vm: VmId) -> Result<()>;
        fn reset(vm: VmId) -> Result<()>;
        fn reboot(vm: VmId, mode: ShutdownMode) -> Result<()>;
        fn pause(vm: VmId) -> Result<()>;
        fn resume(vm: VmId) -> Result<()>;
        fn suspend(vm: VmId) -> Result<()>;
        fn discard_saved(vm: VmId) -> Result<()>;
        fn guest_exec(vm: VmId, request: &ExecRequest) -> Result<ExecResult>;
        fn guest_write_file(vm: VmId, path: &str, content: &[u8]) -> Result<()>;
        fn guest_read_file(vm: VmId, path: &str, limit: usize) -> Result<Vec<u8>>;
        fn fs_freeze(vm: VmId) -> Result<u32>;
        fn screenshot(vm: VmId) -> Result<Screenshot>;
        fn stats(vm: VmId) -> Result<DomainStats>;
        fn all_stats() -> Result<Vec<DomainStats>>;
        fn events() -> crossbeam_channel::Receiver<HypervisorEvent>;
    }
}
