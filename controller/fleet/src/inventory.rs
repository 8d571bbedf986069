//! Who is there: hosts by their heartbeats, VMs by what their hosts say.
//!
//! ```text
//!            heartbeat                    silent for offline_after
//!  (known) ------------> online  --------------------------------> offline
//!                          ^  \                                       |
//!                          |   new incarnation (a successor)          |
//!                          +------------------------------------------+
//! ```
//! An older incarnation that still speaks after its successor has settled is the alarm "duplicate incarnation": two live
//! agents claim one host id (a copied state directory). A successor after a crash is welcome and no alarm.

use std::collections::{BTreeMap, BTreeSet};

use muster_common::{HostId, Incarnation, VmId};
use muster_idl::v1::{
    Heartbeat, HostMetrics, PhysicalHost, StoreHealth, StoreState, VirtualSystem, VmMetrics, VolumeMetrics,
};

/// Times that decide who is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Heartbeats come each second; a host silent for longer than this is offline.
    pub offline_after_us: u64,
    /// An older incarnation heard so long after the first word of its successor is a duplicate. Shorter, and a heartbeat
    /// that was delayed on the way would raise the alarm.
    pub settle_us: u64,
    /// A host that has been up for so long without a word of a VM does not have that VM.
    pub missing_after_us: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { offline_after_us: 5_000_000, settle_us: 2_000_000, missing_after_us: 15_000_000 }
    }
}

/// Something that changed and is worth remembering.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Never heard of before.
    Appeared(HostId),
    Online(HostId),
    Offline {
        host: HostId,
        last_seen_us: u64,
    },
    /// The agent was started again.
    Restarted {
        host: HostId,
        machine_too: bool,
    },
    Duplicate {
        host: HostId,
        older: Incarnation,
        newer: Incarnation,
    },
    DuplicateGone(HostId),
    /// The description of a host changed: store it.
    Described(HostId),
    /// A VM's EnabledState changed.
    VmState {
        host: HostId,
        vm: VmId,
        from: u16,
        to: u16,
    },
}

#[derive(Clone, Debug, PartialEq)]
struct Run {
    incarnation: Incarnation,
    boot: String,
    first_seen_us: u64,
    last_seen_us: u64,
    counter: u64,
}

/// What is known of a host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostEntry {
    pub description: Option<PhysicalHost>,
    /// The cell its heartbeats come from; before that the one stored.
    pub cell: u16,
    /// Incarnations heard lately, in the order in which they were first heard: the last is the host's agent.
    runs: Vec<Run>,
    pub online: bool,
    pub draining: bool,
    /// Older incarnation that is still alive.
    pub duplicate: Option<Incarnation>,
    /// 0 when not heard since the controller started.
    pub last_seen_us: u64,
    pub metrics: Option<HostMetrics>,
    pub store: Option<StoreState>,
    pub health: Option<StoreHealth>,
    /// Grows with each change an operator would notice.
    pub version: u64,
}

impl HostEntry {
    pub fn incarnation(&self) -> Option<Incarnation> {
        self.runs.last().map(|run| run.incarnation)
    }
    /// When the present agent was first heard; 0 when there is none.
    pub fn up_since_us(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.first_seen_us)
    }
    /// The name people use; the id when the host has not said it yet.
    pub fn name(&self, id: HostId) -> String {
        match &self.description {
            Some(d) if !d.name.is_empty() => d.name.clone(),
            _ => id.to_string(),
        }
    }
}

/// What one host says of one VM.
#[derive(Clone, Debug, PartialEq)]
pub struct VmEntry {
    pub system: VirtualSystem,
    pub heard_us: u64,
    pub metrics: Option<VmMetrics>,
    /// Of its disks, by volume.
    pub disks: BTreeMap<String, VolumeMetrics>,
    pub version: u64,
}

impl VmEntry {
    /// Off (3) and saved (6) VMs use nothing.
    fn has_process(&self) -> bool {
        !matches!(self.system.enabled_state, 3 | 6)
    }
}

/// All hosts and VMs heard of.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    settings: Settings,
    hosts: BTreeMap<HostId, HostEntry>,
    vms: BTreeMap<(VmId, HostId), VmEntry>,
}

