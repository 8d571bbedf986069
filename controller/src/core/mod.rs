//! The one owner of all that the controller knows: a thread that takes requests and samples one after the other, lets
//! `muster-fleet` decide, writes, and acts.
//!
//! A batch of messages is one database transaction. Only when it is durable are answers given, samples handed to the bus and
//! followers told: nothing is ever published or promised that a crash could take back.
//!
//! ```text
//! REST ----- call -----+                            +--> answers
//! bus ------ input ----+--> batch -> decide, write -> commit --> outbox (publish), watchers
//! clock ---- tick -----+                            +-- failed: roll back, read all again from the database
//! ```

mod catalog;
mod command;
mod desired;
mod disks;
mod input;
mod page;
mod usage;
mod view;

use std::{
    collections::BTreeMap,
    sync::{Arc, mpsc::SyncSender},
    thread::JoinHandle,
};

use muster_api::Severity;
use muster_common::{Clock, CommandId, ControllerId, Digest, ErrorCode, HostId, Incarnation, VmId};
use muster_fleet::{
    command::{Engine, Liveness},
    groups::Groups,
    inventory::Inventory,
    target::Names,
};
use muster_idl::v1;
use tokio::sync::{mpsc, oneshot, watch};

pub(crate) use catalog::source_format;
pub use command::NewCommand;
pub use input::Input;
pub use page::{limit_of, paginate};

use crate::{
    config::Config,
    db::{Db, DbError, DesiredVm, NewEvent, StoredImage, StoredTemplate},
    refusal::Refusal,
};

/// What goes out to one cell. The thread of that cell publishes it.
#[derive(Debug)]
pub enum Outgoing {
    State(v1::ControllerState),
    Groups(v1::GroupSet),
    /// `hosts`: so many agents that are online are meant.
    Command {
        id: CommandId,
        sample: Box<v1::GroupCommand>,
        hosts: usize,
    },
}

/// Done only when the batch is durable.
#[derive(Debug)]
enum Effect {
    Send { cell: u16, outgoing: Outgoing },
    CommandsChanged,
    EventsChanged,
}

type AfterCommit = Box<dyn FnOnce(Result<(), Refusal>) + Send>;
type Task = Box<dyn FnOnce(&mut Core) -> AfterCommit + Send>;

enum Message {
    Call(Task),
    Input(Box<Input>),
    Tick,
    Stop,
}

/// Counters that grow with each change: followers look again.
#[derive(Debug)]
struct Watches {
    commands: watch::Sender<u64>,
    events: watch::Sender<u64>,
}

/// The way to the core. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    sender: mpsc::Sender<Message>,
    commands: watch::Receiver<u64>,
    events: watch::Receiver<u64>,
}

/// See [`Handle::way_back`].
pub struct WayBack(mpsc::WeakSender<Message>);

impl WayBack {
    /// Hands something over from a thread, waiting for room.
    pub fn input(&self, input: Input) {
        if let Some(sender) = self.0.upgrade() {
            let _ = sender.blocking_send(Message::Input(Box::new(input)));
        }
    }
}

/// Messages that may wait. Full: REST and reliable topics wait, telemetry is dropped (the next reading replaces it).
const QUEUE: usize = 4096;
/// Messages of one transaction at most: bounds how long the first answer waits for the last write.
const BATCH: usize = 256;

