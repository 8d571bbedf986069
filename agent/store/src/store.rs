//! The store: what the rest of the agent holds.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use muster_common::{ByteLen, Digest, SnapshotId, TenantId, VolumeId};
use parking_lot::{Mutex, RwLock};

use crate::{
    AuditReport, Image, ImageBuilder, ImageInfo, PageKind, Snapshot, SnapshotInfo, StoreConfig, StoreError, StoreStats,
    VerifyReport, Volume, VolumeSpec,
    account::{Account, Limits},
    arena::BLOCK,
    attach::{AttachReport, Found},
    audit::Recount,
    config::WhenFull,
    disk::{Disk, Holder},
    frames::{BESIDE_FRAME, Domain, Engine, Frames, STICKY_FRAME},
    index::{self, IndexCounts},
    map::{Map, NODE_COST, Nodes, Refused, height_of},
    memory::{Directory, Memory, private_pages},
    pool::Budget,
    records::{Kind, LABEL, Layout, Record, Records, TENANTS, Variant},
    spill::Spill,
    sync::World,
    volume::Origin,
};

mod open;
mod snapshots;

/// Below this a store could not hold its own tables and a handful of blocks.
const LEAST_BUDGET: ByteLen = ByteLen::mib(1);
/// Frame numbers are 32 bits.
const MOST_BUDGET: ByteLen = ByteLen::gib(16 << 10);
/// What is taken at opening: the empty index, pools, locks.
const FIXED: u64 = index::FIXED + 24_576;
/// What listing one more block in the index takes, at most.
const LISTING: u64 = 14;
/// What mapping one more block takes, at most, where blocks come in runs.
const MAPPING: u64 = 5;
/// Blocks that a free map node is good for, counting the nodes above it.
const NODE_MAPS: u64 = 60;
/// Numbers taken at a time for a reservation, so that others get their turn.
const RESERVE_STEP: u64 = 4096;

/// The images and volumes of one host, in memory. Cheap to clone: a handle. When the last handle goes, the store is
/// closed; volumes and images somebody still holds go on until they are let go. Memory in a directory stays as it is then,
/// for the next [`Store::open_or_attach`], unless it was discarded.
#[derive(Clone)]
pub struct Store {
    owner: Arc<Owner>,
}

/// Breaks the circle between the store and the volumes in its table.
struct Owner {
    inner: Arc<Inner>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _inside = self.inner.engine.world.enter_again();
        if matches!(self.inner.memory, Memory::Shared(_)) {
            self.inner.leaving.store(true, SeqCst);
        }
        let snapshots = std::mem::take(&mut *self.inner.snapshots.write());
        let volumes = std::mem::take(&mut *self.inner.volumes.write());
        let images = std::mem::take(&mut *self.inner.images.write());
        drop((snapshots, volumes, images));
    }
}

/// How a store came to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attached {
    /// Empty. The reason, when there was something that could not be used.
    Fresh(Option<String>),
    /// With everything an earlier process had.
    Warm(AttachReport),
}

/// A snapshot on the books of the store.
struct Kept {
    info: SnapshotInfo,
    snapshot: Snapshot,
}

/// Lock order: world, images, volumes, snapshots, then building or books, then a map's stripes (ascending), an index shard,
/// a pool's cache, its central list. Nobody enters the world with one of the others held, unless inside already.
pub(crate) struct Inner {
    pub(crate) engine: Engine,
    pub(crate) memory: Memory,
    pub(crate) records: Records,
    /// The memory is left to the next process: nothing is given back any more.
    leaving: AtomicBool,
    key: [u8; 32],
    images: RwLock<BTreeMap<Digest, Arc<Image>>>,
    volumes: RwLock<HashMap<VolumeId, Arc<Volume>>>,
    snapshots: RwLock<BTreeMap<SnapshotId, Kept>>,
    /// Digests of images being brought in.
    pub(crate) building: Mutex<HashSet<Digest>>,
    books: Mutex<Books>,
}

