//! Verbs that exchange the contents of volumes: restore, reset-session, destroy-volumes. Each content gets a generation of
//! its own, written to the record before it is used.

use std::ops::ControlFlow;

use muster_backup::{BackupId, BackupRecord, Backups};
use muster_cim::EnabledState;
use muster_common::{ByteLen, Chain, ErrorCode, VmId, VolumeId};
use muster_store::{Snapshot, VolumeSpec};
use muster_virt::{DomainState, Lane};

use super::{Done, Failure, Work};
use crate::{
    arguments::{self, Template},
    host::Host,
    inventory::is_there,
    records::{DiskRecord, DiskRole, VmRecord},
    volumes::Volumes,
};

/// Name of the argument that allows reset-session to make a lost data disk anew, blank: its value is `blank`.
const DATA: &str = "data";

impl Work {
    /// Saves the record with each of these disks one generation on, withdraws the old exports, and shows the new record.
    async fn next_generation(&self, record: &VmRecord, roles: &[DiskRole]) -> Result<VmRecord, Failure> {
        let old = record.clone();
        let roles = roles.to_vec();
        self.blocking(move |host| {
            for disk in old.disks.iter().filter(|d| roles.contains(&d.role)) {
                host.volumes.withdraw(disk)?;
            }
            let next = |new: &mut VmRecord| {
                for disk in new.disks.iter_mut().filter(|d| roles.contains(&d.role)) {
                    disk.generation += 1;
                }
            };
            host.change_record(old.vm, next)?.ok_or_else(Failure::no_such_vm)
        })
        .await
    }

    pub(super) async fn reset_session(&self) -> Result<Done, Failure> {
        let entry = self.entry()?;
        let vm = entry.record.vm;
        let template = arguments::check_template(entry.record.template.clone())?;
        let system = entry.record.disk(DiskRole::System).cloned();
        let system = system.ok_or_else(|| Failure::failed(ErrorCode::Internal, "the VM has no system disk"))?;
        // everything that can be refused comes before anything is touched
        let data = entry.record.disk(DiskRole::Data).cloned();
        let lost_data = data.filter(|d| !is_there(d, &self.host.volumes.store));
        let data_from = match &lost_data {
            None => None,
            Some(disk) => Some(self.data_source(vm, disk).await?),
        };
        self.fetch_boot_files(&template).await?;
        self.ensure_image(template.image, &template.spec.image_name).await?;
        self.ensure_applications(&template).await?;
        let fetched = match (&lost_data, data_from) {
            (Some(disk), Some(Some(backup))) => Some((self.fetch_disk(disk.clone(), backup).await?, backup)),
            _ => None,
        };

        let before = self.state().await?.0;
        let was_up = before.is_active();
        if was_up {
            self.power_off().await?;
        } else if before == DomainState::Saved {
            self.host.machines.call(Lane::Vm(vm), "discard saved memory", move |h| h.discard_saved(vm)).await?;
        }
        self.host.clear_snapshots(vm);

        let mut roles = vec![DiskRole::System];
        if lost_data.is_some() {
            roles.push(DiskRole::Data);
        }
        let record = self.next_generation(&entry.record, &roles).await?;
        let record = self.renew_applications(&record).await?;
        let renewed = record.clone();
        let image = template.image;
        self.blocking(move |host| {
            let disk = renewed.disks.iter().find(|d| d.volume == system.volume);
            let disk = disk.ok_or_else(|| Failure::failed(ErrorCode::Internal, "the VM has no system disk"))?;
            host.volumes.renew(disk, image)?;
            Ok(host.volumes.offer(vm, disk)?)
        })
        .await?;
        let mut message = String::new();
        if let Some(lost) = lost_data {
            let disk = record.disks.iter().find(|d| d.volume == lost.volume).cloned().unwrap_or(lost);
            message = match fetched {
                Some((content, backup)) => {
                    self.put_all(&record, vec![(disk.volume, content)]).await?;
                    format!("the lost data disk was restored from backup {backup}")
                }
                None => {
                    self.blocking(move |host| {
                        host.volumes.make(&disk)?;
                        Ok(host.volumes.offer(vm, &disk)?)
                    })
                    .await?;
                    "the lost data disk was made anew, blank".into()
                }
            };
        }
        self.define(&record).await?;
        if was_up {
            self.start(&record).await?;
            self.wait_for(EnabledState::Enabled).await?;
        }
        Ok(Done { message, ..Done::default() })
    }

