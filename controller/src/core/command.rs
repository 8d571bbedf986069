//! Commands: who is meant is frozen here, the engine decides, and what it decides is written and done.

use std::collections::{BTreeMap, BTreeSet};

use muster_api::{CreateCommand, Severity};
use muster_common::{CommandId, ErrorCode, HostId, VmId};
use muster_fleet::{
    arguments,
    command::{Action, Ignored, Member, Order, Record},
    target,
};
use muster_idl::v1::{self, TargetKind, Verb};

use super::{Core, Effect, Outgoing, input::line};
use crate::{db::DbError, refusal::Refusal};

/// A command with its members found.
#[derive(Debug)]
pub struct NewCommand {
    pub verb: Verb,
    pub kind: TargetKind,
    /// As the operator named it.
    pub target: String,
    /// Host, VM, and the name to be shown.
    pub members: Vec<(HostId, Option<VmId>, String)>,
    pub arguments: BTreeMap<String, String>,
    pub timeout_seconds: Option<u32>,
    pub issuer: String,
    pub retry_of: Option<CommandId>,
}

impl Core {
    /// Gives an order to those whom the operator named.
    pub(crate) fn command(&mut self, create: CreateCommand, issuer: String) -> Result<CommandId, Refusal> {
        let verb = verb_of(create.verb);
        if verb == Verb::Create {
            return Err(Refusal::invalid("VMs are created by POST /v1/vms, which finds hosts and names for them"));
        }
        let kind = match create.target_kind {
            None => arguments::default_kind(verb),
            Some(muster_api::TargetKind::Host) => TargetKind::Host,
            Some(muster_api::TargetKind::Vm) => TargetKind::Vm,
        };
        if !arguments::applies(verb, kind) {
            let other = if kind == TargetKind::Host { "VMs" } else { "hosts" };
            return Err(Refusal::invalid(format!("{verb} is a verb for {other}")));
        }
        let mut given = BTreeMap::new();
        for (name, value) in create.arguments {
            let text = match value {
                serde_json::Value::String(text) => text,
                other => other.to_string(),
            };
            given.insert(name, text);
        }
        let (members, target) = match create.retry_of {
            Some(before) if create.target.is_empty() => {
                (self.those_without_success(before, verb, kind)?, String::new())
            }
            _ => (self.members(&create.target, kind)?, create.target.join(",")),
        };
        let command = NewCommand {
            verb,
            kind,
            target,
            members,
            arguments: given,
            timeout_seconds: create.timeout_seconds,
            issuer,
            retry_of: create.retry_of,
        };
        if verb == Verb::Delete {
            return self.delete_vms(command);
        }
        self.begin(command)
    }

    fn members(&self, texts: &[String], kind: TargetKind) -> Result<Vec<(HostId, Option<VmId>, String)>, Refusal> {
        let names = self.names();
        Ok(match kind {
            TargetKind::Host => target::hosts(texts, &names, &self.groups)?
                .into_iter()
                .map(|host| (host, None, names.hosts.get(&host).cloned().unwrap_or_default()))
                .collect(),
            TargetKind::Vm => target::vms(texts, &names, &self.groups)?
                .into_iter()
                .filter_map(|vm| names.vms.get(&vm).map(|(name, host)| (*host, Some(vm), name.clone())))
                .collect(),
        })
    }

    /// The members of an earlier command that did not come to be as it wanted.
    fn those_without_success(
        &self,
        before: CommandId,
        verb: Verb,
        kind: TargetKind,
    ) -> Result<Vec<(HostId, Option<VmId>, String)>, Refusal> {
        let record = self.record(before)?;
        if record.is_open() {
            return Err(Refusal::new(ErrorCode::InvalidState, format!("command {before} has not ended yet")));
        }
        if record.order.verb != verb || record.order.target_kind != kind {
            return Err(Refusal::invalid(format!("command {before} is not the same verb for the same kind of target")));
        }
        let wanting = record.order.members.iter().zip(&record.verdicts).filter(|(_, verdict)| {
            !verdict.as_ref().is_some_and(|v| matches!(v.outcome, v1::Outcome::Done | v1::Outcome::Already))
        });
        let members: Vec<_> = wanting.map(|(m, _)| (m.host, m.vm, m.name.clone())).collect();
        if members.is_empty() {
            return Err(Refusal::invalid(format!("all members of command {before} are as it wanted")));
        }
        Ok(members)
    }

