//! The VMs of this host as they are known at this moment: what they are made of (records), what the hypervisor said last,
//! whether the guest answers. Telemetry takes copies; nobody holds the lock while calling anything.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use muster_cim::{EnabledState, condition_of};
use muster_common::{VmId, VolumeId};
use muster_idl::v1::{VirtualDisk, VirtualSystem};
use muster_repository::{RepositoryError, source::SourceError};
use muster_store::{Snapshot, Store};
use muster_virt::{DomainState, DomainStatus, StateReason};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::{
    chunks::ChunkTable,
    machines::enabled_state,
    records::{PausedBy, VmRecord},
};

/// A named point in time of a VM's own volumes. In memory only.
#[derive(Clone)]
pub struct SnapshotSet {
    pub taken_us: u64,
    pub volumes: Vec<(VolumeId, Snapshot)>,
    /// Goes when nobody has read of it for so long; none: it stays.
    pub keep: Option<Duration>,
    /// When somebody read of it last, shared by the clones.
    read_us: Arc<AtomicU64>,
    /// Names of the volumes' chunks, once somebody has asked for them.
    tables: Arc<Mutex<BTreeMap<VolumeId, Arc<ChunkTable>>>>,
}

impl SnapshotSet {
    pub fn new(taken_us: u64, volumes: Vec<(VolumeId, Snapshot)>, keep: Option<Duration>) -> Self {
        let read_us = Arc::new(AtomicU64::new(taken_us));
        Self { taken_us, volumes, keep, read_us, tables: Arc::default() }
    }

    pub fn volume(&self, id: VolumeId) -> Option<&Snapshot> {
        self.volumes.iter().find(|(volume, _)| *volume == id).map(|(_, snapshot)| snapshot)
    }

    /// Somebody reads of it.
    pub fn touch(&self, now_us: u64) {
        self.read_us.fetch_max(now_us, Ordering::Relaxed);
    }

    pub fn is_over(&self, now_us: u64) -> bool {
        let idle = now_us.saturating_sub(self.read_us.load(Ordering::Relaxed));
        self.keep.is_some_and(|keep| u128::from(idle) > keep.as_micros())
    }

    /// Blocks while the volume is read, the first time. Who comes meanwhile waits for the same.
    pub fn chunks(&self, volume: VolumeId) -> Result<Arc<ChunkTable>, RepositoryError> {
        let mut tables = self.tables.lock();
        if let Some(table) = tables.get(&volume) {
            return Ok(table.clone());
        }
        let snapshot = self.volume(volume).ok_or(SourceError::Empty)?;
        let table = Arc::new(ChunkTable::of(snapshot)?);
        tables.insert(volume, table.clone());
        Ok(table)
    }
}

/// What is known of one VM.
#[derive(Clone)]
pub struct Entry {
    pub record: VmRecord,
    pub state: DomainState,
    pub reason: StateReason,
    pub agent_connected: Option<bool>,
    pub guest_up: bool,
    /// When the guest was asked last whether it is up.
    pub asked_us: u64,
    /// Shown instead of the hypervisor's state while a verb is at work that libvirt has no state for.
    pub transition: Option<EnabledState>,
    pub requested_state: u16,
    pub remark: String,
    pub changed_us: u64,
    /// Counts reboots the hypervisor told of.
    pub reboots: u64,
    pub snapshots: BTreeMap<String, SnapshotSet>,
    /// The last I/O error of its disks was that there was no room; until it is resumed.
    pub no_space: bool,
}

impl Entry {
    pub fn new(record: VmRecord, state: DomainState, now_us: u64) -> Self {
        Self {
            record,
            state,
            reason: StateReason::None,
            agent_connected: None,
            guest_up: false,
            asked_us: 0,
            transition: None,
            requested_state: muster_cim::RequestedState::NotApplicable.cim(),
            remark: String::new(),
            changed_us: now_us,
            reboots: 0,
            snapshots: BTreeMap::new(),
            no_space: false,
        }
    }

    pub fn shown_state(&self) -> EnabledState {
        self.transition.unwrap_or(enabled_state(self.state))
    }
}

