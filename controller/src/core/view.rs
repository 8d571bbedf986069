//! What is known, in REST's words.

use std::collections::{BTreeMap, BTreeSet};

use muster_api as api;
use muster_common::{ByteLen, CommandId, Digest, ErrorCode, HostId, VmId};
use muster_fleet::{
    command::{Record, Verdict},
    groups::{Group, GroupPath},
    inventory::{HostEntry, VmEntry},
    target,
};
use muster_idl::{arguments::TemplateSpec, v1};

use super::{Core, desired::limits_of};
use crate::{
    db::{DesiredVm, Standing, StoredImage, StoredTemplate},
    refusal::Refusal,
};

impl Core {
    pub(crate) fn status(&self) -> api::Status {
        let hosts_online = self.inventory.hosts().filter(|(_, entry)| entry.online).count() as u32;
        api::Status {
            controller: self.identity.id,
            name: self.identity.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            lab: self.config.lab,
            epoch: self.identity.epoch,
            group_epoch: self.groups.epoch(),
            started_at_us: self.identity.started_at_us,
            now_us: self.now_us(),
            stream_endpoint: self.identity.stream_endpoint.clone(),
            cells: self
                .cells
                .iter()
                .map(|link| {
                    let (participant, diagnosis) = (link.describe)();
                    let online =
                        self.inventory.hosts().filter(|(_, entry)| entry.online && entry.cell == link.cell).count();
                    api::Cell { cell: link.cell, participant, hosts_online: online as u32, diagnosis }
                })
                .collect(),
            hosts: self.inventory.hosts().count() as u32,
            hosts_online,
            vms: self.names().vms.len() as u32,
            images: self.images.len() as u32,
            open_commands: self.engine.open() as u32,
            alarms: self.all_alarms(),
        }
    }

    fn all_alarms(&self) -> Vec<api::Alarm> {
        let mut alarms: Vec<api::Alarm> = self.alarms.values().cloned().collect();
        for name in self.inventory.duplicate_names() {
            alarms.push(api::Alarm {
                kind: "duplicate-name".to_string(),
                host: None,
                message: format!("more than one host is named {name}: use their ids, or rename one"),
                since_us: self.identity.started_at_us,
            });
        }
        alarms
    }

    pub(super) fn clear_alarms(&mut self, host: HostId) {
        self.alarms.retain(|_, alarm| alarm.host != Some(host));
    }

    pub(crate) fn all_hosts(&self) -> Vec<api::Host> {
        self.inventory.hosts().map(|(id, entry)| self.host_view(id, entry)).collect()
    }

    pub(crate) fn host(&self, text: &str) -> Result<api::Host, Refusal> {
        let id = self.names().host(text)?;
        let entry = self.inventory.host(id).ok_or_else(|| Refusal::new(ErrorCode::NotFound, "the host is gone"))?;
        Ok(self.host_view(id, entry))
    }

    fn host_view(&self, id: HostId, entry: &HostEntry) -> api::Host {
        let said = entry.description.as_ref();
        let text = |field: fn(&v1::PhysicalHost) -> &String| said.map(field).cloned().unwrap_or_default();
        let here: BTreeSet<VmId> = self
            .desired
            .values()
            .filter(|vm| vm.host == id)
            .map(|vm| vm.id)
            .chain(self.inventory.vms().filter(|(_, host, _)| *host == id).map(|(vm, _, _)| vm))
            .collect();
        let running =
            here.iter().filter(|vm| self.inventory.vm_on(**vm, id).is_some_and(|e| e.system.enabled_state == 2));
        api::Host {
            id,
            name: entry.name(id),
            cell: entry.cell,
            state: if entry.online { api::HostState::Online } else { api::HostState::Offline },
            incarnation: entry.incarnation(),
            last_seen_us: entry.last_seen_us,
            draining: entry.draining,
            duplicate_incarnation: entry.duplicate.is_some(),
            alarm: match (entry.duplicate, entry.online) {
                (Some(_), _) => "two live agents say they are this host".to_string(),
                (None, false) => "no heartbeat".to_string(),
                (None, true) => String::new(),
            },
            agent_version: text(|d| &d.agent_version),
            operating_system: text(|d| &d.operating_system),
            kernel: text(|d| &d.kernel),
            processor_model: text(|d| &d.processor_model),
            processors: said.map_or(0, |d| d.number_of_processors),
            memory_bytes: said.map_or(0, |d| d.total_memory_bytes),
            hardware_uuid: text(|d| &d.hardware_uuid),
            boot: text(|d| &d.boot),
            health_state: said.map_or(0, |d| d.health_state),
            hypervisor_uri: text(|d| &d.hypervisor_uri),
            hypervisor_version: text(|d| &d.hypervisor_version),
            accelerator: text(|d| &d.accelerator),
            hypervisor_remark: text(|d| &d.hypervisor_remark),
            stream_endpoint: text(|d| &d.stream_endpoint),
            lab: said.is_some_and(|d| d.lab),
            started_at_us: said.map_or(0, |d| d.started_at_us),
            groups: self.groups_with(|group| group.members.hosts.contains(&id)),
            vms: here.len() as u32,
            vms_running: running.count() as u32,
            version: entry.version,
        }
    }