    /// Freezes the members and begins: durable before it is published.
    pub(crate) fn begin(&mut self, new: NewCommand) -> Result<CommandId, Refusal> {
        arguments::check(new.verb, &new.arguments)?;
        let timeout = new.timeout_seconds.unwrap_or_else(|| arguments::default_timeout_seconds(new.verb));
        if timeout == 0 || timeout > arguments::TIMEOUT_LIMIT_SECONDS {
            let limit = arguments::TIMEOUT_LIMIT_SECONDS;
            return Err(Refusal::invalid(format!("a timeout of {timeout} s: it must be 1 to {limit}")));
        }
        let now_us = self.now_us();
        let id = CommandId::now();
        let members = new.members.into_iter().map(|(host, vm, name)| {
            let entry = self.inventory.host(host);
            let incarnation = entry.and_then(|entry| entry.incarnation());
            Member {
                host,
                host_name: self.inventory.host_name(host),
                cell: entry.map_or(0, |entry| entry.cell),
                // anybody may answer a ping; all else is meant for the agent we know
                incarnation: match incarnation {
                    Some(incarnation) if new.verb != Verb::Ping => incarnation.to_string(),
                    _ => String::new(),
                },
                vm,
                name,
            }
        });
        let order = Order {
            id,
            verb: new.verb,
            target_kind: new.kind,
            target: new.target,
            issuer: new.issuer,
            group_epoch: self.groups.epoch(),
            issued_at_us: now_us,
            not_after_us: now_us.saturating_add(u64::from(timeout) * 1_000_000),
            arguments: new.arguments,
            retry_of: new.retry_of,
            members: members.collect(),
        };
        tracing::info!(cmd = %id, verb = %order.verb, members = order.members.len(), "command begun");
        self.touched = true;
        let actions = self.engine.begin(order);
        self.apply(actions)?;
        Ok(id)
    }

    /// The command, with all that is known of it.
    pub(crate) fn record(&self, id: CommandId) -> Result<Record, Refusal> {
        if let Some(record) = self.engine.get(id) {
            return Ok(record.clone());
        }
        self.db.command(id)?.ok_or_else(|| Refusal::new(ErrorCode::NotFound, format!("no command {id}")))
    }

    /// Writes and does what the engine decided.
    pub(super) fn apply(&mut self, actions: Vec<Action>) -> Result<(), DbError> {
        let mut changed = false;
        for action in actions {
            match action {
                Action::Record(id) => {
                    if let Some(record) = self.engine.get(id) {
                        self.db.put_command(&record.order)?;
                    }
                    changed = true;
                }
                Action::Publish { command, cell } => {
                    if let Some(sample) = self.sample(command, cell) {
                        let hosts: BTreeSet<&str> = sample.members.iter().map(|m| m.host.as_str()).collect();
                        let online = |host: &&str| host.parse().is_ok_and(|id| self.inventory.is_online(id));
                        let hosts = hosts.into_iter().filter(online).count();
                        let outgoing = Outgoing::Command { id: command, sample: Box::new(sample), hosts };
                        self.effect(Effect::Send { cell, outgoing });
                    }
                }
                Action::RecordPublished { command, .. } => {
                    if let Some(record) = self.engine.get(command) {
                        self.db.put_published(command, &record.published)?;
                    }
                    changed = true;
                }
                Action::RecordVerdict { command, member } => {
                    self.stored_verdict(command, member)?;
                    changed = true;
                }
                Action::RecordEnd(id) => {
                    self.ended(id)?;
                    changed = true;
                }
                Action::ShowProgress { .. } => changed = true,
                Action::Forget(_) => {}
                Action::Ignored { why: Ignored::Repeated, .. } => {}
                Action::Ignored { command, host, vm, why } => {
                    tracing::warn!(cmd = %command, host = %host, ?vm, ?why, "verdict ignored");
                }
            }
        }
        if changed {
            self.effect(Effect::CommandsChanged);
        }
        Ok(())
    }

