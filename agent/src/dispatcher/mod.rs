//! Decides what a command means here: pure, `(now, event)` in, [`Action`]s out. The driver in `supervise` carries them
//! out and feeds what comes of them back as events.
//!
//! ```text
//! Command -> record -> wait in its lane -> Inspect -> (facts) -> refused | already | begin -> Act -> (ending) -> Say
//!              |            |                                                          |
//!              |            '-- not_after passes: expired                              '-- deadline + grace: indeterminate
//!              '-- not for us / past its time / stale incarnation / old epoch: said at once, nothing begun
//! ```
//!
//! Main types: [`Dispatcher`], [`Event`], [`Action`], [`Order`], [`Ending`], [`judge::Facts`].
//!
//! Invariants (a property test holds them against random histories):
//! 1. Every member of ours in a command gets exactly one verdict; said again, it is the same, but for a result no longer
//!    kept (a day, and 64 MiB of all).
//! 2. [`Action::Record`] of a command comes before anything is done about it, of a begin before its [`Action::Act`], of a
//!    verdict before its [`Action::Say`].
//! 3. For one VM one task is at work at a time; only a power-off overtakes what waits for the guest.
//! 4. At most `parallel` tasks are at work, quick ones (power-off, drain, ping) not counted.
//! 5. Nothing is begun after its `not_after`.
//! 6. After a crash nothing is begun a second time: what had begun is read back ([`Action::ReadBack`]).
//!
//! Lab mode: commands need no signature, whoever sent them. (The agent does not start otherwise.)
//!
//! No I/O, no clock, no locks.

pub mod judge;
mod plan;
pub mod recovery;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, VecDeque};

use muster_common::{CommandId, ErrorCode, HostId, Incarnation, VmId};
use muster_idl::{
    arguments::name,
    v1::{Argument, GroupCommand, Outcome, TargetKind, Verb, Verdict},
};

use crate::ledger::{CommandEntry, Entry};
use judge::Facts;

/// One member's share of a command, numbered in the order of arrival.
pub type TaskId = u64;

/// How long after its deadline a task that does not end is given up: within the controller's grace of 3 s. The executor
/// ends by the deadline itself; this is for one that hangs.
pub const OVERRUN_US: u64 = 1_500_000;

/// Longer texts are cut: a verdict has to fit into a ledger record and a sample.
const MESSAGE_LIMIT: usize = 4 << 10;
const RESULT_LIMIT: usize = 256 << 10;

/// Results of all verdicts kept to be said again, in memory and so in the ledger; beyond it the oldest go first. Far more
/// than a controller that is away for minutes lacks.
const RESULTS_LIMIT: usize = 64 << 20;

/// What is to be done for one member.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    pub task: TaskId,
    pub command: CommandId,
    pub controller: String,
    pub verb: Verb,
    pub target_kind: TargetKind,
    /// As received: a VM id, or empty for the host.
    pub member: String,
    /// `None` for the host.
    pub vm: Option<VmId>,
    /// The VM's name to be, for create.
    pub name: String,
    pub arguments: Vec<Argument>,
    /// Not begun later, and ended by then.
    pub deadline_us: u64,
    pub received_us: u64,
}

impl Order {
    /// The value of an argument.
    pub fn argument(&self, name: &str) -> Option<&str> {
        self.arguments.iter().find(|a| a.name == name).map(|a| a.value.as_str())
    }
}

/// What a task came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Ending {
    pub outcome: Outcome,
    pub code: ErrorCode,
    pub message: String,
    /// JSON, or empty.
    pub result: String,
    /// EnabledState as read back; 5 (not applicable) when there is nothing to read.
    pub enabled_state: u16,
    pub guest_up: bool,
}

impl Ending {
    pub fn done(enabled_state: u16) -> Self {
        Self {
            outcome: Outcome::Done,
            code: ErrorCode::Ok,
            message: String::new(),
            result: String::new(),
            enabled_state,
            guest_up: false,
        }
    }

    pub fn of(outcome: Outcome, code: ErrorCode, message: impl Into<String>, enabled_state: u16) -> Self {
        Self { outcome, code, message: message.into(), ..Self::done(enabled_state) }
    }
}