impl Inventory {
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// A host known from before the controller's start. It is offline until it is heard.
    pub fn restore_host(&mut self, id: HostId, cell: u16, description: Option<PhysicalHost>) {
        let draining = description.as_ref().is_some_and(|d| d.draining);
        self.hosts.insert(id, HostEntry { description, cell, draining, version: 1, ..HostEntry::default() });
    }

    pub fn hosts(&self) -> impl Iterator<Item = (HostId, &HostEntry)> {
        self.hosts.iter().map(|(id, entry)| (*id, entry))
    }
    pub fn host(&self, id: HostId) -> Option<&HostEntry> {
        self.hosts.get(&id)
    }
    /// The name people use of a host; its id when unknown.
    pub fn host_name(&self, id: HostId) -> String {
        self.hosts.get(&id).map_or_else(|| id.to_string(), |entry| entry.name(id))
    }
    pub fn is_online(&self, id: HostId) -> bool {
        self.hosts.get(&id).is_some_and(|entry| entry.online)
    }
    pub fn vms(&self) -> impl Iterator<Item = (VmId, HostId, &VmEntry)> {
        self.vms.iter().map(|((vm, host), entry)| (*vm, *host, entry))
    }
    /// What `host` says of `vm`.
    pub fn vm_on(&self, vm: VmId, host: HostId) -> Option<&VmEntry> {
        self.vms.get(&(vm, host))
    }
    /// Hosts that speak of `vm`; more than one only when something is wrong.
    pub fn vm_anywhere(&self, vm: VmId) -> impl Iterator<Item = (HostId, &VmEntry)> {
        self.vms
            .range((vm, HostId::from_uuid(MIN))..=(vm, HostId::from_uuid(MAX)))
            .map(|((_, host), entry)| (*host, entry))
    }
    /// True when the host has been heard long enough that it would have spoken of this VM if it had it.
    pub fn is_missing(&self, vm: VmId, host: HostId, now_us: u64) -> bool {
        let Some(entry) = self.hosts.get(&host).filter(|entry| entry.online) else { return false };
        let settled = now_us.saturating_sub(entry.up_since_us()) > self.settings.missing_after_us;
        let current = entry.incarnation().map(|i| i.to_string());
        settled && self.vm_on(vm, host).is_none_or(|seen| Some(&seen.system.incarnation) != current.as_ref())
    }

    /// Takes a heartbeat in. One with an id that is no UUID is ignored.
    pub fn heartbeat(&mut self, cell: u16, beat: &Heartbeat, now_us: u64) -> Vec<Change> {
        let (Ok(id), Ok(incarnation)) = (beat.host.parse::<HostId>(), beat.incarnation.parse::<Incarnation>()) else {
            return Vec::new();
        };
        let mut changes = Vec::new();
        let offline_after = self.settings.offline_after_us;
        let settle = self.settings.settle_us;
        let entry = self.hosts.entry(id).or_insert_with(|| {
            changes.push(Change::Appeared(id));
            HostEntry::default()
        });
        entry.cell = cell;
        let last = entry.runs.len().wrapping_sub(1);
        match entry.runs.iter().position(|run| run.incarnation == incarnation) {
            Some(at) if at == last => {
                let run = &mut entry.runs[at];
                run.last_seen_us = now_us;
                run.counter = beat.counter;
            }
            Some(at) => {
                let successor = entry.runs[last].first_seen_us;
                // a heartbeat that was on the way while the successor started is not a second agent
                let news = beat.counter > entry.runs[at].counter && now_us.saturating_sub(successor) > settle;
                let run = &mut entry.runs[at];
                run.counter = run.counter.max(beat.counter);
                if news {
                    run.last_seen_us = now_us;
                    if entry.duplicate != Some(incarnation) {
                        entry.duplicate = Some(incarnation);
                        entry.version += 1;
                        let newer = entry.runs[last].incarnation;
                        changes.push(Change::Duplicate { host: id, older: incarnation, newer });
                    }
                }
                // it is not the host's agent: nothing else of it counts
                return changes;
            }
            None => {
                if let Some(previous) = entry.runs.last() {
                    let machine_too = previous.boot != beat.boot;
                    changes.push(Change::Restarted { host: id, machine_too });
                }
                entry.runs.push(Run {
                    incarnation,
                    boot: beat.boot.clone(),
                    first_seen_us: now_us,
                    last_seen_us: now_us,
                    counter: beat.counter,
                });
                // old runs are kept only as long as they could still speak
                let keep_from = now_us.saturating_sub(4 * offline_after);
                let newest = entry.runs.len() - 1;
                let mut at = 0;
                entry.runs.retain(|run| {
                    at += 1;
                    at > newest || run.last_seen_us >= keep_from
                });
                entry.version += 1;
            }
        }
        entry.last_seen_us = now_us;
        if entry.draining != beat.draining {
            entry.draining = beat.draining;
            entry.version += 1;
        }
        if !entry.online {
            entry.online = true;
            entry.version += 1;
            changes.push(Change::Online(id));
        }
        changes
    }