    /// What goes out in one cell: the members that are there.
    fn sample(&self, id: CommandId, cell: u16) -> Option<v1::GroupCommand> {
        let order = &self.engine.get(id)?.order;
        let members = order.members.iter().filter(|member| member.cell == cell);
        Some(v1::GroupCommand {
            id: id.to_string(),
            controller: self.identity.id.to_string(),
            issuer: order.issuer.clone(),
            // after a restart too the epoch of now: agents refuse a lower one than they have seen
            controller_epoch: self.identity.epoch,
            group_epoch: order.group_epoch,
            issued_at_us: order.issued_at_us,
            not_after_us: order.not_after_us,
            target_kind: order.target_kind,
            target: order.target.clone(),
            members: members
                .map(|member| v1::Member {
                    host: member.host.to_string(),
                    incarnation: member.incarnation.clone(),
                    vm: member.vm.map(|vm| vm.to_string()).unwrap_or_default(),
                    name: member.name.clone(),
                })
                .collect(),
            verb: order.verb,
            arguments: order
                .arguments
                .iter()
                .map(|(name, value)| v1::Argument { name: name.clone(), value: value.clone() })
                .collect(),
            wave: 0,
            plan_digest: String::new(),
            retry_of: order.retry_of.map(|id| id.to_string()).unwrap_or_default(),
            key_id: String::new(),
            signature: Vec::new(),
            extension: Vec::new(),
        })
    }

    /// Stores a verdict with what follows from it.
    fn stored_verdict(&mut self, id: CommandId, member: usize) -> Result<(), DbError> {
        let Some(record) = self.engine.get(id) else { return Ok(()) };
        let Some(verdict) = record.verdicts[member].clone() else { return Ok(()) };
        let (verb, meant) = (record.order.verb, record.order.members[member].clone());
        self.db.put_verdict(id, member, &verdict)?;
        match (verb, meant.vm) {
            (Verb::Create | Verb::Delete, Some(vm)) => self.settle_vm(id, verb, vm, &verdict)?,
            (Verb::Resize, Some(vm)) if verdict.outcome == v1::Outcome::Done => {
                let arguments = record.order.arguments.clone();
                self.settle_resize(vm, &arguments)?;
            }
            (Verb::Backup, vm) if verdict.outcome == v1::Outcome::Done => {
                self.store_backups(id, meant.host, vm, &verdict.result)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn ended(&mut self, id: CommandId) -> Result<(), DbError> {
        let Some(record) = self.engine.get(id) else { return Ok(()) };
        self.db.put_end(id, record.ended_at_us)?;
        let total = record.verdicts.len();
        let good = record
            .verdicts
            .iter()
            .flatten()
            .filter(|v| matches!(v.outcome, v1::Outcome::Done | v1::Outcome::Already))
            .count();
        let hosts: BTreeSet<HostId> = record.order.members.iter().map(|member| member.host).collect();
        let verb = record.order.verb;
        let severity = if good == total { Severity::Info } else { Severity::Warning };
        tracing::info!(cmd = %id, %verb, good, total, "command ended");
        let message = format!("{verb} ended: {good} of {total} members on {} hosts as wanted", hosts.len());
        self.log_event(severity, "command-ended", message, None, None, &id.to_string());
        Ok(())
    }

    fn store_backups(&mut self, id: CommandId, host: HostId, vm: Option<VmId>, result: &str) -> Result<(), DbError> {
        use muster_idl::arguments::BackupResult;
        // one for a VM, a list for a host
        let parsed = match vm {
            Some(_) => serde_json::from_str::<BackupResult>(result).map(|one| vec![one]),
            None => serde_json::from_str::<Vec<BackupResult>>(result),
        };
        match parsed {
            Ok(backups) => {
                for backup in &backups {
                    self.db.put_backup(host, id, backup)?;
                }
            }
            Err(error) => {
                tracing::warn!(cmd = %id, host = %host, err = line(&error), "backup result cannot be read");
            }
        }
        Ok(())
    }
}

/// The wire's word for REST's.
pub(crate) fn verb_of(verb: muster_api::Verb) -> Verb {
    // both enumerations have the same words; a test holds them together
    Verb::from_text(verb.as_str()).unwrap_or(Verb::Ping)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rest_and_wire_have_the_same_words() {
        let words = |all: Vec<&'static str>| all;
        assert_eq!(
            words(muster_api::Verb::ALL.iter().map(|v| v.as_str()).collect()),
            words(Verb::ALL.iter().map(|v| v.as_str()).collect())
        );
        assert_eq!(
            words(muster_api::Outcome::ALL.iter().map(|v| v.as_str()).collect()),
            words(v1::Outcome::ALL.iter().map(|v| v.as_str()).collect())
        );
        for verb in muster_api::Verb::ALL {
            assert_eq!(verb_of(*verb).as_str(), verb.as_str());
        }
    }
}