impl Handle {
    /// Has `f` done by the core, and its answer once it is durable. When this future is dropped it is done all the same.
    pub async fn call<T, F>(&self, f: F) -> Result<T, Refusal>
    where
        T: Send + 'static,
        F: FnOnce(&mut Core) -> Result<T, Refusal> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let task: Task = Box::new(move |core| {
            let result = core.request(f);
            Box::new(move |committed| {
                // nobody waits any more: it is done all the same
                let _ = answer.send(committed.and(result));
            })
        });
        let gone = || Refusal::new(ErrorCode::Unavailable, "the controller is shutting down");
        self.sender.send(Message::Call(task)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// Hands a sample over, waiting for room.
    pub async fn input(&self, input: Input) {
        // gone: the controller is shutting down
        let _ = self.sender.send(Message::Input(Box::new(input))).await;
    }
    /// Hands a reading over, or drops it.
    pub fn reading(&self, input: Input) {
        let _ = self.sender.try_send(Message::Input(Box::new(input)));
    }
    /// The way back for the threads that the core feeds: it does not keep the core alive.
    pub fn way_back(&self) -> WayBack {
        WayBack(self.sender.downgrade())
    }
    pub fn tick(&self) {
        // full: it is busy, the next tick does
        let _ = self.sender.try_send(Message::Tick);
    }
    /// Ends the core when all that waits before has been done.
    pub async fn stop(&self) {
        let _ = self.sender.send(Message::Stop).await;
    }
    /// Changes when any command does.
    pub fn commands(&self) -> watch::Receiver<u64> {
        self.commands.clone()
    }
    /// Changes when an event is added.
    pub fn events(&self) -> watch::Receiver<u64> {
        self.events.clone()
    }
}

/// What is fixed for this run.
#[derive(Clone, Debug)]
pub struct Identity {
    pub id: ControllerId,
    pub incarnation: Incarnation,
    pub epoch: u64,
    pub name: String,
    pub stream_endpoint: String,
    pub started_at_us: u64,
}

/// A cell the controller has joined.
#[derive(Clone)]
pub struct CellLink {
    pub cell: u16,
    pub outbox: SyncSender<Outgoing>,
    /// Participant and diagnosis, as of now.
    pub describe: Arc<dyn Fn() -> (String, String) + Send + Sync>,
}

/// Everything, owned by the core thread.
pub struct Core {
    pub(crate) db: Db,
    pub(crate) config: Arc<Config>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) identity: Identity,
    pub(crate) cells: Vec<CellLink>,
    pub(crate) inventory: Inventory,
    pub(crate) groups: Groups,
    pub(crate) engine: Engine,
    pub(crate) desired: BTreeMap<VmId, DesiredVm>,
    pub(crate) images: BTreeMap<Digest, StoredImage>,
    pub(crate) templates: BTreeMap<String, StoredTemplate>,
    usage: usage::Meter,
    alarms: BTreeMap<String, muster_api::Alarm>,
    effects: Vec<Effect>,
    watches: Watches,
    /// The database failed in this batch.
    failed: bool,
    /// The request at hand has changed what is in memory.
    touched: bool,
    last_state_us: u64,
    last_prune_us: u64,
}

/// Whether hosts are there, for the engine.
struct Seen<'a>(&'a Inventory);
impl Liveness for Seen<'_> {
    fn last_seen_us(&self, host: HostId) -> u64 {
        self.0.host(host).map_or(0, |entry| entry.last_seen_us)
    }
    fn is_online(&self, host: HostId) -> bool {
        self.0.is_online(host)
    }
}