    async fn ensure_applications(&self, template: &Template) -> Result<(), Failure> {
        for (digest, name) in &template.applications {
            self.ensure_image(*digest, name).await?;
        }
        Ok(())
    }

    /// Makes application disks that were lost again, out of their (resident) images; the record they are in then.
    async fn renew_applications(&self, record: &VmRecord) -> Result<VmRecord, Failure> {
        if record.applications().all(|d| is_there(d, &self.host.volumes.store)) {
            return Ok(record.clone());
        }
        let record = self.next_generation(record, &[DiskRole::Application]).await?;
        let renewed = record.clone();
        self.blocking(move |host| {
            for disk in renewed.applications() {
                host.volumes.destroy(disk)?;
                host.volumes.make(disk)?;
                host.volumes.offer(renewed.vm, disk)?;
            }
            Ok(())
        })
        .await?;
        Ok(record)
    }

    /// Where a lost data disk comes from: a backup, or `None`: blank, because the command allows it.
    async fn data_source(&self, vm: VmId, disk: &DiskRecord) -> Result<Option<BackupId>, Failure> {
        let volume = disk.volume;
        if let Ok(backups) = self.host.backups.clone() {
            let found = self
                .blocking(move |_| {
                    Ok(backups.list()?.records.into_iter().rev().find(|r| has(r, vm, volume)).map(|r| r.id))
                })
                .await?;
            if found.is_some() {
                return Ok(found);
            }
        }
        if self.order.argument(DATA) == Some("blank") {
            return Ok(None);
        }
        Err(Failure::refused(
            ErrorCode::VolumeLost,
            "the data disk is lost and no backup has it; give the argument data=blank to begin with a blank one",
        ))
    }

    pub(super) async fn restore(&self) -> Result<Done, Failure> {
        let entry = self.entry()?;
        if let Some(name) = self.order.argument(muster_idl::arguments::name::NAME).filter(|n| !n.is_empty()) {
            let set = entry
                .snapshots
                .get(name)
                .cloned()
                .ok_or_else(|| Failure::refused(ErrorCode::NotFound, format!("the VM has no snapshot {name:?}")))?;
            return self.revert(&entry.record, set.volumes).await;
        }
        let backups = self.backups()?;
        let wanted = arguments::backup(&self.order)?;
        let vm = entry.record.vm;
        let found = self
            .blocking(move |_| match wanted {
                Some(id) => Ok(Some(backups.get(id)?)),
                None => Ok(backups.latest_of(vm)?),
            })
            .await?;
        let backup = found
            .filter(|b| b.vms.iter().any(|v| v.id == vm))
            .ok_or_else(|| Failure::refused(ErrorCode::NotFound, "there is no such backup of this VM on this host"))?;
        let in_it: Vec<DiskRole> =
            entry.record.own_disks().filter(|d| has(&backup, vm, d.volume)).map(|d| d.role).collect();
        if in_it.len() < entry.record.own_disks().count() {
            return Err(Failure::refused(ErrorCode::NotFound, "the backup does not have all volumes of the VM"));
        }
        // the image makes the restored system disk share memory with its siblings; without it the restore works too
        for disk in entry.record.own_disks().filter_map(|d| d.image) {
            if let Err(f) = self.ensure_image(disk, &entry.record.template.image_name).await {
                tracing::warn!(image = %disk.short(), reason = f.message, "restoring without the image in memory");
            }
        }
        // an application's disk is nothing but its image
        self.ensure_applications(&arguments::check_template(entry.record.template.clone())?).await?;
        // all contents first: a restore that fails leaves the VM as it was
        let mut contents = Vec::new();
        for disk in entry.record.own_disks().cloned().collect::<Vec<_>>() {
            contents.push((disk.volume, self.fetch_disk(disk, backup.id).await?));
        }
        let record = self.next_generation(&entry.record, &in_it).await?;
        self.host.clear_snapshots(vm);
        self.put_all(&record, contents).await?;
        let record = self.renew_applications(&record).await?;
        self.define(&record).await?;
        Ok(Done { message: format!("from backup {}", backup.id), ..Done::default() })
    }

    fn backups(&self) -> Result<Backups, Failure> {
        self.host
            .backups
            .clone()
            .map_err(|why| Failure::refused(ErrorCode::Unavailable, format!("no backup directory: {why}")))
    }

