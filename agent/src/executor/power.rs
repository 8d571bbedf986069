//! Power verbs.

use std::time::Duration;

use muster_cim::EnabledState;
use muster_common::{ErrorCode, VmId};
use muster_virt::{DomainState, Hypervisor, HypervisorErrorKind, Lane, ShutdownMode, StateReason};

use super::{Done, Failure, Work};
use crate::{
    arguments::ShutdownPolicy,
    machines::enabled_state,
    records::{PausedBy, VmRecord},
};

/// Between two looks at a state. The hypervisor's events wake the look earlier.
const LOOK: Duration = Duration::from_millis(200);
/// A resume within about 10 ms of a disk's return pauses again: it has to be running this much later to count.
const SETTLE: Duration = Duration::from_millis(150);
/// A guest that still boots does not hear the power button: it is pressed again.
const PRESS_AGAIN: Duration = Duration::from_secs(5);

impl Work {
    fn vm(&self) -> Result<VmId, Failure> {
        self.order.vm.ok_or_else(Failure::no_such_vm)
    }

    async fn call<T: Send + 'static>(
        &self,
        lane: Lane,
        label: &'static str,
        operation: impl FnOnce(&dyn Hypervisor) -> muster_virt::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        Ok(self.host.machines.call_within(lane, label, self.call_time(), operation).await?)
    }

    /// The state now.
    pub(super) async fn state(&self) -> Result<(DomainState, StateReason), Failure> {
        match self.host.machines.status(self.vm()?).await? {
            Some(status) => {
                self.host.inventory.observe(self.host.now_us(), &status);
                Ok((status.state, status.reason))
            }
            None => Ok((DomainState::Off, StateReason::None)),
        }
    }

    /// Waits until the state read back is this one; past the deadline it is a failure that names what it was.
    pub(super) async fn wait_for(&self, wanted: EnabledState) -> Result<(), Failure> {
        self.wait_until(wanted, self.left()).await
    }

    pub(super) async fn wait_until(&self, wanted: EnabledState, time: Duration) -> Result<(), Failure> {
        let until = tokio::time::Instant::now() + time;
        loop {
            let changed = self.host.inventory.changed.notified();
            let (state, reason) = self.state().await?;
            let seen = enabled_state(state);
            if seen == wanted {
                return Ok(());
            }
            if wanted == EnabledState::Enabled && (state == DomainState::Crashed || reason == StateReason::Failed) {
                return Err(Failure::failed(ErrorCode::Hypervisor, "the machine crashed"));
            }
            if tokio::time::Instant::now() >= until {
                return Err(Failure::timeout(format!("it is {seen} and not {wanted} at the deadline")));
            }
            // whichever comes first; a look too many is cheap
            let _ = tokio::time::timeout(LOOK, changed).await;
        }
    }

    /// A call whose result is not known counts by what is read afterwards.
    fn tolerate_unknown(result: Result<(), Failure>) -> Result<(), Failure> {
        match result {
            Err(f) if f.code == ErrorCode::Indeterminate => Ok(()),
            other => other,
        }
    }

    pub(super) async fn power_on(&self) -> Result<Done, Failure> {
        let vm = self.vm()?;
        loop {
            match self.state().await?.0 {
                DomainState::Running => return Ok(Done::default()),
                DomainState::Paused => {
                    self.host.mark_paused(vm, None).await;
                    Self::tolerate_unknown(self.call(Lane::Vm(vm), "resume", move |h| h.resume(vm)).await)?;
                    tokio::time::sleep(SETTLE).await;
                    let (state, reason) = self.state().await?;
                    match state {
                        DomainState::Running => {
                            // QEMU hears nothing of a disk's new size while it is paused
                            self.entry()?.record.disks.iter().for_each(|disk| _ = self.host.volumes.announce(disk));
                            return Ok(Done::default());
                        }
                        DomainState::Paused if reason == StateReason::IoError && !self.left().is_zero() => {
                            tracing::info!(vm = %vm, "paused again by a disk, resuming again");
                        }
                        _ if self.left().is_zero() => {
                            return Err(Failure::failed(ErrorCode::Io, "it pauses again: a disk does not answer"));
                        }
                        _ => {}
                    }
                }
                DomainState::Off | DomainState::Crashed => {
                    self.start(&self.entry()?.record).await?;
                    return self.wait_for(EnabledState::Enabled).await.map(|()| Done::default());
                }
                DomainState::Saved => {
                    self.offer_all(&self.entry()?.record).await?;
                    Self::tolerate_unknown(self.call(Lane::Vm(vm), "start", move |h| h.start(vm)).await)?;
                    return self.wait_for(EnabledState::Enabled).await.map(|()| Done::default());
                }
                DomainState::Starting | DomainState::ShuttingDown | DomainState::Unknown => {
                    return self.wait_for(EnabledState::Enabled).await.map(|()| Done::default());
                }
            }
        }
    }

    /// Starts a machine that is off: definition, boot files and exports are made sure of first.
    pub(super) async fn start(&self, record: &VmRecord) -> Result<(), Failure> {
        let vm = record.vm;
        let record = &self.settle_record(record).await?;
        self.host.inventory.update(vm, |e| {
            e.transition = Some(EnabledState::Starting);
            e.guest_up = false;
        });
        self.ensure_boot_files(record).await?;
        self.offer_all(record).await?;
        self.define(record).await?;
        if !self.host.boot_files.in_memory() && record.template.boot.kernel.is_some() {
            self.host.count_guest_file_reads(1 + u64::from(record.template.boot.initrd.is_some()));
        }
        Self::tolerate_unknown(self.call(Lane::Vm(vm), "start", move |h| h.start(vm)).await)
    }

    /// What a cold start begins with: nobody has paused it, and its disks are served as the configuration says now.
    async fn settle_record(&self, record: &VmRecord) -> Result<VmRecord, Failure> {
        let wanted = self.host.wanted_transport(record.template.vcpus);
        if record.paused_by.is_none() && record.disks.iter().all(|disk| disk.transport == wanted) {
            return Ok(record.clone());
        }
        let old = record.clone();
        self.blocking(move |host| {
            for disk in old.disks.iter().filter(|disk| disk.transport != wanted) {
                host.volumes.withdraw(disk)?;
            }
            let settle = |record: &mut VmRecord| {
                record.paused_by = None;
                record.disks.iter_mut().for_each(|disk| disk.transport = wanted);
            };
            host.change_record(old.vm, settle)?.ok_or_else(Failure::no_such_vm)
        })
        .await
    }

    pub(super) async fn define(&self, record: &VmRecord) -> Result<(), Failure> {
        let spec = self.host.domain(record)?;
        self.call(Lane::Vm(record.vm), "define", move |h| h.define(&spec)).await
    }

    async fn offer_all(&self, record: &VmRecord) -> Result<(), Failure> {
        for disk in &record.disks {
            self.host.volumes.offer(record.vm, disk)?;
        }
        Ok(())
    }

    pub(super) async fn power_off(&self) -> Result<Done, Failure> {
        let vm = self.vm()?;
        match self.call(Lane::Urgent, "power off", move |h| h.power_off(vm)).await {
            // it went off by itself in between
            Err(f) if f.code == ErrorCode::InvalidState || f.code == ErrorCode::NotFound => {}
            other => Self::tolerate_unknown(other)?,
        }
        self.wait_for(EnabledState::Disabled).await.map(|()| Done::default())
    }

    pub(super) async fn shutdown(&self) -> Result<Done, Failure> {
        let policy = crate::arguments::policy(&self.order)?;
        let vm = self.vm()?;
        let timeouts = self.host.config.timeouts;
        self.host.inventory.update(vm, |e| e.transition = Some(EnabledState::ShuttingDown));
        // of a short time half is left for the policy
        let reserve = Duration::from_millis(timeouts.policy_reserve_ms).min(self.left() / 2);
        let until_policy = || match policy {
            ShutdownPolicy::Fail => self.left(),
            ShutdownPolicy::PowerOff => self.left().saturating_sub(reserve),
        };
        let mut asked = "";
        if self.guest_answers(vm).await {
            match self.call(Lane::Vm(vm), "shutdown by agent", move |h| h.shutdown(vm, ShutdownMode::Agent)).await {
                Ok(()) => {
                    asked = "guest agent";
                    let patience = Duration::from_millis(timeouts.shutdown_agent_ms).min(until_policy() / 2);
                    if self.wait_until(EnabledState::Disabled, patience).await.is_ok() {
                        return Ok(Done { message: "by the guest agent".into(), ..Done::default() });
                    }
                }
                Err(f) if f.code == ErrorCode::InvalidState => {}
                Err(f) => {
                    tracing::info!(vm = %vm, reason = f.message, "shutdown by guest agent failed, trying the power button")
                }
            }
        }
        let by_agent = !asked.is_empty();
        loop {
            match self.call(Lane::Vm(vm), "shutdown by power button", move |h| h.shutdown(vm, ShutdownMode::Acpi)).await
            {
                Ok(()) => asked = if by_agent { "guest agent and power button" } else { "power button" },
                // it is off by now
                Err(f) if f.code == ErrorCode::InvalidState => {}
                Err(f) => tracing::info!(vm = %vm, reason = f.message, "the power button failed"),
            }
            if self.wait_until(EnabledState::Disabled, until_policy().min(PRESS_AGAIN)).await.is_ok() {
                return Ok(Done { message: format!("by the {asked}"), ..Done::default() });
            }
            if until_policy().is_zero() {
                break;
            }
        }
        match policy {
            ShutdownPolicy::Fail => {
                Err(Failure::timeout(format!("the guest did not shut down in time (asked by {asked})")))
            }
            ShutdownPolicy::PowerOff => {
                self.power_off().await?;
                Ok(Done { message: "powered off: the guest did not shut down in time".into(), ..Done::default() })
            }
        }
    }

    pub(super) async fn reset(&self) -> Result<Done, Failure> {
        let vm = self.vm()?;
        Self::tolerate_unknown(self.call(Lane::Vm(vm), "reset", move |h| h.reset(vm)).await)?;
        self.host.inventory.update(vm, |e| e.guest_up = false);
        if self.state().await?.0 == DomainState::Paused {
            self.host.mark_paused(vm, None).await;
            Self::tolerate_unknown(self.call(Lane::Vm(vm), "resume", move |h| h.resume(vm)).await)?;
        }
        self.wait_for(EnabledState::Enabled).await.map(|()| Done::default())
    }

    pub(super) async fn reboot(&self) -> Result<Done, Failure> {
        let vm = self.vm()?;
        let before = self.entry()?.reboots;
        let mut pressed: Option<tokio::time::Instant> = None;
        loop {
            let changed = self.host.inventory.changed.notified();
            if self.entry()?.reboots != before {
                break;
            }
            if pressed.is_none_or(|at| at.elapsed() >= PRESS_AGAIN) {
                pressed = Some(tokio::time::Instant::now());
                let mode = if self.guest_answers(vm).await { ShutdownMode::Agent } else { ShutdownMode::Acpi };
                Self::tolerate_unknown(self.call(Lane::Vm(vm), "reboot", move |h| h.reboot(vm, mode)).await)?;
            }
            if self.left().is_zero() {
                return Err(Failure::timeout("the guest did not reboot in time"));
            }
            // the event thread counts reboots; whichever comes first
            let _ = tokio::time::timeout(LOOK.min(self.left()), changed).await;
        }
        self.host.inventory.update(vm, |e| e.guest_up = false);
        self.wait_for(EnabledState::Enabled).await.map(|()| Done::default())
    }

    pub(super) async fn pause(&self) -> Result<Done, Failure> {
        let vm = self.vm()?;
        // first the mark: nobody is to resume it in between
        self.host.mark_paused(vm, Some(PausedBy::Command)).await;
        Self::tolerate_unknown(self.call(Lane::Vm(vm), "pause", move |h| h.pause(vm)).await)?;
        let paused = self.wait_for(EnabledState::Quiesce).await;
        if paused.is_err() {
            self.host.mark_paused(vm, None).await;
        }
        paused.map(|()| Done::default())
    }

    pub(super) async fn suspend(&self) -> Result<Done, Failure> {
        let vm = self.vm()?;
        Self::tolerate_unknown(self.call(Lane::Vm(vm), "suspend", move |h| h.suspend(vm)).await)?;
        self.wait_for(EnabledState::EnabledButOffline).await.map(|()| Done::default())
    }

    /// Asks the guest agent whether it is there, now.
    pub(super) async fn guest_answers(&self, vm: VmId) -> bool {
        self.guest_answers_within(vm, self.host.config.timeouts.guest_agent()).await
    }

    /// Asks it, and waits so long for the answer.
    pub(super) async fn guest_answers_within(&self, vm: VmId, timeout: Duration) -> bool {
        // the observer may be asking just now: it goes first
        let all = timeout + self.host.config.timeouts.guest_agent();
        let ping = self.host.machines.call_within(Lane::Host, "guest ping", all, move |h| h.guest_ping(vm, timeout));
        match ping.await {
            Ok(up) => up,
            Err(e) => {
                if e.kind() != HypervisorErrorKind::Unsupported {
                    tracing::debug!(vm = %vm, err = %e, "guest ping failed");
                }
                false
            }
        }
    }
}