impl Core {
    /// Reads what the database has and starts the thread.
    ///
    /// # Errors
    /// When the database cannot be read or the thread cannot be started.
    pub fn start(
        db: Db,
        config: Arc<Config>,
        clock: Arc<dyn Clock>,
        identity: Identity,
        cells: impl FnOnce(Handle) -> Vec<CellLink>,
    ) -> Result<(Handle, JoinHandle<()>), crate::StartError> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (commands, commands_seen) = watch::channel(0);
        let (events, events_seen) = watch::channel(db.last_event()?);
        let handle = Handle { sender, commands: commands_seen, events: events_seen };
        let now_us = clock.now_us();
        let mut core = Core {
            inventory: Inventory::new(config.timing.inventory()),
            engine: Engine::new(config.timing.engine()),
            cells: Vec::new(),
            db,
            config,
            clock,
            identity,
            groups: Groups::default(),
            desired: BTreeMap::new(),
            images: BTreeMap::new(),
            templates: BTreeMap::new(),
            usage: usage::Meter::default(),
            alarms: BTreeMap::new(),
            effects: Vec::new(),
            watches: Watches { commands, events },
            failed: false,
            touched: false,
            last_state_us: 0,
            last_prune_us: now_us,
        };
        for host in core.db.hosts()? {
            core.inventory.restore_host(host.id, host.cell, host.description);
        }
        core.load()?;
        core.cells = cells(handle.clone());
        let started = format!("controller started, epoch {}", core.identity.epoch);
        core.log_event(Severity::Info, "controller-started", started, None, None, "");
        core.send_groups();
        core.finish_batch(Vec::new());
        let thread = std::thread::Builder::new()
            .name("core".to_string())
            .spawn(move || core.run(receiver))
            .map_err(|source| crate::StartError::Thread { source })?;
        Ok((handle, thread))
    }

    /// Everything that lasts, from the database.
    fn load(&mut self) -> Result<(), DbError> {
        let now_us = self.clock.now_us();
        self.groups = self.db.groups()?;
        self.desired = self.db.vms()?.into_iter().map(|vm| (vm.id, vm)).collect();
        self.images = self.db.images()?.into_iter().map(|image| (image.digest, image)).collect();
        self.templates = self.db.templates()?.into_iter().map(|t| (t.name.clone(), t)).collect();
        let settings = self.config.timing.engine();
        self.engine = Engine::new(settings);
        for record in self.db.live_commands(now_us.saturating_sub(settings.settle_us))? {
            let actions = self.engine.restore(record, now_us);
            self.apply(actions)?;
        }
        Ok(())
    }

    fn run(mut self, mut receiver: mpsc::Receiver<Message>) {
        let mut running = true;
        while running {
            let Some(first) = receiver.blocking_recv() else { break };
            let mut replies = Vec::new();
            let mut next = Some(first);
            let mut taken = 0;
            while let Some(message) = next.take() {
                match message {
                    Message::Call(task) => replies.push(task(&mut self)),
                    Message::Input(input) => self.take_in(*input),
                    Message::Tick => self.pass_time(),
                    Message::Stop => running = false,
                }
                taken += 1;
                if running && taken < BATCH {
                    next = receiver.try_recv().ok();
                }
            }
            self.finish_batch(replies);
        }
    }

    fn finish_batch(&mut self, replies: Vec<AfterCommit>) {
        let committed = if self.failed {
            self.db.rollback();
            Err(Refusal::new(ErrorCode::Io, "the database failed, nothing was changed"))
        } else {
            self.db.commit().map_err(Refusal::from)
        };
        match &committed {
            Ok(()) => {
                for effect in std::mem::take(&mut self.effects) {
                    self.perform(effect);
                }
            }
            Err(refusal) => {
                tracing::error!(err = %refusal.detail, "database write failed, state is read again");
                self.failed = false;
                self.effects.clear();
                if let Err(error) = self.load() {
                    let error = muster_common::Chain(&error).to_string();
                    tracing::error!(err = error, "database cannot be read");
                }
            }
        }
        for reply in replies {
            reply(committed.clone());
        }
    }

    /// A request: all of it or nothing.
    fn request<T>(&mut self, f: impl FnOnce(&mut Core) -> Result<T, Refusal>) -> Result<T, Refusal> {
        self.db.savepoint()?;
        let effects = self.effects.len();
        self.touched = false;
        match f(self) {
            Ok(value) => {
                self.db.release()?;
                Ok(value)
            }
            Err(refusal) => {
                self.effects.truncate(effects);
                // refused half-way: memory is ahead of the database, all is read again
                self.failed |= refusal.database || self.touched || self.db.undo().is_err();
                Err(refusal)
            }
        }
    }

    /// Work that no caller waits for: a failed database is remembered for the end of the batch.
    fn attempt(&mut self, f: impl FnOnce(&mut Core) -> Result<(), DbError>) {
        if let Err(error) = self.db.begin().and_then(|()| f(self)) {
            tracing::error!(err = %muster_common::Chain(&error), "database write failed");
            self.failed = true;
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Send { cell, outgoing } => {
                let Some(link) = self.cells.iter().find(|link| link.cell == cell) else {
                    if let Outgoing::Command { id, .. } = outgoing {
                        self.engine.publish_failed(id, cell, self.clock.now_us());
                    }
                    return;
                };
                // full: the bus does not take samples; a command is tried again, the rest is sent again anyway
                if let Err(refused) = link.outbox.try_send(outgoing)
                    && let std::sync::mpsc::TrySendError::Full(Outgoing::Command { id, .. }) = refused
                {
                    self.engine.publish_failed(id, cell, self.clock.now_us());
                }
            }
            Effect::CommandsChanged => self.watches.commands.send_modify(|n| *n += 1),
            Effect::EventsChanged => self.watches.events.send_modify(|n| *n += 1),
        }
    }

    fn effect(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    fn send_all(&mut self, outgoing: impl Fn() -> Outgoing) {
        for cell in self.cells.iter().map(|link| link.cell).collect::<Vec<_>>() {
            self.effect(Effect::Send { cell, outgoing: outgoing() });
        }
    }

    /// The names of the moment, for finding who is meant.
    pub(crate) fn names(&self) -> Names {
        let hosts = self.inventory.hosts().map(|(id, entry)| (id, entry.name(id))).collect();
        let mut vms: BTreeMap<VmId, (String, HostId)> =
            self.inventory.vms().map(|(vm, host, entry)| (vm, (entry.system.name.clone(), host))).collect();
        vms.extend(self.desired.values().map(|vm| (vm.id, (vm.name.clone(), vm.host))));
        Names { hosts, vms }
    }

    pub(crate) fn now_us(&self) -> u64 {
        self.clock.now_us()
    }

    /// Puts the controller's own word into the event log.
    pub(crate) fn log_event(
        &mut self,
        severity: Severity,
        kind: &str,
        message: String,
        host: Option<HostId>,
        vm: Option<VmId>,
        command: &str,
    ) {
        let now_us = self.now_us();
        let event = NewEvent {
            host: host.map(|id| id.to_string()).unwrap_or_default(),
            vm: vm.map(|id| id.to_string()).unwrap_or_default(),
            occurred_at_us: now_us,
            received_at_us: now_us,
            severity: Some(severity),
            kind: kind.to_string(),
            message,
            command: command.to_string(),
            ..NewEvent::default()
        };
        self.attempt(|core| core.db.add_event(&event).map(drop));
        self.effect(Effect::EventsChanged);
    }

    /// Changes the groups: all of it or nothing, durable before agents are told.
    pub(crate) fn change_groups(
        &mut self,
        change: impl FnOnce(&mut Groups) -> Result<(), muster_fleet::FleetError>,
    ) -> Result<(), Refusal> {
        let mut next = self.groups.clone();
        change(&mut next)?;
        if next.epoch() != self.groups.epoch() {
            self.db.change_groups(&self.groups, &next)?;
            self.groups = next;
            self.touched = true;
            self.send_groups();
        }
        Ok(())
    }

    fn send_groups(&mut self) {
        let groups = self.groups.iter().map(|(path, group)| v1::Group {
            path: path.to_string(),
            hosts: group.members.hosts.iter().map(ToString::to_string).collect(),
            vms: group.members.vms.iter().map(ToString::to_string).collect(),
            groups: group.members.groups.iter().map(ToString::to_string).collect(),
        });
        let set = v1::GroupSet {
            controller: self.identity.id.to_string(),
            epoch: self.groups.epoch(),
            groups: groups.collect(),
        };
        self.send_all(|| Outgoing::Groups(set.clone()));
    }
}