/// Every map that holds references, by number.
#[derive(Default)]
struct Books {
    next: u64,
    maps: HashMap<u64, Arc<Map>>,
}

/// For people.
fn describe(record: &Record) -> String {
    match (record.kind, record.digest) {
        (Kind::Image, Some(digest)) => format!("image {} ({})", digest.short(), record.label),
        (Kind::Image, None) => format!("an image ({})", record.label),
        (Kind::Volume, _) => format!("volume {}", record.id),
        (Kind::Snapshot, _) => format!("snapshot {:?} of volume {}", record.label, record.of),
    }
}

/// µs since 1970.
pub(crate) fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

impl Inner {
    pub(crate) fn enter_in_books(&self, map: &Arc<Map>) -> u64 {
        let mut books = self.books.lock();
        books.next += 1;
        let number = books.next;
        books.maps.insert(number, Arc::clone(map));
        number
    }

    pub(crate) fn strike_from_books(&self, number: u64) {
        self.books.lock().maps.remove(&number);
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.load(SeqCst)
    }

    pub(crate) fn full(&self, needed: u64) -> StoreError {
        self.engine.world.count_no_space();
        StoreError::NoSpace { budget: ByteLen(self.engine.budget.limit()), needed: ByteLen(needed) }
    }

    pub(crate) fn refused(&self, map: &Map, refused: Refused) -> StoreError {
        match refused {
            Refused::Full => self.full(BLOCK as u64),
            Refused::Closed => StoreError::Deleted,
            Refused::Quota => StoreError::Quota { quota: ByteLen(map.account.quota().unwrap_or(0)) },
            Refused::Lost => StoreError::Damaged,
        }
    }

    /// All maps there are.
    pub(crate) fn maps(&self) -> Vec<Arc<Map>> {
        self.books.lock().maps.values().map(Arc::clone).collect()
    }

    /// Makes the image visible, and one that is found again.
    pub(crate) fn add_image(&self, image: Image) -> Result<Arc<Image>, StoreError> {
        let _inside = self.engine.world.enter();
        let image = Arc::new(image);
        let mut images = self.images.write();
        if images.contains_key(&image.digest()) {
            return Err(StoreError::ImageExists(image.digest()));
        }
        image.disk.note(&Image::record(&image.disk, image.digest(), image.name()))?;
        images.insert(image.digest(), Arc::clone(&image));
        Ok(image)
    }

    /// The domain of a tenant, made when it is new.
    fn domain(&self, tenant: Option<TenantId>) -> Result<Arc<Domain>, StoreError> {
        let tenant = tenant.map_or([0; 16], |tenant| *tenant.uuid().as_bytes());
        let known = |domains: &[Arc<Domain>]| domains.iter().find(|domain| domain.tenant == tenant).map(Arc::clone);
        if let Some(domain) = known(&self.engine.domains.read()) {
            return Ok(domain);
        }
        let mut domains = self.engine.domains.write();
        if let Some(domain) = known(&domains) {
            return Ok(domain);
        }
        let number = u8::try_from(domains.len()).ok().filter(|number| usize::from(*number) < TENANTS);
        let number = number.ok_or(StoreError::TooManyTenants)?;
        self.records.set_tenant(number, tenant);
        let domain = Arc::new(Domain::new(number, &self.key, tenant));
        domains.push(Arc::clone(&domain));
        Ok(domain)
    }

    /// Keeps frames and nodes aside until a reservation is whole, with memory that the machine has given.
    pub(crate) fn fill_reserve(&self, map: &Map, after_cut: bool) -> Result<(), StoreError> {
        self.fill_frames(map, after_cut)?;
        self.fill_nodes(map, after_cut)
    }

