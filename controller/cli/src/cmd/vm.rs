//! Virtual machines.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Read},
};

use anyhow::Context;
use muster_api::{Command, CreateVms, Member, TargetKind, Verb, Vm, VmStanding};
use muster_common::ByteLen;
use serde_json::{Value, json};

use super::{Session, ago, command, confirm, now_us, stream};
use crate::{
    Ended,
    args::{CreateArgs, DeleteArgs, Output, ResizeDisk, ShutdownPolicy, Target, VmVerb},
    output::{Table, print, printable_lines, write_out},
};

pub async fn run(session: &Session, verb: VmVerb) -> anyhow::Result<Ended> {
    let client = &session.client;
    let none = BTreeMap::new();
    let (verb, target, arguments) = match verb {
        VmVerb::Ls { targets } => {
            print(session.output, &client.all_vms(&targets).await?, |vms| vms_table(vms))?;
            return Ok(Ended::AllDone);
        }
        VmVerb::Show { vm } => {
            print(session.output, &client.vm(&vm).await?, show)?;
            return Ok(Ended::AllDone);
        }
        VmVerb::Create(args) => return create(session, args).await,
        VmVerb::Console { vm } => return stream::console(session, &vm).await,
        VmVerb::Vnc { vm, listen } => return stream::vnc(session, &vm, &listen).await,
        VmVerb::Screenshot { vm, to } => {
            let png = client.screenshot(&vm).await?;
            let to = to.unwrap_or_else(|| format!("{}.png", vm.replace('/', "-")).into());
            std::fs::write(&to, &png).with_context(|| format!("write {}", to.display()))?;
            print(session.output, &json!({ "file": to, "bytes": png.len() }), |_| format!("{}\n", to.display()))?;
            return Ok(Ended::AllDone);
        }
        VmVerb::Exec { target, argv } => return exec(session, target, argv).await,
        VmVerb::WriteFile { target, path, from } => {
            let mut content = Vec::new();
            if from.as_os_str() == "-" {
                std::io::stdin().lock().read_to_end(&mut content).context("read standard input")?;
            } else {
                content = std::fs::read(&from).with_context(|| format!("read {}", from.display()))?;
            }
            let arguments = [("path".to_string(), path.into()), ("content".to_string(), base64(&content).into())];
            (Verb::FileWrite, target, arguments.into())
        }
        VmVerb::Delete(DeleteArgs { target, yes }) => {
            confirm(&format!("delete {} with all volumes", target.targets.join(" ")), yes)?;
            (Verb::Delete, target, none)
        }
        VmVerb::DestroyVolumes(DeleteArgs { target, yes }) => {
            confirm(&format!("destroy all volumes of {}", target.targets.join(" ")), yes)?;
            (Verb::DestroyVolumes, target, none)
        }
        VmVerb::PowerOn(target) => (Verb::PowerOn, target, none),
        VmVerb::Resume(target) => (Verb::Resume, target, none),
        VmVerb::PowerOff(target) => (Verb::PowerOff, target, none),
        VmVerb::Shutdown { target, policy } => {
            let policy = match policy {
                ShutdownPolicy::Fail => "fail",
                ShutdownPolicy::PowerOff => "power-off",
            };
            (Verb::Shutdown, target, [("policy".to_string(), policy.into())].into())
        }
        VmVerb::Reset(target) => (Verb::Reset, target, none),
        VmVerb::Reboot(target) => (Verb::Reboot, target, none),
        VmVerb::Suspend(target) => (Verb::Suspend, target, none),
        VmVerb::Pause(target) => (Verb::Pause, target, none),
        VmVerb::Snapshot { target, name } => (Verb::Snapshot, target, [("name".to_string(), name.into())].into()),
        VmVerb::Backup(target) => (Verb::Backup, target, none),
        VmVerb::Restore { target, backup } => (Verb::Restore, target, [("backup".to_string(), backup.into())].into()),
        VmVerb::Resize { target, disk, size, quota } => {
            let disk = match disk {
                ResizeDisk::System => "system",
                ResizeDisk::Data => "data",
            };
            let bytes = |name: &str, bytes: ByteLen| (name.to_string(), Value::from(bytes.bytes()));
            let mut arguments = BTreeMap::from([("disk".to_string(), Value::from(disk))]);
            arguments.extend(size.map(|size| bytes("size_bytes", size)));
            arguments.extend(quota.map(|quota| bytes("quota_bytes", quota)));
            (Verb::Resize, target, arguments)
        }
        VmVerb::ResetSession(target) => (Verb::ResetSession, target, none),
    };
    command::order(session, verb, TargetKind::Vm, target, arguments).await
}

async fn create(session: &Session, args: CreateArgs) -> anyhow::Result<Ended> {
    let mut create = CreateVms {
        template: args.template,
        hosts: args.hosts,
        groups: args.group.into_iter().collect(),
        timeout_seconds: Some(command::seconds(&args.deadline)),
        per_host: args.per_host,
        ..CreateVms::default()
    };
    match args.name {
        Some(name) if name.contains('{') => create.pattern = Some(name),
        Some(name) if args.count == 1 && args.per_host.is_none() => create.names = vec![name],
        Some(name) => create.pattern = Some(format!("{name}-{{n}}")),
        None => {}
    }
    if create.per_host.is_none() && create.names.is_empty() {
        create.count = Some(args.count);
    }
    let created = session.client.create_vms(&create, Some(&command::idempotency_key())).await?;
    let order = session.client.command(&created.command.to_string()).await?;
    command::finish(session, &order, &args.deadline).await
}

