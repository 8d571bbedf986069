//! Carries orders out: reads the facts before, acts, and says "done" only when the state read back says so.
//!
//! | verb | what is done | done when |
//! |---|---|---|
//! | power-on, resume | off: define, offer the exports, start; paused: resume, again until it stays; saved: start | running |
//! | power-off | destroy, past a call that hangs | off |
//! | shutdown | guest agent (if up), after `shutdown_agent_ms` or without it the power button; `policy_reserve_ms` before the deadline the command's policy: `fail` or `power-off` | off |
//! | reset, reboot | reset button; agent, else power button | running, for reboot after the hypervisor told of one |
//! | pause, suspend | pause; managed save | paused; saved |
//! | create | image (pulled if missing) and boot files, volumes, record, definition | domain defined, exports offered |
//! | delete | undefine, exports and volumes away, record away | hypervisor does not know it |
//! | reset-session | power off if it was up, system disk as the image (new generation), data disk kept, start if it was up | as before, with the new generation |
//! | snapshot, backup | freeze if the guest agent is up, snapshot all volumes, thaw; backup: copy from the snapshots | record published |
//! | restore | from a backup, or a snapshot (argument `name`), into new generations | volumes there, exports offered |
//! | destroy-volumes | exports and volumes away | volumes gone |
//! | exec, file-write | through the guest agent | it said so |
//! | resize | record, volume; then a guest on vhost-user disks is told | the volume has the size and the quota |
//! | image-pull, image-drop, ping | | resident; gone; |
//! | drain, undrain | mark | a heartbeat said so |
//!
//! A lost data disk at reset-session: restored from the newest backup that has it; without one the verb is refused,
//! unless its argument `data` is `blank`.
//!
//! Each order is one future. Its deadline is the command's `not_after`; blocking work runs on the runtime's blocking
//! threads, libvirt calls on the pool's. Dropping the future ends the waiting, not a call that runs, nor what must not be
//! left half done: that runs in [`crate::aftercare`].

mod create;
mod failure;
mod guest;
mod host_verbs;
mod power;
mod protect;
mod resize;
mod session;

use std::{sync::Arc, time::Duration};

use muster_cim::{EnabledState, requested_state};
use muster_common::{Chain, VmId};
use muster_idl::v1::{TargetKind, Verb};

pub use failure::Failure;

use crate::{
    arguments,
    dispatcher::{Ending, Order, judge::Facts},
    host::Host,
    inventory::{Entry, is_lost},
    ledger::CommandEntry,
    machines::enabled_state,
    records::PausedBy,
};

/// What a verb yields when it is done.
#[derive(Debug, Default)]
struct Done {
    message: String,
    result: String,
}

/// One order at work.
#[derive(Clone)]
struct Work {
    host: Arc<Host>,
    order: Order,
}

/// What is so before anything is begun.
pub async fn facts(host: &Arc<Host>, order: &Order) -> Facts {
    let digest = order.argument(muster_idl::arguments::name::DIGEST).unwrap_or_default();
    let mut facts = read(host, order.target_kind, order.vm, order.verb, digest).await;
    if let (Verb::Pause, Some(vm), Some(EnabledState::Quiesce)) = (order.verb, order.vm, facts.state) {
        // nothing is left to do, but from now on it is paused by a command: nobody resumes it by himself
        host.mark_paused(vm, Some(PausedBy::Command)).await;
    }
    if order.verb == Verb::Create && facts.state.is_some() {
        let wanted = arguments::template(order).ok().map(|t| t.spec);
        let name = arguments::vm_name(order).ok();
        facts.as_wanted = order.vm.and_then(|vm| host.inventory.get(vm)).is_some_and(|entry| {
            wanted.as_ref() == Some(&entry.record.template) && name.as_ref() == Some(&entry.record.name)
        });
    }
    facts
}

/// What is so after a crash, for a command that had begun.
pub async fn read_back(host: &Host, entry: &CommandEntry, member: &str) -> Facts {
    let vm = member.parse().ok();
    let mut facts = read(host, entry.target_kind, vm, entry.verb, &entry.subject).await;
    if entry.verb == Verb::Backup
        && let Ok(backups) = host.backups.clone()
    {
        let label = entry.id.to_string();
        let found = tokio::task::spawn_blocking(move || {
            backups.list().is_ok_and(|l| {
                l.records.iter().any(|r| r.label == label && vm.is_none_or(|vm| r.vms.iter().any(|v| v.id == vm)))
            })
        });
        facts.backed_up = found.await.unwrap_or(false);
    }
    facts
}