    fn groups_with(&self, holds: impl Fn(&Group) -> bool) -> Vec<String> {
        self.groups.iter().filter(|(_, group)| holds(group)).map(|(path, _)| path.to_string()).collect()
    }

    pub(crate) fn host_metrics(&self) -> Vec<api::HostMetrics> {
        self.inventory
            .hosts()
            .filter_map(|(id, entry)| Some(host_metrics(id, entry.name(id), entry.metrics.as_ref()?)))
            .collect()
    }

    pub(crate) fn stores(&self) -> Vec<api::Store> {
        self.inventory
            .hosts()
            .filter_map(|(id, entry)| Some(store(id, entry.name(id), entry.store.as_ref()?, entry.health.as_ref())))
            .collect()
    }

    /// The VMs that `target` means (comma separated); all when there is none.
    pub(super) fn wanted_vms(&self, target: Option<&str>) -> Result<Option<BTreeSet<VmId>>, Refusal> {
        let Some(target) = target.filter(|text| !text.is_empty()) else { return Ok(None) };
        let texts: Vec<String> = target.split(',').map(ToString::to_string).collect();
        Ok(Some(target::vms(&texts, &self.names(), &self.groups)?))
    }

    pub(crate) fn vms(&self, target: Option<&str>) -> Result<Vec<api::Vm>, Refusal> {
        let wanted = self.wanted_vms(target)?;
        let ids = self.names().vms.into_keys().filter(|id| wanted.as_ref().is_none_or(|wanted| wanted.contains(id)));
        Ok(ids.filter_map(|id| self.vm_view(id)).collect())
    }

    pub(crate) fn vm(&self, text: &str) -> Result<api::Vm, Refusal> {
        let id = self.names().vm(text)?;
        self.vm_view(id).ok_or_else(|| Refusal::new(ErrorCode::NotFound, "the VM is gone"))
    }

    /// What its own host says of a VM; what another says when its own does not.
    pub(super) fn heard_of(&self, id: VmId) -> Option<(HostId, &VmEntry)> {
        let own = self.desired.get(&id).map(|vm| vm.host);
        own.and_then(|host| self.inventory.vm_on(id, host).map(|entry| (host, entry)))
            .or_else(|| self.inventory.vm_anywhere(id).max_by_key(|(_, entry)| entry.heard_us))
    }

