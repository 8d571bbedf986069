//! The VMs that are wanted: made from templates, placed on hosts, deleted again.

use std::collections::{BTreeMap, BTreeSet};

use muster_api::{self as api, BootFiles, CreateVms, CreatedVms, NetworkMode, Placed};
use muster_common::{ByteLen, CommandId, ErrorCode, HostId, VmId};
use muster_fleet::{
    FleetError,
    command::Verdict,
    groups::{GroupPath, Members},
    name,
    placement::{self, Amount, Candidate},
    target,
};
use muster_idl::{
    arguments::{self, ApplicationSpec, BootSpec, LimitSpec, TemplateSpec},
    v1::{Outcome, TargetKind, Verb, VirtualSystem},
};

use super::{Core, NewCommand};
use crate::{
    db::{DbError, DesiredVm, Standing, StoredTemplate},
    refusal::Refusal,
};

/// As limits travel; `None` when there are none.
pub(super) fn spec_of(limits: &api::DiskLimits) -> Option<LimitSpec> {
    (!limits.is_none()).then(|| LimitSpec {
        quota_bytes: limits.quota.map(ByteLen::bytes),
        reservation_bytes: limits.reservation.map(ByteLen::bytes),
        when_full: (limits.when_full != api::WhenFull::default()).then(|| limits.when_full.as_str().to_string()),
    })
}

/// As limits are shown.
pub(super) fn limits_of(spec: Option<&LimitSpec>) -> api::DiskLimits {
    spec.map_or_else(Default::default, |spec| api::DiskLimits {
        quota: spec.quota_bytes.map(ByteLen),
        reservation: spec.reservation_bytes.map(ByteLen),
        when_full: match spec.when_full.as_deref() {
            Some("spill") => api::WhenFull::Spill,
            _ => api::WhenFull::Pause,
        },
    })
}

/// What a resize that was done makes of what was ordered.
fn resized(spec: &mut TemplateSpec, arguments: &BTreeMap<String, String>) {
    let number = |name: &str| arguments.get(name).and_then(|text| text.parse::<u64>().ok());
    let data = arguments.get(arguments::name::DISK).is_some_and(|disk| disk == "data");
    // the size of a system disk is its image's: nothing was ordered
    if let Some(size) = number(arguments::name::SIZE_BYTES).filter(|_| data) {
        spec.data_volume_bytes = Some(size);
    }
    if let Some(quota) = number(arguments::name::QUOTA_BYTES) {
        let limits = if data { &mut spec.data_limits } else { &mut spec.system_limits };
        let changed = LimitSpec { quota_bytes: (quota > 0).then_some(quota), ..limits.clone().unwrap_or_default() };
        *limits = (changed != LimitSpec::default()).then_some(changed);
    }
}

impl Core {
    /// Finds hosts and names for new VMs, wants them, and begins the command that makes them.
    pub(crate) fn create_vms(&mut self, create: CreateVms, issuer: String) -> Result<CreatedVms, Refusal> {
        let template = self.template(&create.template)?.clone();
        let amount = match (create.names.len(), create.count, create.per_host) {
            (0, Some(n), None) => Amount::Total(n),
            (0, None, Some(n)) => Amount::PerHost(n),
            (n, None, None) if n > 0 => Amount::Total(u32::try_from(n).unwrap_or(u32::MAX)),
            _ => return Err(Refusal::invalid("say how many: exactly one of names, count and per_host")),
        };
        let groups =
            create.groups.iter().map(|path| path.parse::<GroupPath>()).collect::<Result<Vec<_>, FleetError>>()?;
        let candidates = self.candidates(&create.hosts)?;
        let hosts = placement::place(&candidates, amount, template.memory, self.config.placement.overcommit_percent)?;
        let names = self.new_names(&create, &template, &hosts)?;

        let spec = self.spec(&template)?;
        let now_us = self.now_us();
        let mut placed = Vec::new();
        let mut members = Vec::new();
        for (host, name) in hosts.into_iter().zip(names) {
            let id = VmId::random();
            let host_name = self.inventory.host_name(host);
            members.push((host, Some(id), name.clone()));
            placed.push(Placed { id, name, host, host_name });
        }
        let spec_text = serde_json::to_string(&spec)
            .map_err(|error| Refusal::new(ErrorCode::Internal, format!("write the template as JSON: {error}")))?;
        let command = self.begin(NewCommand {
            verb: Verb::Create,
            kind: TargetKind::Vm,
            target: String::new(),
            members,
            arguments: BTreeMap::from([(arguments::name::TEMPLATE.to_string(), spec_text)]),
            timeout_seconds: create.timeout_seconds,
            issuer,
            retry_of: None,
        })?;
        for vm in &placed {
            let desired = DesiredVm {
                id: vm.id,
                name: vm.name.clone(),
                host: vm.host,
                template: template.name.clone(),
                spec: spec.clone(),
                standing: Standing::Creating,
                command: Some(command),
                created_at_us: now_us,
                version: 1,
            };
            self.db.put_vm(&desired)?;
            self.desired.insert(vm.id, desired);
        }
        if !groups.is_empty() {
            let vms = Members { vms: placed.iter().map(|vm| vm.id).collect(), ..Members::default() };
            self.change_groups(|all| groups.iter().try_for_each(|path| all.ensure(path, &vms)))?;
        }
        Ok(CreatedVms { command, vms: placed })
    }

