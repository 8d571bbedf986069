//! Create and delete.

use std::sync::Arc;

use muster_cim::{EnabledState, LimitError, WhenFull};
use muster_common::{ByteLen, ErrorCode, VolumeId};
use muster_store::Image;
use muster_virt::{DomainState, HypervisorErrorKind, Lane};
use tokio::sync::oneshot;

use super::{Done, Failure, Work};
use crate::{
    aftercare::{Care, Pauses},
    arguments::{self, Template},
    images::Pulled,
    inventory::Entry,
    records::{DiskRecord, DiskRole, VmRecord},
};

impl Work {
    pub(super) async fn create(&self) -> Result<Done, Failure> {
        let template = arguments::template(&self.order)?;
        let name = arguments::vm_name(&self.order)?;
        let vm = self.order.vm.ok_or_else(Failure::no_such_vm)?;
        if let Some(other) = self.host.inventory.by_name(&name) {
            return Err(Failure::refused(
                ErrorCode::AlreadyExists,
                format!("the name {name:?} is taken by VM {other}"),
            ));
        }
        self.check_limits(&template)?;
        self.fetch_boot_files(&template).await?;
        let (image, _) = self.ensure_image(template.image, &template.spec.image_name).await?;
        let too_much = |e: LimitError| Failure::refused(ErrorCode::InvalidArgument, format!("the system disk: {e}"));
        template.system_limits.check_size(image.size()).map_err(too_much)?;
        let transport = self.host.wanted_transport(template.spec.vcpus);
        let tenant = template.spec.tenant.clone();
        let mut applications = Vec::new();
        for (digest, name) in &template.applications {
            applications.push(self.ensure_image(*digest, name).await?.0);
        }
        let mut disks = vec![DiskRecord {
            role: DiskRole::System,
            target: "vda".into(),
            volume: VolumeId::random(),
            generation: 1,
            size: image.size(),
            image: Some(template.image),
            transport,
            limits: template.system_limits.spec(),
            tenant: tenant.clone(),
        }];
        if let Some(size) = template.data {
            disks.push(DiskRecord {
                role: DiskRole::Data,
                target: "vdb".into(),
                volume: VolumeId::random(),
                generation: 1,
                size,
                image: None,
                transport,
                limits: template.data_limits.spec(),
                tenant,
            });
        }
        for (n, application) in applications.iter().enumerate() {
            disks.push(DiskRecord {
                role: DiskRole::Application,
                target: arguments::application_target(n),
                volume: VolumeId::random(),
                generation: 1,
                size: application.size(),
                image: Some(application.digest()),
                transport,
                limits: None,
                tenant: None,
            });
        }
        let record = VmRecord::new(vm, name, template.spec.clone(), disks, self.host.now_us());
        let Some(held) = self.host.aftercare.hold(vm, Care::Build) else {
            let text = "what an earlier create of it made is still being taken away: try again later";
            return Err(Failure::refused(ErrorCode::InUse, text));
        };
        let (answer, built) = oneshot::channel();
        let work = self.clone();
        self.host.aftercare.spawn(async move {
            let _held = held;
            work.build_or_undo(&record, answer).await;
        });
        built.await.unwrap_or_else(|_| Err(Failure::panicked()))
    }

    /// Limits that this host's store cannot keep, before anything is fetched.
    fn check_limits(&self, template: &Template) -> Result<(), Failure> {
        let store = &self.host.volumes.store;
        let disks = [template.system_limits, template.data_limits];
        if disks.iter().any(|limits| limits.when_full == WhenFull::Spill) && store.spill_room().is_none() {
            let text = "this host has nowhere to spill to: set store.spill in its agent's configuration, or let the \
                        template say pause";
            return Err(Failure::refused(ErrorCode::Unsupported, text));
        }
        let reserved = ByteLen(disks.iter().filter_map(|limits| limits.reservation).map(ByteLen::bytes).sum());
        let budget = store.stats().budget;
        if reserved >= budget {
            let text = format!("a reservation of {reserved} cannot be kept by a store whose budget is {budget}");
            return Err(Failure::refused(ErrorCode::NoSpace, text));
        }
        Ok(())
    }

    /// Outlives the order: what it made is taken away again when the building failed or nobody waits for it any more.
    async fn build_or_undo(&self, record: &VmRecord, answer: oneshot::Sender<Result<Done, Failure>>) {
        let mut unsaid = match self.build(record).await {
            Ok(done) => match answer.send(Ok(done)) {
                Ok(()) => return,
                Err(_) => {
                    tracing::warn!(vm = %record.vm, "a create was given up, what it made is taken away");
                    None
                }
            },
            Err(failure) => Some((answer, failure)),
        };
        let mut pauses = Pauses::new();
        loop {
            let undone = self.unbuild(record).await;
            if let Some((answer, failure)) = unsaid.take() {
                // given up meanwhile: its verdict is said
                let _ = answer.send(Err(failure));
            }
            if undone {
                return;
            }
            pauses.wait().await;
        }
    }