    fn vm_view(&self, id: VmId) -> Option<api::Vm> {
        let desired = self.desired.get(&id);
        let heard = self.heard_of(id);
        let host = desired.map(|vm| vm.host).or(heard.map(|(host, _)| host))?;
        let said = heard.map(|(_, entry)| &entry.system);
        let missing = self.inventory.is_missing(id, host, self.now_us());
        let standing = match desired.map(|vm| vm.standing) {
            None => api::VmStanding::Unmanaged,
            Some(Standing::Creating) => api::VmStanding::Creating,
            Some(Standing::Deleting) => api::VmStanding::Deleting,
            Some(Standing::Doubtful) => api::VmStanding::Doubtful,
            Some(Standing::Present) if missing => api::VmStanding::Missing,
            Some(Standing::Present) => api::VmStanding::Present,
        };
        // 5: not applicable (CIM)
        let enabled_state = if missing { 5 } else { said.map_or(5, |s| s.enabled_state) };
        let spec = desired.map(|vm| &vm.spec);
        Some(api::Vm {
            id,
            name: desired.map(|vm| vm.name.clone()).or(said.map(|s| s.name.clone())).unwrap_or_default(),
            host,
            host_name: self.inventory.host_name(host),
            standing,
            state: api::VmState::from_enabled_state(enabled_state),
            enabled_state,
            requested_state: said.map_or(12, |s| s.requested_state),
            health_state: said.map_or(0, |s| s.health_state),
            guest_up: said.is_some_and(|s| s.guest_up),
            vcpus: said.map(|s| s.virtual_processors).or(spec.map(|s| s.vcpus)).unwrap_or(0),
            memory_bytes: said.map(|s| s.memory_bytes).or(spec.map(|s| s.memory_bytes)).unwrap_or(0),
            disks: said.map(|s| s.disks.iter().filter_map(|d| disk(d, spec)).collect()).unwrap_or_default(),
            template: desired.map(|vm| vm.template.clone()).or(said.map(|s| s.template.clone())).unwrap_or_default(),
            remark: said.map(|s| s.remark.clone()).unwrap_or_default(),
            changed_at_us: said.map_or(0, |s| s.changed_at_us),
            sampled_at_us: said.map_or(0, |s| s.sampled_at_us),
            stale: !self.inventory.is_online(host),
            groups: self.groups_with(|group| group.members.vms.contains(&id)),
            tenant: spec.and_then(|spec| spec.tenant.clone()),
            version: desired.map_or(0, |vm| vm.version) + heard.map_or(0, |(_, entry)| entry.version),
        })
    }

    /// The id, the name and the stream endpoint of the host of a VM, for its console and screen.
    pub(crate) fn stream_of(&self, text: &str) -> Result<(VmId, String), Refusal> {
        let vm = self.vm(text)?;
        let host = self.inventory.host(vm.host);
        if !host.is_some_and(|entry| entry.online) {
            let detail = format!("host {} of VM {} is offline", vm.host_name, vm.name);
            return Err(Refusal::new(ErrorCode::HostOffline, detail));
        }
        let endpoint = host.and_then(|entry| entry.description.as_ref()).map(|d| d.stream_endpoint.clone());
        match endpoint {
            Some(endpoint) if endpoint.starts_with("http://") => Ok((vm.id, endpoint)),
            _ => Err(Refusal::new(
                ErrorCode::Unavailable,
                format!("host {} has not said where its stream endpoint is", vm.host_name),
            )),
        }
    }

    pub(crate) fn vm_metrics(&self) -> Vec<api::VmMetrics> {
        self.names()
            .vms
            .into_iter()
            .filter_map(|(id, (name, _))| {
                let (host, entry) = self.heard_of(id)?;
                Some(vm_metrics(id, host, name, entry.metrics.as_ref()?))
            })
            .collect()
    }

    pub(crate) fn volumes(&self, target: Option<&str>) -> Result<Vec<api::Volume>, Refusal> {
        let vms = self.vms(target)?;
        Ok(vms
            .into_iter()
            .flat_map(|vm| {
                let disks = vm.disks.clone();
                disks.into_iter().map(move |disk| (vm.clone(), disk))
            })
            .map(|(vm, disk)| api::Volume {
                id: disk.volume,
                generation: disk.generation,
                role: disk.role,
                vm: vm.id,
                vm_name: vm.name,
                host: vm.host,
                host_name: vm.host_name,
                size: ByteLen(disk.size_bytes),
                image: disk.image,
                image_name: disk
                    .image
                    .and_then(|digest| self.images.get(&digest))
                    .map(StoredImage::full_name)
                    .unwrap_or_default(),
                condition: disk.condition,
            })
            .collect())
    }

    pub(crate) fn backups(&self, target: Option<&str>) -> Result<Vec<api::Backup>, Refusal> {
        let wanted = self.wanted_vms(target)?;
        let names = self.names();
        Ok(self
            .db
            .backups()?
            .into_iter()
            .filter_map(|(host, command, backup)| {
                let vm: VmId = backup.vm.parse().ok()?;
                if wanted.as_ref().is_some_and(|wanted| !wanted.contains(&vm)) {
                    return None;
                }
                Some(api::Backup {
                    id: backup.id,
                    host,
                    host_name: self.inventory.host_name(host),
                    vm,
                    vm_name: names.vms.get(&vm).map_or(backup.vm_name, |(name, _)| name.clone()),
                    taken_at_us: backup.taken_at_us,
                    command,
                    volumes: backup
                        .volumes
                        .into_iter()
                        .filter_map(|volume| {
                            Some(api::BackupVolume {
                                volume: volume.volume.parse().ok()?,
                                role: volume.role,
                                size_bytes: volume.size_bytes,
                                new_bytes: volume.new_bytes,
                                manifest: volume.manifest.parse().ok(),
                            })
                        })
                        .collect(),
                    logical_bytes: backup.logical_bytes,
                    new_bytes: backup.new_bytes,
                })
            })
            .collect())
    }