/// What happens.
#[derive(Clone, Debug)]
pub enum Event {
    /// A command sample arrived.
    Command(Box<GroupCommand>),
    /// A controller lacks verdicts of these commands.
    Awaiting(Vec<String>),
    /// What [`Action::Inspect`] found.
    Inspected { task: TaskId, facts: Facts },
    /// What [`Action::Act`] came to.
    Ended { task: TaskId, ending: Ending },
    /// The ledger did not take these commands, nor the begin of these tasks: nothing was begun.
    Unrecorded { commands: Vec<CommandId>, tasks: Vec<TaskId> },
    /// What [`Action::ReadBack`] found.
    ReadBack { command: CommandId, member: String, facts: Facts },
    /// Time passed.
    Tick,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Write to the ledger; durable before any later action that is not a record.
    Record(Entry),
    /// Read the facts of an order and come back with [`Event::Inspected`].
    Inspect(Order),
    /// Carry it out and come back with [`Event::Ended`]. `expected`: the state to be read back at the end;
    /// `wait_only`: it is under way already.
    Act { order: Order, expected: u16, wait_only: bool },
    /// End the task's work; nothing it says is heard any more.
    GiveUp(TaskId),
    /// Begun before a crash: read the facts and come back with [`Event::ReadBack`].
    ReadBack { entry: CommandEntry, member: String },
    /// Publish; it is in the ledger.
    Say(Verdict),
    /// Publish again what was said before.
    SayAgain(Verdict),
    /// For the log.
    Warn(String),
}

/// What may not overlap.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lane {
    Vm(VmId),
    Drain,
    HostBackup,
    Image(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Waiting,
    Inspecting,
    Acting { started_us: u64 },
}

#[derive(Debug)]
struct Task {
    order: Order,
    lane: Lane,
    stage: Stage,
}

#[derive(Debug)]
enum MemberState {
    /// Waiting or at work.
    Open,
    /// Begun before a crash; being read back.
    ReadingBack {
        begun_us: u64,
    },
    Said(Box<Verdict>),
}

/// Whose verdicts have a result, oldest first, and how many bytes that is.
#[derive(Debug, Default)]
struct Results {
    queue: VecDeque<(CommandId, String)>,
    bytes: usize,
    dropped: u64,
}

#[derive(Debug)]
struct Known {
    entry: CommandEntry,
    members: BTreeMap<String, MemberState>,
}

/// See the module.
#[derive(Debug)]
pub struct Dispatcher {
    host: HostId,
    incarnation: Incarnation,
    parallel: usize,
    commands: HashMap<CommandId, Known>,
    epochs: BTreeMap<String, u64>,
    results: Results,
    tasks: HashMap<TaskId, Task>,
    /// Tasks in the order they came; those at work are not in it.
    queue: VecDeque<TaskId>,
    next_task: TaskId,
}

impl Dispatcher {
    pub fn new(host: HostId, incarnation: Incarnation, parallel: usize) -> Self {
        Self {
            host,
            incarnation,
            parallel,
            commands: HashMap::new(),
            epochs: BTreeMap::new(),
            results: Results::default(),
            tasks: HashMap::new(),
            queue: VecDeque::new(),
            next_task: 0,
        }
    }

    /// Tasks waiting and at work.
    pub fn open_tasks(&self) -> usize {
        self.tasks.len()
    }

    /// Everything the ledger should hold.
    pub fn entries(&self) -> Vec<Entry> {
        let epochs =
            self.epochs.iter().map(|(controller, &epoch)| Entry::Epoch { controller: controller.clone(), epoch });
        // oldest first, as they were written: in this order results are dropped
        let mut commands: Vec<&Known> = self.commands.values().collect();
        commands.sort_by_key(|known| (known.entry.received_us, known.entry.id));
        let commands = commands.into_iter().flat_map(|known| {
            let id = known.entry.id;
            let begun = self
                .tasks
                .values()
                .filter(move |t| t.order.command == id)
                .filter_map(|t| match t.stage {
                    Stage::Acting { started_us } => Some((t.order.member.clone(), started_us)),
                    Stage::Waiting | Stage::Inspecting => None,
                })
                .chain(known.members.iter().filter_map(|(member, state)| match state {
                    MemberState::ReadingBack { begun_us } => Some((member.clone(), *begun_us)),
                    MemberState::Open | MemberState::Said(_) => None,
                }))
                .map(move |(vm, at_us)| Entry::Begun { id, vm, at_us });
            let said = known.members.values().filter_map(|state| match state {
                MemberState::Said(verdict) => Some(Entry::Verdict(verdict.clone())),
                MemberState::Open | MemberState::ReadingBack { .. } => None,
            });
            std::iter::once(Entry::Command(known.entry.clone())).chain(begun).chain(said)
        });
        epochs.chain(commands).collect()
    }