    /// Reads a disk's content from a backup into memory, beside what the disk holds.
    async fn fetch_disk(&self, disk: DiskRecord, backup: BackupId) -> Result<Snapshot, Failure> {
        let backups = self.backups()?;
        let order = self.order.clone();
        self.blocking(move |host| {
            let mut said = 0;
            let mut progress = |p: muster_backup::Progress| {
                let now = host.now_us();
                if now.saturating_sub(said) >= 500_000 {
                    said = now;
                    host.voice.progress(&order, "restore", p.done.bytes(), p.total.bytes());
                }
                if now > order.deadline_us { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            // a disk may have grown since: what was added is not in the backup, and reads as zero
            let record = backups.get(backup)?;
            let size = record.volumes.iter().find(|v| v.id == disk.volume).map_or(disk.size, |v| v.size);
            let aside = Aside::make(host, &disk, size)?;
            backups.restore(backup, disk.volume, &*aside.volume, &mut progress)?;
            Ok(aside.volume.snapshot()?)
        })
        .await
    }

    /// Gives disks the contents, in the generations the record names, and offers them.
    async fn put_all(&self, record: &VmRecord, contents: Vec<(VolumeId, Snapshot)>) -> Result<(), Failure> {
        let record = record.clone();
        self.blocking(move |host| {
            for (volume, snapshot) in &contents {
                if let Some(disk) = record.disks.iter().find(|d| d.volume == *volume) {
                    put(host, record.vm, disk, snapshot)?;
                }
            }
            Ok(())
        })
        .await
    }

    async fn revert(&self, record: &VmRecord, set: Vec<(VolumeId, Snapshot)>) -> Result<Done, Failure> {
        let roles: Vec<DiskRole> =
            record.disks.iter().filter(|d| set.iter().any(|(v, _)| *v == d.volume)).map(|d| d.role).collect();
        let record = self.next_generation(record, &roles).await?;
        self.put_all(&record, set).await?;
        self.define(&record).await?;
        Ok(Done::default())
    }

    pub(super) async fn destroy_volumes(&self) -> Result<Done, Failure> {
        let entry = self.entry()?;
        self.host.clear_snapshots(entry.record.vm);
        let record = entry.record.clone();
        self.blocking(move |host| {
            for disk in &record.disks {
                host.volumes.destroy(disk)?;
            }
            match record.disks.iter().find(|d| host.volumes.store.volume(d.volume).is_some()) {
                Some(disk) => {
                    Err(Failure::failed(ErrorCode::Internal, format!("volume {} is still there", disk.volume)))
                }
                None => Ok(()),
            }
        })
        .await?;
        Ok(Done::default())
    }
}

fn has(backup: &BackupRecord, vm: VmId, volume: VolumeId) -> bool {
    backup.volumes.iter().any(|v| v.id == volume && v.vm == Some(vm))
}

/// A volume beside the real one, gone when dropped.
struct Aside<'a> {
    host: &'a Host,
    volume: std::sync::Arc<muster_store::Volume>,
}

impl<'a> Aside<'a> {
    fn make(host: &'a Host, disk: &DiskRecord, size: ByteLen) -> Result<Self, Failure> {
        // never shared with strangers; what is kept for the disk itself is not touched
        let spec = Volumes::spec(disk)?;
        let spec = VolumeSpec {
            tenant: spec.tenant,
            when_full: spec.when_full,
            ..VolumeSpec::blank(VolumeId::random(), size)
        };
        Ok(Self { host, volume: host.volumes.store.create_volume(spec)? })
    }
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.host.volumes.store.delete_volume(self.volume.id()) {
            tracing::warn!(err = %Chain(&e), "a temporary volume stayed");
        }
    }
}

/// Makes the disk's volume equal to the snapshot, in the generation the disk names, and offers it.
fn put(host: &Host, vm: VmId, disk: &DiskRecord, snapshot: &Snapshot) -> Result<(), Failure> {
    let store = &host.volumes.store;
    let volume = match store.volume(disk.volume) {
        Some(volume) if volume.generation() + 1 == disk.generation => volume,
        other => {
            if other.is_some() {
                store.delete_volume(disk.volume)?;
            }
            // never offered in this generation: reverting makes it the next one
            let base = disk.image.filter(|image| store.image(image).is_some());
            let generation = disk.generation - 1;
            let spec = VolumeSpec { generation, base, ..Volumes::spec(disk)? };
            store.create_volume(spec)?
        }
    };
    volume.revert(snapshot)?;
    Ok(host.volumes.offer(vm, disk)?)
}