    pub(crate) fn all_groups(&self) -> Vec<api::Group> {
        let names = self.names();
        self.groups.iter().map(|(path, group)| self.group_view(path, group, &names)).collect()
    }

    pub(crate) fn group(&self, path: &str) -> Result<api::Group, Refusal> {
        let path: GroupPath = path.parse()?;
        let group = self.groups.find(&path)?;
        Ok(self.group_view(&path, group, &self.names()))
    }

    fn group_view(&self, path: &GroupPath, group: &Group, names: &target::Names) -> api::Group {
        let (hosts, vms) = self.groups.expand(path);
        let named = |id: String, name: Option<&String>| api::Reference { name: name.unwrap_or(&id).clone(), id };
        api::Group {
            path: path.to_string(),
            hosts: group.members.hosts.iter().map(|id| named(id.to_string(), names.hosts.get(id))).collect(),
            vms: group
                .members
                .vms
                .iter()
                .map(|id| named(id.to_string(), names.vms.get(id).map(|(name, _)| name)))
                .collect(),
            groups: group.members.groups.iter().map(ToString::to_string).collect(),
            total_hosts: hosts.len() as u32,
            total_vms: vms.len() as u32,
            version: group.version,
        }
    }

    pub(crate) fn all_images(&self) -> Vec<api::Image> {
        self.images.values().map(|image| self.image_view(image)).collect()
    }

    pub(crate) fn image_view(&self, image: &StoredImage) -> api::Image {
        let residency = self.residency(&image.digest);
        let parent = image.parent.and_then(|digest| self.images.get(&digest));
        api::Image {
            digest: image.digest,
            name: image.name.clone(),
            revision: image.revision,
            format: image.format,
            logical_bytes: image.logical_bytes,
            new_bytes: image.new_bytes,
            resident_estimate_bytes: image.resident_estimate_bytes,
            boot: image.boot.clone(),
            imported_at_us: image.imported_at_us,
            resident_on: residency.iter().map(|there| there.host_name.clone()).collect(),
            volumes: residency.iter().map(|there| there.volumes).sum(),
            residency,
            templates: self.templates_of(&image.digest),
            vms: self.vms_of(&image.digest).len() as u32,
            parent: image.parent,
            parent_name: parent.map(StoredImage::full_name).unwrap_or_default(),
            origin: image.origin.clone(),
            version: image.version,
        }
    }

    pub(crate) fn all_templates(&self) -> Vec<api::Template> {
        self.templates.values().map(|template| self.template_view(template)).collect()
    }

    pub(crate) fn template_view(&self, template: &StoredTemplate) -> api::Template {
        api::Template {
            name: template.name.clone(),
            image: template.image,
            image_name: self.images.get(&template.image).map(StoredImage::full_name).unwrap_or_default(),
            vcpus: template.vcpus,
            memory: template.memory,
            data_volume: template.data_volume,
            applications: template
                .applications
                .iter()
                .map(|digest| api::Application {
                    image: *digest,
                    image_name: self.images.get(digest).map(StoredImage::full_name).unwrap_or_default(),
                })
                .collect(),
            boot: template.boot.clone(),
            network: template.network.clone(),
            system_limits: template.system_limits.clone(),
            data_limits: template.data_limits.clone(),
            tenant: template.tenant.clone(),
            created_at_us: template.created_at_us,
            vms: self.desired.values().filter(|vm: &&DesiredVm| vm.template == template.name).count() as u32,
            version: template.version,
        }
    }

    pub(crate) fn command_view(&self, id: CommandId) -> Result<api::Command, Refusal> {
        let record = self.record(id)?;
        let members = (0..record.order.members.len()).map(|at| member(&record, at)).collect();
        Ok(api::Command { summary: summary(&record), arguments: record.order.arguments.clone(), members })
    }

