//! Backups as the agent uses them: capture, list, verify, restore, retire, also when the storage breaks in the middle.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic")]

use std::{ops::ControlFlow, sync::Arc};

use muster_backup::{
    BackedVm, BackupError, BackupId, Backups, BlockDevice, Plan, Progress, VolumeToBackUp,
    retention::{self, Policy},
};
use muster_block::{
    BlockError, BlockErrorKind, Extent, ExtentKind, Geometry, WriteFlags, ZeroFlags, model::MemoryDevice,
};
use muster_common::{ByteLen, ErrorCode, HostId, VmId, VolumeId};
use muster_repository::{
    CHUNK_SIZE, RepositoryError,
    storage::{
        MemoryStorage, Storage,
        fault::{Fault, FaultStorage},
    },
};
use proptest::prelude::*;
use tempfile::TempDir;

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A disk of chunks told by numbers; 0 is a hole.
fn disk(chunks: &[u8]) -> Vec<u8> {
    chunks.iter().flat_map(|&n| (0..CHUNK_SIZE).map(move |i| if n == 0 { 0 } else { n ^ (i / 256) as u8 })).collect()
}

struct Desktop {
    vm: VmId,
    system: VolumeId,
    personal: VolumeId,
}

impl Desktop {
    fn new() -> Self {
        Self { vm: VmId::random(), system: VolumeId::random(), personal: VolumeId::random() }
    }

    fn plan(&self, system: &[u8], personal: &[u8]) -> Plan {
        let volume = |id, role: &str, bytes: &[u8]| VolumeToBackUp {
            id,
            vm: Some(self.vm),
            generation: 3,
            role: role.to_string(),
            snapshot: Arc::new(MemoryDevice::from_bytes(bytes.to_vec()).read_only()),
        };
        Plan {
            host: HostId::from_uuid(uuid::Uuid::from_u128(7)),
            label: "nightly".to_string(),
            vms: vec![BackedVm {
                id: self.vm,
                name: "desktop-01".to_string(),
                spec: serde_json::json!({"vcpus": 2, "disks": [{"target": "vda"}]}),
            }],
            volumes: vec![volume(self.system, "system", system), volume(self.personal, "personal", personal)],
        }
    }
}

fn memory() -> (Arc<MemoryStorage>, Backups) {
    let storage = Arc::new(MemoryStorage::new());
    (storage.clone(), Backups::open_storage(storage).unwrap())
}

fn restored(backups: &Backups, id: BackupId, volume: VolumeId, size: usize) -> Result<Vec<u8>, BackupError> {
    // what was on the target before must not shine through the holes
    let target = MemoryDevice::from_bytes(vec![0xee; size]);
    backups.restore(id, volume, &target, &mut go)?;
    Ok(target.contents())
}

#[test]
fn a_range_is_found_in_every_backup_that_has_it_the_newest_first() {
    let (_, backups) = memory();
    let desktop = Desktop::new();
    for (at, system) in (1..).zip([[1, 2, 0], [1, 3, 0], [1, 3, 9], [1, 0, 9]]) {
        backups.capture(&desktop.plan(&disk(&system), &disk(&[4])), at, &mut go).unwrap();
    }
    let at = |n: u64| n * CHUNK_SIZE as u64 + 4096;
    let versions = |offset, most| backups.versions_of(desktop.system, offset, 4096, most).unwrap();
    let part = |n: u8| disk(&[n])[4096..8192].to_vec();
    assert_eq!(versions(at(1), 9), [part(3), part(2)]);
    assert_eq!(versions(at(1), 1), [part(3)]);
    assert_eq!(versions(at(0), 9), [part(1)]);
    assert!(versions(at(7), 9).is_empty());
    assert!(backups.versions_of(VolumeId::random(), 0, 4096, 9).unwrap().is_empty());
}