    /// Time has passed: who has gone silent?
    pub fn tick(&mut self, now_us: u64) -> Vec<Change> {
        let mut changes = Vec::new();
        let offline_after = self.settings.offline_after_us;
        for (id, entry) in &mut self.hosts {
            if entry.online && now_us.saturating_sub(entry.last_seen_us) > offline_after {
                entry.online = false;
                // what it measured last is no reading of now
                entry.metrics = None;
                entry.version += 1;
                changes.push(Change::Offline { host: *id, last_seen_us: entry.last_seen_us });
            }
            if let Some(older) = entry.duplicate {
                let alive = entry
                    .runs
                    .iter()
                    .any(|run| run.incarnation == older && now_us.saturating_sub(run.last_seen_us) <= offline_after);
                if !alive {
                    entry.duplicate = None;
                    entry.version += 1;
                    changes.push(Change::DuplicateGone(*id));
                }
            }
        }
        changes
    }

    /// Takes a host's description in.
    pub fn describe(&mut self, cell: u16, description: PhysicalHost) -> Vec<Change> {
        let Ok(id) = description.host.parse::<HostId>() else { return Vec::new() };
        let mut changes = Vec::new();
        let entry = self.hosts.entry(id).or_insert_with(|| {
            changes.push(Change::Appeared(id));
            HostEntry::default()
        });
        // the last word of an older run may come after the first of its successor
        let stale = entry.incarnation().is_some_and(|current| {
            let said = description.incarnation.parse::<Incarnation>().ok();
            said != Some(current) && entry.runs.iter().any(|run| Some(run.incarnation) == said)
        });
        if stale {
            return changes;
        }
        if entry.description.as_ref() != Some(&description) {
            entry.draining = description.draining;
            entry.description = Some(description);
            entry.cell = cell;
            entry.version += 1;
            changes.push(Change::Described(id));
        }
        changes
    }

    pub fn host_metrics(&mut self, metrics: HostMetrics) {
        if let Some(entry) = metrics.host.parse().ok().and_then(|id: HostId| self.hosts.get_mut(&id)) {
            entry.metrics = Some(metrics);
        }
    }

    pub fn store_state(&mut self, state: StoreState) {
        if let Some(entry) = state.host.parse().ok().and_then(|id: HostId| self.hosts.get_mut(&id)) {
            entry.store = Some(state);
        }
    }

    pub fn store_health(&mut self, health: StoreHealth) {
        if let Some(entry) = health.host.parse().ok().and_then(|id: HostId| self.hosts.get_mut(&id)) {
            entry.health = Some(health);
        }
    }

    /// Takes what a host says of a VM in.
    pub fn virtual_system(&mut self, system: VirtualSystem, now_us: u64) -> Vec<Change> {
        let (Ok(vm), Ok(host)) = (system.vm.parse::<VmId>(), system.host.parse::<HostId>()) else {
            return Vec::new();
        };
        let mut changes = Vec::new();
        match self.vms.get_mut(&(vm, host)) {
            Some(entry) => {
                // reliable and in order per writer, but an older run's words may trail
                if system.incarnation == entry.system.incarnation && system.sampled_at_us < entry.system.sampled_at_us {
                    return changes;
                }
                let (from, to) = (entry.system.enabled_state, system.enabled_state);
                if from != to {
                    changes.push(Change::VmState { host, vm, from, to });
                }
                let mut comparable = entry.system.clone();
                comparable.sampled_at_us = system.sampled_at_us;
                if comparable != system {
                    entry.version += 1;
                }
                entry.system = system;
                entry.heard_us = now_us;
                if !entry.has_process() {
                    entry.metrics = None;
                    entry.disks.clear();
                }
            }
            None => {
                changes.push(Change::VmState { host, vm, from: 0, to: system.enabled_state });
                self.vms.insert(
                    (vm, host),
                    VmEntry { system, heard_us: now_us, metrics: None, disks: BTreeMap::new(), version: 1 },
                );
            }
        }
        changes
    }

