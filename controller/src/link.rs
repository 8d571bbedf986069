//! The bus link: what the fleet says goes into the core, what the core says goes out, one participant a cell.
//!
//! Each topic of each cell has a task that reads; each cell has a thread `bus-out-<cell>` that writes, because a publish on a
//! reliable topic may wait for room.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, sync_channel},
    },
    time::{Duration, Instant},
};

use muster_bus::{Bus, BusError, Payload, Publisher, Subscriber};
use muster_common::Chain;
use muster_idl::{Topic, v1};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::core::{CellLink, Handle, Input, Outgoing, WayBack};

/// Samples of a topic that wait for the core: some seconds of a cell of 30 hosts with 30 VMs each.
const CAPACITY: usize = 4096;
/// What waits for a cell's thread; more means that the bus takes nothing.
const OUTBOX: usize = 1024;

/// So long a command waits for the readers of agents that have just appeared.
const MATCH_LIMIT: Duration = Duration::from_secs(2);

/// Readers and writers of one cell, made but not yet running.
pub struct Joined {
    bus: Bus,
    readers: Readers,
    writers: Writers,
}

struct Readers {
    heartbeat: Subscriber<v1::Heartbeat>,
    physical_host: Subscriber<v1::PhysicalHost>,
    host_metrics: Subscriber<v1::HostMetrics>,
    store_state: Subscriber<v1::StoreState>,
    store_health: Subscriber<v1::StoreHealth>,
    virtual_system: Subscriber<v1::VirtualSystem>,
    vm_metrics: Subscriber<v1::VmMetrics>,
    volume_metrics: Subscriber<v1::VolumeMetrics>,
    verdict: Subscriber<v1::Verdict>,
    progress: Subscriber<v1::Progress>,
    event: Subscriber<v1::Event>,
}

struct Writers {
    state: Publisher<v1::ControllerState>,
    groups: Publisher<v1::GroupSet>,
    command: Publisher<v1::GroupCommand>,
}

/// Makes the readers and writers of a cell.
///
/// # Errors
/// When the bus refuses.
pub fn join(bus: Bus) -> Result<Joined, BusError> {
    // readers first: what agents say when they see our writers is not missed
    let readers = Readers {
        heartbeat: bus.subscriber(CAPACITY)?,
        physical_host: bus.subscriber(CAPACITY)?,
        host_metrics: bus.subscriber(CAPACITY)?,
        store_state: bus.subscriber(CAPACITY)?,
        store_health: bus.subscriber(CAPACITY)?,
        virtual_system: bus.subscriber(CAPACITY)?,
        vm_metrics: bus.subscriber(CAPACITY)?,
        volume_metrics: bus.subscriber(CAPACITY)?,
        verdict: bus.subscriber(CAPACITY)?,
        progress: bus.subscriber(CAPACITY)?,
        event: bus.subscriber(CAPACITY)?,
    };
    let writers = Writers { state: bus.publisher()?, groups: bus.publisher()?, command: bus.publisher()? };
    Ok(Joined { bus, readers, writers })
}

/// The running threads of the link.
pub struct Threads(Vec<std::thread::JoinHandle<()>>);

impl Threads {
    /// Waits for the writers; they end when the core has dropped their outboxes.
    pub fn join(self) {
        for thread in self.0 {
            if thread.join().is_err() {
                tracing::error!("a thread of the bus link panicked");
            }
        }
    }
}

