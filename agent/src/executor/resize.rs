//! Resize: a disk becomes larger, or its quota another one. Given twice it is done twice: what is so already is announced
//! again, which does no harm and helps a guest that missed it.

use muster_cim::{DiskLimits, LimitError};
use muster_common::{ByteLen, Chain, ErrorCode, VmId};
use muster_store::Volume;

use super::{Done, Failure, Work};
use crate::{
    arguments::{self, Resize},
    host::Host,
    records::{DiskRecord, Transport},
};

impl Work {
    pub(super) async fn resize(&self) -> Result<Done, Failure> {
        let wanted = arguments::resize(&self.order)?;
        let record = self.entry()?.record;
        let disk = record.disk(wanted.role).cloned();
        let disk = disk.ok_or_else(|| {
            Failure::refused(ErrorCode::InvalidArgument, format!("the VM has no {} disk", wanted.role.as_str()))
        })?;
        let up = self.state().await?.0.is_active();
        let (vm, shown) = (record.vm, disk.clone());
        let told = self.blocking(move |host| change(host, vm, &disk, &wanted)).await?;
        let message = match (wanted.size, up, told, shown.transport) {
            (None, ..) | (_, false, ..) | (_, _, true, _) => "",
            (_, _, false, Transport::Nbd) => {
                "the guest sees the new size when the VM was powered off and on: QEMU does not grow an NBD disk in use"
            }
            (_, _, false, Transport::VhostUser { .. }) => {
                "QEMU is not connected to the disk: the guest is told of the new size when it is again"
            }
        };
        Ok(Done { message: message.into(), ..Done::default() })
    }
}

/// Whether the guest was told.
fn change(host: &Host, vm: VmId, disk: &DiskRecord, wanted: &Resize) -> Result<bool, Failure> {
    let lost = || Failure::failed(ErrorCode::VolumeLost, format!("volume {} is lost", disk.volume));
    let volume = host.volumes.find(disk).ok_or_else(lost)?;
    let limits = check(disk, &volume, wanted)?;
    let size = wanted.size.unwrap_or(volume.size());
    // first the record: a volume that is made anew is as large as was promised; one smaller than its record only shows it
    save(host, vm, disk, size, limits)?;
    match host.volumes.grow(&volume, disk, size) {
        Ok(told) => {
            if let Some(quota) = wanted.quota {
                volume.set_quota(quota.unwrap_or(ByteLen::ZERO));
            }
            host.inventory.changed.notify_waiters();
            Ok(told)
        }
        Err(e) => {
            let before = DiskLimits::read(disk.limits.as_ref()).unwrap_or_default();
            if let Err(failure) = save(host, vm, disk, disk.size, before) {
                tracing::error!(vm = %vm, reason = failure.message, "a disk that did not grow is recorded as if it had");
            }
            Err(e.into())
        }
    }
}

/// What the disk's limits are to be. Nothing is refused after this but for want of memory.
fn check(disk: &DiskRecord, volume: &Volume, wanted: &Resize) -> Result<DiskLimits, Failure> {
    let refused = |text: String| Failure::refused(ErrorCode::InvalidArgument, text);
    if let Some(size) = wanted.size.filter(|size| *size < volume.size()) {
        let text =
            "disks only grow: what is in the part cut off would be lost. Copy what you need to a new, smaller one";
        return Err(refused(format!("{} is asked for and it has {}; {text}", size, volume.size())));
    }
    let invalid = |e: LimitError| refused(e.to_string());
    let limits = DiskLimits::read(disk.limits.as_ref()).map_err(invalid)?;
    let Some(quota) = wanted.quota else { return Ok(limits) };
    // the store counts what a volume writes from its beginning, or never
    if !volume.takes_quota() {
        return Err(refused(
            "the disk was made without a quota and cannot get one: give it to the template, and make the VM anew"
                .into(),
        ));
    }
    limits.with_quota(quota).map_err(invalid)
}

fn save(host: &Host, vm: VmId, disk: &DiskRecord, size: ByteLen, limits: DiskLimits) -> Result<(), Failure> {
    let changed = host.change_record(vm, |record| {
        for one in record.disks.iter_mut().filter(|one| one.volume == disk.volume) {
            one.size = size;
            one.limits = limits.spec();
        }
    });
    match changed {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(Failure::no_such_vm()),
        Err(e) => Err(Failure::failed(e.code(), Chain(&e).to_string())),
    }
}