#[test]
fn a_destroyed_desktop_comes_back_as_it_was_from_a_directory_opened_again() {
    let dir = TempDir::new().unwrap();
    let desktop = Desktop::new();
    let (system, personal) = (disk(&[1, 0, 2, 3, 0, 0]), disk(&[9, 0]));
    let captured = {
        let backups = Backups::open(&dir.path().join("backups")).unwrap();
        backups.capture(&desktop.plan(&system, &personal), 1_000, &mut go).unwrap()
    };
    let backups = Backups::open(&dir.path().join("backups")).unwrap();
    let listing = backups.list().unwrap();
    assert!(listing.unreadable.is_empty());
    assert_eq!(listing.records, std::slice::from_ref(&captured.record));
    let record = backups.latest_of(desktop.vm).unwrap().unwrap();
    assert_eq!(record.vms[0].spec["vcpus"], 2);
    assert_eq!(record.volumes_of(desktop.vm).map(|v| v.role.as_str()).collect::<Vec<_>>(), ["system", "personal"]);
    for (volume, bytes) in [(desktop.system, &system), (desktop.personal, &personal)] {
        assert_eq!(&restored(&backups, record.id, volume, bytes.len()).unwrap(), bytes);
    }
    assert!(backups.verify(record.id, &mut go).unwrap().iter().all(|v| v.report.is_good()));
}

#[test]
fn a_second_backup_writes_only_what_changed() {
    let (_, backups) = memory();
    let desktop = Desktop::new();
    let chunk = CHUNK_SIZE as u64;
    let first = backups.capture(&desktop.plan(&disk(&[1, 2, 3, 0, 4]), &disk(&[5, 1])), 1, &mut go).unwrap();
    assert_eq!(first.logical.0, 7 * chunk);
    assert_eq!(first.data.0, 6 * chunk);
    assert_eq!(first.new_bytes.0, 5 * chunk, "what two volumes share is written once");
    let second = backups.capture(&desktop.plan(&disk(&[1, 2, 7, 0, 4]), &disk(&[5, 1])), 2, &mut go).unwrap();
    assert_eq!(second.new_bytes.0, chunk);
    assert_eq!(second.record.volumes[1].new_bytes.0, 0);
    assert_eq!(second.record.volumes[1].manifest, first.record.volumes[1].manifest);
    let neighbour = backups.capture(&Desktop::new().plan(&disk(&[1, 2, 7, 0, 4]), &disk(&[5, 1])), 3, &mut go).unwrap();
    assert_eq!(neighbour.new_bytes.0, 0, "another desktop of the same content costs nothing");
}

#[test]
fn deleting_one_backup_keeps_what_others_need_and_gives_back_the_rest() {
    let (storage, backups) = memory();
    let desktop = Desktop::new();
    let personal = disk(&[5]);
    let first = backups.capture(&desktop.plan(&disk(&[1, 2, 3, 4]), &personal), 1, &mut go).unwrap().record.id;
    let second = backups.capture(&desktop.plan(&disk(&[1, 9, 8, 7]), &personal), 2, &mut go).unwrap().record.id;
    backups.delete(first).unwrap();
    assert!(matches!(backups.delete(first), Err(BackupError::Unknown { .. })));
    assert!(matches!(backups.get(first), Err(BackupError::Unknown { .. })));
    let report = backups.prune().unwrap();
    assert_eq!(report.manifests_removed, 1, "the personal volume's manifest is still in use");
    assert_eq!(restored(&backups, second, desktop.system, 4 * CHUNK_SIZE).unwrap(), disk(&[1, 9, 8, 7]));
    assert_eq!(restored(&backups, second, desktop.personal, CHUNK_SIZE).unwrap(), personal);
    backups.delete(second).unwrap();
    backups.prune().unwrap();
    assert_eq!(storage.list("").unwrap(), ["format"]);
}

/// Counts what reaches it, and can fail.
struct Target {
    device: MemoryDevice,
    touched: std::sync::atomic::AtomicU64,
    full_after: u64,
}

impl Target {
    fn new(size: usize, full_after: u64) -> Self {
        Self { device: MemoryDevice::from_bytes(vec![0xee; size]), touched: Default::default(), full_after }
    }
    fn touch(&self) -> Result<(), BlockError> {
        if self.touched.fetch_add(1, std::sync::atomic::Ordering::SeqCst) >= self.full_after {
            return Err(BlockError::new(BlockErrorKind::NoSpace, "write to a full store".to_string()));
        }
        Ok(())
    }
}

