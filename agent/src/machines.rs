//! The hypervisor as the agent's tasks see it: calls with a deadline that can be awaited, or the reason why there is none.

use std::{sync::Arc, time::Duration};

use muster_cim::EnabledState;
use muster_common::{Chain, ErrorCode, VmId};
use muster_virt::{
    Accel, DomainState, DomainStatus, Hypervisor, HypervisorError, HypervisorErrorKind, HypervisorInfo, Lane, Pool,
    PoolConfig,
};

use crate::config::{AcceleratorChoice, Config};

/// See the module.
pub struct Machines {
    pool: Option<Pool>,
    info: Option<HypervisorInfo>,
    accel: Accel,
    /// What the host topic says.
    accelerator: &'static str,
    /// Why there is no hypervisor or no KVM; empty when all is well.
    remark: String,
    timeout: Duration,
}

impl Machines {
    /// Opens what the configuration names, or wraps what it is given. Never fails: without a hypervisor the agent runs
    /// and says so. Blocks for some seconds (capabilities, KVM probe).
    pub fn open(config: &Config, given: Option<Arc<dyn Hypervisor>>) -> Self {
        let timeout = config.timeouts.hypervisor_call();
        let none =
            |remark: String| Self { pool: None, info: None, accel: Accel::Tcg, accelerator: "none", remark, timeout };
        let hypervisor = match (given, config.hypervisor_uri()) {
            (Some(hypervisor), _) => hypervisor,
            (None, None) => return none("the configuration says hypervisor.uri = \"none\"".into()),
            (None, Some(uri)) => match muster_virt::open(&uri) {
                Ok(hypervisor) => hypervisor,
                Err(e) => {
                    tracing::warn!(uri, err = %Chain(&e), "no hypervisor, commands for VMs will be refused");
                    return none(Chain(&e).to_string());
                }
            },
        };
        let info = hypervisor.info();
        let pool = match Pool::start(hypervisor, PoolConfig::default()) {
            Ok(pool) => pool,
            Err(e) => return none(Chain(&e).to_string()),
        };
        let (accel, accelerator, remark) = accelerator(config, &info);
        if !remark.is_empty() {
            tracing::warn!(reason = remark, "guests run without hardware acceleration");
        }
        Self { pool: Some(pool), info: Some(info), accel, accelerator, remark, timeout }
    }

    pub fn info(&self) -> Option<&HypervisorInfo> {
        self.info.as_ref()
    }
    pub fn pool(&self) -> Option<&Pool> {
        self.pool.as_ref()
    }
    pub fn accel(&self) -> Accel {
        self.accel
    }
    pub fn accelerator(&self) -> &'static str {
        self.accelerator
    }
    pub fn remark(&self) -> &str {
        &self.remark
    }
    /// Why VMs cannot be commanded; `None`: they can.
    pub fn missing(&self) -> Option<String> {
        self.pool.is_none().then(|| self.remark.clone())
    }

    /// One call with the usual deadline. When the awaiting task is dropped, the call still runs.
    pub async fn call<T, F>(&self, lane: Lane, label: &'static str, operation: F) -> Result<T, HypervisorError>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Hypervisor) -> muster_virt::Result<T> + Send + 'static,
    {
        self.call_within(lane, label, self.timeout, operation).await
    }

    /// One call with its own deadline.
    pub async fn call_within<T, F>(
        &self,
        lane: Lane,
        label: &'static str,
        timeout: Duration,
        operation: F,
    ) -> Result<T, HypervisorError>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Hypervisor) -> muster_virt::Result<T> + Send + 'static,
    {
        let gone = || HypervisorError::new(HypervisorErrorKind::Connection, format!("{label}: {}", self.remark));
        let pool = self.pool.as_ref().ok_or_else(gone)?;
        let (sender, receiver) = tokio::sync::oneshot::channel();
        pool.submit(lane, label, timeout, operation, move |result| {
            // nobody waits any more: the task was given up
            let _ = sender.send(result);
        });
        receiver.await.unwrap_or_else(|_| Err(gone()))
    }

    /// The state as the hypervisor says it now; `None`: it does not know the VM.
    pub async fn status(&self, vm: VmId) -> Result<Option<DomainStatus>, HypervisorError> {
        match self.call(Lane::Host, "status", move |h| h.status(vm)).await {
            Ok(status) => Ok(Some(status)),
            Err(e) if e.kind() == HypervisorErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Gives up what waits; how many calls are still running after the grace.
    pub fn close(&self, grace: Duration) -> usize {
        self.pool.as_ref().map_or(0, |pool| pool.close(grace))
    }
}

fn accelerator(config: &Config, info: &HypervisorInfo) -> (Accel, &'static str, String) {
    use muster_virt::HypervisorKind::{LibvirtTest, QemuEmbedded, QemuSystem, Simulator};
    match info.kind {
        Simulator | LibvirtTest => return (Accel::Tcg, "simulated", String::new()),
        QemuEmbedded | QemuSystem => {}
    }
    match config.hypervisor.accelerator {
        AcceleratorChoice::Kvm => (Accel::Kvm, "kvm", String::new()),
        AcceleratorChoice::Tcg => (Accel::Tcg, "tcg", String::new()),
        AcceleratorChoice::Auto => {
            let probe = muster_virt::probe_kvm(muster_virt::probe::LIMIT, Some(&config.run_dir.join("kvm-probe.json")));
            match probe.accel() {
                Accel::Kvm => (Accel::Kvm, "kvm", String::new()),
                Accel::Tcg => {
                    // the reason is a line of QEMU's: for the log, not for every table of hosts
                    tracing::warn!(reason = %probe.reason, "no usable KVM, guests run under TCG");
                    (
                        Accel::Tcg,
                        "tcg",
                        "no usable KVM: guests run under TCG, slower (reason in the agent's log)".into(),
                    )
                }
            }
        }
    }
}

/// CIM's state for libvirt's.
pub const fn enabled_state(state: DomainState) -> EnabledState {
    match state {
        DomainState::Off | DomainState::Crashed => EnabledState::Disabled,
        DomainState::Starting => EnabledState::Starting,
        DomainState::Running => EnabledState::Enabled,
        DomainState::Paused => EnabledState::Quiesce,
        DomainState::Saved => EnabledState::EnabledButOffline,
        DomainState::ShuttingDown => EnabledState::ShuttingDown,
        DomainState::Unknown => EnabledState::Unknown,
    }
}

/// The code that travels.
pub const fn code_of(kind: HypervisorErrorKind) -> ErrorCode {
    match kind {
        HypervisorErrorKind::NotFound => ErrorCode::NotFound,
        HypervisorErrorKind::InvalidState => ErrorCode::InvalidState,
        HypervisorErrorKind::AlreadyExists => ErrorCode::AlreadyExists,
        HypervisorErrorKind::Unsupported => ErrorCode::Unsupported,
        HypervisorErrorKind::Unknown => ErrorCode::Indeterminate,
        HypervisorErrorKind::Busy => ErrorCode::Timeout,
        HypervisorErrorKind::AgentUnavailable | HypervisorErrorKind::GuestFailed => ErrorCode::GuestAgent,
        HypervisorErrorKind::InvalidSpec => ErrorCode::InvalidArgument,
        HypervisorErrorKind::DiskUnavailable => ErrorCode::Unavailable,
        _ => ErrorCode::Hypervisor,
    }
}