    pub(crate) fn commands(
        &self,
        before: Option<CommandId>,
        open: bool,
        limit: usize,
    ) -> Result<Vec<api::CommandSummary>, Refusal> {
        let stored = self.db.commands(before, open, limit)?;
        // the engine is ahead of the database only in what is not stored
        Ok(stored.iter().map(|record| summary(self.engine.get(record.order.id).unwrap_or(record))).collect())
    }

    pub(crate) fn top(&self) -> Result<api::Top, Refusal> {
        let mut by_host: Vec<api::TopHost> = self
            .inventory
            .hosts()
            .map(|(id, entry)| api::TopHost {
                host: self.host_view(id, entry),
                metrics: entry.metrics.as_ref().map(|m| host_metrics(id, entry.name(id), m)),
                store: entry.store.as_ref().map(|s| store(id, entry.name(id), s, entry.health.as_ref())),
            })
            .collect();
        by_host.sort_by(|a, b| a.host.name.cmp(&b.host.name));
        let vms = self.vms(None)?.into_iter().map(|vm| {
            let metrics = self
                .heard_of(vm.id)
                .and_then(|(host, entry)| Some(vm_metrics(vm.id, host, vm.name.clone(), entry.metrics.as_ref()?)));
            api::TopVm { vm, metrics }
        });
        let mut vms: Vec<api::TopVm> = vms.collect();
        vms.sort_by(|a, b| a.vm.name.cmp(&b.vm.name));
        // ids sort by time: newest first
        let mut commands: Vec<_> = self.engine.records().filter(|r| r.is_open()).map(summary).collect();
        commands.reverse();
        Ok(api::Top { status: self.status(), hosts: by_host, vms, commands })
    }
}

/// REST's word for the wire's; a test in `command` holds them together.
fn outcome(outcome: v1::Outcome) -> api::Outcome {
    api::Outcome::from_text(outcome.as_str()).unwrap_or(api::Outcome::Indeterminate)
}

fn verdict(verdict: &Verdict) -> api::Verdict {
    let result = if verdict.result.is_empty() {
        serde_json::Value::Null
    } else {
        // a result that is no JSON is shown as the text it is
        serde_json::from_str(&verdict.result).unwrap_or_else(|_| verdict.result.clone().into())
    };
    api::Verdict {
        outcome: outcome(verdict.outcome),
        code: verdict.code.clone(),
        message: verdict.message.clone(),
        enabled_state: verdict.enabled_state,
        guest_up: verdict.guest_up,
        result,
        received_at_us: verdict.received_at_us,
        started_at_us: verdict.started_at_us,
        ended_at_us: verdict.ended_at_us,
        arrived_at_us: verdict.arrived_at_us,
        late: verdict.late,
    }
}

pub(crate) fn member(record: &Record, at: usize) -> api::Member {
    let member = &record.order.members[at];
    api::Member {
        host: member.host,
        host_name: member.host_name.clone(),
        vm: member.vm,
        name: member.name.clone(),
        verdict: record.verdicts[at].as_ref().map(verdict),
        progress: record.progress[at].as_ref().map(|progress| api::Progress {
            phase: progress.phase.clone(),
            done: progress.done,
            total: progress.total,
            sent_at_us: progress.sent_at_us,
        }),
    }
}

pub(crate) fn summary(record: &Record) -> api::CommandSummary {
    let order = &record.order;
    let verdicts: Vec<&Verdict> = record.verdicts.iter().flatten().collect();
    let mut outcomes: BTreeMap<api::Outcome, u32> = BTreeMap::new();
    for said in &verdicts {
        *outcomes.entry(outcome(said.outcome)).or_default() += 1;
    }
    let after = |at: Option<u64>| at.map_or(0, |at| at.saturating_sub(order.issued_at_us));
    api::CommandSummary {
        id: order.id,
        verb: api::Verb::from_text(order.verb.as_str()).unwrap_or(api::Verb::Ping),
        target_kind: match order.target_kind {
            v1::TargetKind::Host => api::TargetKind::Host,
            v1::TargetKind::Vm => api::TargetKind::Vm,
        },
        target: order.target.clone(),
        issuer: order.issuer.clone(),
        state: if record.is_open() { api::CommandState::Open } else { api::CommandState::Ended },
        issued_at_us: order.issued_at_us,
        not_after_us: order.not_after_us,
        ended_at_us: record.ended_at_us,
        cells: record.published.iter().copied().collect(),
        members_total: record.verdicts.len() as u32,
        members_answered: verdicts.len() as u32,
        outcomes,
        first_verdict_after_us: after(verdicts.iter().map(|v| v.arrived_at_us).min()),
        last_verdict_after_us: after(verdicts.iter().map(|v| v.arrived_at_us).max()),
        retry_of: order.retry_of,
        version: record.version,
    }
}