    /// Keeps the frames aside that the map's reservation lacks.
    pub(crate) fn fill_frames(&self, map: &Map, after_cut: bool) -> Result<(), StoreError> {
        let engine = &self.engine;
        loop {
            let lack = map.account.lack(after_cut).frames;
            if lack == 0 {
                return Ok(());
            }
            let wanted = lack.min(RESERVE_STEP);
            let mut frames: Vec<u32> = (0..wanted).map_while(|_| engine.take_frame()).collect();
            frames.sort_unstable();
            if frames.len() as u64 != wanted || !engine.populate(&frames) {
                frames.into_iter().for_each(|frame| engine.put_frame(frame));
                return Err(self.full(lack * BLOCK as u64));
            }
            map.account.fill(frames, Vec::new());
        }
    }

    /// The same with nodes.
    pub(crate) fn fill_nodes(&self, map: &Map, after_cut: bool) -> Result<(), StoreError> {
        let engine = &self.engine;
        loop {
            let lack = map.account.lack(after_cut).nodes;
            if lack == 0 {
                return Ok(());
            }
            let wanted = lack.min(RESERVE_STEP);
            let nodes: Vec<u32> = (0..wanted).map_while(|_| engine.take_free_node()).collect();
            if nodes.len() as u64 != wanted {
                nodes.into_iter().for_each(|node| engine.put_node(node));
                return Err(self.full(lack * NODE_COST));
            }
            map.account.fill(Vec::new(), nodes);
        }
    }

    /// Gives back what was kept aside.
    pub(crate) fn empty_reserve(&self, map: &Map) {
        let (frames, nodes) = map.account.empty();
        frames.into_iter().for_each(|frame| self.engine.put_frame(frame));
        nodes.into_iter().for_each(|node| self.engine.put_node(node));
    }

    fn verify(&self, disk: &Disk) -> Result<VerifyReport, StoreError> {
        // A copy, so that the disk goes on meanwhile and no lock of it is held for long.
        let copy = {
            let _inside = self.engine.world.enter();
            let paid = Disk::pay(&disk.inner, disk.map.size(), Limits::default())?;
            let trees = self.engine.fork(&disk.map, disk.map.size()).map_err(|r| self.refused(&disk.map, r))?;
            let holder = Holder { domain: Arc::clone(&disk.map.domain), limits: Limits::default() };
            Disk::new(paid, disk.map.size(), trees, holder, true)
        };
        let mut report = VerifyReport::default();
        self.engine
            .for_each_block(&copy.map, |block, frame| {
                report.blocks += 1;
                if !self.engine.is_sound(frame) && report.bad.len() < 1000 {
                    report.bad.push(block * BLOCK as u64);
                }
            })
            .map_err(|refused| self.refused(&copy.map, refused))?;
        report.bad.sort_unstable();
        Ok(report)
    }
}

/// What is left, part by part: memory the store has but does not use counts as well.
pub(crate) struct Room {
    free: u64,
    frames: u64,
    granule: u64,
    listings: u64,
    mappings: u64,
}

impl Room {
    pub(crate) fn of(engine: &Engine) -> Room {
        Room {
            free: engine.budget.limit().saturating_sub(engine.budget.charged()),
            frames: engine.frames.pool.stats().kept,
            granule: u64::from(engine.frames.pool.granule()),
            listings: engine.frames.index.counts().room,
            mappings: engine.nodes.pool.stats().kept * NODE_MAPS,
        }
    }

    /// Whether this many new unique blocks fit.
    pub(crate) fn holds(&self, blocks: u64) -> bool {
        let frames = blocks.saturating_sub(self.frames).next_multiple_of(self.granule);
        let bytes = frames * (BLOCK as u64 + BESIDE_FRAME)
            + blocks.saturating_sub(self.listings) * LISTING
            + blocks.saturating_sub(self.mappings) * MAPPING;
        bytes <= self.free
    }

    /// The most new unique blocks that fit.
    fn blocks(&self) -> u64 {
        let (mut fit, mut not) = (0, self.frames + self.free / BLOCK as u64 + 1);
        while not - fit > 1 {
            let middle = fit + (not - fit) / 2;
            if self.holds(middle) { fit = middle } else { not = middle }
        }
        fit
    }
}

