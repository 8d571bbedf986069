//! Images and templates as records; the images' bytes are in the repository.

use muster_api::{
    self as api, ChangeLimits, ChangeTemplate, CreateTemplate, GroupMembers, ImageFormat, NetworkMode, PullImage,
    Residency,
};
use muster_cim::{DiskLimits, LimitError};
use muster_common::{ByteLen, CommandId, Digest, ErrorCode};
use muster_fleet::{
    FleetError,
    groups::{GroupPath, Members},
    name, target,
};
use muster_idl::{
    arguments,
    v1::{TargetKind, Verb},
};

use super::{Core, NewCommand, desired::spec_of};
use crate::{
    db::{DesiredVm, StoredImage, StoredTemplate},
    refusal::Refusal,
};

/// Below it nothing boots; a typing error such as "512" for 512 MiB is caught.
const LEAST_MEMORY: ByteLen = ByteLen::mib(16);
const MOST_VCPUS: u32 = 512;
/// Disks `vdc` to `vdz`.
const MOST_APPLICATIONS: usize = 24;

fn checked(limits: &api::DiskLimits) -> Result<DiskLimits, LimitError> {
    DiskLimits::read(spec_of(limits).as_ref())
}

/// `data_size`: of the data volume, if there is one.
fn check_limits(system: &api::DiskLimits, data: &api::DiskLimits, data_size: Option<ByteLen>) -> Result<(), Refusal> {
    let wrong = |disk: &str, e: LimitError| Refusal::invalid(format!("the {disk} disk: {e}"));
    checked(system).map_err(|e| wrong("system", e))?;
    let limits = checked(data).map_err(|e| wrong("data", e))?;
    match data_size {
        None if !data.is_none() => Err(Refusal::invalid("limits of a data disk, and no data volume: say its size")),
        None => Ok(()),
        Some(size) => limits.check_size(size).map_err(|e| wrong("data", e)),
    }
}

/// A system disk is as large as its image.
fn check_system_size(limits: &api::DiskLimits, image: &StoredImage) -> Result<(), Refusal> {
    checked(limits)
        .and_then(|limits| limits.check_size(ByteLen(image.logical_bytes)))
        .map_err(|e| Refusal::invalid(format!("the system disk: {e}")))
}

/// These limits with what is said changed.
fn changed(limits: &api::DiskLimits, change: &ChangeLimits) -> api::DiskLimits {
    let size = |new: Option<ByteLen>, old: Option<ByteLen>| match new {
        Some(ByteLen::ZERO) => None,
        new => new.or(old),
    };
    api::DiskLimits {
        quota: size(change.quota, limits.quota),
        reservation: size(change.reservation, limits.reservation),
        when_full: change.when_full.unwrap_or(limits.when_full),
    }
}

impl Core {
    /// The image of a digest, a name (its newest revision) or `name@revision`.
    pub(crate) fn image(&self, reference: &str) -> Result<&StoredImage, Refusal> {
        if let Ok(digest) = reference.parse::<Digest>()
            && let Some(image) = self.images.get(&digest)
        {
            return Ok(image);
        }
        let (wanted, revision) = match reference.split_once('@') {
            Some((name, revision)) => (name, revision.parse::<u32>().ok()),
            None => (reference, None),
        };
        let named = self.images.values().filter(|image| image.name == wanted);
        let found = if reference.contains('@') {
            named.clone().find(|image| Some(image.revision) == revision)
        } else {
            named.clone().max_by_key(|image| image.revision)
        };
        found.ok_or_else(|| {
            let near = name::near(wanted, self.images.values().map(|image| image.name.as_str()));
            FleetError::Unknown { what: "image", name: reference.to_string(), near }.into()
        })
    }

    /// The revision an import under this name would get.
    pub(crate) fn free_revision(&self, wanted: &str, new_revision: bool) -> Result<u32, Refusal> {
        name::check("image", wanted)?;
        let newest = self.images.values().filter(|image| image.name == wanted).map(|image| image.revision).max();
        match newest {
            Some(_) if !new_revision => Err(Refusal::new(
                ErrorCode::AlreadyExists,
                format!(
                    "image {wanted:?} exists already: import it under another name, or as a new revision of it (--new-revision)"
                ),
            )),
            newest => Ok(newest.unwrap_or(0) + 1),
        }
    }

