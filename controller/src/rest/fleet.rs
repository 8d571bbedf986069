//! Hosts, VMs, groups, stores, volumes, backups.

use axum::{extract::State, http::StatusCode};
use muster_api::{
    Backup, ChangeGroup, Command, CreateCommand, CreateGroup, CreateVms, CreatedVms, Group, Host, HostMetrics,
    ListQuery, Page, Problem, Store, Verb, Vm, VmMetrics, VmQuery, Volume, VolumeMetrics,
};
use muster_common::ErrorCode;
use muster_fleet::groups::GroupPath;

use super::{
    Caller, Shared,
    extract::{Answer, IfMatch, Name, Params, Post, json, nothing, versioned},
};
use crate::{core::paginate, refusal::Refusal};

/// Hosts, by name.
#[utoipa::path(get, path = "/v1/hosts", tag = "hosts", params(ListQuery), responses((status = 200, body = Page<Host>), (status = "default", body = Problem)))]
pub async fn list_hosts(State(shared): State<Shared>, Params(query): Params<ListQuery>) -> Answer {
    let hosts = shared.core.call(|core| Ok(core.all_hosts())).await?;
    json(paginate(hosts, |h| format!("{} {}", h.name, h.id), query.cursor.as_deref(), query.limit)?)
}

/// One host, by name or id.
#[utoipa::path(get, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path)), responses((status = 200, body = Host), (status = "default", body = Problem)))]
pub async fn get_host(State(shared): State<Shared>, Name(name): Name) -> Answer {
    let host = shared.core.call(move |core| core.host(&name)).await?;
    let version = host.version;
    versioned(host, version)
}

/// Forgets a host that is offline and has no VMs.
#[utoipa::path(delete, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path)), responses((status = 204), (status = "default", body = Problem)))]
pub async fn forget_host(State(shared): State<Shared>, Name(name): Name) -> Answer {
    shared.core.call(move |core| core.forget_host(&name)).await?;
    nothing()
}

/// The latest readings of all hosts.
#[utoipa::path(get, path = "/v1/metrics/hosts", tag = "metrics", params(ListQuery), responses((status = 200, body = Page<HostMetrics>), (status = "default", body = Problem)))]
pub async fn host_metrics(State(shared): State<Shared>, Params(query): Params<ListQuery>) -> Answer {
    let all = shared.core.call(|core| Ok(core.host_metrics())).await?;
    json(paginate(all, |m| format!("{} {}", m.host_name, m.host), query.cursor.as_deref(), query.limit)?)
}

/// The latest readings of all VMs.
#[utoipa::path(get, path = "/v1/metrics/vms", tag = "metrics", params(ListQuery), responses((status = 200, body = Page<VmMetrics>), (status = "default", body = Problem)))]
pub async fn vm_metrics(State(shared): State<Shared>, Params(query): Params<ListQuery>) -> Answer {
    let all = shared.core.call(|core| Ok(core.vm_metrics())).await?;
    json(paginate(all, |m| format!("{} {}", m.vm_name, m.vm), query.cursor.as_deref(), query.limit)?)
}

/// The latest readings of the disks of VMs.
#[utoipa::path(get, path = "/v1/metrics/volumes", tag = "metrics", params(VmQuery), responses((status = 200, body = Page<VolumeMetrics>), (status = "default", body = Problem)))]
pub async fn volume_metrics(State(shared): State<Shared>, Params(query): Params<VmQuery>) -> Answer {
    let all = shared.core.call(move |core| core.volume_metrics(query.target.as_deref())).await?;
    let key = |m: &VolumeMetrics| format!("{} {} {}", m.vm_name, m.target, m.volume);
    json(paginate(all, key, query.cursor.as_deref(), query.limit)?)
}

/// The memory-resident stores of all hosts.
#[utoipa::path(get, path = "/v1/stores", tag = "stores", params(ListQuery), responses((status = 200, body = Page<Store>), (status = "default", body = Problem)))]
pub async fn list_stores(State(shared): State<Shared>, Params(query): Params<ListQuery>) -> Answer {
    let all = shared.core.call(|core| Ok(core.stores())).await?;
    json(paginate(all, |s| format!("{} {}", s.host_name, s.host), query.cursor.as_deref(), query.limit)?)
}

/// The store of one host.
#[utoipa::path(get, path = "/v1/stores/{host}", tag = "stores", params(("host" = String, Path)), responses((status = 200, body = Store), (status = "default", body = Problem)))]
pub async fn get_store(State(shared): State<Shared>, Name(name): Name) -> Answer {
    let found = shared
        .core
        .call(move |core| {
            let id = core.names().host(&name)?;
            let store = core.stores().into_iter().find(|store| store.host == id);
            store.ok_or_else(|| {
                Refusal::new(ErrorCode::Unavailable, format!("host {name} has not spoken of its store yet"))
            })
        })
        .await?;
    json(found)
}

/// VMs, by name.
#[utoipa::path(get, path = "/v1/vms", tag = "vms", params(VmQuery), responses((status = 200, body = Page<Vm>), (status = "default", body = Problem)))]
pub async fn list_vms(State(shared): State<Shared>, Params(query): Params<VmQuery>) -> Answer {
    let vms = shared.core.call(move |core| core.vms(query.target.as_deref())).await?;
    json(paginate(vms, |v| format!("{} {}", v.name, v.id), query.cursor.as_deref(), query.limit)?)
}

/// Makes VMs from a template: finds hosts and names, and begins the command that makes them.
#[utoipa::path(post, path = "/v1/vms", tag = "vms", request_body = CreateVms, params(("idempotency-key" = Option<String>, Header)), responses((status = 202, body = CreatedVms), (status = "default", body = Problem)))]
pub async fn create_vms(State(shared): State<Shared>, post: Post<CreateVms>) -> Answer {
    post.once(&shared, StatusCode::ACCEPTED, |core, create, issuer| core.create_vms(create, issuer)).await
}