    /// What placement may choose from.
    fn candidates(&self, wanted: &[String]) -> Result<Vec<Candidate>, Refusal> {
        let names = self.names();
        let wanted: BTreeSet<HostId> = if wanted.is_empty() {
            names.hosts.keys().copied().collect()
        } else {
            target::hosts(wanted, &names, &self.groups)?
        };
        let explicit = wanted.len() < names.hosts.len();
        let candidates: Vec<Candidate> = self
            .inventory
            .hosts()
            .filter(|(id, _)| wanted.contains(id))
            .map(|(id, entry)| {
                let here = self.desired.values().filter(|vm| vm.host == id);
                let total = entry.description.as_ref().map_or(0, |d| d.total_memory_bytes);
                let budget = entry.store.as_ref().map_or(0, |s| s.budget_bytes);
                Candidate {
                    host: id,
                    name: entry.name(id),
                    online: entry.online,
                    draining: entry.draining,
                    capable: entry.description.as_ref().is_some_and(|d| d.accelerator != "none"),
                    vms: here.clone().count() as u32,
                    memory: ByteLen(total.saturating_sub(budget)),
                    committed: ByteLen(here.map(|vm| vm.spec.memory_bytes).sum()),
                }
            })
            .collect();
        // a host that was named and cannot is an error, not a silent move to the others
        if explicit && let Some(c) = candidates.iter().find(|c| !c.online || c.draining || !c.capable) {
            let (code, why) = if !c.online {
                (ErrorCode::HostOffline, "is offline")
            } else if c.draining {
                (ErrorCode::HostDraining, "is draining")
            } else {
                (ErrorCode::Hypervisor, "has no hypervisor")
            };
            return Err(Refusal::new(code, format!("host {} {why}", c.name)));
        }
        Ok(candidates)
    }

    /// A free name for each new VM, in the order of the hosts.
    fn new_names(
        &self,
        create: &CreateVms,
        template: &StoredTemplate,
        hosts: &[HostId],
    ) -> Result<Vec<String>, Refusal> {
        let mut taken: BTreeSet<String> = self.names().vms.into_values().map(|(name, _)| name).collect();
        if !create.names.is_empty() {
            for wanted in &create.names {
                name::check("VM", wanted)?;
                if !taken.insert(wanted.clone()) {
                    return Err(FleetError::Exists { what: "VM", name: wanted.clone() }.into());
                }
            }
            return Ok(create.names.clone());
        }
        let pattern = create.pattern.clone().unwrap_or_else(|| format!("{}-{{n}}", template.name));
        if !pattern.contains("{n}") {
            return Err(Refusal::invalid(format!("pattern {pattern:?} has no {{n}} for the number")));
        }
        let mut names = Vec::new();
        for host in hosts {
            let host_name = self.inventory.host_name(*host);
            let free = (1..)
                .map(|n: u32| pattern.replace("{host}", &host_name).replace("{n}", &format!("{n:02}")))
                .find(|name| !taken.contains(name))
                .unwrap_or_default();
            name::check("VM", &free)?;
            taken.insert(free.clone());
            names.push(free);
        }
        Ok(names)
    }

    fn spec(&self, template: &StoredTemplate) -> Result<TemplateSpec, Refusal> {
        let image = self.images.get(&template.image).ok_or_else(|| {
            Refusal::new(ErrorCode::NotFound, format!("the image of template {} is gone", template.name))
        })?;
        let applications = template.applications.iter().map(|digest| {
            let image = self.images.get(digest).ok_or_else(|| {
                Refusal::new(ErrorCode::NotFound, format!("an application of template {} is gone", template.name))
            })?;
            Ok(ApplicationSpec { image: digest.to_string(), image_name: image.full_name() })
        });
        let applications = applications.collect::<Result<_, Refusal>>()?;
        let BootFiles { kernel, initrd, cmdline } = template.boot.clone();
        Ok(TemplateSpec {
            name: template.name.clone(),
            image: image.digest.to_string(),
            image_name: image.full_name(),
            vcpus: template.vcpus,
            memory_bytes: template.memory.0,
            data_volume_bytes: template.data_volume.map(ByteLen::bytes),
            applications,
            boot: BootSpec { kernel: kernel.map(|d| d.to_string()), initrd: initrd.map(|d| d.to_string()), cmdline },
            bridge: match &template.network {
                NetworkMode::None => None,
                NetworkMode::Bridge { name } => Some(name.clone()),
            },
            system_limits: spec_of(&template.system_limits),
            data_limits: spec_of(&template.data_limits),
            tenant: template.tenant.clone(),
        })
    }