impl BlockDevice for Target {
    fn geometry(&self) -> Geometry {
        self.device.geometry()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.device.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8], flags: WriteFlags) -> Result<(), BlockError> {
        self.touch()?;
        self.device.write_at(offset, data, flags)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), BlockError> {
        self.touch()?;
        self.device.write_zeroes(offset, len, flags)
    }
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.device.trim(offset, len)
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.device.flush()
    }
    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        self.device.block_status(offset, len, out)
    }
}

#[test]
fn a_restore_that_cannot_succeed_does_not_touch_the_target() {
    let (storage, backups) = memory();
    let desktop = Desktop::new();
    let system = disk(&[1, 0, 2]);
    let id = backups.capture(&desktop.plan(&system, &disk(&[5])), 1, &mut go).unwrap().record.id;
    let target = Target::new(system.len(), u64::MAX);
    let refused = |backups: &Backups, id, volume, target: &Target| {
        let error = backups.restore(id, volume, target, &mut go).unwrap_err();
        assert_eq!(target.touched.load(std::sync::atomic::Ordering::SeqCst), 0);
        error
    };
    assert_eq!(refused(&backups, BackupId::now(), desktop.system, &target).code(), ErrorCode::NotFound);
    assert_eq!(refused(&backups, id, VolumeId::random(), &target).code(), ErrorCode::NotFound);
    let short = Target::new(system.len() - 512, u64::MAX);
    assert!(matches!(refused(&backups, id, desktop.system, &short), BackupError::SizeDiffers { .. }));
    // the pack's index is damaged, so its chunks are known to be missing
    let pack = storage.list("packs/").unwrap().remove(0);
    let last = storage.len(&pack).unwrap() as usize - 1;
    storage.damage(&pack, last, 1);
    let backups = Backups::open_storage(storage).unwrap();
    let error = refused(&backups, id, desktop.system, &target);
    assert!(matches!(error, BackupError::ChunksMissing { missing: 2, .. }), "{error}");
}

#[test]
fn a_damaged_chunk_is_found_by_verify_and_never_reaches_a_target() {
    let (storage, backups) = memory();
    let desktop = Desktop::new();
    let system = disk(&[1, 2, 3]);
    let id = backups.capture(&desktop.plan(&system, &disk(&[5])), 1, &mut go).unwrap().record.id;
    let pack = storage.list("packs/").unwrap().remove(0);
    storage.damage(&pack, 32 + CHUNK_SIZE + 9, 4);
    let verified = backups.verify(id, &mut go).unwrap();
    assert_eq!(verified[0].volume, desktop.system);
    assert_eq!(verified[0].report.bad.iter().map(|b| b.offset).collect::<Vec<_>>(), [CHUNK_SIZE as u64]);
    assert!(verified[1].report.is_good());
    let target = MemoryDevice::from_bytes(vec![0xee; system.len()]);
    let error = backups.restore(id, desktop.system, &target, &mut go).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Corrupt);
    let bad = &target.contents()[CHUNK_SIZE..2 * CHUNK_SIZE];
    assert!(bad.iter().all(|&b| b == 0xee), "not one byte of the damaged chunk was written");
}

#[test]
fn a_target_that_is_full_ends_the_restore_with_its_code() {
    let (_, backups) = memory();
    let desktop = Desktop::new();
    let system = disk(&[1, 2, 3, 4, 0, 5]);
    let id = backups.capture(&desktop.plan(&system, &disk(&[5])), 1, &mut go).unwrap().record.id;
    let error = backups.restore(id, desktop.system, &Target::new(system.len(), 3), &mut go).unwrap_err();
    assert_eq!(error.code(), ErrorCode::NoSpace);
}

#[test]
fn a_backup_being_restored_cannot_be_deleted_and_cancelling_is_heard() {
    let (_, backups) = memory();
    let desktop = Desktop::new();
    let plan = desktop.plan(&disk(&[1, 2, 3]), &disk(&[5]));
    let id = backups.capture(&plan, 1, &mut go).unwrap().record.id;
    let target = MemoryDevice::new(ByteLen(3 * CHUNK_SIZE as u64));
    let error = backups
        .restore(id, desktop.system, &target, &mut |_| {
            assert!(matches!(backups.delete(id), Err(BackupError::InUse { .. })));
            ControlFlow::Break(())
        })
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::Cancelled);
    assert!(matches!(backups.capture(&plan, 2, &mut |_| ControlFlow::Break(())), Err(BackupError::Cancelled)));
    assert_eq!(backups.list().unwrap().records.len(), 1);
    backups.delete(id).unwrap();
}

