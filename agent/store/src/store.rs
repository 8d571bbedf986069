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
        if !map.account.is_alone() {
            return Ok(());
        }
        let engine = &self.engine;
        loop {
            let lack = map.account.lack(after_cut);
            if lack.frames == 0 && lack.nodes == 0 {
                return Ok(());
            }
            let mut frames: Vec<u32> = (0..lack.frames.min(RESERVE_STEP)).map_while(|_| engine.take_frame()).collect();
            let nodes: Vec<u32> = (0..lack.nodes.min(RESERVE_STEP)).map_while(|_| engine.take_free_node()).collect();
            let refused = frames.len() as u64 != lack.frames.min(RESERVE_STEP)
                || nodes.len() as u64 != lack.nodes.min(RESERVE_STEP);
            frames.sort_unstable();
            if refused || !engine.populate(&frames) {
                frames.into_iter().for_each(|frame| engine.put_frame(frame));
                nodes.into_iter().for_each(|node| engine.put_node(node));
                return Err(self.full(lack.frames * BLOCK as u64));
            }
            map.account.fill(frames, nodes);
        }
    }

    /// Gives back what was kept aside.
    pub(crate) fn empty_reserve(&self, map: &Map) {
        let (frames, nodes) = map.account.empty();
        frames.into_iter().for_each(|frame| self.engine.put_frame(frame));
        nodes.into_iter().for_each(|node| self.engine.put_node(node));
    }

    /// Counts the references of all records. Those of trees that are not whole are dropped, and said.
    fn count_records(&self, records: &mut Vec<(u32, Record)>, report: &mut AttachReport) {
        let level = |record: &Record| height_of(record.variant.size) + 1;
        let trees = |records: &[(u32, Record)]| -> Vec<Found> {
            records.iter().map(|(_, record)| Found::new(record.variant.top, level(record))).collect()
        };
        let found = trees(records);
        self.engine.count_all(&found);
        if !found.iter().any(|tree| tree.damaged.load(SeqCst)) {
            return;
        }
        let mut tops = HashSet::new();
        records.retain(|(number, record)| {
            let top = record.variant.top;
            let whole = tops.insert(top) && self.engine.is_whole(top, level(record));
            if !whole {
                report.faults.push(format!("{} is damaged and lost", describe(record)));
                self.records.remove(*number);
            }
            whole
        });
        self.engine.forget_nodes();
        self.engine.count_all(&trees(records));
    }

    /// Makes images, snapshots and volumes of their records, in this order: each may need those before.
    fn make_again(self: &Arc<Self>, records: Vec<(u32, Record)>, report: &mut AttachReport) {
        let mut known = HashMap::new();
        let mut snapshots: HashMap<u32, Snapshot> = HashMap::new();
        let mut counted = Vec::new();
        for kind in [Kind::Image, Kind::Snapshot, Kind::Volume] {
            for (number, record) in records.iter().filter(|(_, record)| record.kind == kind) {
                let Variant { top, size, policy, quota, reservation, generation } = record.variant;
                let height = height_of(size);
                let trees =
                    self.engine.found_trees(size, top, |root| self.engine.mapped_below(root, height, &mut known));
                let domain = self.engine.domains.read().get(usize::from(record.tenant)).map(Arc::clone);
                let Some(domain) = domain else {
                    report.faults.push(format!("{} belongs to a tenant nobody knows", describe(record)));
                    continue;
                };
                let tenant = (domain.number != 0).then(|| TenantId::from_bytes(domain.tenant));
                let when_full = if policy == 1 { WhenFull::Spill } else { WhenFull::Refuse };
                let limits = Limits { when_full, quota, reservation };
                let disk = Disk::found(self, *number, record, trees, Holder { domain, limits });
                match (kind, record.digest) {
                    (Kind::Image, Some(digest)) => {
                        self.images.write().insert(digest, Arc::new(Image::new(disk, digest, &record.label)));
                    }
                    (Kind::Image, None) => {
                        report.faults.push(format!("{} has no digest", describe(record)));
                    }
                    (Kind::Snapshot, _) => {
                        let snapshot = Snapshot { disk: Arc::new(disk) };
                        snapshots.insert(*number, snapshot.clone());
                        let info = SnapshotInfo {
                            id: SnapshotId::from_uuid(record.id.uuid()),
                            label: record.label.clone(),
                            volume: record.of,
                            size: ByteLen(size),
                            kept_us: record.made_us,
                        };
                        // one without a volume is only what some volume is reset to
                        if record.of.uuid().is_nil() {
                            continue;
                        }
                        self.snapshots.write().insert(info.id, Kept { info, snapshot });
                    }
                    (Kind::Volume, base) => {
                        let image = base.and_then(|base| self.images.read().get(&base).map(Arc::clone));
                        let origin = match (record.origin, base, image) {
                            (0, None, _) => Some(Origin::Blank),
                            (0, Some(_), image) => image.map(Origin::Image),
                            (origin, ..) => snapshots.get(&origin).cloned().map(Origin::Snapshot),
                        };
                        let Some(origin) = origin else {
                            report
                                .faults
                                .push(format!("what {} was made from is lost, and so it is", describe(record)));
                            continue;
                        };
                        let limit = |bytes| Some(ByteLen(bytes)).filter(|limit| *limit > ByteLen::ZERO);
                        let spec = VolumeSpec {
                            id: record.id,
                            generation,
                            base,
                            size: Some(ByteLen(size)),
                            read_only: record.read_only,
                            tenant,
                            quota: limit(quota),
                            reservation: limit(reservation),
                            when_full,
                        };
                        let volume = Arc::new(Volume::new(disk, &spec, origin));
                        if volume.disk.map.account.counts() {
                            counted.push(Arc::clone(&volume));
                        }
                        self.volumes.write().insert(record.id, volume);
                    }
                }
            }
        }
        for volume in counted {
            if let Err(error) = self.find_account(&volume) {
                let text = format!("volume {}: its reservation is not whole: {error}", volume.id());
                report.faults.push(text);
            }
        }
    }

    /// What a volume with a quota or a reservation has written, and what has to be kept for it.
    fn find_account(&self, volume: &Volume) -> Result<(), StoreError> {
        volume.count_own()?;
        let map = &volume.disk.map;
        if map.account.is_alone() {
            let leaves = map.size().div_ceil(BLOCK as u64).div_ceil(64);
            for leaf in 0..leaves {
                let bits = self.engine.alone_bits(map, leaf);
                map.account.found_fresh(leaf, bits);
            }
        }
        self.fill_reserve(map, false)
    }

    fn verify(&self, disk: &Disk) -> Result<VerifyReport, StoreError> {
        // A copy, so that the disk goes on meanwhile and no lock of it is held for long.
        let copy = {
            let _inside = self.engine.world.enter();
            let trees = self.engine.fork(&disk.map, disk.map.size()).map_err(|r| self.refused(&disk.map, r))?;
            let holder = Holder { domain: Arc::clone(&disk.map.domain), limits: Limits::default() };
            Disk::new(&disk.inner, disk.map.size(), trees, holder, true)?
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
    /// Reserves the address space; memory is taken as it is used. As [`Store::open_or_attach`] for who does not care how.
    pub fn open(config: StoreConfig) -> Result<Store, StoreError> {
        Ok(Self::open_or_attach(config)?.0)
    }

    /// Opens a store; where the directory holds what an earlier process left, with all images, volumes and kept snapshots
    /// of it, in their generations and with every write that had returned.
    pub fn open_or_attach(config: StoreConfig) -> Result<(Store, Attached), StoreError> {
        Self::open_with(config, STICKY_FRAME)
    }

    pub(crate) fn open_with(config: StoreConfig, sticky: u32) -> Result<(Store, Attached), StoreError> {
        let start = Instant::now();
        let budget = config.budget;
        if budget < LEAST_BUDGET || budget > MOST_BUDGET {
            return Err(StoreError::Budget { budget, least: LEAST_BUDGET, most: MOST_BUDGET });
        }
        let (memory, left) = match &config.directory {
            None => (Memory::Private, false),
            Some(path) => {
                let (directory, left) = Directory::open(path, config.pages, budget.bytes())?;
                (Memory::Shared(directory), left)
            }
        };
        if left {
            match Self::attach(&config, memory, sticky, start) {
                Ok(Ok((store, report))) => return Ok((store, Attached::Warm(report))),
                Ok(Err((memory, why))) => {
                    if let Memory::Shared(directory) = &memory {
                        let path = config.directory.clone().unwrap_or_default();
                        let failed = |source| StoreError::Memory { action: "clear", path, source };
                        directory.clear().map_err(failed)?;
                    }
                    let store = Self::fresh(&config, memory, sticky)?;
                    return Ok((store, Attached::Fresh(Some(why))));
                }
                Err(error) => return Err(error),
            }
        }
        Ok((Self::fresh(&config, memory, sticky)?, Attached::Fresh(None)))
    }

    fn layout(config: &StoreConfig, pages: PageKind) -> Layout {
        let most = u64::from(u32::MAX - 1);
        let spilled = config.spill.as_ref().map_or(0, |spill| spill.limit.bytes());
        let budget = config.budget.bytes();
        Layout {
            pages,
            frames: (budget.saturating_add(spilled) / BLOCK as u64).min(most) as u32,
            nodes: (budget / NODE_COST).min(most) as u32,
        }
    }

    fn fresh(config: &StoreConfig, memory: Memory, sticky: u32) -> Result<Store, StoreError> {
        let pages = match &memory {
            Memory::Private => private_pages(config.pages, config.budget.bytes()),
            Memory::Shared(directory) => directory.choose_pages(config.pages, config.budget.bytes())?,
        };
        let layout = Self::layout(config, pages);
        let mut key = [0; 32];
        rand::fill(&mut key);
        let inner = Self::reserve(config, memory, layout, key, sticky, false)?;
        inner.records.begin(layout, &key);
        if !inner.engine.budget.charge(FIXED) {
            return Err(inner.full(FIXED));
        }
        Ok(Store { owner: Arc::new(Owner { inner: Arc::new(inner) }) })
    }

    /// Reserves address space over whatever lies there.
    fn reserve(
        config: &StoreConfig,
        memory: Memory,
        layout: Layout,
        key: [u8; 32],
        sticky: u32,
        keep_spilled: bool,
    ) -> Result<Inner, StoreError> {
        let map_error = |what| move |source| StoreError::Map { what, size: config.budget, source };
        let spill = match &config.spill {
            None => None,
            Some(spill) => {
                let failed =
                    |source| StoreError::Memory { action: "open spill file", path: spill.file.clone(), source };
                Some(Spill::open(spill, layout.frames, keep_spilled).map_err(failed)?)
            }
        };
        let engine = Engine {
            budget: Budget::new(config.budget.bytes()),
            frames: Frames::reserve(layout.frames, layout.pages, &memory).map_err(map_error("frames"))?,
            nodes: Nodes::reserve(layout.nodes, &memory).map_err(map_error("map nodes"))?,
            world: World::default(),
            pages: layout.pages,
            spill,
            domains: Default::default(),
            sticky,
        };
        if engine.spill.is_some() {
            engine.frames.marks.arm();
        }
        let records = Records::reserve(&memory).map_err(map_error("records"))?;
        engine.domains.write().push(Arc::new(Domain::new(0, &key, [0; 16])));
        Ok(Inner {
            engine,
            memory,
            records,
            leaving: AtomicBool::new(false),
            key,
            images: RwLock::default(),
            volumes: RwLock::default(),
            snapshots: RwLock::default(),
            building: Mutex::default(),
            books: Mutex::default(),
        })
    }

    /// Takes over what an earlier process left, or says why that cannot be and gives the memory back.
    #[allow(clippy::type_complexity)]
    fn attach(
        config: &StoreConfig,
        memory: Memory,
        sticky: u32,
        start: Instant,
    ) -> Result<Result<(Store, AttachReport), (Memory, String)>, StoreError> {
        let header = Records::reserve(&memory).map_err(|source| StoreError::Map {
            what: "records",
            size: config.budget,
            source,
        })?;
        let (found, key) = match header.look() {
            Ok(found) => found,
            Err(unusable) => return Ok(Err((memory, unusable.0))),
        };
        drop(header);
        // the pages are what they were; room only grows
        let wanted = Self::layout(config, found.pages);
        let layout = Layout {
            pages: found.pages,
            frames: wanted.frames.max(found.frames),
            nodes: wanted.nodes.max(found.nodes),
        };
        let inner = Arc::new(Self::reserve(config, memory, layout, key, sticky, true)?);
        inner.records.set_layout(layout);
        inner.engine.budget.charge_anyway(FIXED);
        for (number, tenant) in (1..).zip(inner.records.tenants()) {
            inner.engine.domains.write().push(Arc::new(Domain::new(number, &key, tenant)));
        }

        let mut report = AttachReport::default();
        let (mut records, damaged) = inner.records.all();
        for number in damaged {
            report.faults.push(format!("record {number} is damaged: whatever it was of is lost"));
        }
        inner.count_records(&mut records, &mut report);
        let wrong = inner.engine.find_again();
        if wrong > 0 {
            report.faults.push(format!("{wrong} blocks in use had no memory"));
        }
        inner.make_again(records, &mut report);
        let (away, _) = inner.engine.frames.marks.counts();
        if away > 0 && inner.engine.spill.as_ref().is_none_or(Spill::was_empty) {
            let path = config.spill.as_ref().map(|spill| spill.file.clone());
            // all stays as it is: the next process may find it
            drop(Owner { inner });
            return Err(StoreError::SpillMissing { bytes: ByteLen(away * BLOCK as u64), path });
        }
        report.frames = inner.engine.frames.pool.stats().used;
        report.resident_bytes = ByteLen(inner.engine.budget.charged());
        report.images = inner.images.read().len();
        report.volumes = inner.volumes.read().len();
        report.snapshots = inner.snapshots.read().len();
        report.took = start.elapsed();
        Ok(Ok((Store { owner: Arc::new(Owner { inner }) }, report)))
    }

    /// Gives the memory in the directory back to the machine and takes away what lies there, the spill file too. Volumes and
    /// images somebody still holds go on until they are let go; nobody finds them again.
    pub fn discard(self) {
        let inner = self.inner();
        if let Memory::Shared(directory) = &inner.memory {
            directory.discard();
        }
        if let Some(spill) = &inner.engine.spill {
            spill.discard();
        }
    }

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
        let trees = inner.engine.empty_trees(size).map_err(|_| inner.full(NODE_COST))?;
        Disk::new(inner, size, trees, holder, read_only)
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

    fn snapshot_record(snapshot: &Snapshot, id: SnapshotId, label: &str, of: Option<VolumeId>) -> Record {
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
        let mut trees = HashMap::new();
        {
            let frozen: Vec<_> = order.iter().map(|volume| (*volume, volume.disk.map.freeze())).collect();
            for (volume, frozen) in &frozen {
                let map = &volume.disk.map;
                match inner.engine.fork_frozen(frozen, map.size()) {
                    Ok(copy) => {
                        trees.insert(volume.id(), copy);
                    }
                    Err(refused) => {
                        trees.into_values().for_each(|copy| inner.engine.release_trees(&Account::NONE, copy));
                        return Err(inner.refused(map, refused));
                    }
                }
            }
            for (volume, _) in &frozen {
                volume.disk.map.account.cut();
            }
        }
        for volume in &order {
            inner.fill_reserve(&volume.disk.map, false)?;
        }
        let mut made = HashMap::new();
        for volume in &order {
            if let Some(copy) = trees.remove(&volume.id()) {
                let map = &volume.disk.map;
                let holder = Holder { domain: Arc::clone(&map.domain), limits: Limits::default() };
                let disk = Disk::new(inner, map.size(), copy, holder, true);
                match disk {
                    Ok(disk) => made.insert(volume.id(), Snapshot { disk: Arc::new(disk) }),
                    Err(error) => {
                        trees.into_values().for_each(|copy| inner.engine.release_trees(&Account::NONE, copy));
                        return Err(error);
                    }
                };
            }
        }
        Ok(volumes.iter().filter_map(|id| made.get(id).cloned()).collect())
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
            // of huge pages only whole ones go back, and only when enough is free to look for them
            let most = if pages == Pages::Small { 64 + 128 + 4 } else { 256 + 4 };
            assert!(store.stats().frame_bytes <= ByteLen::mib(most), "{:?}", store.stats());
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