    /// Forgets commands whose ledger entries have expired, and results a day after their command's deadline. Returns how
    /// many bytes of results were dropped since it was called last.
    pub fn forget_expired(&mut self, now_us: u64) -> u64 {
        let queue = std::mem::take(&mut self.results.queue);
        for (command, member) in queue {
            let keep = self.commands.get(&command).is_some_and(|known| known.entry.keeps_results(now_us));
            if keep {
                self.results.queue.push_back((command, member));
            } else {
                self.drop_result(command, &member);
            }
        }
        self.commands.retain(|_, known| {
            let until = known.entry.not_after_us.max(known.entry.received_us);
            until.saturating_add(crate::ledger::RETENTION_US) > now_us
                || known.members.values().any(|m| !matches!(m, MemberState::Said(_)))
        });
        std::mem::take(&mut self.results.dropped)
    }

    /// Remembers that a verdict that was said has a result, and drops the oldest beyond the limit.
    fn keep_result(&mut self, command: CommandId, verdict: &Verdict) {
        if verdict.result.is_empty() {
            return;
        }
        self.results.bytes += verdict.result.len();
        self.results.queue.push_back((command, verdict.vm.clone()));
        while self.results.bytes > RESULTS_LIMIT {
            let Some((command, member)) = self.results.queue.pop_front() else { break };
            self.drop_result(command, &member);
        }
    }

    fn drop_result(&mut self, command: CommandId, member: &str) {
        let member = self.commands.get_mut(&command).and_then(|known| known.members.get_mut(member));
        if let Some(MemberState::Said(verdict)) = member {
            let result = std::mem::take(&mut verdict.result);
            self.results.bytes = self.results.bytes.saturating_sub(result.len());
            self.results.dropped += result.len() as u64;
        }
    }

