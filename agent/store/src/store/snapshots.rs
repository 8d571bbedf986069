//! Snapshots: of several volumes at one instant, and those that are kept.

use super::*;
use crate::map::{Refused, Trees};

impl Store {
    pub(super) fn snapshot_record(snapshot: &Snapshot, id: SnapshotId, label: &str, of: Option<VolumeId>) -> Record {
        let map = &snapshot.disk.map;
        Record {
            kind: Kind::Snapshot,
            id: VolumeId::from_uuid(id.uuid()),
            digest: None,
            read_only: true,
            origin: 0,
            tenant: map.domain.number,
            of: of.unwrap_or(VolumeId::from_bytes([0; 16])),
            made_us: now_us(),
            label: label.to_owned(),
            variant: Variant { top: map.top(), size: map.size(), ..Variant::default() },
        }
    }

    /// All these volumes as they are at one instant, in the order asked for: what a VM with several disks, or several VMs,
    /// can go back to together. As [`Volume::snapshot`] otherwise.
    pub fn snapshot_together(&self, volumes: &[VolumeId]) -> Result<Vec<Snapshot>, StoreError> {
        let inner = self.inner();
        let _inside = inner.engine.world.enter();
        let found: Vec<Arc<Volume>> = volumes
            .iter()
            .map(|id| self.volume(*id).ok_or(StoreError::VolumeNotFound(*id)))
            .collect::<Result<_, _>>()?;
        // everybody who takes several takes them in this order
        let mut order: Vec<&Arc<Volume>> = found.iter().collect();
        order.sort_unstable_by_key(|volume| volume.id());
        order.dedup_by_key(|volume| volume.id());
        for volume in &order {
            inner.fill_reserve(&volume.disk.map, true)?;
        }
        let mut paid = HashMap::new();
        for volume in &order {
            paid.insert(volume.id(), Disk::pay(inner, volume.disk.map.size(), Limits::default())?);
        }
        let mut trees = inner
            .engine
            .with_room(|(refused, _)| *refused == Refused::Full, || Self::fork_together(&inner.engine, &order))
            .map_err(|(refused, volume)| inner.refused(&volume.disk.map, refused))?;
        let mut made = HashMap::new();
        for volume in &order {
            if let (Some(trees), Some(paid)) = (trees.remove(&volume.id()), paid.remove(&volume.id())) {
                let map = &volume.disk.map;
                let holder = Holder { domain: Arc::clone(&map.domain), limits: Limits::default() };
                made.insert(volume.id(), Snapshot { disk: Arc::new(Disk::new(paid, map.size(), trees, holder, true)) });
            }
        }
        for volume in &order {
            inner.fill_reserve(&volume.disk.map, false)?;
        }
        Ok(volumes.iter().filter_map(|id| made.get(id).cloned()).collect())
    }

    /// Copies of these volumes at one instant; or whose was refused.
    fn fork_together<'a>(
        engine: &Engine,
        order: &[&'a Arc<Volume>],
    ) -> Result<HashMap<VolumeId, Trees>, (Refused, &'a Arc<Volume>)> {
        let mut trees = HashMap::new();
        let frozen: Vec<_> = order.iter().map(|volume| (*volume, volume.disk.map.freeze())).collect();
        for (volume, frozen) in &frozen {
            match engine.fork_frozen(frozen, volume.disk.map.size()) {
                Ok(copy) => {
                    trees.insert(volume.id(), copy);
                }
                Err(refused) => {
                    trees.into_values().for_each(|copy| engine.release_trees(&Account::NONE, copy));
                    return Err((refused, *volume));
                }
            }
        }
        for (volume, _) in &frozen {
            volume.disk.map.account.cut();
        }
        Ok(trees)
    }

    /// Keeps a snapshot on the books, under a label (not unique): it is there after this process, and after its volume.
    pub fn keep_snapshot(&self, snapshot: &Snapshot, of: VolumeId, label: &str) -> Result<SnapshotInfo, StoreError> {
        self.check_ours(snapshot)?;
        Self::check_name(label)?;
        let inner = self.inner();
        let _inside = inner.engine.world.enter();
        let kept = Snapshot { disk: Arc::new(snapshot.disk.fork(snapshot.disk.map.size(), true)?) };
        let id = SnapshotId::random();
        let record = Self::snapshot_record(&kept, id, label, Some(of));
        kept.disk.note(&record)?;
        let info = SnapshotInfo { id, label: label.to_owned(), volume: of, size: kept.size(), kept_us: record.made_us };
        inner.snapshots.write().insert(id, Kept { info: info.clone(), snapshot: kept });
        Ok(info)
    }

    /// All kept snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        let mut infos: Vec<SnapshotInfo> =
            self.inner().snapshots.read().values().map(|kept| kept.info.clone()).collect();
        infos.sort_by_key(|info| (info.kept_us, info.id));
        infos
    }

    pub fn snapshot(&self, id: SnapshotId) -> Option<Snapshot> {
        self.inner().snapshots.read().get(&id).map(|kept| kept.snapshot.clone())
    }

    /// Takes a kept snapshot off the books. What only it holds is freed when nobody holds it any more.
    pub fn drop_snapshot(&self, id: SnapshotId) -> Result<(), StoreError> {
        let inner = self.inner();
        let _inside = inner.engine.world.enter();
        let kept = inner.snapshots.write().remove(&id).ok_or(StoreError::SnapshotNotFound(id))?;
        kept.snapshot.disk.strike();
        drop(kept);
        Ok(())
    }
}