/// A VM's state was seen to have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub vm: VmId,
    pub name: String,
    pub from: EnabledState,
    pub to: EnabledState,
    pub crashed: bool,
}

/// See the module. One lock, a leaf.
#[derive(Default)]
pub struct Inventory {
    entries: Mutex<BTreeMap<VmId, Entry>>,
    /// Notified whenever something may have changed: whoever waits for a state looks again.
    pub changed: Notify,
    /// Asks the observer to look now.
    pub look: Notify,
}

impl Inventory {
    pub fn insert(&self, entry: Entry) {
        self.entries.lock().insert(entry.record.vm, entry);
        self.changed.notify_waiters();
    }

    pub fn remove(&self, vm: VmId) {
        self.entries.lock().remove(&vm);
        self.changed.notify_waiters();
    }

    pub fn get(&self, vm: VmId) -> Option<Entry> {
        self.entries.lock().get(&vm).cloned()
    }

    pub fn all(&self) -> Vec<Entry> {
        self.entries.lock().values().cloned().collect()
    }

    pub fn ids(&self) -> Vec<VmId> {
        self.entries.lock().keys().copied().collect()
    }

    pub fn by_name(&self, name: &str) -> Option<VmId> {
        self.entries.lock().values().find(|e| e.record.name == name).map(|e| e.record.vm)
    }

    /// Changes one entry under the lock; nothing when there is none.
    pub fn update(&self, vm: VmId, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.entries.lock().get_mut(&vm) {
            change(entry);
        }
        self.changed.notify_waiters();
    }

    /// Drops snapshots that were to go when nobody reads of them any more. Their memory is given back after the lock.
    pub fn drop_idle_snapshots(&self, now_us: u64) {
        let mut over = Vec::new();
        for entry in self.entries.lock().values_mut() {
            let names: Vec<String> =
                entry.snapshots.iter().filter(|(_, set)| set.is_over(now_us)).map(|(name, _)| name.clone()).collect();
            over.extend(names.iter().filter_map(|name| entry.snapshots.remove(name)));
        }
        if !over.is_empty() {
            tracing::debug!(snapshots = over.len(), "snapshots nobody reads of any more were dropped");
        }
    }

    /// Takes in what the hypervisor says of one VM.
    pub fn observe(&self, now_us: u64, status: &DomainStatus) -> Option<Change> {
        let mut entries = self.entries.lock();
        let entry = entries.get_mut(&status.vm)?;
        let (from, to) = (enabled_state(entry.state), enabled_state(status.state));
        let crashed = status.state == DomainState::Crashed && entry.state != DomainState::Crashed
            || status.reason == StateReason::Crashed && entry.reason != StateReason::Crashed;
        entry.state = status.state;
        entry.reason = status.reason;
        entry.agent_connected = status.agent_connected;
        if !status.state.is_active() || status.agent_connected == Some(false) {
            entry.guest_up = false;
        }
        if from == to && !crashed {
            return None;
        }
        entry.changed_us = now_us;
        let change = Change { vm: status.vm, name: entry.record.name.clone(), from, to, crashed };
        drop(entries);
        self.changed.notify_waiters();
        Some(change)
    }

    /// Running VMs.
    pub fn running(&self) -> u32 {
        self.entries.lock().values().filter(|e| e.state == DomainState::Running).count() as u32
    }
}

/// True when the store does not hold every volume of the VM in its present generation.
pub fn is_lost(record: &VmRecord, store: &Store) -> bool {
    record.disks.iter().any(|d| !is_there(d, store))
}

pub fn is_there(disk: &crate::records::DiskRecord, store: &Store) -> bool {
    store.volume(disk.volume).is_some_and(|v| v.generation() == disk.generation)
}

