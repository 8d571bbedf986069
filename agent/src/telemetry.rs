//! Says what the host and its VMs are doing: heartbeat, metrics, store, states. Reads copies; holds no lock of the control
//! plane while it samples or publishes.
//!
//! Heartbeats come from a task of their own, so that nothing slow (a hypervisor that does not answer, a reader that does not
//! acknowledge) makes the host look dead. Everything else comes from thread `agent-telemetry`, each second and when the
//! inventory changed.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use muster_bus::{Bus, BusError, Publisher};
use muster_cim::{Changes, EnabledState, HealthState, OperationalStatus};
use muster_common::{ByteLen, Chain, VmId};
use muster_export::Operation;
use muster_idl::{
    Topic,
    v1::{
        Heartbeat, HostMetrics, PhysicalHost, Severity, StoreHealth, StoreImage, StoreNode, StoreState, VirtualSystem,
        VmMetrics, VolumeMetrics,
    },
};
use muster_virt::{DomainStats, HypervisorKind, Lane};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{
    disk_metrics::DiskMetrics,
    host::Host,
    inventory::{Entry, virtual_system},
    numa,
    sampling::Sampler,
    voice::About,
    watermark::{Crossing, Watermark},
};

const PERIOD: Duration = Duration::from_secs(1);
/// Every state is said again this often: a late joiner may lack quiet instances until then.
const REFRESH: Duration = Duration::from_secs(5);
const HOST_REFRESH: Duration = Duration::from_secs(30);
/// The store's health is said this often, in seconds, and when damage was found or repaired.
const HEALTH: u32 = 10;
/// Where its memory lies is read this often, in seconds as well: the kernel looks at every page for it.
const NODES: u32 = 60;
/// A hypervisor that takes longer for its statistics is left out of this second's. (Ending a QEMU holds them up for 1-2 s.)
const STATS_TIME: Duration = Duration::from_millis(500);
/// The call itself may take this long before it counts as stuck.
const STATS_DEADLINE: Duration = Duration::from_secs(20);

/// Somebody waits for a heartbeat that says what is so now.
pub type Beat = oneshot::Sender<()>;

/// Each second until `stop`, and whenever one is asked for.
pub async fn beat(
    host: Arc<Host>,
    publisher: Publisher<Heartbeat>,
    mut asked: mpsc::Receiver<Beat>,
    stop: CancellationToken,
) {
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    for counter in 0.. {
        let waiting = tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => None,
            Some(waiting) = asked.recv() => Some(waiting),
        };
        let sample = Heartbeat {
            host: host.id.to_string(),
            incarnation: host.incarnation.to_string(),
            boot: host.boot_id.clone(),
            participant: host.bus.participant_guid(),
            counter,
            sent_at_us: host.now_us(),
            draining: host.draining.is_set(),
        };
        // best effort: this does not wait
        if let Err(e) = publisher.publish(&sample) {
            tracing::warn!(err = %Chain(&e), "a heartbeat was not published");
        }
        if let Some(waiting) = waiting {
            // it may have been given up
            let _ = waiting.send(());
        }
    }
}

/// Passes changes of the inventory on to the thread.
pub async fn nudge(host: Arc<Host>, wake: crossbeam_channel::Sender<()>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = host.inventory.changed.notified() => {
                // one is enough
                let _ = wake.try_send(());
            }
        }
    }
}

/// The thread's state.
pub struct Telemetry {
    host: Arc<Host>,
    sampler: Sampler,
    physical: Publisher<PhysicalHost>,
    metrics: Publisher<HostMetrics>,
    store: Publisher<StoreState>,
    health: Publisher<StoreHealth>,
    systems: Publisher<VirtualSystem>,
    vm_metrics: Publisher<VmMetrics>,
    volume_metrics: Publisher<VolumeMetrics>,
    disks: DiskMetrics,
    host_changes: Changes<PhysicalHost>,
    system_changes: Changes<VirtualSystem>,
    /// Processor time and when it was read, for the percentage.
    previous: BTreeMap<VmId, (u64, u64)>,
    /// Statistics asked for and not there yet: no second call meanwhile.
    asked: Option<Receiver<muster_virt::Result<Vec<DomainStats>>>>,
    watermark: Watermark,
    /// Seconds since the start, as this thread counts them.
    second: u32,
    nodes: Vec<StoreNode>,
    /// What was said of damage last: blocks found, repaired, unreadable.
    damage: (u64, u64, u64),
}