async fn read(host: &Host, kind: TargetKind, vm: Option<VmId>, verb: Verb, digest: &str) -> Facts {
    let mut facts = Facts { draining: host.draining.is_set(), ..Facts::blank() };
    if kind == TargetKind::Host {
        let resident = digest.parse().is_ok_and(|d| host.volumes.store.image(&d).is_some());
        facts.as_wanted = match verb {
            Verb::ImagePull => resident,
            Verb::ImageDrop => !resident,
            _ => false,
        };
        return facts;
    }
    facts.hypervisor_missing = host.machines.missing();
    let Some(entry) = vm.and_then(|vm| host.inventory.get(vm)) else { return facts };
    facts.lost = is_lost(&entry.record, &host.volumes.store);
    facts.guest_up = entry.guest_up;
    match host.machines.status(entry.record.vm).await {
        Ok(Some(status)) => {
            host.inventory.observe(host.now_us(), &status);
            facts.state = Some(enabled_state(status.state));
        }
        // a record without a domain: defined again at power-on
        Ok(None) => facts.state = Some(EnabledState::Disabled),
        Err(e) => {
            facts.state = Some(EnabledState::Unknown);
            facts.unreadable = Some(Chain(&e).to_string());
        }
    }
    facts
}

/// Carries an order out.
pub async fn run(host: Arc<Host>, order: Order, expected: u16, wait_only: bool) -> Ending {
    let work = Work { host, order };
    let verb = work.order.verb;
    if let (Some(vm), Some(requested)) = (work.order.vm, requested_state(verb)) {
        work.host.inventory.update(vm, |e| e.requested_state = requested.cim());
    }
    let result = if wait_only {
        work.wait_for(EnabledState::from_cim(expected).unwrap_or(EnabledState::Unknown)).await.map(|()| Done::default())
    } else {
        work.act().await
    };
    if let Some(vm) = work.order.vm {
        work.host.inventory.update(vm, |e| e.transition = None);
        work.host.inventory.look.notify_one();
    }
    let (state, guest_up) = work.read_end().await;
    let ending = match result {
        Ok(done) => Ending { message: done.message, result: done.result, ..Ending::done(state) },
        Err(failure) => {
            tracing::warn!(
                cmd = %work.order.command, vm = work.order.member, verb = %verb, code = %failure.code,
                reason = failure.message, "a command was not done"
            );
            Ending::of(failure.outcome, failure.code, failure.message, state)
        }
    };
    Ending { guest_up, ..ending }
}

impl Work {
    async fn act(&self) -> Result<Done, Failure> {
        match (self.order.verb, self.order.target_kind) {
            (Verb::Ping, _) => Ok(Done::default()),
            (Verb::Backup, TargetKind::Host) => self.backup_host().await,
            (Verb::ImagePull, _) => self.image_pull().await,
            (Verb::ImageDrop, _) => self.image_drop().await,
            (Verb::Drain, _) => self.set_draining(true).await,
            (Verb::Undrain, _) => self.set_draining(false).await,
            (Verb::Create, _) => self.create().await,
            (Verb::Delete, _) => self.delete().await,
            (Verb::PowerOn | Verb::Resume, _) => self.power_on().await,
            (Verb::PowerOff, _) => self.power_off().await,
            (Verb::Shutdown, _) => self.shutdown().await,
            (Verb::Reset, _) => self.reset().await,
            (Verb::Reboot, _) => self.reboot().await,
            (Verb::Pause, _) => self.pause().await,
            (Verb::Suspend, _) => self.suspend().await,
            (Verb::Snapshot, _) => self.snapshot().await,
            (Verb::Backup, TargetKind::Vm) => self.backup().await,
            (Verb::Restore, _) => self.restore().await,
            (Verb::ResetSession, _) => self.reset_session().await,
            (Verb::DestroyVolumes, _) => self.destroy_volumes().await,
            (Verb::Exec, _) => self.exec().await,
            (Verb::FileWrite, _) => self.file_write().await,
            (Verb::Resize, _) => self.resize().await,
        }
    }

    /// The VM of the order.
    fn entry(&self) -> Result<Entry, Failure> {
        self.order.vm.and_then(|vm| self.host.inventory.get(vm)).ok_or_else(Failure::no_such_vm)
    }

    /// What is left until the deadline.
    fn left(&self) -> Duration {
        Duration::from_micros(self.order.deadline_us.saturating_sub(self.host.now_us()))
    }

    /// For a hypervisor call: no longer than usual, and not past the deadline.
    fn call_time(&self) -> Duration {
        self.left().min(self.host.config.timeouts.hypervisor_call()).max(Duration::from_millis(100))
    }

    /// The state as read back, for the verdict.
    async fn read_end(&self) -> (u16, bool) {
        let Some(entry) = self.order.vm.and_then(|vm| self.host.inventory.get(vm)) else {
            return (EnabledState::NotApplicable.cim(), false);
        };
        match self.host.machines.status(entry.record.vm).await {
            Ok(Some(status)) => {
                self.host.inventory.observe(self.host.now_us(), &status);
                (enabled_state(status.state).cim(), entry.guest_up && status.state.is_active())
            }
            Ok(None) => (EnabledState::Disabled.cim(), false),
            Err(_) => (EnabledState::Unknown.cim(), false),
        }
    }

    /// Runs blocking work off the runtime's threads. A panic in it is a failure of the order, not of the agent.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Host) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let host = Arc::clone(&self.host);
        tokio::task::spawn_blocking(move || work(&host)).await.unwrap_or_else(|_| Err(Failure::panicked()))
    }
}
