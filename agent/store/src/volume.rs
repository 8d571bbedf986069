//! Volumes and their snapshots.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use muster_block::BlockDevice;
use muster_common::{ByteLen, Digest, TenantId, VolumeId};

use crate::{Image, StoreError, VolumeSpec, VolumeStats, config::WhenFull, disk::Disk, store::Room};

/// A disk that started as an image, a snapshot or zeroes, and goes its own way.
///
/// As a [`BlockDevice`] it takes any byte range; whole 4 KiB blocks are served best. After
/// [`Store::delete_volume`](crate::Store::delete_volume) every request fails as fenced.
pub struct Volume {
    pub(crate) disk: Disk,
    id: VolumeId,
    base: Option<Digest>,
    origin: Origin,
    generation: AtomicU64,
    tenant: Option<TenantId>,
    /// Bytes; 0 without one.
    quota: AtomicU64,
    reservation: Option<ByteLen>,
    when_full: WhenFull,
}

/// What a reset goes back to.
pub(crate) enum Origin {
    Blank,
    Image(Arc<Image>),
    Snapshot(Snapshot),
}

impl Origin {
    pub(crate) fn disk(&self) -> Option<&Disk> {
        match self {
            Origin::Blank => None,
            Origin::Image(image) => Some(&image.disk),
            Origin::Snapshot(snapshot) => Some(&snapshot.disk),
        }
    }
}

impl Volume {
    pub(crate) fn new(disk: Disk, spec: &VolumeSpec, origin: Origin) -> Volume {
        Volume {
            disk,
            id: spec.id,
            base: spec.base,
            origin,
            generation: AtomicU64::new(spec.generation),
            tenant: spec.tenant,
            quota: AtomicU64::new(spec.quota.map_or(0, ByteLen::bytes)),
            reservation: spec.reservation,
            when_full: spec.when_full,
        }
    }

    pub fn id(&self) -> VolumeId {
        self.id
    }

    /// With the id it names the export. Grows by one when the contents go back or become another snapshot's.
    pub fn generation(&self) -> u64 {
        self.generation.load(Relaxed)
    }

    /// The image it was made from.
    pub fn base(&self) -> Option<Digest> {
        self.base
    }

    pub fn size(&self) -> ByteLen {
        self.disk.size()
    }

    /// The most it may map of what it has written itself.
    pub fn quota(&self) -> Option<ByteLen> {
        Some(ByteLen(self.quota.load(Relaxed))).filter(|quota| *quota > ByteLen::ZERO)
    }

    pub fn reservation(&self) -> Option<ByteLen> {
        self.reservation
    }

    pub fn when_full(&self) -> WhenFull {
        self.when_full
    }

    /// The volume as it is now, for ever: of writes that returned all is in it, of writes under way any blocks may be.
    /// Takes microseconds and about a kilobyte, whatever the size.
    pub fn snapshot(&self) -> Result<Snapshot, StoreError> {
        let _inside = self.disk.inner.engine.world.enter();
        Ok(Snapshot { disk: Arc::new(self.disk.fork(self.disk.map.size(), true)?) })
    }

    /// Makes the volume larger; what is added reads as zero. Quota and reservation stay what they are. Whoever shows it to a
    /// guest tells the guest afterwards.
    pub fn grow(&self, size: ByteLen) -> Result<(), StoreError> {
        Disk::check_size(size)?;
        let inner = &self.disk.inner;
        let _inside = inner.engine.world.enter();
        if size < self.size() {
            return Err(StoreError::Shrink { size: self.size(), wanted: size });
        }
        let note = |top| {
            inner.records.change(self.disk.record(), |variant| {
                variant.top = top;
                variant.size = size.bytes();
            });
        };
        let undo = self.disk.charge_growth(size)?;
        inner.engine.grow(&self.disk.map, size.bytes(), note).map_err(|refused| {
            undo();
            inner.refused(&self.disk.map, refused)
        })
    }

    /// Whether this many bytes of blocks nobody else has could be written now, as far as quota, reservation and the
    /// store's memory go: what [`WhenFull::Spill`] would make room for is not counted. A promise to nobody: somebody else
    /// may write first.
    pub fn would_fit(&self, new_unique: ByteLen) -> bool {
        let engine = &self.disk.inner.engine;
        let blocks = new_unique.bytes().div_ceil(4096);
        !self.quota_is_used_up() && (self.disk.map.account.spare_frames() > 0 || Room::of(engine).holds(blocks))
    }

    /// The quota holds no further request of the largest piece that is written at once (64 blocks).
    pub fn quota_is_used_up(&self) -> bool {
        self.disk.map.account.quota_left().is_some_and(|left| left < 64)
    }

    /// It was made with a quota or a reservation: what it writes is counted, so its quota can be changed.
    pub fn takes_quota(&self) -> bool {
        self.disk.map.account.counts()
    }