/// Starts reading and writing. Readers end with `stop`.
///
/// # Errors
/// When a thread cannot be started.
pub fn start(
    joined: Vec<Joined>,
    handle: &Handle,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Result<(Vec<CellLink>, Threads), std::io::Error> {
    let mut links = Vec::new();
    let mut threads = Vec::new();
    for Joined { bus, readers, writers } in joined {
        let cell = bus.cell();
        let (outbox, outgoing) = sync_channel(OUTBOX);
        let back = handle.way_back();
        threads.push(
            std::thread::Builder::new()
                .name(format!("bus-out-{cell}"))
                .spawn(move || write(cell, &writers, &outgoing, &back))?,
        );
        let described = bus.clone();
        let describe = Arc::new(move || (described.participant_guid(), described.diagnosis()));
        links.push(CellLink { cell, outbox, describe });

        let r = readers;
        read(tasks, handle, stop, r.heartbeat, Way::Telemetry, move |beat| Some(Input::Heartbeat(cell, beat.value()?)));
        read(tasks, handle, stop, r.physical_host, Way::Waits, move |host| {
            Some(Input::PhysicalHost(cell, host.value()?))
        });
        read(tasks, handle, stop, r.host_metrics, Way::Telemetry, |m| Some(Input::HostMetrics(m.value()?)));
        read(tasks, handle, stop, r.store_state, Way::Waits, |s| Some(Input::StoreState(s.value()?)));
        read(tasks, handle, stop, r.store_health, Way::Telemetry, |h| Some(Input::StoreHealth(h.value()?)));
        read(tasks, handle, stop, r.virtual_system, Way::Waits, |system| match system.payload {
            Payload::Value(system) => Some(Input::VirtualSystem(system)),
            Payload::Disposed(key) => Some(Input::VmGone(key)),
        });
        read(tasks, handle, stop, r.vm_metrics, Way::Telemetry, |m| Some(Input::VmMetrics(m.value()?)));
        read(tasks, handle, stop, r.volume_metrics, Way::Telemetry, |m| Some(Input::VolumeMetrics(m.value()?)));
        read(tasks, handle, stop, r.verdict, Way::Waits, |verdict| Some(Input::Verdict(verdict.value()?)));
        read(tasks, handle, stop, r.progress, Way::Telemetry, |progress| Some(Input::Progress(progress.value()?)));
        read(tasks, handle, stop, r.event, Way::Waits, |event| Some(Input::Event(event.value()?)));
    }
    Ok((links, Threads(threads)))
}

/// What happens to a sample when the core is busy.
#[derive(Clone, Copy)]
enum Way {
    /// It waits.
    Waits,
    /// It is dropped: the next one says the same, newer.
    Telemetry,
}

fn read<T: Topic>(
    tasks: &mut JoinSet<()>,
    handle: &Handle,
    stop: &CancellationToken,
    mut from: Subscriber<T>,
    way: Way,
    input: impl Fn(muster_bus::Sample<T>) -> Option<Input> + Send + 'static,
) {
    let (handle, stop) = (handle.clone(), stop.clone());
    tasks.spawn(async move {
        loop {
            let sample = tokio::select! {
                () = stop.cancelled() => break,
                sample = from.recv() => sample,
            };
            let Some(sample) = sample else { break };
            let Some(input) = input(sample) else { continue };
            match way {
                Way::Waits => handle.input(input).await,
                Way::Telemetry => handle.reading(input),
            }
        }
    });
}

fn write(cell: u16, writers: &Writers, outgoing: &Receiver<Outgoing>, back: &WayBack) {
    while let Ok(next) = outgoing.recv() {
        let (what, done) = match next {
            Outgoing::State(state) => ("controller state", writers.state.publish(&state)),
            Outgoing::Groups(groups) => ("groups", writers.groups.publish(&groups)),
            Outgoing::Command { id, sample, hosts } => {
                wait_for_readers(&writers.command, hosts);
                let done = writers.command.publish(&sample);
                let said = match &done {
                    Ok(()) => Input::Published(id, cell),
                    Err(_) => Input::PublishFailed(id, cell),
                };
                back.input(said);
                ("command", done)
            }
        };
        if let Err(error) = done {
            tracing::warn!(cell, what, err = %Chain(&error), "bus did not take it");
        }
    }
}

/// A heartbeat may arrive before the agent's command reader is matched, and a command does not reach a reader that came
/// later. So a command for hosts that are online waits, within bounds, until there are as many readers.
fn wait_for_readers(command: &Publisher<v1::GroupCommand>, hosts: usize) {
    let deadline = Instant::now() + MATCH_LIMIT;
    while command.matched() < hosts && Instant::now() < deadline {
        std::thread::park_timeout(Duration::from_millis(10));
    }
}