async fn exec(session: &Session, target: Target, argv: Vec<String>) -> anyhow::Result<Ended> {
    let arguments = [("argv".to_string(), Value::from(argv))].into();
    let order = command::send(session, Verb::Exec, TargetKind::Vm, &target, arguments).await?;
    if target.deadline.no_wait {
        return command::finish(session, &order, &target.deadline).await;
    }
    let order = command::follow(session, &order.summary.id.to_string()).await?;
    match (session.output, order.members.as_slice()) {
        (Output::Table, [only]) => output_of(only)?,
        _ => print(session.output, &order, outputs)?,
    }
    let failed = order.members.iter().any(|m| m.verdict.as_ref().is_some_and(|v| v.result["exit_status"] != 0));
    Ok(if failed { Ended::SomeFailed } else { command::ended(&order) })
}

/// What one guest printed, as it is: its output to ours, its errors to ours. Only a terminal gets no control characters.
fn output_of(member: &Member) -> anyhow::Result<()> {
    let Some(verdict) = &member.verdict else {
        return Ok(());
    };
    if !verdict.outcome.is_success() {
        eprintln!("muster: {}: {}: {} [{}]", member.name, verdict.outcome, verdict.message, verdict.code);
        return Ok(());
    }
    let text = |part: &str| verdict.result[part].as_str().unwrap_or("").to_string();
    let shown = |text: String, terminal: bool| if terminal { printable_lines(&text) } else { text };
    write_out(&shown(text("stdout"), std::io::stdout().is_terminal()))?;
    eprint!("{}", shown(text("stderr"), std::io::stderr().is_terminal()));
    if verdict.result["truncated"] == true {
        eprintln!("muster: {}: the output was longer, its rest was not kept", member.name);
    }
    match verdict.result["exit_status"].as_i64() {
        Some(0) | None => {}
        Some(status) => eprintln!("muster: {}: exit status {status}", member.name),
    }
    Ok(())
}

/// What several guests printed, each line behind the guest's name.
fn outputs(order: &Command) -> String {
    let mut text = String::new();
    for member in &order.members {
        let Some(verdict) = &member.verdict else {
            continue;
        };
        let lead = format!("{}: ", member.name);
        if !verdict.outcome.is_success() {
            text += &format!("{}: {}: {} [{}]\n", member.name, verdict.outcome, verdict.message, verdict.code);
            continue;
        }
        for part in ["stdout", "stderr"] {
            for line in verdict.result[part].as_str().unwrap_or("").lines() {
                text += &format!("{lead}{}\n", crate::output::printable(line));
            }
        }
        let status = verdict.result["exit_status"].as_i64().unwrap_or(0);
        if status != 0 {
            text += &format!("{lead}exit status {status}\n");
        }
    }
    text
}

fn vms_table(vms: &[Vm]) -> String {
    let mut table =
        Table::new(&["NAME", "STATE", "GUEST", "HOST", ">VCPUS", ">MEMORY", "TEMPLATE", "GROUPS", "REMARK"]);
    for vm in vms {
        table.row([
            vm.name.clone(),
            state(vm),
            if vm.guest_up { "up".into() } else { "-".into() },
            vm.host_name.clone(),
            vm.vcpus.to_string(),
            ByteLen(vm.memory_bytes).to_string(),
            vm.template.clone(),
            vm.groups.join(" "),
            vm.remark.clone(),
        ]);
    }
    table.render()
}

/// The state, and in brackets what makes it doubtful.
pub fn state(vm: &Vm) -> String {
    let standing = match vm.standing {
        VmStanding::Present => None,
        VmStanding::Creating => Some("creating"),
        VmStanding::Missing => Some("missing"),
        VmStanding::Deleting => Some("deleting"),
        VmStanding::Doubtful => Some("doubtful"),
        VmStanding::Unmanaged => Some("unmanaged"),
    };
    match (standing, vm.stale) {
        (Some(standing), _) => format!("{} ({standing})", vm.state),
        (None, true) => format!("{} (host offline)", vm.state),
        (None, false) => vm.state.to_string(),
    }
}

fn show(vm: &Vm) -> String {
    let mut table = Table::new(&["PROPERTY", "VALUE"]);
    let mut row = |name: &str, value: String| table.row([name.to_string(), value]);
    row("name", vm.name.clone());
    row("id", vm.id.to_string());
    row("host", vm.host_name.clone());
    row("state", state(vm));
    row("since", ago(now_us(), vm.changed_at_us));
    row("guest agent", if vm.guest_up { "answers".into() } else { "silent".into() });
    row("processors", vm.vcpus.to_string());
    row("memory", ByteLen(vm.memory_bytes).to_string());
    row("template", vm.template.clone());
    row("groups", vm.groups.join(" "));
    if let Some(tenant) = &vm.tenant {
        row("tenant", tenant.clone());
    }
    for disk in &vm.disks {
        let image = disk.image.map_or("blank".to_string(), |i| format!("clone of {}", i.short()));
        row(
            &format!("{} disk", disk.role),
            format!(
                "{} gen {}, {}, {image}, {}",
                disk.volume,
                disk.generation,
                ByteLen(disk.size_bytes),
                disk.condition
            ),
        );
        if !disk.limits.is_none() {
            row(&format!("{} disk limits", disk.role), disk.limits.to_string());
        }
    }
    row("remark", if vm.remark.is_empty() { "none".into() } else { vm.remark.clone() });
    table.render()
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let symbol = ALPHABET[(word >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= chunk.len() { char::from(symbol) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_equals_the_test_vectors_of_rfc_4648() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