fn disk(disk: &v1::VirtualDisk, ordered: Option<&TemplateSpec>) -> Option<api::Disk> {
    let limits = ordered.and_then(|spec| match disk.role.as_str() {
        "system" => spec.system_limits.as_ref(),
        "data" => spec.data_limits.as_ref(),
        _ => None,
    });
    Some(api::Disk {
        role: disk.role.clone(),
        volume: disk.volume.parse().ok()?,
        generation: disk.generation,
        size_bytes: disk.size_bytes,
        image: disk.image.parse::<Digest>().ok(),
        condition: disk.condition.clone(),
        limits: limits_of(limits),
    })
}

fn host_metrics(host: HostId, host_name: String, m: &v1::HostMetrics) -> api::HostMetrics {
    api::HostMetrics {
        host,
        host_name,
        sampled_at_us: m.sampled_at_us,
        processor_percent: m.processor_percent,
        load_average_1m: m.load_average_1m,
        memory_total_bytes: m.memory_total_bytes,
        memory_available_bytes: m.memory_available_bytes,
        network_received_bytes: m.network_received_bytes,
        network_sent_bytes: m.network_sent_bytes,
        disk_read_bytes: m.disk_read_bytes,
        disk_written_bytes: m.disk_written_bytes,
        running_vms: m.running_vms,
    }
}

fn store_health(h: &v1::StoreHealth) -> api::StoreHealth {
    api::StoreHealth {
        sampled_at_us: h.sampled_at_us,
        scrubbing: h.scrubbing,
        blocks_checked: h.blocks_checked,
        blocks_damaged: h.blocks_damaged,
        blocks_repaired: h.blocks_repaired,
        blocks_unreadable: h.blocks_unreadable,
        passes: h.passes,
        last_pass_at_us: h.last_pass_at_us,
        nodes: h
            .nodes
            .iter()
            .map(|n| api::StoreNode { node: n.node, memory_bytes: n.memory_bytes, store_bytes: n.store_bytes })
            .collect(),
    }
}

fn store(host: HostId, host_name: String, s: &v1::StoreState, health: Option<&v1::StoreHealth>) -> api::Store {
    api::Store {
        host,
        host_name,
        sampled_at_us: s.sampled_at_us,
        budget_bytes: s.budget_bytes,
        resident_bytes: s.resident_bytes,
        metadata_bytes: s.metadata_bytes,
        logical_bytes: s.logical_bytes,
        provisioned_bytes: s.provisioned_bytes,
        unique_blocks: s.unique_blocks,
        dedup_ratio: s.dedup_ratio,
        guest_file_reads: s.guest_file_reads,
        page_kind: s.page_kind.clone(),
        images: s
            .images
            .iter()
            .filter_map(|image| {
                Some(api::StoreImage {
                    digest: image.digest.parse().ok()?,
                    name: image.name.clone(),
                    logical_bytes: image.logical_bytes,
                    volumes: image.volumes,
                })
            })
            .collect(),
        volumes: s.volumes,
        health: health.map(store_health),
    }
}

fn vm_metrics(vm: VmId, host: HostId, vm_name: String, m: &v1::VmMetrics) -> api::VmMetrics {
    api::VmMetrics {
        vm,
        vm_name,
        host,
        sampled_at_us: m.sampled_at_us,
        processor_percent: m.processor_percent,
        processor_time_us: m.processor_time_us,
        memory_resident_bytes: m.memory_resident_bytes,
        memory_used_bytes: m.memory_used_bytes,
        disk_reads: m.disk_reads,
        disk_writes: m.disk_writes,
        disk_read_bytes: m.disk_read_bytes,
        disk_written_bytes: m.disk_written_bytes,
        network_received_bytes: m.network_received_bytes,
        network_sent_bytes: m.network_sent_bytes,
    }
}