/// One VM, by name or id.
#[utoipa::path(get, path = "/v1/vms/{vm}", tag = "vms", params(("vm" = String, Path)), responses((status = 200, body = Vm), (status = "default", body = Problem)))]
pub async fn get_vm(State(shared): State<Shared>, Name(name): Name) -> Answer {
    let vm = shared.core.call(move |core| core.vm(&name)).await?;
    let version = vm.version;
    versioned(vm, version)
}

/// Begins the command that deletes a VM.
#[utoipa::path(delete, path = "/v1/vms/{vm}", tag = "vms", params(("vm" = String, Path)), responses((status = 202, body = Command), (status = "default", body = Problem)))]
pub async fn delete_vm(State(shared): State<Shared>, caller: Caller, Name(name): Name) -> Answer {
    let command = shared
        .core
        .call(move |core| {
            // by id: a group of the same name is not meant
            let id = core.names().vm(&name)?;
            let create = CreateCommand {
                verb: Verb::Delete,
                target: vec![format!("vm:{id}")],
                target_kind: None,
                arguments: Default::default(),
                timeout_seconds: None,
                retry_of: None,
            };
            let command = core.command(create, caller.issuer())?;
            core.command_view(command)
        })
        .await?;
    Ok(axum::response::IntoResponse::into_response((StatusCode::ACCEPTED, axum::Json(command))))
}

/// Volumes of the VMs, as their hosts speak of them.
#[utoipa::path(get, path = "/v1/volumes", tag = "volumes", params(VmQuery), responses((status = 200, body = Page<Volume>), (status = "default", body = Problem)))]
pub async fn list_volumes(State(shared): State<Shared>, Params(query): Params<VmQuery>) -> Answer {
    let volumes = shared.core.call(move |core| core.volumes(query.target.as_deref())).await?;
    let key = |v: &Volume| format!("{} {} {}", v.vm_name, v.role, v.id);
    json(paginate(volumes, key, query.cursor.as_deref(), query.limit)?)
}

/// Backups, newest first.
#[utoipa::path(get, path = "/v1/backups", tag = "backups", params(VmQuery), responses((status = 200, body = Page<Backup>), (status = "default", body = Problem)))]
pub async fn list_backups(State(shared): State<Shared>, Params(query): Params<VmQuery>) -> Answer {
    let backups = shared.core.call(move |core| core.backups(query.target.as_deref())).await?;
    let key = |b: &Backup| format!("{:020} {} {}", u64::MAX - b.taken_at_us, b.id, b.vm);
    json(paginate(backups, key, query.cursor.as_deref(), query.limit)?)
}

/// Groups, by path.
#[utoipa::path(get, path = "/v1/groups", tag = "groups", params(ListQuery), responses((status = 200, body = Page<Group>), (status = "default", body = Problem)))]
pub async fn list_groups(State(shared): State<Shared>, Params(query): Params<ListQuery>) -> Answer {
    let groups = shared.core.call(|core| Ok(core.all_groups())).await?;
    json(paginate(groups, |g| g.path.clone(), query.cursor.as_deref(), query.limit)?)
}

/// Makes a group, and its parents where they are missing.
#[utoipa::path(post, path = "/v1/groups", tag = "groups", request_body = CreateGroup, params(("idempotency-key" = Option<String>, Header)), responses((status = 201, body = Group), (status = "default", body = Problem)))]
pub async fn create_group(State(shared): State<Shared>, post: Post<CreateGroup>) -> Answer {
    post.once(&shared, StatusCode::CREATED, |core, create, _| {
        let path: GroupPath = create.path.parse()?;
        let members = core.group_members(&create.members)?;
        core.change_groups(|groups| groups.create(&path, &members))?;
        core.group(path.as_str())
    })
    .await
}

/// One group. Slashes in the path are percent-encoded: `school%2Flab1`.
#[utoipa::path(get, path = "/v1/groups/{path}", tag = "groups", params(("path" = String, Path)), responses((status = 200, body = Group), (status = "default", body = Problem)))]
pub async fn get_group(State(shared): State<Shared>, Name(path): Name) -> Answer {
    let group = shared.core.call(move |core| core.group(&path)).await?;
    let version = group.version;
    versioned(group, version)
}

/// Adds and removes members in one step.
#[utoipa::path(patch, path = "/v1/groups/{path}", tag = "groups", params(("path" = String, Path), ("if-match" = Option<String>, Header)), request_body = ChangeGroup, responses((status = 200, body = Group), (status = "default", body = Problem)))]
pub async fn change_group(
    State(shared): State<Shared>,
    Name(path): Name,
    IfMatch(version): IfMatch,
    post: Post<ChangeGroup>,
) -> Answer {
    post.once(&shared, StatusCode::OK, move |core, change, _| {
        let path: GroupPath = path.parse()?;
        let (add, remove) = (core.group_members(&change.add)?, core.group_members(&change.remove)?);
        core.change_groups(|groups| groups.change(&path, &add, &remove, version))?;
        core.group(path.as_str())
    })
    .await
}

/// Deletes a group and those below it; its members stay what they are.
#[utoipa::path(delete, path = "/v1/groups/{path}", tag = "groups", params(("path" = String, Path), ("if-match" = Option<String>, Header)), responses((status = 204), (status = "default", body = Problem)))]
pub async fn delete_group(State(shared): State<Shared>, Name(path): Name, IfMatch(version): IfMatch) -> Answer {
    shared
        .core
        .call(move |core| {
            let path: GroupPath = path.parse()?;
            core.change_groups(|groups| groups.delete(&path, version))
        })
        .await?;
    nothing()
}