    /// A host says that it has a VM no more.
    pub fn vm_gone(&mut self, host: HostId, vm: VmId) -> bool {
        self.vms.remove(&(vm, host)).is_some()
    }

    pub fn vm_metrics(&mut self, metrics: VmMetrics) {
        if let (Ok(vm), Ok(host)) = (metrics.vm.parse::<VmId>(), metrics.host.parse::<HostId>())
            && let Some(entry) = self.vms.get_mut(&(vm, host))
            && entry.has_process()
        {
            entry.metrics = Some(metrics);
        }
    }

    /// Of a disk that the VM has, in its present generation.
    pub fn volume_metrics(&mut self, metrics: VolumeMetrics) {
        if let (Ok(vm), Ok(host)) = (metrics.vm.parse::<VmId>(), metrics.host.parse::<HostId>())
            && let Some(entry) = self.vms.get_mut(&(vm, host))
        {
            let disks = &entry.system.disks;
            entry.disks.retain(|volume, _| disks.iter().any(|disk| disk.volume == *volume));
            if disks.iter().any(|disk| disk.volume == metrics.volume && disk.generation == metrics.generation) {
                entry.disks.insert(metrics.volume.clone(), metrics);
            }
        }
    }

    /// Forgets a host and all it said. It comes back when it speaks again.
    pub fn forget_host(&mut self, id: HostId) -> bool {
        self.vms.retain(|(_, host), _| *host != id);
        self.hosts.remove(&id).is_some()
    }

    /// Names used by more than one host: an alarm, because naming them is ambiguous.
    pub fn duplicate_names(&self) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut twice = BTreeSet::new();
        for (id, entry) in self.hosts() {
            if !seen.insert(entry.name(id)) {
                twice.insert(entry.name(id));
            }
        }
        twice
    }
}

