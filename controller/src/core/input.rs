//! What comes from the bus and from the clock.

use muster_api::{Alarm, Severity};
use muster_common::{Chain, CommandId, HostId, VmId};
use muster_fleet::{
    command::{Progress, Verdict},
    inventory::Change,
};
use muster_idl::v1;

use super::{Core, Effect, Outgoing, Seen};
use crate::db::{NewEvent, StoredHost};

/// One thing the core is told. `cell` says where it was heard.
#[derive(Debug)]
pub enum Input {
    Heartbeat(u16, v1::Heartbeat),
    PhysicalHost(u16, v1::PhysicalHost),
    HostMetrics(v1::HostMetrics),
    StoreState(v1::StoreState),
    StoreHealth(v1::StoreHealth),
    VirtualSystem(v1::VirtualSystem),
    VmGone(v1::VmKey),
    VmMetrics(v1::VmMetrics),
    VolumeMetrics(v1::VolumeMetrics),
    Verdict(v1::Verdict),
    Progress(v1::Progress),
    Event(v1::Event),
    /// The sample was handed to the bus.
    Published(CommandId, u16),
    PublishFailed(CommandId, u16),
}

/// The controller's heartbeat.
const STATE_EVERY_US: u64 = 1_000_000;
const PRUNE_EVERY_US: u64 = 3600 * 1_000_000;

impl Core {
    pub(super) fn take_in(&mut self, input: Input) {
        let now_us = self.now_us();
        match input {
            Input::Heartbeat(cell, beat) => {
                let changes = self.inventory.heartbeat(cell, &beat, now_us);
                self.note(changes);
            }
            Input::PhysicalHost(cell, host) => {
                let changes = self.inventory.describe(cell, host);
                self.note(changes);
            }
            Input::HostMetrics(metrics) => {
                self.usage.host(&metrics);
                self.inventory.host_metrics(metrics);
            }
            Input::StoreState(state) => self.inventory.store_state(state),
            Input::StoreHealth(health) => self.inventory.store_health(health),
            Input::VirtualSystem(system) => {
                self.settle_doubt(&system);
                let changes = self.inventory.virtual_system(system, now_us);
                self.note(changes);
            }
            Input::VmGone(key) => {
                if let (Ok(host), Ok(vm)) = (key.host.parse(), key.vm.parse()) {
                    self.inventory.vm_gone(host, vm);
                }
            }
            Input::VmMetrics(metrics) => {
                self.usage.vm(&metrics);
                self.inventory.vm_metrics(metrics);
            }
            Input::VolumeMetrics(metrics) => self.inventory.volume_metrics(metrics),
            Input::Verdict(verdict) => self.verdict(verdict, now_us),
            Input::Progress(progress) => self.progress(progress),
            Input::Event(event) => self.agent_event(event, now_us),
            Input::Published(id, cell) => {
                let actions = self.engine.published(id, cell);
                self.attempt(|core| core.apply(actions));
            }
            Input::PublishFailed(id, cell) => self.engine.publish_failed(id, cell, now_us),
        }
    }

    fn verdict(&mut self, said: v1::Verdict, now_us: u64) {
        let (Ok(id), Ok(host)) = (said.command.parse::<CommandId>(), said.host.parse::<HostId>()) else { return };
        let vm = if said.vm.is_empty() {
            None
        } else {
            match said.vm.parse::<VmId>() {
                Ok(vm) => Some(vm),
                Err(_) => return,
            }
        };
        let verdict = Verdict {
            outcome: said.outcome,
            code: said.code,
            message: said.message,
            enabled_state: said.enabled_state,
            guest_up: said.guest_up,
            result: said.result,
            received_at_us: said.received_at_us,
            started_at_us: said.started_at_us,
            ended_at_us: said.ended_at_us,
            arrived_at_us: now_us,
            late: false,
        };
        let actions = self.engine.verdict(id, host, vm, verdict);
        self.attempt(|core| core.apply(actions));
    }

    fn progress(&mut self, said: v1::Progress) {
        let (Ok(id), Ok(host)) = (said.command.parse::<CommandId>(), said.host.parse::<HostId>()) else { return };
        let vm = said.vm.parse::<VmId>().ok();
        let progress = Progress { phase: said.phase, done: said.done, total: said.total, sent_at_us: said.sent_at_us };
        let actions = self.engine.progress(id, host, vm, progress);
        self.attempt(|core| core.apply(actions));
    }

    fn agent_event(&mut self, said: v1::Event, now_us: u64) {
        if said.host.parse::<HostId>().is_err() {
            return;
        }
        let event = NewEvent {
            host: said.host,
            vm: said.vm,
            incarnation: said.incarnation,
            counter: said.counter,
            occurred_at_us: said.occurred_at_us,
            received_at_us: now_us,
            severity: Some(match said.severity {
                v1::Severity::Info => Severity::Info,
                v1::Severity::Warning => Severity::Warning,
                v1::Severity::Error => Severity::Error,
            }),
            kind: said.kind,
            message: said.message,
            from_state: said.from_state,
            to_state: said.to_state,
            command: said.command,
        };
        self.attempt(|core| {
            if core.db.add_event(&event)? {
                core.effect(Effect::EventsChanged);
            }
            Ok(())
        });
    }

