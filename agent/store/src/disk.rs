//! A map on the books of its store, as a block device. Volumes, snapshots, images and builders are disks with a name.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};

use muster_block::{BlockDevice, BlockError, Extent, Geometry, WriteFlags, ZeroFlags};
use muster_common::ByteLen;

use crate::{
    StoreError,
    account::{Account, Limits},
    frames::Domain,
    map::{Map, Refused, Trees},
    records::Record,
    store::Inner,
};

/// What a disk costs beside its nodes: the map, its entry in the books, and the handles around it.
pub(crate) const DISK_COST: u64 = (size_of::<Map>() + 512) as u64;

/// A larger disk than this is a mistake.
const LARGEST: u64 = 1 << 50;

pub(crate) struct Disk {
    pub(crate) inner: Arc<Inner>,
    pub(crate) map: Arc<Map>,
    /// Its entry in the books.
    number: u64,
    /// Its record, by which it is found again after this process; 0 when it ends with the process.
    record: AtomicU32,
    pub(crate) read_only: bool,
    /// What it was charged.
    cost: AtomicU64,
}

/// Whose a disk is, and what it may take.
pub(crate) struct Holder {
    pub(crate) domain: Arc<Domain>,
    pub(crate) limits: Limits,
}

/// What was charged for a disk to be; credited when it comes to nothing.
pub(crate) struct Paid {
    inner: Arc<Inner>,
    cost: u64,
}

impl Drop for Paid {
    fn drop(&mut self) {
        self.inner.engine.budget.credit(self.cost);
    }
}

impl Disk {
    pub(crate) fn check_size(size: ByteLen) -> Result<(), StoreError> {
        let rule = match size.bytes() {
            0 => "it must not be empty",
            bytes if !bytes.is_multiple_of(512) => "it must be a multiple of 512 bytes",
            bytes if bytes > LARGEST => "it must not be larger than 1 PiB",
            _ => return Ok(()),
        };
        Err(StoreError::Size { size, rule })
    }

    /// Charges for a disk before its trees are made: what a copy shares cannot make room any more. The caller is inside the world.
    pub(crate) fn pay(inner: &Arc<Inner>, size: u64, limits: Limits) -> Result<Paid, StoreError> {
        let cost = DISK_COST + Account::cost(limits, size);
        if !inner.engine.charge_or_spill(cost) {
            return Err(inner.full(cost));
        }
        Ok(Paid { inner: Arc::clone(inner), cost })
    }

    /// Takes over the trees. The caller is inside the world since before it made them.
    pub(crate) fn new(mut paid: Paid, size: u64, trees: Trees, owner: Holder, read_only: bool) -> Disk {
        let inner = Arc::clone(&paid.inner);
        let account = Account::new(owner.limits, size);
        let spills = account.spills();
        let map = Arc::new(Map::new(size, trees, owner.domain, account));
        if let Some(spill) = inner.engine.spill.as_ref().filter(|_| spills) {
            spill.watch(&map);
        }
        let number = inner.enter_in_books(&map);
        let cost = AtomicU64::new(std::mem::take(&mut paid.cost));
        Disk { inner, map, number, record: AtomicU32::new(0), read_only, cost }
    }

    /// The same of what an earlier process left: it is there, whether the budget holds it or not.
    pub(crate) fn found(inner: &Arc<Inner>, number: u32, record: &Record, trees: Trees, owner: Holder) -> Disk {
        let size = record.variant.size;
        let cost = DISK_COST + Account::cost(owner.limits, size);
        inner.engine.budget.charge_anyway(cost);
        let disk = Self::new(Paid { inner: Arc::clone(inner), cost }, size, trees, owner, record.read_only);
        disk.record.store(number, Relaxed);
        disk
    }

    /// Writes down what must be known to find the disk again.
    pub(crate) fn note(&self, record: &Record) -> Result<(), StoreError> {
        let number = self.inner.records.add(record).ok_or(StoreError::TooMany(crate::records::RECORDS))?;
        self.record.store(number, Relaxed);
        Ok(())
    }

    /// Its record; 0 when it has none.
    pub(crate) fn record(&self) -> u32 {
        self.record.load(Relaxed)
    }

    /// From now on it is not found again.
    pub(crate) fn strike(&self) {
        self.inner.records.remove(self.record.swap(0, Relaxed));
    }