    /// One event.
    pub fn handle(&mut self, now_us: u64, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Command(command) => self.receive(now_us, *command, &mut out),
            Event::Awaiting(ids) => self.say_again(&ids, &mut out),
            Event::Inspected { task, facts } => self.inspected(now_us, task, &facts, &mut out),
            Event::Ended { task, ending } => self.ended(now_us, task, ending, &mut out),
            Event::Unrecorded { commands, tasks } => self.unrecorded(now_us, &commands, &tasks, &mut out),
            Event::ReadBack { command, member, facts } => self.read_back(now_us, command, &member, &facts, &mut out),
            Event::Tick => {}
        }
        self.expire(now_us, &mut out);
        self.pump(now_us, &mut out);
        out
    }

    fn receive(&mut self, now_us: u64, command: GroupCommand, out: &mut Vec<Action>) {
        let mine = plan::members_of(&command, self.host);
        if mine.is_empty() {
            return;
        }
        let Ok(id) = command.id.parse::<CommandId>() else {
            out.push(Action::Warn(format!(
                "command with the malformed id {:?} from controller {}",
                command.id, command.controller
            )));
            return;
        };
        if let Some(known) = self.commands.get(&id) {
            // a second sample, or one of an earlier life
            out.extend(known.members.values().filter_map(|state| match state {
                MemberState::Said(verdict) => Some(Action::SayAgain((**verdict).clone())),
                MemberState::Open | MemberState::ReadingBack { .. } => None,
            }));
            return;
        }
        if plan::is_overlong(&command, &mine) {
            out.push(Action::Warn(format!("command {id} with names too long to be ids")));
            return;
        }
        let entry = CommandEntry {
            id,
            controller: command.controller.clone(),
            verb: command.verb,
            target_kind: command.target_kind,
            not_after_us: command.not_after_us,
            received_us: now_us,
            members: mine.iter().map(|m| m.vm.clone()).collect(),
            subject: plan::argument(&command, name::DIGEST).unwrap_or_default().to_string(),
        };
        let epoch = self.epochs.entry(command.controller.clone()).or_insert(0);
        let old_epoch = command.controller_epoch < *epoch;
        let seen_epoch = *epoch;
        if command.controller_epoch > *epoch {
            *epoch = command.controller_epoch;
            out.push(Action::Record(Entry::Epoch { controller: command.controller.clone(), epoch: *epoch }));
        }
        out.push(Action::Record(Entry::Command(entry.clone())));
        let members = mine.iter().map(|m| (m.vm.clone(), MemberState::Open)).collect();
        self.commands.insert(id, Known { entry, members });
        for member in mine {
            let order = Order {
                task: self.next_task,
                command: id,
                controller: command.controller.clone(),
                verb: command.verb,
                target_kind: command.target_kind,
                member: member.vm.clone(),
                vm: member.vm.parse().ok(),
                name: member.name.clone(),
                arguments: command.arguments.clone(),
                deadline_us: command.not_after_us,
                received_us: now_us,
            };
            self.next_task += 1;
            let stale = !member.incarnation.is_empty() && member.incarnation != self.incarnation.to_string();
            let at_once = if now_us > command.not_after_us {
                Some((Outcome::Expired, ErrorCode::Expired, "its time had passed when it arrived".to_string()))
            } else if old_epoch {
                let text = format!(
                    "controller epoch {} is over: epoch {seen_epoch} was seen; two controllers with one id?",
                    command.controller_epoch
                );
                Some((Outcome::Refused, ErrorCode::Conflict, text))
            } else if stale {
                let text = "it was meant for an earlier run of this agent".to_string();
                Some((Outcome::Refused, ErrorCode::StaleIncarnation, text))
            } else {
                plan::malformed(&order).map(|text| (Outcome::Refused, ErrorCode::InvalidArgument, text))
            };
            if let Some((outcome, code, text)) = at_once {
                let ending = Ending::of(outcome, code, text, 0);
                self.say(now_us, &order, now_us, 0, ending, out);
                continue;
            }
            let lane = plan::lane_of(&order);
            self.queue.push_back(order.task);
            self.tasks.insert(order.task, Task { order, lane, stage: Stage::Waiting });
        }
    }

    fn say_again(&self, ids: &[String], out: &mut Vec<Action>) {
        for id in ids {
            let Some(known) = id.parse().ok().and_then(|id: CommandId| self.commands.get(&id)) else { continue };
            out.extend(known.members.values().filter_map(|state| match state {
                MemberState::Said(verdict) => Some(Action::SayAgain((**verdict).clone())),
                MemberState::Open | MemberState::ReadingBack { .. } => None,
            }));
        }
    }

    fn inspected(&mut self, now_us: u64, id: TaskId, facts: &Facts, out: &mut Vec<Action>) {
        // one that expired while it was inspected is gone
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if task.stage != Stage::Inspecting {
            return;
        }
        let ending = match judge::judge(&task.order, facts) {
            judge::Judgement::Begin { expected, wait_only } if now_us <= task.order.deadline_us => {
                task.stage = Stage::Acting { started_us: now_us };
                let order = task.order.clone();
                out.push(Action::Record(Entry::Begun { id: order.command, vm: order.member.clone(), at_us: now_us }));
                out.push(Action::Act { order, expected, wait_only });
                return;
            }
            judge::Judgement::Begin { .. } => Ending::of(
                Outcome::Expired,
                ErrorCode::Expired,
                "its time passed before it was begun",
                facts.cim_state(),
            ),
            judge::Judgement::Already => Ending::of(Outcome::Already, ErrorCode::Ok, "", facts.cim_state()),
            judge::Judgement::Refuse(code, text) => Ending::of(Outcome::Refused, code, text, facts.cim_state()),
        };
        let ending = Ending { guest_up: facts.guest_up, ..ending };
        self.finish(now_us, id, 0, ending, out);
    }

    fn ended(&mut self, now_us: u64, id: TaskId, ending: Ending, out: &mut Vec<Action>) {
        let Some(Task { stage: Stage::Acting { started_us }, .. }) = self.tasks.get(&id) else { return };
        let started_us = *started_us;
        self.finish(now_us, id, started_us, ending, out);
    }

    /// What cannot be recorded is not begun.
    fn unrecorded(&mut self, now_us: u64, commands: &[CommandId], tasks: &[TaskId], out: &mut Vec<Action>) {
        let mut ids: Vec<TaskId> = self
            .tasks
            .values()
            .filter(|t| t.stage == Stage::Waiting && commands.contains(&t.order.command))
            .map(|t| t.order.task)
            .chain(tasks.iter().copied())
            .collect();
        ids.sort_unstable();
        for id in ids {
            let text = "the host cannot write its command ledger and begins nothing: see its log";
            self.finish(now_us, id, 0, Ending::of(Outcome::Failed, ErrorCode::Io, text, 0), out);
        }
    }

    fn finish(&mut self, now_us: u64, id: TaskId, started_us: u64, ending: Ending, out: &mut Vec<Action>) {
        if let Some(task) = self.tasks.remove(&id) {
            self.queue.retain(|queued| *queued != id);
            self.say(now_us, &task.order, task.order.received_us, started_us, ending, out);
        }
    }

    fn say(
        &mut self,
        now_us: u64,
        order: &Order,
        received_us: u64,
        started_us: u64,
        ending: Ending,
        out: &mut Vec<Action>,
    ) {
        let verdict = self.verdict(now_us, order.command, &order.member, received_us, started_us, ending);
        self.settle(order.command, verdict, out);
    }

    fn verdict(
        &self,
        now_us: u64,
        command: CommandId,
        member: &str,
        received_us: u64,
        started_us: u64,
        ending: Ending,
    ) -> Verdict {
        let Ending { outcome, code, message, result, enabled_state, guest_up } = ending;
        let (result, message) = if result.len() > RESULT_LIMIT {
            (String::new(), format!("{message} (a result of {} bytes was too long to send)", result.len()))
        } else {
            (result, message)
        };
        Verdict {
            command: command.to_string(),
            host: self.host.to_string(),
            vm: member.to_string(),
            incarnation: self.incarnation.to_string(),
            outcome,
            code: code.as_str().to_string(),
            message: plan::cut(&message, MESSAGE_LIMIT),
            enabled_state,
            guest_up,
            result,
            received_at_us: received_us,
            started_at_us: started_us,
            ended_at_us: now_us,
        }
    }

    /// The last word on one member.
    fn settle(&mut self, command: CommandId, verdict: Verdict, out: &mut Vec<Action>) {
        let Some(member) = self.commands.get_mut(&command).and_then(|known| known.members.get_mut(&verdict.vm)) else {
            return;
        };
        if matches!(member, MemberState::Said(_)) {
            return;
        }
        *member = MemberState::Said(Box::new(verdict.clone()));
        self.keep_result(command, &verdict);
        out.push(Action::Record(Entry::Verdict(Box::new(verdict.clone()))));
        out.push(Action::Say(verdict));
    }

    /// Ends what has run out of time.
    fn expire(&mut self, now_us: u64, out: &mut Vec<Action>) {
        let mut late: Vec<TaskId> = self
            .tasks
            .values()
            .filter(|task| match task.stage {
                Stage::Waiting => now_us > task.order.deadline_us,
                Stage::Inspecting | Stage::Acting { .. } => now_us > task.order.deadline_us.saturating_add(OVERRUN_US),
            })
            .map(|task| task.order.task)
            .collect();
        late.sort_unstable();
        for id in late {
            let Some(stage) = self.tasks.get(&id).map(|t| t.stage) else { continue };
            let (started_us, ending) = match stage {
                Stage::Waiting => {
                    let text = "its time passed before it was begun: this host was busy";
                    (0, Ending::of(Outcome::Expired, ErrorCode::Expired, text, 0))
                }
                Stage::Inspecting => {
                    let text = "its time passed before it was begun: its state could not be read";
                    (0, Ending::of(Outcome::Expired, ErrorCode::Expired, text, 0))
                }
                Stage::Acting { started_us } => {
                    let text = "it had not ended at its deadline, and what became of it is not known";
                    (started_us, Ending::of(Outcome::Indeterminate, ErrorCode::Timeout, text, 0))
                }
            };
            if stage != Stage::Waiting {
                out.push(Action::GiveUp(id));
            }
            self.finish(now_us, id, started_us, ending, out);
        }
    }

    /// Starts what may start.
    fn pump(&mut self, now_us: u64, out: &mut Vec<Action>) {
        let mut at_work: HashMap<Lane, Vec<Verb>> = HashMap::new();
        let mut slots = self.parallel;
        for task in self.tasks.values().filter(|t| t.stage != Stage::Waiting) {
            at_work.entry(task.lane.clone()).or_default().push(task.order.verb);
            if !plan::is_quick(task.order.verb) {
                slots = slots.saturating_sub(1);
            }
        }
        // a lane whose first in line cannot start is closed for those behind it
        let mut closed: Vec<Lane> = Vec::new();
        let mut started = Vec::new();
        for id in self.queue.iter().copied() {
            let Some(task) = self.tasks.get_mut(&id) else { continue };
            let quick = plan::is_quick(task.order.verb);
            let busy = at_work.get(&task.lane).map(Vec::as_slice).unwrap_or_default();
            let free = busy.is_empty() || plan::may_overtake(task.order.verb, busy);
            if closed.contains(&task.lane) || !free || (!quick && slots == 0) {
                closed.push(task.lane.clone());
                continue;
            }
            at_work.entry(task.lane.clone()).or_default().push(task.order.verb);
            if !quick {
                slots -= 1;
            }
            task.stage = Stage::Inspecting;
            started.push(id);
            debug_assert!(now_us <= task.order.deadline_us, "expire() ran before");
            out.push(Action::Inspect(task.order.clone()));
        }
        self.queue.retain(|id| !started.contains(id));
    }
}