const MIN: uuid::Uuid = uuid::Uuid::nil();
const MAX: uuid::Uuid = uuid::Uuid::max();

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000;

    fn beat(host: HostId, incarnation: Incarnation, counter: u64) -> Heartbeat {
        Heartbeat {
            host: host.to_string(),
            incarnation: incarnation.to_string(),
            boot: "b".into(),
            participant: String::new(),
            counter,
            sent_at_us: 0,
            draining: false,
        }
    }

    #[test]
    fn a_silent_host_goes_offline_and_comes_back() {
        let mut inventory = Inventory::default();
        let (host, run) = (HostId::random(), Incarnation::random());
        assert_eq!(inventory.heartbeat(0, &beat(host, run, 0), 10 * S), [Change::Appeared(host), Change::Online(host)]);
        assert_eq!(inventory.tick(15 * S), []);
        assert_eq!(inventory.tick(15 * S + 1), [Change::Offline { host, last_seen_us: 10 * S }]);
        assert_eq!(inventory.tick(16 * S), []);
        assert_eq!(inventory.heartbeat(0, &beat(host, run, 6), 17 * S), [Change::Online(host)]);
    }

    #[test]
    fn a_successor_is_welcome_and_a_second_live_agent_is_an_alarm() {
        let mut inventory = Inventory::default();
        let (host, old, new) = (HostId::random(), Incarnation::random(), Incarnation::random());
        inventory.heartbeat(0, &beat(host, old, 7), 10 * S);
        let changes = inventory.heartbeat(0, &beat(host, new, 0), 11 * S);
        assert_eq!(changes, [Change::Restarted { host, machine_too: false }]);
        // one that was on the way
        assert_eq!(inventory.heartbeat(0, &beat(host, old, 8), 11 * S + 1), []);
        // one that was not
        let changes = inventory.heartbeat(0, &beat(host, old, 10), 14 * S);
        assert_eq!(changes, [Change::Duplicate { host, older: old, newer: new }]);
        assert_eq!(inventory.host(host).unwrap().incarnation(), Some(new));
        for second in 15..=20 {
            inventory.heartbeat(0, &beat(host, new, second), second * S);
        }
        assert_eq!(inventory.tick(20 * S), [Change::DuplicateGone(host)]);
    }

    #[test]
    fn garbage_is_ignored() {
        let mut inventory = Inventory::default();
        let mut bad = beat(HostId::random(), Incarnation::random(), 0);
        bad.host = "../../etc".into();
        assert_eq!(inventory.heartbeat(0, &bad, S), []);
        assert_eq!(inventory.hosts().count(), 0);
    }

    #[test]
    fn a_vm_is_missing_when_its_host_is_up_and_does_not_speak_of_it() {
        let mut inventory = Inventory::default();
        let (host, run, vm) = (HostId::random(), Incarnation::random(), VmId::random());
        inventory.heartbeat(0, &beat(host, run, 0), S);
        assert!(!inventory.is_missing(vm, host, 2 * S));
        for second in 2..30 {
            inventory.heartbeat(0, &beat(host, run, second), second * S);
        }
        assert!(inventory.is_missing(vm, host, 30 * S));
        inventory.tick(60 * S);
        assert!(!inventory.is_missing(vm, host, 60 * S), "an offline host says nothing");
    }

    #[test]
    fn a_disks_figures_count_while_the_vm_has_it_in_that_generation() {
        let mut inventory = Inventory::default();
        let mut system = muster_idl::samples::virtual_system();
        let metrics = muster_idl::samples::volume_metrics();
        let (host, vm) = (system.host.parse().unwrap(), system.vm.parse().unwrap());
        inventory.volume_metrics(metrics.clone());
        assert!(inventory.vm_on(vm, host).is_none(), "nobody spoke of the VM");
        inventory.virtual_system(system.clone(), S);
        inventory.volume_metrics(metrics.clone());
        inventory.volume_metrics(VolumeMetrics { generation: 2, reads: 0, ..metrics.clone() });
        inventory.volume_metrics(VolumeMetrics { volume: "another".into(), ..metrics.clone() });
        let disks = &inventory.vm_on(vm, host).unwrap().disks;
        assert_eq!(disks.values().collect::<Vec<_>>(), [&metrics]);
        system.disks[0].volume = "new".into();
        system.sampled_at_us += 1;
        inventory.virtual_system(system, 2 * S);
        inventory.volume_metrics(VolumeMetrics { volume: "new".into(), ..metrics });
        let disks = &inventory.vm_on(vm, host).unwrap().disks;
        assert_eq!(disks.keys().collect::<Vec<_>>(), ["new"]);
    }

    #[test]
    fn what_is_off_has_no_load() {
        let mut inventory = Inventory::default();
        let (host, vm) = (HostId::random(), VmId::random());
        let system = |enabled_state, sampled_at_us| VirtualSystem {
            host: host.to_string(),
            vm: vm.to_string(),
            incarnation: String::new(),
            name: "a".into(),
            enabled_state,
            requested_state: 12,
            health_state: 5,
            operational_status: vec![],
            guest_up: false,
            virtual_processors: 1,
            memory_bytes: 0,
            disks: vec![],
            template: String::new(),
            remark: String::new(),
            changed_at_us: 0,
            sampled_at_us,
        };
        let load = VmMetrics {
            host: host.to_string(),
            vm: vm.to_string(),
            sampled_at_us: 0,
            processor_percent: 5.0,
            processor_time_us: 0,
            memory_resident_bytes: 0,
            memory_used_bytes: 0,
            disk_reads: 0,
            disk_writes: 0,
            disk_read_bytes: 0,
            disk_written_bytes: 0,
            network_received_bytes: 0,
            network_sent_bytes: 0,
        };
        inventory.virtual_system(system(2, 1), S);
        inventory.vm_metrics(load.clone());
        assert!(inventory.vm_on(vm, host).unwrap().metrics.is_some());
        let changes = inventory.virtual_system(system(3, 2), 2 * S);
        assert_eq!(changes, [Change::VmState { host, vm, from: 2, to: 3 }]);
        inventory.vm_metrics(load);
        assert!(inventory.vm_on(vm, host).unwrap().metrics.is_none(), "a reading that was on the way");
        inventory.virtual_system(system(2, 1), 3 * S);
        assert_eq!(inventory.vm_on(vm, host).unwrap().system.enabled_state, 3, "old news");
    }
}