impl Store {
    fn inner(&self) -> &Arc<Inner> {
        &self.owner.inner
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.owner.inner.engine
    }

    /// Begins to bring an image in.
    pub fn image_builder(&self, digest: Digest, name: &str, size: ByteLen) -> Result<ImageBuilder, StoreError> {
        Disk::check_size(size)?;
        Self::check_name(name)?;
        let inner = self.inner();
        let _inside = inner.engine.world.enter();
        if inner.images.read().contains_key(&digest) {
            return Err(StoreError::ImageExists(digest));
        }
        let disk =
            self.blank(size.bytes(), Holder { domain: inner.domain(None)?, limits: Limits::default() }, false)?;
        ImageBuilder::new(inner, digest, name, disk)
    }

    fn check_name(name: &str) -> Result<(), StoreError> {
        if name.len() > LABEL { Err(StoreError::Name(name.to_owned())) } else { Ok(()) }
    }

    fn blank(&self, size: u64, holder: Holder, read_only: bool) -> Result<Disk, StoreError> {
        let inner = self.inner();
        let paid = Disk::pay(inner, size, holder.limits)?;
        let trees = inner.engine.with_room(|_| true, || inner.engine.empty_trees(size));
        let trees = trees.map_err(|_| inner.full(NODE_COST))?;
        Ok(Disk::new(paid, size, trees, holder, read_only))
    }

    /// All resident images, in the order of their digests.
    pub fn images(&self) -> Vec<ImageInfo> {
        let images = self.inner().images.read();
        let mut users: HashMap<Digest, usize> = HashMap::new();
        for volume in self.inner().volumes.read().values() {
            if let Some(base) = volume.base() {
                *users.entry(base).or_default() += 1;
            }
        }
        let info = |image: &Arc<Image>| ImageInfo {
            digest: image.digest(),
            name: image.name().to_owned(),
            size: image.size(),
            mapped_bytes: ByteLen(image.disk.map.mapped() * BLOCK as u64),
            volumes: users.get(&image.digest()).copied().unwrap_or(0),
        };
        images.values().map(info).collect()
    }

    pub fn image(&self, digest: &Digest) -> Option<Arc<Image>> {
        self.inner().images.read().get(digest).map(Arc::clone)
    }

    /// Forgets an image no volume is made from. What only it holds is freed when the last `Arc` of it goes, here and now
    /// as a rule.
    pub fn drop_image(&self, digest: &Digest) -> Result<(), StoreError> {
        let inner = self.inner();
        let _inside = inner.engine.world.enter();
        let image = {
            let mut images = inner.images.write();
            let users = inner.volumes.read().values().filter(|volume| volume.base() == Some(*digest)).count();
            if users > 0 {
                return Err(StoreError::ImageInUse { digest: *digest, volumes: users });
            }
            images.remove(digest).ok_or(StoreError::ImageNotFound(*digest))?
        };
        image.disk.strike();
        drop(image);
        Ok(())
    }

    /// Keeps a snapshot as an image: how a session's changes become a new version. Copies nothing.
    pub fn commit(&self, snapshot: &Snapshot, digest: Digest, name: &str) -> Result<Arc<Image>, StoreError> {
        self.check_ours(snapshot)?;
        Self::check_name(name)?;
        let disk = {
            let _inside = self.engine().world.enter();
            let nobody = Holder { domain: self.inner().domain(None)?, limits: Limits::default() };
            snapshot.disk.fork_for(snapshot.disk.map.size(), nobody, true)?
        };
        self.inner().add_image(Image::new(disk, digest, name))
    }

    /// A blank volume, or a clone of an image: that takes microseconds and about a kilobyte, whatever the size.
    pub fn create_volume(&self, spec: VolumeSpec) -> Result<Arc<Volume>, StoreError> {
        let inner = self.inner();
        let _inside = inner.engine.world.enter();
        // held to the end, so that the image is not dropped meanwhile
        let images = inner.images.read();
        let origin = match spec.base {
            None => Origin::Blank,
            Some(digest) => {
                Origin::Image(images.get(&digest).map(Arc::clone).ok_or(StoreError::ImageNotFound(digest))?)
            }
        };
        self.add_volume(spec, origin)
    }

