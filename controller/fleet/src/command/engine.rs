//! The state machine: events and time in, actions out.

use std::collections::BTreeMap;

use muster_common::{CommandId, ErrorCode, HostId, VmId};
use muster_idl::v1::Outcome;

use super::{Action, Ignored, Liveness, Order, Progress, Record, Settings, Verdict};

/// All commands that can still change.
#[derive(Clone, Debug, Default)]
pub struct Engine {
    settings: Settings,
    records: BTreeMap<CommandId, Running>,
}

#[derive(Clone, Debug)]
struct Running {
    record: Record,
    /// It ends no later than this.
    deadline_us: u64,
    /// Cells to publish in again, and when.
    retries: BTreeMap<u16, u64>,
}

/// The heartbeat that carries the awaited ids is one sample: so many fit easily.
const AWAITING_LIMIT: usize = 256;

impl Engine {
    pub fn new(settings: Settings) -> Self {
        Self { settings, records: BTreeMap::new() }
    }

    /// A command that can still change; one that cannot is in the database only.
    pub fn get(&self, id: CommandId) -> Option<&Record> {
        self.records.get(&id).map(|running| &running.record)
    }
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values().map(|running| &running.record)
    }
    pub fn open(&self) -> usize {
        self.records().filter(|record| record.is_open()).count()
    }

    /// Commands some members of which have not said anything themselves: newest first.
    pub fn awaiting(&self) -> Vec<CommandId> {
        let lacking = self.records.iter().rev().filter(|(_, running)| running.record.awaits_words());
        lacking.map(|(id, _)| *id).take(AWAITING_LIMIT).collect()
    }

    /// Begins a command. An id that is known already changes nothing.
    pub fn begin(&mut self, order: Order) -> Vec<Action> {
        let id = order.id;
        if self.records.contains_key(&id) {
            return Vec::new();
        }
        let deadline_us = order.not_after_us.saturating_add(self.settings.grace_us);
        let record = Record::new(order);
        let cells = record.cells();
        self.records.insert(id, Running { record, deadline_us, retries: BTreeMap::new() });
        let mut actions = vec![Action::Record(id)];
        actions.extend(cells.into_iter().map(|cell| Action::Publish { command: id, cell }));
        actions
    }

    /// Takes over, after a restart, what the database has of a command that has not ended or has not settled.
    pub fn restore(&mut self, record: Record, now_us: u64) -> Vec<Action> {
        let id = record.order.id;
        let order = &record.order;
        if !record.is_open() && !self.is_settling(&record, now_us) {
            return Vec::new();
        }
        let deadline_us = order
            .not_after_us
            .saturating_add(self.settings.grace_us)
            .max(now_us.saturating_add(self.settings.restart_grace_us));
        let may_begin = record.is_open() && now_us < order.not_after_us;
        let unpublished = record.cells().into_iter().filter(|cell| may_begin && !record.published.contains(cell));
        let actions = unpublished.map(|cell| Action::Publish { command: id, cell }).collect();
        self.records.insert(id, Running { record, deadline_us, retries: BTreeMap::new() });
        actions
    }

    fn is_settling(&self, record: &Record, now_us: u64) -> bool {
        record.awaits_words() && now_us < record.ended_at_us.saturating_add(self.settings.settle_us)
    }

    /// The sample of a cell was handed to the bus.
    pub fn published(&mut self, id: CommandId, cell: u16) -> Vec<Action> {
        let Some(running) = self.records.get_mut(&id) else { return Vec::new() };
        running.retries.remove(&cell);
        if running.record.published.insert(cell) {
            running.record.version += 1;
            return vec![Action::RecordPublished { command: id, cell }];
        }
        Vec::new()
    }

    /// It could not be handed over. It is tried again while the command may still be begun.
    pub fn publish_failed(&mut self, id: CommandId, cell: u16, now_us: u64) {
        if let Some(running) = self.records.get_mut(&id) {
            running.retries.insert(cell, now_us.saturating_add(self.settings.publish_retry_us));
        }
    }

    /// A member says something.
    pub fn verdict(&mut self, id: CommandId, host: HostId, vm: Option<VmId>, mut said: Verdict) -> Vec<Action> {
        // a command the engine no longer holds has all its words, or waited for them long enough
        let Some(running) = self.records.get_mut(&id) else { return Vec::new() };
        let record = &mut running.record;
        let ignored = |why| vec![Action::Ignored { command: id, host, vm, why }];
        let Some(member) = record.order.members.iter().position(|m| m.host == host && m.vm == vm) else {
            return ignored(Ignored::NotAMember);
        };
        if said.is_provisional() {
            return ignored(Ignored::NotTheirWord);
        }
        said.late = false;
        match &record.verdicts[member] {
            Some(before) if !before.is_provisional() => {
                let why = if before.says_the_same(&said) { Ignored::Repeated } else { Ignored::Contradiction };
                return ignored(why);
            }
            Some(_) => said.late = true,
            None => {}
        }
        let now_us = said.arrived_at_us;
        record.verdicts[member] = Some(said);
        record.progress[member] = None;
        record.version += 1;
        let mut actions = vec![Action::RecordVerdict { command: id, member }];
        actions.extend(end_if_answered(record, now_us));
        actions
    }

    /// A member has come further. Old news and news after the verdict are dropped.
    pub fn progress(&mut self, id: CommandId, host: HostId, vm: Option<VmId>, progress: Progress) -> Vec<Action> {
        let Some(running) = self.records.get_mut(&id) else { return Vec::new() };
        let record = &mut running.record;
        let Some(member) = record.order.members.iter().position(|m| m.host == host && m.vm == vm) else {
            return Vec::new();
        };
        let said = record.verdicts[member].as_ref().is_some_and(|verdict| !verdict.is_provisional());
        let old = record.progress[member].as_ref().is_some_and(|before| before.sent_at_us >= progress.sent_at_us);
        if said || old {
            return Vec::new();
        }
        record.progress[member] = Some(progress);
        vec![Action::ShowProgress { command: id, member }]
    }

    /// Time has passed.
    pub fn tick(&mut self, now_us: u64, hosts: &dyn Liveness) -> Vec<Action> {
        let settings = self.settings;
        let mut actions = Vec::new();
        let mut settled = Vec::new();
        for (id, running) in &mut self.records {
            let record = &mut running.record;
            if !record.is_open() {
                let over = now_us >= record.ended_at_us.saturating_add(settings.settle_us);
                if over || !record.awaits_words() {
                    settled.push(*id);
                }
                continue;
            }
            if now_us < record.order.not_after_us {
                let due: Vec<u16> = running.retries.iter().filter(|(_, at)| **at <= now_us).map(|(c, _)| *c).collect();
                for cell in due {
                    running.retries.remove(&cell);
                    actions.push(Action::Publish { command: *id, cell });
                }
            }
            let over = now_us >= running.deadline_us;
            for member in 0..record.verdicts.len() {
                if record.verdicts[member].is_some() {
                    continue;
                }
                let host = record.order.members[member].host;
                let heard = hosts.last_seen_us(host).max(record.order.issued_at_us);
                let lost = !hosts.is_online(host) && now_us.saturating_sub(heard) > settings.lost_after_us;
                if over || lost {
                    record.verdicts[member] = Some(in_its_stead(record, member, now_us, hosts));
                    record.version += 1;
                    actions.push(Action::RecordVerdict { command: *id, member });
                }
            }
            actions.extend(end_if_answered(record, now_us));
        }
        for id in settled {
            self.records.remove(&id);
            actions.push(Action::Forget(id));
        }
        actions
    }
}