impl Telemetry {
    pub fn new(host: Arc<Host>, bus: &Bus) -> Result<Self, BusError> {
        Ok(Self {
            sampler: Sampler::new(),
            physical: bus.publisher()?,
            metrics: bus.publisher()?,
            store: bus.publisher()?,
            health: bus.publisher()?,
            systems: bus.publisher()?,
            vm_metrics: bus.publisher()?,
            volume_metrics: bus.publisher()?,
            disks: DiskMetrics::default(),
            host_changes: Changes::new(HOST_REFRESH),
            system_changes: Changes::new(REFRESH),
            previous: BTreeMap::new(),
            asked: None,
            watermark: Watermark::default(),
            second: 0,
            nodes: Vec::new(),
            damage: (0, 0, 0),
            host,
        })
    }

    /// Until `stop`; the last word is that the host shuts down.
    pub fn run(mut self, wake: &Receiver<()>, stop: &CancellationToken) {
        let mut next = std::time::Instant::now();
        while !stop.is_cancelled() {
            if std::time::Instant::now() >= next {
                next = std::time::Instant::now() + PERIOD;
                self.each_second();
            }
            self.systems();
            match wake.recv_deadline(next) {
                Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        if !self.host.silent.load(std::sync::atomic::Ordering::Relaxed) {
            publish(&self.physical, &self.physical_host(EnabledState::ShuttingDown));
        }
    }

    fn each_second(&mut self) {
        let host = Arc::clone(&self.host);
        let now = host.now_us();
        let physical = self.physical_host(EnabledState::Enabled);
        if self.host_changes.due(now, &physical) && !publish(&self.physical, &physical) {
            self.host_changes.forget();
        }
        let metrics = self.sampler.host_metrics(&host.id.to_string(), now, host.inventory.running());
        publish(&self.metrics, &metrics);
        publish(&self.store, &store_state(&host, now));
        if self.second.is_multiple_of(NODES) {
            self.nodes = store_nodes(&host);
        }
        let health = store_health(&host, now, self.nodes.clone());
        let damage = (health.blocks_damaged, health.blocks_repaired, health.blocks_unreadable);
        if self.second.is_multiple_of(HEALTH) || damage != self.damage {
            publish(&self.health, &health);
            self.damage = damage;
        }
        self.second = self.second.wrapping_add(1);
        self.watermark();
        for sample in self.disks.samples(&host, &host.inventory.all(), now) {
            publish(&self.volume_metrics, &sample);
        }
        self.vm_metrics(now);
    }

    /// What is left counts, not what is taken: the store keeps freed memory for a while.
    fn watermark(&mut self) {
        let stats = self.host.volumes.store.stats();
        let used = ByteLen(stats.budget.bytes().saturating_sub(stats.available_bytes.bytes()));
        if let Some(crossing) = self.watermark.observe(used.bytes(), stats.budget.bytes()) {
            tell_watermark(&self.host, crossing, used, stats.budget);
        }
    }

    fn systems(&mut self) {
        let now = self.host.now_us();
        let (host, incarnation) = (self.host.id.to_string(), self.host.incarnation.to_string());
        let mut present = std::collections::BTreeSet::new();
        let mut failed = false;
        for entry in self.host.inventory.all() {
            let sample = virtual_system(&entry, &self.host.volumes.store, &host, &incarnation, now);
            present.insert(sample.key());
            if self.system_changes.due(now, &sample) {
                failed |= !publish(&self.systems, &sample);
            }
        }
        for key in self.system_changes.gone(&present) {
            if let Err(e) = self.systems.dispose(&key) {
                tracing::warn!(err = %Chain(&e), "the end of a VM was not published");
            }
        }
        if failed {
            self.system_changes.forget();
        }
    }

    fn vm_metrics(&mut self, now: u64) {
        let entries: BTreeMap<VmId, Entry> =
            self.host.inventory.all().into_iter().filter(|e| e.state.is_active()).map(|e| (e.record.vm, e)).collect();
        self.previous.retain(|vm, _| entries.contains_key(vm));
        let Some(pool) = self.host.machines.pool().filter(|_| !entries.is_empty()) else { return };
        let answer =
            self.asked.take().unwrap_or_else(|| pool.call(Lane::Host, "statistics", STATS_DEADLINE, |h| h.all_stats()));
        let stats = match answer.recv_timeout(STATS_TIME) {
            Ok(Ok(stats)) => stats,
            Ok(Err(e)) => {
                tracing::debug!(err = %Chain(&e), "no statistics this second");
                return;
            }
            Err(RecvTimeoutError::Timeout) => {
                self.asked = Some(answer);
                return;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        for stat in stats {
            let Some(entry) = entries.get(&stat.vm) else { continue };
            let before = self.previous.insert(stat.vm, (stat.cpu_time_ns, now));
            publish(&self.vm_metrics, &vm_sample(&self.host, entry, &stat, before, now));
        }
    }

    fn physical_host(&self, state: EnabledState) -> PhysicalHost {
        let host = &self.host;
        let info = host.machines.info();
        let healthy = host.machines.missing().is_none() && host.backups.is_ok();
        let facts = self.sampler.facts();
        PhysicalHost {
            host: host.id.to_string(),
            incarnation: host.incarnation.to_string(),
            name: host.name.clone(),
            cell: host.config.cell,
            hardware_uuid: host.hardware_uuid.clone(),
            boot: host.boot_id.clone(),
            agent_version: env!("CARGO_PKG_VERSION").into(),
            operating_system: facts.operating_system.clone(),
            kernel: facts.kernel.clone(),
            processor_model: facts.processor_model.clone(),
            number_of_processors: facts.processors,
            total_memory_bytes: facts.memory_bytes,
            enabled_state: state.cim(),
            health_state: if healthy { HealthState::Ok } else { HealthState::MajorFailure }.cim(),
            operational_status: vec![
                match (state, healthy) {
                    (EnabledState::ShuttingDown, _) => OperationalStatus::Stopping,
                    (_, true) => OperationalStatus::Ok,
                    (_, false) => OperationalStatus::Error,
                }
                .cim(),
            ],
            hypervisor_uri: info
                .map(|i| if i.uri.starts_with("sim:") { "simulator:".into() } else { i.uri.clone() })
                .unwrap_or_default(),
            hypervisor_version: info.map(|i| i.hypervisor_version.clone()).unwrap_or_default(),
            accelerator: host.machines.accelerator().into(),
            hypervisor_remark: host.machines.remark().into(),
            draining: host.draining.is_set(),
            lab: host.config.lab,
            stream_endpoint: host.stream_endpoint.lock().clone(),
            started_at_us: host.started_us,
        }
    }
}

/// True when it was published.
fn publish<T: Topic>(publisher: &Publisher<T>, sample: &T) -> bool {
    match publisher.publish(sample) {
        Ok(()) => true,
        Err(e) => {
            tracing::warn!(topic = T::INFO.name, err = %Chain(&e), "a sample was not published");
            false
        }
    }
}

fn tell_watermark(host: &Host, crossing: Crossing, used: ByteLen, budget: ByteLen) {
    let (severity, kind, text) = match crossing {
        Crossing::Above(mark) => {
            let severity = if mark >= 95 { Severity::Error } else { Severity::Warning };
            let text = format!(
                "{mark} % of the store's budget are in use ({used} of {budget}): when it is used up, VMs that write \
                 stand still. Drop images, reset sessions, delete VMs, or raise store.budget"
            );
            (severity, "store-filling", text)
        }
        Crossing::Below(mark) => {
            let text = format!("less than {mark} % of the store's budget are in use again ({used} of {budget})");
            (Severity::Info, "store-has-room", text)
        }
    };
    tracing::warn!(used = used.bytes(), budget = budget.bytes(), kind, "the store passed a mark");
    host.voice.event(severity, kind, text, About::default());
}

/// The store as a topic sample.
pub fn store_state(host: &Host, now_us: u64) -> StoreState {
    let stats = host.volumes.store.stats();
    StoreState {
        host: host.id.to_string(),
        sampled_at_us: now_us,
        budget_bytes: stats.budget.bytes(),
        resident_bytes: stats.frame_bytes.bytes(),
        metadata_bytes: stats.metadata_bytes.bytes(),
        logical_bytes: stats.logical_bytes.bytes(),
        provisioned_bytes: stats.provisioned_bytes.bytes(),
        unique_blocks: stats.unique_blocks,
        dedup_ratio: stats.dedup_ratio,
        guest_file_reads: host.guest_file_reads.load(std::sync::atomic::Ordering::Relaxed),
        page_kind: stats.pages.as_str().to_string(),
        images: host
            .volumes
            .store
            .images()
            .into_iter()
            .map(|image| StoreImage {
                digest: image.digest.to_string(),
                name: image.name,
                logical_bytes: image.size.bytes(),
                volumes: image.volumes as u32,
            })
            .collect(),
        volumes: stats.volumes as u32,
    }
}

/// Which node has how much of the store; nothing when its memory is private.
fn store_nodes(host: &Host) -> Vec<StoreNode> {
    if !host.volumes.store.stats().shared {
        return Vec::new();
    }
    numa::nodes_of(&host.config.store_directory())
        .into_iter()
        .filter_map(|node| {
            let store_bytes = node.store_bytes?;
            Some(StoreNode { node: node.node, memory_bytes: node.memory_bytes, store_bytes })
        })
        .collect()
}

/// What the scrub has found, as a topic sample.
pub fn store_health(host: &Host, now_us: u64, nodes: Vec<StoreNode>) -> StoreHealth {
    let counts = host.scrub.counts();
    StoreHealth {
        host: host.id.to_string(),
        sampled_at_us: now_us,
        scrubbing: host.config.scrub.is_on(),
        blocks_checked: counts.blocks,
        blocks_damaged: counts.damaged,
        blocks_repaired: counts.repaired,
        blocks_unreadable: host.volumes.store.stats().damaged_blocks,
        passes: counts.passes,
        last_pass_at_us: counts.last_pass_at_us,
        nodes,
    }
}

fn vm_sample(host: &Host, entry: &Entry, stat: &DomainStats, before: Option<(u64, u64)>, now_us: u64) -> VmMetrics {
    let percent = before.map_or(0.0, |(cpu_ns, at_us)| {
        let elapsed_ns = now_us.saturating_sub(at_us).max(1) as f64 * 1000.0;
        stat.cpu_time_ns.saturating_sub(cpu_ns) as f64 * 100.0 / elapsed_ns
    });
    let memory = |m: Option<muster_common::ByteLen>| m.map(|m| m.bytes()).unwrap_or(0);
    let used = match (stat.memory, stat.memory_usable) {
        (Some(all), Some(usable)) => all.bytes().saturating_sub(usable.bytes()),
        _ => 0,
    };
    // our exports count every kind of disk, libvirt not all; what they count begins with the export, not with the VM's start
    let (mut reads, mut writes, mut read_bytes, mut written_bytes) = (0, 0, 0, 0);
    for disk in &entry.record.disks {
        if let Some(statistics) = host.volumes.export(disk).map(|export| export.statistics()) {
            let (r, w) = (statistics.of(Operation::Read), statistics.of(Operation::Write));
            reads += r.requests;
            writes += w.requests;
            read_bytes += r.bytes;
            written_bytes += w.bytes;
        }
    }
    if host.machines.info().is_some_and(|info| info.kind == HypervisorKind::Simulator) {
        // its guests have no disks of ours
        for block in &stat.block {
            reads += block.read_requests;
            writes += block.write_requests;
            read_bytes += block.read_bytes;
            written_bytes += block.write_bytes;
        }
    }
    VmMetrics {
        host: host.id.to_string(),
        vm: stat.vm.to_string(),
        sampled_at_us: now_us,
        processor_percent: percent,
        processor_time_us: stat.cpu_time_ns / 1000,
        memory_resident_bytes: memory(stat.memory_resident),
        memory_used_bytes: used,
        disk_reads: reads,
        disk_writes: writes,
        disk_read_bytes: read_bytes,
        disk_written_bytes: written_bytes,
        network_received_bytes: stat.net.iter().map(|n| n.received_bytes).sum(),
        network_sent_bytes: stat.net.iter().map(|n| n.sent_bytes).sum(),
    }
}