    /// As [`Store::create_volume`], but it starts as the snapshot, and a reset goes back to that. `spec.base` only says
    /// which image it descends from, and keeps that one from being dropped.
    pub fn create_volume_from(&self, spec: VolumeSpec, snapshot: &Snapshot) -> Result<Arc<Volume>, StoreError> {
        self.check_ours(snapshot)?;
        let inner = self.inner();
        let _inside = inner.engine.world.enter();
        let images = inner.images.read();
        if let Some(base) = spec.base.filter(|base| !images.contains_key(base)) {
            return Err(StoreError::ImageNotFound(base));
        }
        // a copy of its own, which is found again with the volume whatever becomes of the snapshot
        let origin = Snapshot { disk: Arc::new(snapshot.disk.fork(snapshot.disk.map.size(), true)?) };
        self.add_volume(spec, Origin::Snapshot(origin))
    }

    fn check_ours(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        if Arc::ptr_eq(&snapshot.disk.inner, self.inner()) { Ok(()) } else { Err(StoreError::ForeignSnapshot) }
    }

    fn add_volume(&self, spec: VolumeSpec, origin: Origin) -> Result<Arc<Volume>, StoreError> {
        let inner = self.inner();
        let base_size = origin.disk().map(Disk::size);
        let size = spec.size.or(base_size).unwrap_or(ByteLen::ZERO);
        Disk::check_size(size)?;
        if let Some(base) = base_size.filter(|base| size < *base) {
            return Err(StoreError::SmallerThanBase { size, base });
        }
        let mut volumes = inner.volumes.write();
        if volumes.contains_key(&spec.id) {
            return Err(StoreError::VolumeExists(spec.id));
        }
        let limits = Limits {
            when_full: spec.when_full,
            quota: spec.quota.map_or(0, ByteLen::bytes),
            reservation: spec.reservation.map_or(0, ByteLen::bytes),
        };
        let holder = Holder { domain: inner.domain(spec.tenant)?, limits };
        let tenant = holder.domain.number;
        let disk = match origin.disk() {
            None => self.blank(size.bytes(), holder, spec.read_only)?,
            Some(base) => base.fork_for(size.bytes(), holder, spec.read_only)?,
        };
        inner.fill_reserve(&disk.map, false)?;
        let origin_record = match &origin {
            Origin::Snapshot(snapshot) => {
                snapshot.disk.note(&Self::snapshot_record(snapshot, SnapshotId::random(), "", None))?;
                snapshot.disk.record()
            }
            _ => 0,
        };
        disk.note(&Record {
            kind: Kind::Volume,
            id: spec.id,
            digest: spec.base,
            read_only: spec.read_only,
            origin: origin_record,
            tenant,
            of: VolumeId::from_bytes([0; 16]),
            made_us: now_us(),
            label: String::new(),
            variant: Variant {
                top: disk.map.top(),
                policy: u32::from(spec.when_full == WhenFull::Spill),
                generation: spec.generation,
                size: size.bytes(),
                quota: limits.quota,
                reservation: limits.reservation,
            },
        })?;
        let volume = Arc::new(Volume::new(disk, &spec, origin));
        volumes.insert(spec.id, Arc::clone(&volume));
        Ok(volume)
    }

    /// All volumes, in the order of their ids.
    pub fn volumes(&self) -> Vec<Arc<Volume>> {
        let mut volumes: Vec<_> = self.inner().volumes.read().values().map(Arc::clone).collect();
        volumes.sort_unstable_by_key(|volume| volume.id());
        volumes
    }

    pub fn volume(&self, id: VolumeId) -> Option<Arc<Volume>> {
        self.inner().volumes.read().get(&id).map(Arc::clone)
    }

