//! The command loop: feeds the dispatcher with what happens and carries its actions out.
//!
//! One task. Orders run in a `JoinSet`: none is detached, a panic in one is a verdict (`failed`, code `internal`) and not
//! the end of the agent. Records are made durable, all of one round in one `fdatasync`, before any other action of the
//! round is begun; what the ledger does not take is not begun, and the dispatcher is told.

use std::{collections::HashMap, sync::Arc, time::Duration};

use muster_bus::{Payload, Subscriber};
use muster_common::{Chain, CommandId, ErrorCode};
use muster_idl::v1::{GroupCommand, Outcome, Severity};
use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    task::{AbortHandle, Id, JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;

use crate::{
    dispatcher::{Action, Dispatcher, Ending, Event, TaskId, judge::Facts},
    executor,
    host::Host,
    ledger::{Entry, Ledger},
    voice::About,
};

/// How often time is looked at when nothing else happens: deadlines are kept to this.
const TICK: Duration = Duration::from_millis(100);
/// Events taken into one round.
const ROUND: usize = 256;

/// What runs in the `JoinSet`.
#[derive(Clone, Debug)]
enum Job {
    Inspect(TaskId),
    Act(TaskId),
    ReadBack(CommandId, String),
}

pub struct Driver {
    pub host: Arc<Host>,
    pub dispatcher: Dispatcher,
    pub ledger: Arc<Mutex<Ledger>>,
    pub commands: Subscriber<GroupCommand>,
    /// Command ids a controller awaits verdicts of.
    pub awaiting: mpsc::Receiver<Vec<String>>,
    pub stop: CancellationToken,
    /// What the replay of the ledger asks for.
    pub first: Vec<Action>,
}

/// What is under way.
#[derive(Default)]
struct Running {
    set: JoinSet<Event>,
    jobs: HashMap<Id, Job>,
    handles: HashMap<TaskId, AbortHandle>,
}

impl Driver {
    /// Until `stop`; then what runs gets `grace` to end.
    pub async fn run(mut self, grace: Duration) {
        let mut running = Running::default();
        let first = std::mem::take(&mut self.first);
        self.carry_out(first, &mut running).await;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last_housekeeping = self.host.now_us();
        loop {
            let mut events = Vec::new();
            tokio::select! {
                () = self.stop.cancelled() => break,
                Some(sample) = self.commands.recv() => {
                    if let Payload::Value(command) = sample.payload {
                        events.push(Event::Command(Box::new(command)));
                    }
                }
                Some(joined) = running.set.join_next_with_id() => events.extend(running.ended(joined)),
                Some(ids) = self.awaiting.recv() => events.push(Event::Awaiting(ids)),
                _ = tick.tick() => events.push(Event::Tick),
            }
            while events.len() < ROUND {
                if let Some(joined) = running.set.try_join_next_with_id() {
                    events.extend(running.ended(joined));
                } else if let Some(sample) = self.commands.try_recv() {
                    if let Payload::Value(command) = sample.payload {
                        events.push(Event::Command(Box::new(command)));
                    }
                } else {
                    break;
                }
            }
            let now = self.host.now_us();
            let actions = events.into_iter().flat_map(|event| self.dispatcher.handle(now, event)).collect();
            self.carry_out(actions, &mut running).await;
            if now.saturating_sub(last_housekeeping) > 60_000_000 {
                last_housekeeping = now;
                self.keep_house(now).await;
            }
        }
        self.finish(running, grace).await;
    }

    /// No new command is begun; those at work may end in time. What does not is in the ledger, and the next run reads back
    /// what came of it.
    async fn finish(&mut self, mut running: Running, grace: Duration) {
        let until = tokio::time::Instant::now() + grace;
        while !running.set.is_empty() {
            let Ok(Some(joined)) = tokio::time::timeout_at(until, running.set.join_next_with_id()).await else { break };
            let Some(event) = running.ended(joined) else { continue };
            let now = self.host.now_us();
            let actions = self.dispatcher.handle(now, event);
            let said = actions.into_iter().filter(|a| !matches!(a, Action::Inspect(_) | Action::Act { .. })).collect();
            self.carry_out(said, &mut running).await;
        }
        if !running.set.is_empty() {
            tracing::warn!(
                orders = running.set.len(),
                "stopping with orders at work: the next run reads back what came of them"
            );
        }
        running.set.shutdown().await;
    }

    /// Carries actions out, and those that follow when the ledger did not take a record.
    async fn carry_out(&mut self, mut actions: Vec<Action>, running: &mut Running) {
        while !actions.is_empty() {
            actions = match self.carry_out_once(actions, running).await {
                None => return,
                // each round ends a task at least
                Some(unrecorded) => self.dispatcher.handle(self.host.now_us(), unrecorded),
            };
        }
    }

    /// What could not be recorded and was not begun for that.
    async fn carry_out_once(&self, actions: Vec<Action>, running: &mut Running) -> Option<Event> {
        let records: Vec<Entry> = actions
            .iter()
            .filter_map(|a| if let Action::Record(entry) = a { Some(entry.clone()) } else { None })
            .collect();
        let commands: Vec<CommandId> =
            records.iter().filter_map(|e| if let Entry::Command(c) = e { Some(c.id) } else { None }).collect();
        let durable = self.record(records).await;
        let mut tasks = Vec::new();
        for action in actions {
            match action {
                Action::Record(_) => {}
                Action::Inspect(order) if durable => {
                    let host = Arc::clone(&self.host);
                    let task = order.task;
                    let job = async move { Event::Inspected { task, facts: executor::facts(&host, &order).await } };
                    running.spawn(Job::Inspect(task), Some(task), job);
                }
                Action::Act { order, expected, wait_only } if durable => {
                    let host = Arc::clone(&self.host);
                    let task = order.task;
                    tracing::info!(cmd = %order.command, vm = order.member, verb = %order.verb, "command begun");
                    let job = async move {
                        Event::Ended { task, ending: executor::run(host, order, expected, wait_only).await }
                    };
                    running.spawn(Job::Act(task), Some(task), job);
                }
                Action::Inspect(order) | Action::Act { order, .. } => tasks.push(order.task),
                Action::GiveUp(task) => {
                    if let Some(handle) = running.handles.remove(&task) {
                        handle.abort();
                    }
                }
                Action::ReadBack { entry, member } => {
                    let host = Arc::clone(&self.host);
                    let job = Job::ReadBack(entry.id, member.clone());
                    let work = async move {
                        let facts = executor::read_back(&host, &entry, &member).await;
                        Event::ReadBack { command: entry.id, member, facts }
                    };
                    running.spawn(job, None, work);
                }
                Action::Say(verdict) => {
                    tracing::info!(
                        cmd = verdict.command, vm = verdict.vm, outcome = %verdict.outcome, code = verdict.code, "verdict"
                    );
                    self.host.voice.verdict(verdict);
                }
                Action::SayAgain(verdict) => self.host.voice.verdict(verdict),
                Action::Warn(text) => tracing::warn!(reason = text, "a command was ignored"),
            }
        }
        if durable || commands.is_empty() && tasks.is_empty() {
            return None;
        }
        Some(Event::Unrecorded { commands, tasks })
    }

    /// True when everything is durable.
    async fn record(&self, entries: Vec<Entry>) -> bool {
        if entries.is_empty() {
            return true;
        }
        let ledger = Arc::clone(&self.ledger);
        let written = tokio::task::spawn_blocking(move || ledger.lock().append(&entries)).await;
        match written {
            Ok(Ok(())) => true,
            Ok(Err(e)) => {
                self.host.complain("commands cannot be recorded, none is begun any more", &e);
                let text = format!("the command ledger cannot be written: {}", Chain(&e));
                self.host.voice.event(Severity::Error, "ledger-broken", text, About::default());
                false
            }
            Err(_) => false,
        }
    }

    async fn keep_house(&mut self, now_us: u64) {
        let dropped = self.dispatcher.forget_expired(now_us);
        let wanted = {
            let mut ledger = self.ledger.lock();
            ledger.may_drop(dropped);
            ledger.wants_compaction()
        };
        if !wanted {
            return;
        }
        let (ledger, entries) = (Arc::clone(&self.ledger), self.dispatcher.entries());
        let compacted = tokio::task::spawn_blocking(move || ledger.lock().compact(entries, now_us)).await;
        if let Ok(Err(e)) = compacted {
            self.host.complain("the command ledger was not compacted", &e);
        }
    }
}

impl Running {
    fn spawn(&mut self, job: Job, task: Option<TaskId>, work: impl Future<Output = Event> + Send + 'static) {
        let handle = self.set.spawn(work);
        self.jobs.insert(handle.id(), job);
        if let Some(task) = task {
            self.handles.insert(task, handle);
        }
    }

    /// What a finished job means; one that was given up means nothing.
    fn ended(&mut self, joined: Result<(Id, Event), JoinError>) -> Option<Event> {
        let (id, outcome) = match joined {
            Ok((id, event)) => (id, Ok(event)),
            Err(e) => (e.id(), Err(e)),
        };
        let job = self.jobs.remove(&id)?;
        if let Job::Inspect(task) | Job::Act(task) = &job
            && self.handles.get(task).is_some_and(|h| h.id() == id)
        {
            self.handles.remove(task);
        }
        let error = match outcome {
            Ok(event) => return Some(event),
            Err(e) => e,
        };
        if error.is_cancelled() {
            return None;
        }
        tracing::error!(?job, err = %error, "an order panicked");
        let unreadable = || Facts { unreadable: Some("a part of the agent panicked".into()), ..Facts::blank() };
        Some(match job {
            Job::Inspect(task) => Event::Inspected { task, facts: unreadable() },
            Job::Act(task) => {
                let text = "a part of the agent panicked; its log says where";
                Event::Ended { task, ending: Ending::of(Outcome::Failed, ErrorCode::Internal, text, 0) }
            }
            Job::ReadBack(command, member) => Event::ReadBack { command, member, facts: unreadable() },
        })
    }
}