    /// Changes the quota of a volume that was made with one, or with a reservation.
    pub fn set_quota(&self, quota: ByteLen) -> bool {
        if !self.takes_quota() {
            return false;
        }
        self.disk.inner.records.change(self.disk.record(), |variant| variant.quota = quota.bytes());
        self.quota.store(quota.bytes(), Relaxed);
        self.disk.map.account.set_quota(quota.bytes());
        true
    }

    /// Back to what it was made from, at one instant; returns the new generation. Whoever shows the volume to a guest
    /// withdraws it first: to a guest this is a disk swapped while it runs.
    pub fn reset(&self) -> Result<u64, StoreError> {
        self.become_copy_of(self.origin.disk())
    }

    /// Becomes the snapshot, which is not larger, at one instant; returns the new generation.
    pub fn revert(&self, snapshot: &Snapshot) -> Result<u64, StoreError> {
        if !Arc::ptr_eq(&snapshot.disk.inner, &self.disk.inner) {
            return Err(StoreError::ForeignSnapshot);
        }
        if snapshot.disk.size() > self.size() {
            return Err(StoreError::SmallerThanBase { size: self.size(), base: snapshot.disk.size() });
        }
        self.become_copy_of(Some(&snapshot.disk))
    }

    fn become_copy_of(&self, other: Option<&Disk>) -> Result<u64, StoreError> {
        let inner = &self.disk.inner;
        let _inside = inner.engine.world.enter();
        let map = &self.disk.map;
        let size = map.size();
        let trees = match other {
            None => inner.engine.empty_trees(size).map_err(|failed| inner.refused(map, failed.into()))?,
            Some(other) => other.fork_trees(size)?,
        };
        let mut generation = 0;
        let note = |top| {
            // under the locks of the whole map, so that generation and contents go together
            generation = self.generation.fetch_add(1, Relaxed) + 1;
            inner.records.change(self.disk.record(), |variant| {
                variant.top = top;
                variant.generation = generation;
            });
        };
        inner.engine.install(map, trees, note).map_err(|refused| inner.refused(map, refused))?;
        if map.account.counts() {
            self.count_own()?;
            inner.fill_reserve(map, false)?;
        }
        Ok(generation)
    }

    /// Finds out which blocks are the volume's own: those that differ from its origin.
    pub(crate) fn count_own(&self) -> Result<(), StoreError> {
        let (inner, map) = (&self.disk.inner, &self.disk.map);
        let engine = &inner.engine;
        let refused = |refused| inner.refused(map, refused);
        match self.origin.disk() {
            None => {
                let mut leaves = std::collections::HashMap::<u64, u64>::new();
                engine
                    .for_each_block(map, |block, _| *leaves.entry(block / 64).or_default() |= 1 << (block % 64))
                    .map_err(refused)?;
                leaves.into_iter().for_each(|(leaf, bits)| map.account.found_own(leaf, bits));
            }
            Some(origin) => {
                for (leaf, bits) in engine.differing_leaves(map, &origin.map).map_err(refused)? {
                    let mapped = engine.mapped_bits(map, leaf);
                    map.account.found_own(leaf, bits & mapped);
                }
            }
        }
        Ok(())
    }

    /// Walks what differs from the origin; all that is shared with it is skipped.
    pub fn stats(&self) -> VolumeStats {
        let changed = match self.origin.disk() {
            None => self.disk.map.mapped() * 4096,
            // a deleted volume has nothing of its own
            Some(origin) => {
                self.disk.differences(origin).map_or(0, |ranges| ranges.into_iter().map(|(_, len)| len).sum())
            }
        };
        VolumeStats {
            id: self.id,
            generation: self.generation(),
            base: self.base,
            size: self.size(),
            read_only: self.geometry().read_only,
            tenant: self.tenant,
            quota: self.quota(),
            reservation: self.reservation,
            when_full: self.when_full,
            mapped_bytes: ByteLen(self.disk.map.mapped() * 4096),
            changed_bytes: ByteLen(changed),
        }
    }
}

/// A volume as it was at one instant: a read-only [`BlockDevice`]. Cheap to clone; what only it holds is freed when the
/// last clone goes.
#[derive(Clone)]
pub struct Snapshot {
    pub(crate) disk: Arc<Disk>,
}

impl Snapshot {
    pub fn size(&self) -> ByteLen {
        self.disk.size()
    }

    /// Byte ranges (offset, length), ascending, that may hold other bytes than in the other snapshot (usually an older
    /// one of the same volume): what an incremental backup reads. Looks only at what the two do not share.
    pub fn changed_since(&self, older: &Snapshot) -> Result<Vec<(u64, u64)>, StoreError> {
        self.disk.differences(&older.disk)
    }
}