    /// Frees the volume's memory before it returns. Requests on handles that are still about fail as fenced; its
    /// snapshots stay.
    pub fn delete_volume(&self, id: VolumeId) -> Result<(), StoreError> {
        let inner = self.inner();
        let _inside = inner.engine.world.enter();
        let volume = inner.volumes.write().remove(&id).ok_or(StoreError::VolumeNotFound(id))?;
        volume.disk.strike();
        inner.engine.close(&volume.disk.map);
        inner.empty_reserve(&volume.disk.map);
        Ok(())
    }

    /// Reads every block of the volume as it is now and hashes it again.
    pub fn verify_volume(&self, id: VolumeId) -> Result<VerifyReport, StoreError> {
        let volume = self.volume(id).ok_or(StoreError::VolumeNotFound(id))?;
        self.inner().verify(&volume.disk)
    }

    /// Reads every block of the image and hashes it again.
    pub fn verify_image(&self, digest: &Digest) -> Result<VerifyReport, StoreError> {
        let image = self.image(digest).ok_or(StoreError::ImageNotFound(*digest))?;
        self.inner().verify(&image.disk)
    }

    /// Stops all changes (not reads), counts all references again, and compares. Takes about a second for 16 GiB.
    pub fn audit(&self) -> AuditReport {
        let inner = self.inner();
        let _stopped = inner.engine.world.stop();
        let mut recount = Recount::new(&inner.engine);
        let maps = inner.maps();
        for map in &maps {
            recount.add(map);
        }
        recount.compare();
        let kept: u64 = maps.iter().map(|map| map.account.kept_frames()).sum();
        let used = inner.engine.frames.pool.stats().used - kept;
        let frames = recount.frames.iter().filter(|&&count| count > 0).count() as u64;
        if frames != used && inner.engine.sticky == STICKY_FRAME {
            recount.fault(format!("{used} frames are in use, {frames} are referred to"));
        }
        let (images, volumes) = (inner.images.read().len(), inner.volumes.read().len());
        AuditReport {
            frames,
            frame_references: recount.frames.iter().map(|&count| u64::from(count)).sum(),
            nodes: recount.nodes.iter().filter(|&&count| count > 0).count() as u64,
            maps: maps.len(),
            images,
            volumes,
            faults: recount.faults,
        }
    }

    /// What the store holds and takes. Cheap enough for every second.
    pub fn stats(&self) -> StoreStats {
        let inner = self.inner();
        let engine = &inner.engine;
        let block = BLOCK as u64;
        let frames = engine.frames.pool.stats();
        let charged = engine.budget.charged();
        let (away, damaged) = engine.frames.marks.counts();
        let frame_bytes = (frames.resident - away) * block;
        let IndexCounts { hits: dedup_hits, misses: dedup_misses, .. } = engine.frames.index.counts();
        let (zero_blocks, no_space) = engine.world.counts();
        let maps = inner.maps();
        let logical = maps.iter().map(|map| map.mapped()).sum::<u64>() * block;
        let reserved: u64 = maps.iter().map(|map| map.account.kept_frames()).sum();
        let maps = maps.len();
        let (spill_writes, spill_reads) = engine.spill.as_ref().map_or((0, 0), Spill::counts);
        let (images, image_bytes) = {
            let images = inner.images.read();
            (images.len(), images.values().map(|image| image.size().bytes()).sum::<u64>())
        };
        let (volumes, volume_bytes) = {
            let volumes = inner.volumes.read();
            (volumes.len(), volumes.values().map(|volume| volume.size().bytes()).sum::<u64>())
        };
        let used = frames.used - reserved;
        let used_bytes = used * block;
        StoreStats {
            budget: ByteLen(engine.budget.limit()),
            resident_bytes: ByteLen(charged),
            frame_bytes: ByteLen(frame_bytes),
            metadata_bytes: ByteLen(charged.saturating_sub(frame_bytes)),
            unique_blocks: used,
            used_bytes: ByteLen(used_bytes),
            available_bytes: ByteLen(Room::of(engine).blocks() * block),
            logical_bytes: ByteLen(logical),
            provisioned_bytes: ByteLen(image_bytes + volume_bytes),
            dedup_ratio: if used_bytes == 0 { 1.0 } else { logical as f64 / used_bytes as f64 },
            zero_blocks,
            dedup_hits,
            dedup_misses,
            no_space,
            images,
            volumes,
            snapshots: maps.saturating_sub(images + volumes),
            reserved_bytes: ByteLen(reserved * block),
            spilled_bytes: ByteLen(away * block),
            spill_writes,
            spill_reads,
            damaged_blocks: damaged,
            pages: engine.pages,
            shared: matches!(inner.memory, Memory::Shared(_)),
        }
    }