#[test]
fn plans_that_could_not_be_restored_are_refused() {
    let (_, backups) = memory();
    let desktop = Desktop::new();
    let mut plan = desktop.plan(&disk(&[1]), &disk(&[2]));
    plan.volumes[1].id = plan.volumes[0].id;
    assert!(matches!(backups.capture(&plan, 1, &mut go), Err(BackupError::InvalidPlan { .. })));
    let mut plan = desktop.plan(&disk(&[1]), &disk(&[2]));
    plan.volumes[1].vm = Some(VmId::random());
    assert!(matches!(backups.capture(&plan, 1, &mut go), Err(BackupError::InvalidPlan { .. })));
    plan.volumes.clear();
    assert!(matches!(backups.capture(&plan, 1, &mut go), Err(BackupError::NoVolumes)));
}

#[test]
fn one_damaged_record_does_not_hide_the_others() {
    let (storage, backups) = memory();
    let good = backups.capture(&Desktop::new().plan(&disk(&[1]), &disk(&[2])), 1, &mut go).unwrap().record;
    let bad = backups.capture(&Desktop::new().plan(&disk(&[3]), &disk(&[4])), 2, &mut go).unwrap().record;
    storage.damage(&format!("refs/backup-{}", bad.id), 200, 1);
    let listing = backups.list().unwrap();
    assert_eq!(listing.records, [good]);
    assert_eq!(listing.unreadable.len(), 1);
    assert_eq!(listing.unreadable[0].1.code(), ErrorCode::Corrupt);
}

/// A backup that was acknowledged, and what its volumes held.
type Acknowledged = (BackupId, Vec<(VolumeId, Vec<u8>)>);

fn story(storage: Arc<dyn Storage>, done: &mut Vec<Acknowledged>) -> Result<(), BackupError> {
    let backups = Backups::open_storage(storage)?;
    let desktop = Desktop::new();
    let capture = |system: &[u8], personal: &[u8], done: &mut Vec<_>| {
        let (system, personal) = (disk(system), disk(personal));
        let id = backups.capture(&desktop.plan(&system, &personal), 1, &mut go)?.record.id;
        done.push((id, vec![(desktop.system, system), (desktop.personal, personal)]));
        Ok::<_, BackupError>(id)
    };
    let first = capture(&[1, 2, 3, 4], &[5, 0], done)?;
    capture(&[1, 2, 8, 4], &[5, 6], done)?;
    done.retain(|(id, _)| *id != first);
    backups.delete(first)?;
    backups.prune()?;
    capture(&[1, 3, 8, 9], &[5, 6], done)?;
    Ok(())
}

#[test]
fn after_a_crash_at_any_step_every_listed_backup_restores_and_every_acknowledged_one_is_listed() {
    let counting = Arc::new(FaultStorage::new(Arc::new(MemoryStorage::new()), u64::MAX, Fault::CrashBefore));
    story(counting.clone(), &mut Vec::new()).unwrap();
    for fault in [Fault::CrashBefore, Fault::CrashAfter, Fault::FailOnce] {
        for at in 0..counting.steps() {
            let storage = Arc::new(FaultStorage::new(Arc::new(MemoryStorage::new()), at, fault));
            let mut acknowledged = Vec::new();
            story(storage.clone(), &mut acknowledged).unwrap_err();
            let backups = Backups::open_storage(storage.surviving()).unwrap();
            for _ in 0..2 {
                let listing = backups.list().unwrap();
                assert!(listing.unreadable.is_empty(), "{fault:?} at {at}");
                for record in &listing.records {
                    assert!(backups.verify(record.id, &mut go).unwrap().iter().all(|v| v.report.is_good()));
                }
                for (id, volumes) in &acknowledged {
                    for (volume, bytes) in volumes {
                        assert_eq!(&restored(&backups, *id, *volume, bytes.len()).unwrap(), bytes, "{fault:?} at {at}");
                    }
                }
                backups.prune().unwrap();
            }
        }
    }
}