    /// Remembers what changed in the fleet.
    fn note(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Appeared(host) => {
                    self.store_host(host);
                    let name = self.inventory.host_name(host);
                    self.log_event(Severity::Info, "host-appeared", format!("host {name} heard"), Some(host), None, "");
                }
                Change::Described(host) => self.store_host(host),
                Change::Online(host) => {
                    let name = self.inventory.host_name(host);
                    tracing::info!(host = %host, name, "host online");
                    self.alarms.remove(&format!("offline {host}"));
                    self.log_event(
                        Severity::Info,
                        "host-online",
                        format!("host {name} is online"),
                        Some(host),
                        None,
                        "",
                    );
                }
                Change::Offline { host, last_seen_us } => {
                    let name = self.inventory.host_name(host);
                    tracing::warn!(host = %host, name, "host offline");
                    let message = format!("no heartbeat from host {name}");
                    self.raise("host-offline", format!("offline {host}"), host, message.clone(), last_seen_us);
                    self.log_event(Severity::Warning, "host-offline", message, Some(host), None, "");
                }
                Change::Restarted { host, machine_too } => {
                    let name = self.inventory.host_name(host);
                    let what =
                        if machine_too { "the machine was started again" } else { "the agent was started again" };
                    let message = format!("host {name}: {what}");
                    self.log_event(Severity::Warning, "agent-restarted", message, Some(host), None, "");
                }
                Change::Duplicate { host, older, newer } => {
                    let name = self.inventory.host_name(host);
                    let message = format!(
                        "two live agents say they are host {name} (runs {} and {}): a state directory was copied",
                        older.short(),
                        newer.short()
                    );
                    tracing::error!(host = %host, name, "duplicate incarnation");
                    let now_us = self.now_us();
                    self.raise("duplicate-incarnation", format!("duplicate {host}"), host, message.clone(), now_us);
                    self.log_event(Severity::Error, "duplicate-incarnation", message, Some(host), None, "");
                }
                Change::DuplicateGone(host) => {
                    self.alarms.remove(&format!("duplicate {host}"));
                    let name = self.inventory.host_name(host);
                    let message = format!("host {name} has one agent again");
                    self.log_event(Severity::Info, "duplicate-incarnation-gone", message, Some(host), None, "");
                }
                // agents report these as events themselves
                Change::VmState { .. } => {}
            }
        }
    }

    fn raise(&mut self, kind: &str, key: String, host: HostId, message: String, since_us: u64) {
        self.alarms.insert(key, Alarm { kind: kind.to_string(), host: Some(host), message, since_us });
    }

    fn store_host(&mut self, id: HostId) {
        if let Some(entry) = self.inventory.host(id) {
            let host = StoredHost { id, cell: entry.cell, description: entry.description.clone() };
            self.attempt(|core| core.db.put_host(&host));
        }
    }

    /// Time has passed.
    pub(super) fn pass_time(&mut self) {
        let now_us = self.now_us();
        let changes = self.inventory.tick(now_us);
        self.note(changes);
        let actions = self.engine.tick(now_us, &Seen(&self.inventory));
        self.attempt(|core| core.apply(actions));
        self.flush_usage(now_us);
        if now_us.saturating_sub(self.last_state_us) >= STATE_EVERY_US {
            self.last_state_us = now_us;
            let state = v1::ControllerState {
                controller: self.identity.id.to_string(),
                incarnation: self.identity.incarnation.to_string(),
                name: self.identity.name.clone(),
                epoch: self.identity.epoch,
                group_epoch: self.groups.epoch(),
                stream_endpoint: self.identity.stream_endpoint.clone(),
                lab: self.config.lab,
                sent_at_us: now_us,
                awaiting: self.engine.awaiting().iter().map(ToString::to_string).collect(),
            };
            self.send_all(|| Outgoing::State(state.clone()));
        }
        if now_us.saturating_sub(self.last_prune_us) >= PRUNE_EVERY_US {
            self.last_prune_us = now_us;
            let keep = self.config.retention;
            let before = |days: u32| now_us.saturating_sub(u64::from(days) * 86_400 * 1_000_000);
            self.attempt(|core| {
                core.db.prune_logs(before(keep.events_days), before(keep.usage_days), before(1))?;
                core.db.prune_commands(before(keep.commands_days))
            });
        }
    }

    fn flush_usage(&mut self, now_us: u64) {
        for minute in self.usage.take_complete(now_us) {
            self.attempt(|core| core.db.add_usage(&minute));
        }
    }
}

/// One line of an error for the log.
pub(crate) fn line(error: &(dyn std::error::Error + 'static)) -> String {
    Chain(error).to_string()
}