    /// Gives memory back to the machine that free blocks still take, 4 MiB at most: how much. Needed with transparent huge pages
    /// only, and for as long as the answer is not 0: a huge page that is free goes back at once, one that is free in part goes
    /// back in part by this call, those with the most free blocks first, as far as more is free than stays for the next
    /// writes (1/128 of the budget, 128 MiB at most). What it leaves behind are small pages, which cost reads some speed.
    ///
    /// And makes holes in the spill file where blocks are not wanted any more, some at a time, 256 KiB and more in a row.
    /// Without this call that room is used for what is spilled next, and all of it goes back to the disk with the next call
    /// after the last block came back.
    pub fn give_back(&self) -> ByteLen {
        let engine = self.engine();
        let _inside = engine.world.enter();
        engine.tidy_spilled();
        ByteLen((engine.cut_frames(engine.frames.pool.keep()) * BLOCK) as u64)
    }

    /// Whether this many bytes of blocks the store has never seen fit now, their metadata included. A promise to nobody:
    /// somebody else may write first.
    pub fn would_fit(&self, new_unique: ByteLen) -> bool {
        Room::of(self.engine()).holds(new_unique.bytes().div_ceil(BLOCK as u64))
    }

    /// What the spill file still takes; `None`: the store has none.
    pub fn spill_room(&self) -> Option<ByteLen> {
        let engine = self.engine();
        let away = engine.frames.marks.counts().0;
        engine.spill.as_ref().map(|spill| ByteLen(spill.limit().saturating_sub(away) * BLOCK as u64))
    }
}

#[cfg(test)]
mod tests {
    use muster_block::{BlockDevice, WriteFlags, conformance::Random};

    use super::*;
    use crate::Pages;

    fn store(pages: Pages) -> Store {
        Store::open(StoreConfig { pages, ..StoreConfig::new(ByteLen::mib(64)) }).unwrap()
    }

