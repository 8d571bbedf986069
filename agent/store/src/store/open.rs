//! Opening: a fresh store, or one that finds again what an earlier process left.

use super::*;

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
        // there are always numbers for what is spilled next, whatever pages the others share
        let beside = if config.spill.is_some() { 1024 } else { 0 };
        Layout {
            pages,
            frames: ((budget.saturating_add(spilled) / BLOCK as u64).saturating_add(beside)).min(most) as u32,
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
        inner.engine.expect_spilling();
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
        let frames_error = |source| match layout.pages {
            PageKind::Huge => StoreError::no_huge_pages(layout.frames, source),
            PageKind::Small | PageKind::Transparent => map_error("frames")(source),
        };
        if layout.pages == PageKind::Huge && config.spill.is_some() {
            return Err(StoreError::SpillFromHugetlb);
        }
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
            frames: Frames::reserve(layout.frames, layout.pages, &memory).map_err(frames_error)?,
            nodes: Nodes::reserve(layout.nodes, &memory).map_err(map_error("map nodes"))?,
            world: World::default(),
            pages: layout.pages,
            spill,
            domains: Default::default(),
            sticky,
        };
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
        if !memory.may_hold(found.pages) {
            return Ok(Err((memory, "the hugetlbfs its blocks lay on is not mounted any more".into())));
        }
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
        inner.engine.expect_spilling();
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
}

impl Inner {
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
        // The frames kept for all of them first: for nodes, free frames may have to go back to the machine.
        let fault = |volume: &Volume, error| format!("volume {}: its reservation is not whole: {error}", volume.id());
        for volume in &counted {
            let found = self.find_account(volume).and_then(|()| self.fill_frames(&volume.disk.map, false));
            report.faults.extend(found.err().map(|error| fault(volume, error)));
        }
        for volume in &counted {
            let found = self.fill_nodes(&volume.disk.map, false);
            report.faults.extend(found.err().map(|error| fault(volume, error)));
        }
    }

    /// What a volume with a quota or a reservation has written.
    fn find_account(&self, volume: &Volume) -> Result<(), StoreError> {
        volume.count_own()?;
        let map = &volume.disk.map;
        if map.account.is_alone() {
            let leaves = map.size().div_ceil(BLOCK as u64).div_ceil(64);
            for leaf in 0..leaves {
                let bits = self.engine.fresh_bits(map, leaf);
                map.account.found_fresh(leaf, bits);
            }
            map.account.found_nodes(self.engine.alone_nodes(map));
        }
        Ok(())
    }
}