    /// Records an image whose bytes are durable in the repository.
    pub(crate) fn add_image(&mut self, mut image: StoredImage, new_revision: bool) -> Result<StoredImage, Refusal> {
        if let Some(same) = self.images.get(&image.digest) {
            let detail = format!("the same content is there already, as image {}: use that one", same.full_name());
            return Err(Refusal::new(ErrorCode::AlreadyExists, detail));
        }
        image.revision = self.free_revision(&image.name, new_revision)?;
        self.db.put_image(&image)?;
        self.images.insert(image.digest, image.clone());
        Ok(image)
    }

    /// Where the image is in memory, and what is made from it there.
    pub(crate) fn residency(&self, digest: &Digest) -> Vec<Residency> {
        let text = digest.to_string();
        self.inventory
            .hosts()
            .filter_map(|(host, entry)| {
                let image = entry.store.as_ref()?.images.iter().find(|image| image.digest == text)?;
                Some(Residency { host, host_name: entry.name(host), volumes: image.volumes })
            })
            .collect()
    }

    pub(crate) fn templates_of(&self, digest: &Digest) -> Vec<String> {
        let names_it = |t: &&StoredTemplate| t.image == *digest || t.applications.contains(digest);
        self.templates.values().filter(names_it).map(|t| t.name.clone()).collect()
    }

    /// VMs made from it here, for the system disk or as an application.
    pub(crate) fn vms_of(&self, digest: &Digest) -> Vec<&str> {
        let text = digest.to_string();
        let names_it = |vm: &&DesiredVm| {
            vm.spec.image == text || vm.spec.applications.iter().any(|application| application.image == text)
        };
        self.desired.values().filter(names_it).map(|vm| vm.name.as_str()).collect()
    }

    /// VMs that hosts tell of, which nobody here made, and whose disks are clones of it.
    fn strangers_of(&self, digest: &Digest) -> Vec<&str> {
        let text = digest.to_string();
        self.inventory
            .vms()
            .filter(|(vm, _, entry)| {
                !self.desired.contains_key(vm) && entry.system.disks.iter().any(|disk| disk.image == text)
            })
            .map(|(_, _, entry)| entry.system.name.as_str())
            .collect()
    }

    /// Takes an image out of the records, when nothing uses it; its bytes go with the next prune.
    pub(crate) fn delete_image(&mut self, reference: &str) -> Result<StoredImage, Refusal> {
        let image = self.image(reference)?.clone();
        let templates = self.templates_of(&image.digest);
        let vms = self.vms_of(&image.digest);
        let strangers = self.strangers_of(&image.digest);
        let in_use = |what: &str, names: &str| {
            let detail = format!("image {} is used by {what} {names}", image.full_name());
            Err(Refusal::new(ErrorCode::InUse, detail))
        };
        if !templates.is_empty() {
            return in_use("template", &templates.join(", "));
        }
        if !vms.is_empty() {
            return in_use("VM", &some_of(&vms));
        }
        if !strangers.is_empty() {
            return in_use("VM (not made here)", &some_of(&strangers));
        }
        self.db.delete_image(&image.digest)?;
        self.images.remove(&image.digest);
        Ok(image)
    }

    /// Stores of online hosts that cannot hold `resident` bytes more.
    pub(crate) fn too_small_for(&self, resident: u64, digest: Option<&Digest>) -> Vec<String> {
        let text = digest.map(ToString::to_string);
        self.inventory
            .hosts()
            .filter(|(_, entry)| entry.online)
            .filter(|(_, entry)| {
                entry.store.as_ref().is_some_and(|store| {
                    let there = store.images.iter().any(|image| Some(&image.digest) == text.as_ref());
                    !there && store.budget_bytes.saturating_sub(store.resident_bytes) < resident
                })
            })
            .map(|(id, entry)| entry.name(id))
            .collect()
    }