    fn blank(store: &Store, mib: u64) -> Arc<Volume> {
        store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(mib))).unwrap()
    }

    fn fill(volume: &Volume, seed: u64, blocks: u64) {
        let mut block = [0; BLOCK];
        for n in 0..blocks {
            Random(seed << 32 | n).fill(&mut block);
            volume.write_at(n * BLOCK as u64, &block, WriteFlags::default()).unwrap();
        }
    }

    #[test]
    fn verification_finds_a_flipped_bit() {
        let store = store(Pages::Small);
        let volume = blank(&store, 1);
        fill(&volume, 1, 100);
        assert_eq!(store.verify_volume(volume.id()).unwrap(), VerifyReport { blocks: 100, bad: vec![] });
        let mut frame = 0;
        store
            .engine()
            .for_each_block(&volume.disk.map, |block, at| {
                if block == 70 {
                    frame = at
                }
            })
            .unwrap();
        store.engine().frames.flip_a_bit(frame);
        assert_eq!(store.verify_volume(volume.id()).unwrap(), VerifyReport { blocks: 100, bad: vec![70 * 4096] });
    }

    #[test]
    fn a_count_that_sticks_keeps_the_block_and_loses_nothing_else() {
        let config = StoreConfig { pages: Pages::Small, ..StoreConfig::new(ByteLen::mib(64)) };
        let (store, _) = Store::open_with(config, 3).unwrap();
        let volume = blank(&store, 1);
        volume.write_at(0, &[9; 1 << 20], WriteFlags::default()).unwrap();
        assert!(store.audit().is_exact(), "{:?}", store.audit().faults);
        volume.trim(0, 1 << 20).unwrap();
        assert_eq!(store.stats().unique_blocks, 1, "the block is kept");
        volume.write_at(0, &[9; BLOCK], WriteFlags::default()).unwrap();
        assert_eq!(store.stats().unique_blocks, 1, "and found again");
        let mut buf = [0; BLOCK];
        volume.read_at(0, &mut buf).unwrap();
        assert_eq!(buf, [9; BLOCK]);
    }

    #[test]
    fn memory_taken_from_the_machine_is_what_is_reported() {
        for pages in [Pages::Small, Pages::Transparent] {
            let store = Store::open(StoreConfig { pages, ..StoreConfig::new(ByteLen::mib(600)) }).unwrap();
            let volume = blank(&store, 256);
            let check = |what: &str| {
                let (frames, nodes) = (store.engine().frames.pool.stats(), store.engine().nodes.pool.stats());
                let beside = u64::from(frames.next) * BESIDE_FRAME + u64::from(nodes.next) * 4;
                let charged = store.stats().frame_bytes.bytes() + nodes.resident * 256 + beside;
                let resident = resident(&store);
                // a huge page charged before it is touched, and the last pages of the tables
                assert!(
                    resident <= charged + (64 << 10) && resident + (3 << 20) >= charged,
                    "{what}, {pages:?} pages: {resident} in smaps, {charged} charged"
                );
            };
            fill(&volume, 7, 256 << 8);
            check("full");
            volume.trim(0, 192 << 20).unwrap();
            check("three quarters trimmed");
            // 1/128 of the budget stays, and what is in caches
            let give_back = |used: u64| {
                while store.give_back() > ByteLen::ZERO {}
                let stats = store.stats();
                assert_eq!(stats.used_bytes, ByteLen::mib(used));
                assert!(stats.frame_bytes <= ByteLen::mib(used + 6), "{stats:?}");
            };
            give_back(64);
            check("three quarters given back");
            (192 << 8..256 << 8).step_by(2).for_each(|block| volume.trim(block << 12, 4096).unwrap());
            give_back(32);
            check("every second block of the rest given back");
            for block in 192 << 8..256 << 8 {
                let (mut found, mut expected) = ([0; BLOCK], [0; BLOCK]);
                volume.read_at(block << 12, &mut found).unwrap();
                if block % 2 == 1 {
                    Random(7 << 32 | block).fill(&mut expected);
                }
                assert!(found == expected, "block {block}");
            }
            assert!(store.audit().is_exact());
            fill(&volume, 8, 256 << 8);
            check("full again");
            assert!(store.audit().is_exact());
            store.delete_volume(volume.id()).unwrap();
            check("deleted");
            assert_eq!(store.stats().used_bytes, ByteLen::ZERO);
            store.engine().reclaim();
            check("reclaimed");
            assert!(store.stats().resident_bytes < ByteLen::mib(4), "{:?}", store.stats());
        }
    }

    /// What /proc/self/smaps says of the store's regions.
    fn resident(store: &Store) -> u64 {
        let engine = store.engine();
        let regions: Vec<_> = engine.frames.regions().into_iter().chain(engine.nodes.regions()).collect();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        let mut kib = 0;
        for line in smaps.lines() {
            let first = line.split_whitespace().next().unwrap_or("");
            if let Some((start, end)) = first.split_once('-') {
                let parse = |text| usize::from_str_radix(text, 16);
                if let (Ok(start), Ok(end)) = (parse(start), parse(end)) {
                    inside = regions.iter().any(|region| region.start < end && start < region.end);
                }
            } else if inside && first == "Rss:" {
                kib += line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
            }
        }
        kib << 10
    }
}