#[test]
fn retention_over_records_keeps_each_vms_newest() {
    let (_, backups) = memory();
    let (a, b) = (Desktop::new(), Desktop::new());
    let capture = |d: &Desktop, at| backups.capture(&d.plan(&disk(&[1]), &disk(&[2])), at, &mut go).unwrap().record.id;
    let ids = [capture(&a, 1), capture(&a, 2), capture(&b, 3), capture(&a, 4)];
    let verdict = retention::plan_records(&backups.list().unwrap().records, &Policy::default());
    assert_eq!(verdict.remove, [ids[0], ids[1]]);
    assert_eq!(verdict.keep.keys().copied().collect::<Vec<_>>(), [ids[2], ids[3]]);
}

#[test]
fn the_record_is_pinned_by_golden_bytes() {
    let golden = include_bytes!("golden/record-v1.bin");
    let record = muster_backup::BackupRecord::parse(golden).unwrap();
    assert_eq!(record.id.to_string(), "01890a5d-ac96-774b-bcce-b302099a8057");
    assert_eq!((record.created_at_us, record.label.as_str()), (1_700_000_000_000_000, "nightly"));
    assert_eq!(record.vms[0].spec["vcpus"], 2);
    assert_eq!((record.volumes[0].generation, record.volumes[0].size), (3, ByteLen::gib(1)));
    assert_eq!(record.encode().unwrap(), golden);
    for len in 0..24 {
        assert!(muster_backup::BackupRecord::parse(&golden[..len]).is_err(), "cut to {len}");
    }
    let mut newer = golden.to_vec();
    newer[17] = 1;
    let error = muster_backup::BackupRecord::parse(&newer).unwrap_err();
    assert!(error.is_unsupported(), "{error}");
}

/// A device of odd extents, as a store gives them.
struct Sparse(Vec<u8>, u64);

impl BlockDevice for Sparse {
    fn geometry(&self) -> Geometry {
        Geometry::memory(ByteLen(self.0.len() as u64), true)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        buf.copy_from_slice(&self.0[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8], _: WriteFlags) -> Result<(), BlockError> {
        unreachable!("a snapshot is not written")
    }
    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> Result<(), BlockError> {
        unreachable!("a snapshot is not written")
    }
    fn trim(&self, _: u64, _: u64) -> Result<(), BlockError> {
        unreachable!("a snapshot is not written")
    }
    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }
    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        out.clear();
        for piece in self.0[offset as usize..(offset + len) as usize].chunks(self.1 as usize) {
            let kind = if piece.iter().all(|&b| b == 0) { ExtentKind::Hole } else { ExtentKind::Data };
            Extent::push(out, piece.len() as u64, kind);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_volume_restores_as_it_was(
        chunks in proptest::collection::vec(0u8..5, 1..40),
        cut in 0usize..127,
        piece in prop_oneof![Just(4096u64), 512..70_000u64],
        dots in proptest::collection::vec((any::<prop::sample::Index>(), 1u8..), 0..10),
    ) {
        let mut bytes = disk(&chunks);
        bytes.truncate(bytes.len() - cut * 512);
        for (at, value) in dots {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let (_, backups) = memory();
        let desktop = Desktop::new();
        let mut plan = desktop.plan(&bytes, &disk(&[1]));
        plan.volumes[0].snapshot = Arc::new(Sparse(bytes.clone(), piece));
        let captured = backups.capture(&plan, 1, &mut go).unwrap();
        prop_assert_eq!(restored(&backups, captured.record.id, desktop.system, bytes.len()).unwrap(), bytes);
    }
}

#[test]
fn an_error_names_the_volume_and_carries_its_cause() {
    let storage = Arc::new(FaultStorage::new(Arc::new(MemoryStorage::new()), 1, Fault::FailOnce));
    let backups = Backups::open_storage(storage).unwrap();
    let error = backups.capture(&Desktop::new().plan(&disk(&[1]), &disk(&[2])), 1, &mut go).unwrap_err();
    assert!(matches!(error, BackupError::Repository(RepositoryError::Storage(_))));
    assert_eq!(error.code(), ErrorCode::Io);
}
