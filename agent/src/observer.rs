//! Looks: at the hypervisor (each second, and at once when it tells of something), at guest agents, at who else is on the
//! bus. Only [`crate::inventory`] and [`crate::presence`] learn from it; it commands nothing.

use std::{sync::Arc, time::Duration};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use futures_util::{StreamExt, stream};
use muster_bus::Subscriber;
use muster_common::{Chain, VmId};
use muster_idl::v1::{ControllerState, Heartbeat, Severity};
use muster_virt::{DomainState, HypervisorEvent, Lane};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{host::Host, inventory::Change, presence::Finding, voice::About};

const LOOK: Duration = Duration::from_secs(1);
/// A guest that is up is asked again this often; one that is not, at each look.
const ASK_AGAIN_US: u64 = 10_000_000;
/// Guests asked at the same time: each may take a pool thread for as long as the guest is silent.
const ASK_AT_ONCE: usize = 2;
/// After a silence this long participants of the DDS library may never match again (lease of 50 s): join anew.
const REJOIN_AFTER_US: u64 = 50_000_000;

/// Reads states until `stop`.
pub async fn watch_states(host: Arc<Host>, stop: CancellationToken) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut complained = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
            () = host.inventory.look.notified() => {}
        }
        host.inventory.drop_idle_snapshots(host.now_us());
        if host.machines.missing().is_some() {
            continue;
        }
        match host.machines.call(Lane::Host, "list", |h| h.list()).await {
            Ok(list) => {
                complained = false;
                let now = host.now_us();
                for status in &list {
                    if let Some(change) = host.inventory.observe(now, status) {
                        tell(&host, &change);
                    }
                }
            }
            Err(e) if !complained => {
                complained = true;
                tracing::warn!(err = %Chain(&e), "the hypervisor does not list its machines");
            }
            Err(_) => {}
        }
    }
}

/// Publishes a change of state.
pub fn tell(host: &Host, change: &Change) {
    let about = About {
        vm: change.vm.to_string(),
        from_state: change.from.cim(),
        to_state: change.to.cim(),
        command: String::new(),
    };
    let (severity, kind) = if change.crashed { (Severity::Error, "vm-crashed") } else { (Severity::Info, "vm-state") };
    host.voice.event(severity, kind, format!("{}: {} -> {}", change.name, change.from, change.to), about);
}

/// Asks guest agents whether they are there, until `stop`.
pub async fn watch_guests(host: Arc<Host>, stop: CancellationToken) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let timeout = host.config.timeouts.guest_agent();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let now = host.now_us();
        let due: Vec<VmId> = host
            .inventory
            .all()
            .into_iter()
            .filter(|e| e.state == DomainState::Running && e.agent_connected != Some(false))
            .filter(|e| !e.guest_up || now.saturating_sub(e.asked_us) >= ASK_AGAIN_US)
            .map(|e| e.record.vm)
            .collect();
        let ask = stream::iter(due).for_each_concurrent(ASK_AT_ONCE, |vm| {
            let host = &host;
            async move {
                let ping = move |h: &dyn muster_virt::Hypervisor| h.guest_ping(vm, timeout);
                let answer = host.machines.call_within(Lane::Host, "guest ping", timeout * 2, ping).await;
                let up = answer.unwrap_or(false);
                let was = host.inventory.get(vm).is_some_and(|e| e.guest_up);
                let now = host.now_us();
                host.inventory.update(vm, |e| {
                    e.asked_us = now;
                    e.guest_up = up && e.state == DomainState::Running;
                });
                if up && !was {
                    let about = About { vm: vm.to_string(), ..About::default() };
                    host.voice.event(Severity::Info, "guest-up", "the guest agent answers", about);
                }
            }
        });
        tokio::select! {
            () = stop.cancelled() => return,
            () = ask => {}
        }
    }
}

/// Thread `agent-events`: what the hypervisor tells wakes the observer.
pub fn follow_events(host: &Host, events: &Receiver<HypervisorEvent>, stop: &CancellationToken) {
    while !stop.is_cancelled() {
        match events.recv_timeout(Duration::from_millis(250)) {
            Ok(event) => {
                match event {
                    HypervisorEvent::Rebooted { vm } => host.inventory.update(vm, |e| {
                        e.reboots += 1;
                        e.guest_up = false;
                    }),
                    // said by `mend`, once
                    HypervisorEvent::IoError { vm, no_space: true, .. } => {
                        host.inventory.update(vm, |e| e.no_space = true);
                    }
                    HypervisorEvent::IoError { vm, disk, no_space: false } => {
                        let text = format!("disk {disk} failed and the VM was paused");
                        let about = About { vm: vm.to_string(), ..About::default() };
                        host.voice.event(Severity::Error, "vm-io-error", text, about);
                    }
                    HypervisorEvent::GuestAgent { vm, connected } => host.inventory.update(vm, |e| {
                        e.agent_connected = Some(connected);
                        e.guest_up &= connected;
                    }),
                    HypervisorEvent::ConnectionLost => {
                        tracing::error!(
                            "the connection to the hypervisor broke: its machines run on, restart the agent"
                        );
                    }
                    HypervisorEvent::Lifecycle { .. } | HypervisorEvent::Overflow => {}
                }
                host.inventory.look.notify_one();
                host.inventory.changed.notify_waiters();
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Hears controllers and other agents, until `stop`.
pub async fn listen(
    host: Arc<Host>,
    mut controllers: Subscriber<ControllerState>,
    mut hearts: Subscriber<Heartbeat>,
    awaiting: mpsc::Sender<Vec<String>>,
    stop: CancellationToken,
) {
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    loop {
        let now = host.now_us();
        let finding = tokio::select! {
            () = stop.cancelled() => return,
            Some(sample) = controllers.recv() => sample.value().and_then(|state| {
                if !state.awaiting.is_empty() {
                    // a full channel: the next heartbeat asks again
                    let _ = awaiting.try_send(state.awaiting.clone());
                }
                host.presence.lock().controller(now, &state)
            }),
            Some(sample) = hearts.recv() => {
                sample.value().and_then(|beat| host.presence.lock().heartbeat(now, &beat))
            }
            _ = tick.tick() => host.presence.lock().tick(now),
        };
        if let Some(finding) = finding {
            report(&host, finding).await;
        }
    }
}

async fn report(host: &Host, finding: Finding) {
    match finding {
        Finding::NoController { silent_us } => {
            tracing::warn!(
                silent_s = silent_us / 1_000_000,
                domain = host.config.cell,
                interface = host.config.interface.map(|i| i.to_string()).unwrap_or_else(|| "all".into()),
                peers = ?host.config.peers,
                "no controller seen; {}", host.bus.diagnosis()
            );
            if silent_us >= REJOIN_AFTER_US {
                let bus = host.bus.clone();
                match tokio::task::spawn_blocking(move || bus.rebuild()).await {
                    Ok(Ok(())) => tracing::info!("joined the bus anew"),
                    Ok(Err(e)) => tracing::warn!(err = %Chain(&e), "joining the bus anew failed"),
                    Err(e) => tracing::error!(err = %e, "joining the bus anew panicked"),
                }
            }
        }
        Finding::ControllerBack { controller, name } => {
            tracing::info!(controller, name, "a controller is there");
        }
        Finding::Duplicate { incarnation, participant } => {
            let text = format!(
                "another agent runs with this host's id (incarnation {incarnation}, participant {participant}): was a \
                 state directory copied? Remove host-id from one of the copies and restart it"
            );
            tracing::error!(incarnation, participant, "two live agents have one host id");
            host.voice.event(Severity::Error, "duplicate-host", text, About::default());
        }
    }
}