/// The topic sample.
pub fn virtual_system(entry: &Entry, store: &Store, host: &str, incarnation: &str, now_us: u64) -> VirtualSystem {
    let record = &entry.record;
    let lost = is_lost(record, store);
    let failed = lost
        || entry.state == DomainState::Crashed
        || entry.reason == StateReason::IoError
        || record.paused_by == Some(PausedBy::Space);
    let state = entry.shown_state();
    let (health, status) = condition_of(state, failed);
    let remark = if lost {
        "a volume was lost with the agent's memory: restore it, or reset its session".to_string()
    } else if record.paused_by == Some(PausedBy::Space) {
        match record.own_disks().find(|disk| store.volume(disk.volume).is_some_and(|v| v.quota_is_used_up())) {
            Some(disk) => format!("paused: the quota of its {} disk is used up; raise it", disk.role.as_str()),
            None => "paused: its disk needs memory and the store is full; it goes on when there is some".to_string(),
        }
    } else if entry.reason == StateReason::IoError {
        "paused: a disk failed".to_string()
    } else {
        entry.remark.clone()
    };
    VirtualSystem {
        host: host.to_string(),
        vm: record.vm.to_string(),
        incarnation: incarnation.to_string(),
        name: record.name.clone(),
        enabled_state: state.cim(),
        requested_state: entry.requested_state,
        health_state: health.cim(),
        operational_status: status.iter().map(|s| s.cim()).collect(),
        guest_up: entry.guest_up,
        virtual_processors: record.template.vcpus,
        memory_bytes: record.template.memory_bytes,
        disks: record
            .disks
            .iter()
            .map(|disk| VirtualDisk {
                role: disk.role.as_str().to_string(),
                volume: disk.volume.to_string(),
                generation: disk.generation,
                size_bytes: disk.size.bytes(),
                image: disk.image.map(|d| d.to_string()).unwrap_or_default(),
                condition: if is_there(disk, store) { "volatile" } else { "lost" }.to_string(),
            })
            .collect(),
        template: record.template.name.clone(),
        remark,
        changed_at_us: entry.changed_us,
        sampled_at_us: now_us,
    }
}

#[cfg(test)]
mod tests {
    use muster_store::StoreConfig;

    use super::*;
    use crate::records::tests::record;

    fn status(vm: VmId, state: DomainState) -> DomainStatus {
        DomainStatus {
            vm,
            name: String::new(),
            state,
            reason: StateReason::None,
            persistent: true,
            ours: true,
            agent_connected: Some(false),
        }
    }

    #[test]
    fn a_change_of_state_is_told_once_and_ends_guest_up() {
        let inventory = Inventory::default();
        let record = record("a");
        let vm = record.vm;
        inventory.insert(Entry::new(record, DomainState::Off, 1));
        assert_eq!(inventory.observe(2, &status(vm, DomainState::Off)), None);
        let change = inventory.observe(3, &status(vm, DomainState::Running)).unwrap();
        assert_eq!((change.from, change.to), (EnabledState::Disabled, EnabledState::Enabled));
        assert_eq!(inventory.get(vm).unwrap().changed_us, 3);
        inventory.update(vm, |e| e.guest_up = true);
        assert_eq!(inventory.observe(4, &status(vm, DomainState::Running)), None);
        assert!(!inventory.get(vm).unwrap().guest_up);
        assert_eq!(inventory.observe(5, &status(VmId::random(), DomainState::Running)), None);
    }

    #[test]
    fn a_volume_of_another_generation_is_lost_too() {
        let store = Store::open(StoreConfig::new(muster_common::ByteLen::mib(64))).unwrap();
        let record = record("a");
        assert!(is_lost(&record, &store));
        for disk in &record.disks {
            let spec = muster_store::VolumeSpec::blank(disk.volume, disk.size);
            let spec = muster_store::VolumeSpec { generation: disk.generation, ..spec };
            store.create_volume(spec).unwrap();
        }
        assert!(!is_lost(&record, &store));
        let mut older = record.clone();
        older.disks[0].generation += 1;
        assert!(is_lost(&older, &store));
        let sample = virtual_system(&Entry::new(older, DomainState::Paused, 1), &store, "h", "i", 2);
        assert_eq!(sample.disks[0].condition, "lost");
        assert_eq!(sample.disks[1].condition, "volatile");
        assert_eq!((sample.health_state, sample.enabled_state), (20, 9));
    }
}