fn end_if_answered(record: &mut Record, now_us: u64) -> Option<Action> {
    if record.is_open() && record.verdicts.iter().all(Option::is_some) {
        // 0 means open
        record.ended_at_us = now_us.max(1);
        record.version += 1;
        return Some(Action::RecordEnd(record.order.id));
    }
    None
}

/// The controller's word on a silent member.
fn in_its_stead(record: &Record, member: usize, now_us: u64, hosts: &dyn Liveness) -> Verdict {
    let member = &record.order.members[member];
    let (outcome, code, message) = if !hosts.is_online(member.host) {
        let message = match hosts.last_seen_us(member.host) {
            0 => format!("host {} was not heard since the controller started", member.host_name),
            last => {
                let seconds = now_us.saturating_sub(last) / 1_000_000;
                format!("no heartbeat from host {} for {seconds} s", member.host_name)
            }
        };
        (Outcome::Offline, ErrorCode::HostOffline, message)
    } else if !record.published.contains(&member.cell) {
        let message = format!("the command could not be published in cell {}", member.cell);
        (Outcome::Unknown, ErrorCode::Unavailable, message)
    } else {
        let message = format!("host {} is there and has not answered", member.host_name);
        (Outcome::Unknown, ErrorCode::Timeout, message)
    };
    Verdict {
        outcome,
        code: code.as_str().to_string(),
        message,
        enabled_state: 0,
        guest_up: false,
        result: String::new(),
        received_at_us: 0,
        started_at_us: 0,
        ended_at_us: 0,
        arrived_at_us: now_us,
        late: false,
    }
}