    /// A disk of a VM has become larger, or its quota another one: what is wanted of the VM is that from now on.
    pub(super) fn settle_resize(&mut self, vm: VmId, arguments: &BTreeMap<String, String>) -> Result<(), DbError> {
        let Some(desired) = self.desired.get(&vm) else { return Ok(()) };
        let mut next = DesiredVm { version: desired.version + 1, ..desired.clone() };
        resized(&mut next.spec, arguments);
        self.db.put_vm(&next)?;
        self.desired.insert(vm, next);
        Ok(())
    }

    /// Begins deleting VMs; their rows go when their hosts say that they are gone.
    pub(super) fn delete_vms(&mut self, command: NewCommand) -> Result<CommandId, Refusal> {
        let ids: Vec<VmId> = command.members.iter().filter_map(|(_, vm, _)| *vm).collect();
        let busy = ids.iter().filter_map(|id| self.desired.get(id)).find(|vm| vm.standing == Standing::Creating);
        if let Some(vm) = busy {
            let detail = format!("VM {} is being made; wait for its command to end", vm.name);
            return Err(Refusal::new(ErrorCode::InvalidState, detail));
        }
        let id = self.begin(command)?;
        for vm in ids {
            self.restand(vm, Standing::Deleting, Some(id))?;
        }
        Ok(id)
    }

    fn restand(&mut self, vm: VmId, standing: Standing, command: Option<CommandId>) -> Result<(), DbError> {
        let Some(desired) = self.desired.get(&vm) else { return Ok(()) };
        let next = DesiredVm { standing, command, version: desired.version + 1, ..desired.clone() };
        self.db.put_vm(&next)?;
        self.desired.insert(vm, next);
        Ok(())
    }

    /// The VM is wanted no more.
    fn forget_vm(&mut self, vm: VmId) -> Result<(), DbError> {
        self.db.delete_vm(vm)?;
        self.desired.remove(&vm);
        let mut groups = self.groups.clone();
        if groups.forget(&[], &[vm]) {
            self.db.change_groups(&self.groups, &groups)?;
            self.groups = groups;
            self.send_groups();
        }
        Ok(())
    }

    /// What a verdict on creating or deleting a VM means for it.
    pub(super) fn settle_vm(
        &mut self,
        command: CommandId,
        verb: Verb,
        vm: VmId,
        verdict: &Verdict,
    ) -> Result<(), DbError> {
        match self.desired.get(&vm) {
            // a later command has the say
            Some(desired) if desired.command.is_some_and(|current| current != command) => return Ok(()),
            Some(_) => {}
            // one that was never wanted, or is gone already
            None if verb == Verb::Create => return Ok(()),
            None => {}
        }
        match (verb, verdict.outcome) {
            (Verb::Create, Outcome::Done | Outcome::Already) => self.restand(vm, Standing::Present, Some(command)),
            (Verb::Create, Outcome::Refused | Outcome::Failed | Outcome::Expired) => self.forget_vm(vm),
            (Verb::Delete, Outcome::Done | Outcome::Already) => {
                if let Some(host) = self.desired.get(&vm).map(|desired| desired.host) {
                    self.inventory.vm_gone(host, vm);
                }
                self.forget_vm(vm)
            }
            // not begun, so it is what it was; whether it is there, its host says
            (Verb::Delete, Outcome::Refused | Outcome::Expired) => self.restand(vm, Standing::Present, Some(command)),
            // the command may still be said to have ended otherwise: see `settle_doubt`
            _ => self.restand(vm, Standing::Doubtful, Some(command)),
        }
    }

    /// A host speaks of a VM whose making ended without a clear word: then it is there.
    pub(super) fn settle_doubt(&mut self, system: &VirtualSystem) {
        let (Ok(vm), Ok(host)) = (system.vm.parse::<VmId>(), system.host.parse::<HostId>()) else { return };
        let doubtful =
            self.desired.get(&vm).is_some_and(|desired| desired.host == host && desired.standing == Standing::Doubtful);
        if doubtful {
            let command = self.desired.get(&vm).and_then(|desired| desired.command);
            self.attempt(|core| core.restand(vm, Standing::Present, command));
        }
    }
}
