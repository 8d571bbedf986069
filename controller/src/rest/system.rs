//! The controller itself.

use axum::extract::State;
use muster_api::{Check, CheckResult, Doctor, HostState, Problem, Status, Top, VmStanding};

use super::{
    Shared,
    extract::{Answer, json},
};
use crate::core::Core;

/// One look at the controller.
#[utoipa::path(get, path = "/v1/status", tag = "system", responses((status = 200, body = Status), (status = "default", body = Problem)))]
pub async fn status(State(shared): State<Shared>) -> Answer {
    json(shared.core.call(|core| Ok(core.status())).await?)
}

/// One look at the whole fleet.
#[utoipa::path(get, path = "/v1/top", tag = "system", responses((status = 200, body = Top), (status = "default", body = Problem)))]
pub async fn top(State(shared): State<Shared>) -> Answer {
    json(shared.core.call(|core| core.top()).await?)
}

/// What the controller finds when it examines itself and the fleet.
#[utoipa::path(get, path = "/v1/doctor", tag = "system", responses((status = 200, body = Doctor), (status = "default", body = Problem)))]
pub async fn doctor(State(shared): State<Shared>) -> Answer {
    let repository = shared.repository.stats();
    let mut doctor = shared.core.call(|core| Ok(examine(core))).await?;
    doctor.checks.push(if repository.damaged_packs == 0 {
        good("image repository", format!("{} packs, {} stored", repository.packs, repository.stored_bytes))
    } else {
        bad(
            "image repository",
            format!("{} packs cannot be read", repository.damaged_packs),
            "import the images again; what is whole is kept",
        )
    });
    json(doctor)
}

fn check(name: &str, result: CheckResult, message: String, remedy: &str) -> Check {
    Check { name: name.to_string(), result, message, remedy: remedy.to_string() }
}
fn good(name: &str, message: String) -> Check {
    check(name, CheckResult::Good, message, "")
}
fn warning(name: &str, message: String, remedy: &str) -> Check {
    check(name, CheckResult::Warning, message, remedy)
}
fn bad(name: &str, message: String, remedy: &str) -> Check {
    check(name, CheckResult::Bad, message, remedy)
}

fn examine(core: &Core) -> Doctor {
    let status = core.status();
    let hosts = core.all_hosts();
    let mut checks = Vec::new();
    if status.lab {
        checks.push(warning(
            "lab mode",
            "nothing on the fleet's network is authenticated".to_string(),
            "use a network of its own until certificates are built",
        ));
    }
    for cell in &status.cells {
        let name = format!("cell {}", cell.cell);
        checks.push(if cell.hosts_online > 0 {
            good(&name, format!("{} hosts online", cell.hosts_online))
        } else {
            warning(
                &name,
                format!("no host is heard: {}", cell.diagnosis),
                "check that agents run in this domain, on this network, and that UDP 7400 and up is open",
            )
        });
    }
    for host in &hosts {
        let name = format!("host {}", host.name);
        if host.duplicate_incarnation {
            checks.push(bad(
                &name,
                host.alarm.clone(),
                "stop one of the two agents and give it a state directory of its own",
            ));
        } else if host.state == HostState::Offline {
            checks.push(bad(&name, "no heartbeat".to_string(), "look whether its agent runs and reaches the network"));
        } else if host.accelerator == "none" {
            checks.push(warning(
                &name,
                format!("no hypervisor: {}", host.hypervisor_remark),
                "install libvirt and QEMU there",
            ));
        } else if host.accelerator == "tcg" {
            checks.push(warning(&name, host.hypervisor_remark.clone(), "guests run, slowly; enable virtualisation"));
        } else {
            checks.push(good(&name, format!("online, {}", host.accelerator)));
        }
    }
    for store in core.stores() {
        let name = format!("store of {}", store.host_name);
        let used = store.resident_bytes.saturating_mul(100).checked_div(store.budget_bytes).unwrap_or(0);
        if used >= 90 {
            checks.push(warning(
                &name,
                format!("{used} % of its budget is used"),
                "delete volumes or images, or raise the budget",
            ));
        }
        if store.guest_file_reads > 0 {
            let message = format!("{} reads of files were made to serve guests", store.guest_file_reads);
            checks.push(bad(&name, message, "report this: guests are to be served from memory only"));
        }
    }
    for vm in core.vms(None).unwrap_or_default() {
        let name = format!("VM {}", vm.name);
        if matches!(vm.standing, VmStanding::Missing | VmStanding::Doubtful) {
            checks.push(bad(
                &name,
                "its host does not have it, or did not say".to_string(),
                "delete it, or restore it from a backup",
            ));
        } else if vm.disks.iter().any(|disk| disk.condition == "lost") {
            checks.push(bad(&name, "a volume was lost with its host's memory".to_string(), "restore it from a backup"));
        }
    }
    Doctor { lab: status.lab, checks }
}