    async fn build(&self, record: &VmRecord) -> Result<Done, Failure> {
        let saved = record.clone();
        self.blocking(move |host| {
            // first the record: a domain of ours always has one, whenever the agent dies
            host.records.save(&saved)?;
            for disk in &saved.disks {
                host.volumes.make(disk)?;
                host.volumes.offer(saved.vm, disk)?;
            }
            Ok(())
        })
        .await?;
        self.define(record).await?;
        self.host.inventory.insert(Entry::new(record.clone(), DomainState::Off, self.host.now_us()));
        self.wait_for(EnabledState::Disabled).await?;
        Ok(Done::default())
    }

    /// Takes everything of a VM away again; false when something stayed. The record goes last and only without a domain.
    async fn unbuild(&self, record: &VmRecord) -> bool {
        let vm = record.vm;
        self.host.inventory.remove(vm);
        match self.host.machines.call(Lane::Vm(vm), "undefine", move |h| h.undefine(vm)).await {
            Err(e) if e.kind() != HypervisorErrorKind::NotFound => {
                self.host.complain("a domain stayed", &e);
                return false;
            }
            _ => {}
        }
        let gone = record.clone();
        let removed = self.blocking(move |host| {
            for disk in &gone.disks {
                host.volumes.destroy(disk)?;
            }
            Ok(host.forget_record(gone.vm)?)
        });
        match removed.await {
            Ok(()) => true,
            Err(failure) => {
                tracing::error!(vm = %vm, reason = failure.message, "something of a VM stayed");
                false
            }
        }
    }

    pub(super) async fn delete(&self) -> Result<Done, Failure> {
        let record = self.entry()?.record;
        let vm = record.vm;
        match self.host.machines.call_within(Lane::Vm(vm), "undefine", self.call_time(), move |h| h.undefine(vm)).await
        {
            Err(e) if e.kind() == HypervisorErrorKind::NotFound => {}
            other => other?,
        }
        if self.host.machines.status(vm).await?.is_some() {
            return Err(Failure::failed(ErrorCode::Hypervisor, "the hypervisor still knows it"));
        }
        let gone = record.clone();
        self.blocking(move |host| {
            for disk in &gone.disks {
                host.volumes.destroy(disk)?;
            }
            Ok(host.forget_record(vm)?)
        })
        .await?;
        for path in [self.host.console_socket(vm), self.host.vnc_socket(vm), self.host.log_path(vm)] {
            // QEMU removes its sockets itself as a rule
            let _ = std::fs::remove_file(path);
        }
        self.host.boot_files.sweep(&self.host.used_boot_files());
        Ok(Done::default())
    }

    /// The image in memory, pulled if it is missing, with progress.
    pub(super) async fn ensure_image(
        &self,
        digest: muster_common::Digest,
        name: &str,
    ) -> Result<(Arc<Image>, Option<Pulled>), Failure> {
        let source = match arguments::source(&self.order)? {
            Some(source) => Some(source),
            None => self.host.source_for(&self.order.controller),
        };
        let host = Arc::clone(&self.host);
        let order = self.order.clone();
        let said = std::sync::atomic::AtomicU64::new(0);
        let progress = Arc::new(move |done: u64, total: u64| {
            let now = host.now_us();
            let last = said.load(std::sync::atomic::Ordering::Relaxed);
            // twice a second is enough for eyes
            if done >= total || now.saturating_sub(last) >= 500_000 {
                said.store(now, std::sync::atomic::Ordering::Relaxed);
                host.voice.progress(&order, "pull image", done, total);
            }
        });
        let pull = self.host.images.ensure(source, digest, name, progress);
        match tokio::time::timeout(self.left(), pull).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(Failure::timeout("the image was not pulled by the deadline; nothing of it is kept")),
        }
    }

    pub(super) async fn fetch_boot_files(&self, template: &Template) -> Result<(), Failure> {
        for digest in [template.kernel, template.initrd].into_iter().flatten() {
            if self.host.boot_files.has(&digest) {
                continue;
            }
            let source = match arguments::source(&self.order)? {
                Some(source) => Some(source),
                None => self.host.source_for(&self.order.controller),
            };
            let fetch = self.host.images.blob(source, digest);
            let bytes = match tokio::time::timeout(self.left(), fetch).await {
                Ok(result) => result.map_err(|e| Failure::from(e).while_doing("fetch a boot file"))?,
                Err(_) => return Err(Failure::timeout("a boot file was not fetched by the deadline")),
            };
            self.blocking(move |host| Ok(host.boot_files.keep(&digest, &bytes)?)).await?;
        }
        Ok(())
    }

    /// Boot files vanish with the machine's memory; they are fetched again.
    pub(super) async fn ensure_boot_files(&self, record: &VmRecord) -> Result<(), Failure> {
        self.fetch_boot_files(&arguments::check_template(record.template.clone())?).await
    }
}