    /// What is charged before the disk becomes larger: its account's share, and what a reservation has to keep aside in
    /// addition. `undo` takes it back.
    pub(crate) fn charge_growth(&self, size: ByteLen) -> Result<impl FnOnce() + '_, StoreError> {
        let (inner, account) = (&self.inner, &self.map.account);
        let more = account.bytes(size.bytes()).saturating_sub(account.bytes(self.size().bytes()));
        if !inner.engine.charge_or_spill(more) {
            return Err(inner.full(more));
        }
        let nodes = account.provide_for(size.bytes());
        self.cost.fetch_add(more, Relaxed);
        let undo = move || {
            account.provide_again(nodes);
            self.cost.fetch_sub(more, Relaxed);
            inner.engine.budget.credit(more);
        };
        match inner.fill_reserve(&self.map, false) {
            Ok(()) => Ok(undo),
            Err(error) => {
                undo();
                Err(error)
            }
        }
    }

    pub(crate) fn size(&self) -> ByteLen {
        ByteLen(self.map.size())
    }

    /// A disk of its own that starts as this one is now, whose blocks are this one's owner's. The caller is inside the
    /// world.
    pub(crate) fn fork(&self, size: u64, read_only: bool) -> Result<Disk, StoreError> {
        self.fork_for(size, Holder { domain: Arc::clone(&self.map.domain), limits: Limits::default() }, read_only)
    }

    /// The same for somebody else.
    pub(crate) fn fork_for(&self, size: u64, owner: Holder, read_only: bool) -> Result<Disk, StoreError> {
        let paid = Disk::pay(&self.inner, size, owner.limits)?;
        let trees = self.fork_trees(size)?;
        Ok(Disk::new(paid, size, trees, owner, read_only))
    }

    pub(crate) fn fork_trees(&self, size: u64) -> Result<Trees, StoreError> {
        let engine = &self.inner.engine;
        let refused = |refused| self.inner.refused(&self.map, refused);
        if !self.map.account.is_alone() {
            return engine.fork(&self.map, size).map_err(refused);
        }
        // a copy makes all that was written the volume's alone no more: as much has to be kept aside again
        loop {
            self.inner.fill_reserve(&self.map, true)?;
            let frozen = self.map.freeze();
            if self.map.account.lack(true).frames == 0 {
                let trees = engine.fork_frozen(&frozen, size).map_err(refused)?;
                self.map.account.cut();
                return Ok(trees);
            }
        }
    }

    /// Byte ranges mapped to other frames than `other` maps them to.
    pub(crate) fn differences(&self, other: &Disk) -> Result<Vec<(u64, u64)>, StoreError> {
        if !Arc::ptr_eq(&self.inner, &other.inner) {
            return Err(StoreError::ForeignSnapshot);
        }
        let runs = self
            .inner
            .engine
            .differences(&self.map, &other.map)
            .map_err(|refused| self.inner.refused(&self.map, refused))?;
        let size = self.map.size().max(other.map.size());
        Ok(runs.into_iter().map(|(first, count)| (first * 4096, (count * 4096).min(size - first * 4096))).collect())
    }

    fn refuse(&self, refused: Refused, what: &str, offset: u64, len: u64) -> BlockError {
        let cause = self.inner.refused(&self.map, refused);
        BlockError::with_source(cause.block_kind(), format!("{what} {len} bytes at offset {offset}"), cause)
    }

    fn clear(&self, what: &str, offset: u64, len: u64) -> Result<(), BlockError> {
        self.geometry().check_write(offset, len)?;
        let engine = &self.inner.engine;
        let _inside = engine.world.enter();
        engine.clear(&self.map, offset, len).map_err(|refused| self.refuse(refused, what, offset, len))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let engine = &self.inner.engine;
        let _inside = engine.world.enter_again();
        if self.inner.is_leaving() {
            // the memory stays as it is for whoever comes next
            return;
        }
        self.strike();
        engine.close(&self.map);
        self.inner.empty_reserve(&self.map);
        self.inner.strike_from_books(self.number);
        engine.budget.credit(self.cost.load(Relaxed));
    }
}

impl BlockDevice for Disk {
    fn geometry(&self) -> Geometry {
        Geometry::memory(self.size(), self.read_only)
    }

    fn may_wait(&self) -> bool {
        // blocks that are away may be shared by disks that never spill themselves
        let away = || self.inner.engine.frames.marks.counts().0 > 0;
        self.inner.engine.spill.is_some() && (self.map.account.spills() || away())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let len = buf.len() as u64;
        self.geometry().check(offset, len)?;
        self.inner.engine.read(&self.map, offset, buf).map_err(|refused| self.refuse(refused, "read", offset, len))
    }

    fn read_with(&self, offset: u64, len: u64, sink: &mut dyn FnMut(u64, &[u8])) -> Result<(), BlockError> {
        self.geometry().check(offset, len)?;
        self.inner
            .engine
            .show(&self.map, offset, len, sink)
            .map_err(|refused| self.refuse(refused, "read", offset, len))
    }

    fn write_at(&self, offset: u64, data: &[u8], _flags: WriteFlags) -> Result<(), BlockError> {
        let len = data.len() as u64;
        self.geometry().check_write(offset, len)?;
        let engine = &self.inner.engine;
        let _inside = engine.world.enter();
        engine.write(&self.map, offset, data).map_err(|refused| self.refuse(refused, "write", offset, len))
    }

    /// Never slower than a write, so `fast` is always granted. The store is thin: `no_hole` is taken as a wish, and the
    /// range gives its memory back.
    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> Result<(), BlockError> {
        self.clear("zero", offset, len)
    }

    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.clear("trim", offset, len)
    }

    /// Nothing to do: memory is all there is. What must outlive the agent is backed up, or journalled above.
    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        self.geometry().check(offset, len)?;
        out.clear();
        self.inner
            .engine
            .extents(&self.map, offset, len, out)
            .map_err(|refused| self.refuse(refused, "look at", offset, len))
    }
}

/// Makes a type that has a disk a block device.
macro_rules! device {
    ($name:ty, $($disk:ident).+) => {
        impl BlockDevice for $name {
            fn geometry(&self) -> Geometry {
                self.$($disk).+.geometry()
            }
            fn may_wait(&self) -> bool {
                self.$($disk).+.may_wait()
            }
            fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
                self.$($disk).+.read_at(offset, buf)
            }
            fn read_with(&self, offset: u64, len: u64, sink: &mut dyn FnMut(u64, &[u8])) -> Result<(), BlockError> {
                self.$($disk).+.read_with(offset, len, sink)
            }
            fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
                self.$($disk).+.write_at(offset, data, flags)
            }
            fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
                self.$($disk).+.write_zeroes(offset, len, flags)
            }
            fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
                self.$($disk).+.trim(offset, len)
            }
            fn flush(&self) -> Result<(), BlockError> {
                self.$($disk).+.flush()
            }
            fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
                self.$($disk).+.block_status(offset, len, out)
            }
        }
    };
}

device!(crate::Volume, disk);
device!(crate::Snapshot, disk);
device!(crate::Image, disk);