    /// Has hosts make an image resident. Refused when it surely does not fit even into an empty store.
    pub(crate) fn pull(&mut self, reference: &str, pull: PullImage, issuer: String) -> Result<CommandId, Refusal> {
        let image = self.image(reference)?.clone();
        let names = self.names();
        let hosts = target::hosts(&pull.target, &names, &self.groups)?;
        for host in &hosts {
            // overlap with what is there may make it fit, so only the whole budget is held against it
            let budget = self.inventory.host(*host).and_then(|entry| entry.store.as_ref()).map(|s| s.budget_bytes);
            if let Some(budget) = budget
                && image.resident_estimate_bytes > budget
            {
                let detail = format!(
                    "image {} would take {} of memory, and the store of host {} has a budget of {}",
                    image.full_name(),
                    ByteLen(image.resident_estimate_bytes),
                    self.inventory.host_name(*host),
                    ByteLen(budget)
                );
                return Err(Refusal::new(ErrorCode::NoSpace, detail));
            }
        }
        let members = hosts.into_iter().map(|host| (host, None, self.inventory.host_name(host))).collect();
        self.begin(NewCommand {
            verb: Verb::ImagePull,
            kind: TargetKind::Host,
            target: pull.target.join(","),
            members,
            arguments: [
                (arguments::name::DIGEST.to_string(), image.digest.to_string()),
                (arguments::name::IMAGE_NAME.to_string(), image.full_name()),
            ]
            .into(),
            timeout_seconds: pull.timeout_seconds,
            issuer,
            retry_of: None,
        })
    }

    pub(crate) fn template(&self, name: &str) -> Result<&StoredTemplate, Refusal> {
        self.templates.get(name).ok_or_else(|| {
            let near = name::near(name, self.templates.keys().map(String::as_str));
            FleetError::Unknown { what: "template", name: name.to_string(), near }.into()
        })
    }

    pub(crate) fn create_template(&mut self, create: CreateTemplate) -> Result<String, Refusal> {
        name::check("template", &create.name)?;
        if self.templates.contains_key(&create.name) {
            return Err(FleetError::Exists { what: "template", name: create.name }.into());
        }
        if create.vcpus == 0 || create.vcpus > MOST_VCPUS {
            return Err(Refusal::invalid(format!("{} vcpus: it must be 1 to {MOST_VCPUS}", create.vcpus)));
        }
        if create.memory < LEAST_MEMORY {
            let detail =
                format!("{} of memory: at least {LEAST_MEMORY}; sizes without a unit are bytes", create.memory);
            return Err(Refusal::invalid(detail));
        }
        if let Some(size) = create.data_volume
            && (size.0 == 0 || size.0 % 4096 != 0)
        {
            let detail = format!("a data volume of {} bytes: it must be a multiple of 4096 above 0", size.0);
            return Err(Refusal::invalid(detail));
        }
        if let NetworkMode::Bridge { name } = &create.network
            && (name.is_empty() || name.len() > 15 || name.contains(['/', ' ']))
        {
            return Err(Refusal::invalid(format!("{name:?} is not the name of a network interface")));
        }
        check_limits(&create.system_limits, &create.data_limits, create.data_volume)?;
        let tenant = create.tenant.as_deref().map_or(Ok(()), muster_cim::check_tenant);
        tenant.map_err(|e| Refusal::invalid(e.to_string()))?;
        let image = self.image(&create.image)?.clone();
        check_system_size(&create.system_limits, &image)?;
        let applications = self.application_images(&create.applications)?;
        let boot = create.boot.unwrap_or_else(|| image.boot.clone());
        if boot.kernel.is_none() && boot.initrd.is_some() {
            return Err(Refusal::invalid("an initrd without a kernel"));
        }
        let template = StoredTemplate {
            name: create.name.clone(),
            image: image.digest,
            vcpus: create.vcpus,
            memory: create.memory,
            data_volume: create.data_volume,
            applications,
            boot,
            network: create.network,
            system_limits: create.system_limits,
            data_limits: create.data_limits,
            tenant: create.tenant,
            created_at_us: self.now_us(),
            version: 1,
        };
        self.db.put_template(&template)?;
        self.templates.insert(template.name.clone(), template);
        Ok(create.name)
    }

    /// The images of applications, as many as there are disks for, each once.
    fn application_images(&self, references: &[String]) -> Result<Vec<Digest>, Refusal> {
        if references.len() > MOST_APPLICATIONS {
            let detail = format!("{} applications: a VM takes {MOST_APPLICATIONS}", references.len());
            return Err(Refusal::invalid(detail));
        }
        let mut digests = Vec::new();
        for reference in references {
            let image = self.image(reference)?;
            if digests.contains(&image.digest) {
                return Err(Refusal::invalid(format!("application {} is named twice", image.full_name())));
            }
            digests.push(image.digest);
        }
        Ok(digests)
    }

    /// Moves a template to another image, other applications or other limits. VMs made from it stay as they are.
    pub(crate) fn change_template(
        &mut self,
        name: &str,
        change: &ChangeTemplate,
        version: Option<u64>,
    ) -> Result<(), Refusal> {
        let mut template = self.template(name)?.clone();
        let actual = template.version;
        if let Some(expected) = version.filter(|v| *v != actual) {
            return Err(FleetError::Conflict { what: "template", name: name.to_string(), expected, actual }.into());
        }
        if let Some(reference) = &change.image {
            let image = self.image(reference)?;
            // a template without boot files of its own goes with its image
            if self.images.get(&template.image).is_some_and(|old| old.boot == template.boot) {
                template.boot = image.boot.clone();
            }
            template.image = image.digest;
        }
        if let Some(references) = &change.applications {
            template.applications = self.application_images(references)?;
        }
        if change.tenant.is_some() && change.tenant != template.tenant {
            let has = template.tenant.map_or("has no tenant".into(), |tenant| format!("has the tenant {tenant}"));
            let detail = format!("template {name} {has}, which cannot be changed: create another template");
            return Err(Refusal::invalid(detail));
        }
        if let Some(change) = &change.system_limits {
            template.system_limits = changed(&template.system_limits, change);
        }
        if let Some(change) = &change.data_limits {
            template.data_limits = changed(&template.data_limits, change);
        }
        check_limits(&template.system_limits, &template.data_limits, template.data_volume)?;
        if let Some(image) = self.images.get(&template.image) {
            check_system_size(&template.system_limits, image)?;
        }
        template.version += 1;
        self.db.put_template(&template)?;
        self.templates.insert(template.name.clone(), template);
        Ok(())
    }

    pub(crate) fn delete_template(&mut self, name: &str, version: Option<u64>) -> Result<(), Refusal> {
        let actual = self.template(name)?.version;
        if let Some(expected) = version.filter(|v| *v != actual) {
            return Err(FleetError::Conflict { what: "template", name: name.to_string(), expected, actual }.into());
        }
        let vms: Vec<&str> =
            self.desired.values().filter(|vm| vm.template == name).map(|vm| vm.name.as_str()).collect();
        if !vms.is_empty() {
            let detail = format!("template {name} is used by VM {}", some_of(&vms));
            return Err(Refusal::new(ErrorCode::InUse, detail));
        }
        self.db.delete_template(name)?;
        self.templates.remove(name);
        Ok(())
    }

    /// Members of a group, found by name.
    pub(crate) fn group_members(&self, members: &GroupMembers) -> Result<Members, Refusal> {
        let names = self.names();
        Ok(Members {
            hosts: members.hosts.iter().map(|text| names.host(text)).collect::<Result<_, _>>()?,
            vms: members.vms.iter().map(|text| names.vm(text)).collect::<Result<_, _>>()?,
            groups: members.groups.iter().map(|text| text.parse::<GroupPath>()).collect::<Result<_, _>>()?,
        })
    }

    /// Forgets a host that is offline and has no VMs.
    pub(crate) fn forget_host(&mut self, text: &str) -> Result<(), Refusal> {
        let host = self.names().host(text)?;
        let name = self.inventory.host_name(host);
        if self.inventory.is_online(host) {
            return Err(Refusal::new(ErrorCode::InvalidState, format!("host {name} is online: stop its agent first")));
        }
        let vms: Vec<&str> = self.desired.values().filter(|vm| vm.host == host).map(|vm| vm.name.as_str()).collect();
        if !vms.is_empty() {
            return Err(Refusal::new(ErrorCode::InUse, format!("host {name} has VM {}", some_of(&vms))));
        }
        self.db.delete_host(host)?;
        self.change_groups(|groups| {
            groups.forget(&[host], &[]);
            Ok(())
        })?;
        self.inventory.forget_host(host);
        self.clear_alarms(host);
        Ok(())
    }
}

/// A few names, and how many more there are.
fn some_of(names: &[&str]) -> String {
    match names {
        [a, b, rest @ ..] if rest.len() > 1 => format!("{a}, {b} and {} more", rest.len()),
        few => few.join(", "),
    }
}

/// The repository's word for REST's.
pub(crate) fn source_format(format: ImageFormat) -> muster_repository::source::ImageFormat {
    match format {
        ImageFormat::Auto => muster_repository::source::ImageFormat::Auto,
        ImageFormat::Raw => muster_repository::source::ImageFormat::Raw,
        ImageFormat::Qcow2 => muster_repository::source::ImageFormat::Qcow2,
    }
}
