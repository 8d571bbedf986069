//! Hosts, stores, volumes, backups, the controller itself, and the event log.

use muster_api::{
    CheckResult, Event, EventQuery, Host, HostState, Severity, Status, Store, StoreHealth, TargetKind, Verb,
    VolumeMetrics,
};
use muster_common::ByteLen;

use super::{Session, ago, command, now_us};
use crate::{
    Ended,
    args::{BackupVerb, EventsArgs, HostVerb, Output, StoreVerb, VolumeVerb},
    output::{Table, duration, print, write_out},
};

pub async fn host(session: &Session, verb: HostVerb) -> anyhow::Result<Ended> {
    let client = &session.client;
    let (verb, target) = match verb {
        HostVerb::Ls => {
            print(session.output, &client.all_hosts().await?, |hosts| hosts_table(hosts))?;
            return Ok(Ended::AllDone);
        }
        HostVerb::Show { host } => {
            print(session.output, &client.host(&host).await?, show)?;
            return Ok(Ended::AllDone);
        }
        HostVerb::Ping(target) => (Verb::Ping, target),
        HostVerb::Drain(target) => (Verb::Drain, target),
        HostVerb::Undrain(target) => (Verb::Undrain, target),
        HostVerb::Backup(target) => (Verb::Backup, target),
    };
    command::order(session, verb, TargetKind::Host, target, Default::default()).await
}

fn hosts_table(hosts: &[Host]) -> String {
    let now = now_us();
    let mut table = Table::new(&[
        "NAME",
        "STATE",
        "LAST SEEN",
        ">CELL",
        ">CPUS",
        ">MEMORY",
        ">VMS",
        ">RUNNING",
        "ACCEL",
        "MODE",
        "REMARK",
    ]);
    for h in hosts {
        let mut state = match h.state {
            HostState::Online => "online".to_string(),
            HostState::Offline => "offline".to_string(),
        };
        if h.draining {
            state += ",draining";
        }
        table.row([
            h.name.clone(),
            state,
            ago(now, h.last_seen_us),
            h.cell.to_string(),
            h.processors.to_string(),
            ByteLen(h.memory_bytes).to_string(),
            h.vms.to_string(),
            h.vms_running.to_string(),
            h.accelerator.clone(),
            if h.lab { "LAB".into() } else { "-".into() },
            if h.alarm.is_empty() { h.hypervisor_remark.clone() } else { h.alarm.clone() },
        ]);
    }
    table.render()
}

fn show(h: &Host) -> String {
    let mut table = Table::new(&["PROPERTY", "VALUE"]);
    let mut row = |name: &str, value: String| table.row([name.to_string(), value]);
    row("name", h.name.clone());
    row("id", h.id.to_string());
    row("incarnation", h.incarnation.map_or("-".into(), |i| i.to_string()));
    row("state", if h.state == HostState::Online { "online".into() } else { "offline".into() });
    row("last seen", ago(now_us(), h.last_seen_us));
    row("draining", h.draining.to_string());
    row("cell", h.cell.to_string());
    row("agent", h.agent_version.clone());
    row("operating system", h.operating_system.clone());
    row("kernel", h.kernel.clone());
    row("processors", format!("{} × {}", h.processors, h.processor_model));
    row("memory", ByteLen(h.memory_bytes).to_string());
    row("hypervisor", format!("{} {}", h.hypervisor_uri, h.hypervisor_version));
    row("accelerator", h.accelerator.clone());
    row("remark", h.hypervisor_remark.clone());
    row("stream endpoint", h.stream_endpoint.clone());
    row("groups", h.groups.join(" "));
    row("VMs", format!("{}, {} running", h.vms, h.vms_running));
    row("lab mode", h.lab.to_string());
    row("alarm", if h.alarm.is_empty() { "none".into() } else { h.alarm.clone() });
    table.render()
}

pub async fn store(session: &Session, verb: StoreVerb) -> anyhow::Result<Ended> {
    match verb {
        StoreVerb::Ls => print(session.output, &session.client.stores().await?, |s| stores_table(s))?,
        StoreVerb::Show { host } => print(session.output, &session.client.store(&host).await?, |s: &Store| {
            let mut images = Table::new(&["IMAGE", "DIGEST", ">LOGICAL", ">CLONES"]);
            for i in &s.images {
                images.row([
                    i.name.clone(),
                    i.digest.short(),
                    ByteLen(i.logical_bytes).to_string(),
                    i.volumes.to_string(),
                ]);
            }
            let health = s.health.as_ref().map(|h| format!("\n{}", show_health(h))).unwrap_or_default();
            format!("{}\n{}{health}", stores_table(std::slice::from_ref(s)), images.render())
        })?,
    }
    Ok(Ended::AllDone)
}

/// Since the agent's start.
fn show_health(h: &StoreHealth) -> String {
    let mut table = Table::new(&["MEMORY", "VALUE"]);
    let mut row = |name: &str, value: String| table.row([name.to_string(), value]);
    row("looked for damage", if h.scrubbing { "yes".into() } else { "no (scrub.rate = 0)".into() });
    row("blocks checked", h.blocks_checked.to_string());
    row("blocks damaged", format!("{}, {} repaired", h.blocks_damaged, h.blocks_repaired));
    row("blocks unreadable now", h.blocks_unreadable.to_string());
    let last = if h.passes == 0 { "never".into() } else { ago(now_us(), h.last_pass_at_us) };
    row("all of it checked", format!("{last}, {} times", h.passes));
    for n in &h.nodes {
        let value = format!("{} of {}", ByteLen(n.store_bytes), ByteLen(n.memory_bytes));
        row(&format!("NUMA node {}", n.node), value);
    }
    table.render()
}

pub fn stores_table(stores: &[Store]) -> String {
    let mut table = Table::new(&[
        "HOST",
        ">BUDGET",
        ">RESIDENT",
        ">METADATA",
        ">LOGICAL",
        ">PROVISIONED",
        ">RATIO",
        ">IMAGES",
        ">VOLUMES",
        ">FILE READS",
        "PAGES",
    ]);
    for s in stores {
        table.row([
            s.host_name.clone(),
            ByteLen(s.budget_bytes).to_string(),
            ByteLen(s.resident_bytes).to_string(),
            ByteLen(s.metadata_bytes).to_string(),
            ByteLen(s.logical_bytes).to_string(),
            ByteLen(s.provisioned_bytes).to_string(),
            format!("{:.2}", s.dedup_ratio),
            s.images.len().to_string(),
            s.volumes.to_string(),
            s.guest_file_reads.to_string(),
            s.page_kind.clone(),
        ]);
    }
    table.render()
}

pub async fn volume(session: &Session, verb: VolumeVerb) -> anyhow::Result<Ended> {
    let targets = match verb {
        VolumeVerb::Ls { targets } => targets,
        VolumeVerb::Top { targets } => {
            print(session.output, &session.client.volume_metrics(&targets).await?, |metrics| disks(metrics))?;
            return Ok(Ended::AllDone);
        }
    };
    let volumes = session.client.all_volumes(&targets).await?;
    print(session.output, &volumes, |volumes| {
        let mut table = Table::new(&["VOLUME", ">GEN", "VM", "HOST", "ROLE", ">SIZE", "IMAGE", "CONDITION"]);
        for v in volumes {
            table.row([
                v.id.to_string(),
                v.generation.to_string(),
                v.vm_name.clone(),
                v.host_name.clone(),
                v.role.clone(),
                v.size.to_string(),
                if v.image.is_some() { v.image_name.clone() } else { "blank".into() },
                v.condition.clone(),
            ]);
        }
        table.render()
    })?;
    Ok(Ended::AllDone)
}

fn disks(metrics: &[VolumeMetrics]) -> String {
    let latency = |p50: f64, p99: f64| if p99 > 0.0 { format!("{p50:.0}/{p99:.0}") } else { "-".into() };
    let columns = [
        "VM",
        "DISK",
        "BY",
        ">READS",
        ">READ",
        ">P50/P99 us",
        ">WRITES",
        ">WRITTEN",
        ">P50/P99 us",
        ">ERRORS",
        ">THROTTLED",
        "WAITS",
    ];
    let mut table = Table::new(&columns);
    for m in metrics {
        table.row([
            m.vm_name.clone(),
            m.target.clone(),
            m.transport.clone(),
            m.reads.to_string(),
            ByteLen(m.read_bytes).to_string(),
            latency(m.read_p50_us, m.read_p99_us),
            m.writes.to_string(),
            ByteLen(m.written_bytes).to_string(),
            latency(m.write_p50_us, m.write_p99_us),
            m.errors.to_string(),
            format!("{:.1} s", m.throttled_us as f64 / 1e6),
            if m.waiting_for_space > 0 { "for space".into() } else { String::new() },
        ]);
    }
    table.render()
}

pub async fn backup(session: &Session, verb: BackupVerb) -> anyhow::Result<Ended> {
    let BackupVerb::Ls { targets } = verb;
    let backups = session.client.all_backups(&targets).await?;
    print(session.output, &backups, |backups| {
        let now = now_us();
        let mut table = Table::new(&["BACKUP", "VM", "HOST", "TAKEN", ">VOLUMES", ">LOGICAL", ">NEW"]);
        for b in backups {
            table.row([
                b.id.clone(),
                b.vm_name.clone(),
                b.host_name.clone(),
                ago(now, b.taken_at_us),
                b.volumes.len().to_string(),
                ByteLen(b.logical_bytes).to_string(),
                ByteLen(b.new_bytes).to_string(),
            ]);
        }
        table.render()
    })?;
    Ok(Ended::AllDone)
}

pub async fn status(session: &Session) -> anyhow::Result<Ended> {
    let status = session.client.status().await?;
    let doctor = session.client.doctor().await?;
    let bad = doctor.checks.iter().any(|c| c.result == CheckResult::Bad);
    print(session.output, &serde_json::json!({ "status": status, "doctor": doctor }), |_| {
        let mut text = status_lines(&status);
        let mut table = Table::new(&["CHECK", "RESULT", "FINDING", "REMEDY"]);
        for c in &doctor.checks {
            let result = match c.result {
                CheckResult::Good => "good",
                CheckResult::Warning => "warning",
                CheckResult::Bad => "bad",
            };
            table.row([c.name.clone(), result.into(), c.message.clone(), c.remedy.clone()]);
        }
        text += &table.render();
        text
    })?;
    Ok(if bad { Ended::SomeFailed } else { Ended::AllDone })
}

/// Two lines that head every overview.
pub fn status_lines(s: &Status) -> String {
    let mut text = format!(
        "muster-controller {} {:?}, up {}, epoch {}{}\n{} of {} hosts online, {} VMs, {} images, {} open commands; {}\n",
        s.version,
        s.name,
        duration(s.now_us.saturating_sub(s.started_at_us)),
        s.epoch,
        if s.lab { "   LAB MODE: nothing is authenticated" } else { "" },
        s.hosts_online,
        s.hosts,
        s.vms,
        s.images,
        s.open_commands,
        s.cells.iter().map(|c| format!("cell {}: {} hosts", c.cell, c.hosts_online)).collect::<Vec<_>>().join(", ")
    );
    for alarm in &s.alarms {
        text += &format!("ALARM {}: {}\n", alarm.kind, alarm.message);
    }
    text
}

pub async fn events(session: &Session, args: EventsArgs) -> anyhow::Result<Ended> {
    let mut query = EventQuery { limit: Some(args.limit), ..EventQuery::default() };
    if !args.follow {
        let page = session.client.events(&query).await?;
        print(session.output, &page.items, |items| items.iter().map(line).collect())?;
        return Ok(Ended::AllDone);
    }
    query.wait_seconds = Some(20);
    loop {
        let page = session.client.events(&query).await?;
        for event in &page.items {
            match session.output {
                Output::Json => write_out(&format!("{}\n", serde_json::to_string(event)?))?,
                Output::Table => write_out(&line(event))?,
            }
        }
        query.cursor = page.next.or(query.cursor);
    }
}

fn line(e: &Event) -> String {
    let severity = match e.severity {
        Severity::Info => "info",
        Severity::Warning => "WARNING",
        Severity::Error => "ERROR",
    };
    let subject = if e.vm_name.is_empty() { e.host_name.clone() } else { format!("{} on {}", e.vm_name, e.host_name) };
    let text = format!("{} {severity:<7} {:<18} {subject}: {}", clock(e.occurred_at_us), e.kind, e.message);
    format!("{}\n", crate::output::printable(&text))
}

/// `2026-11-21 08:50:00Z`, from days since the epoch (Howard Hinnant's civil_from_days).
fn clock(us: u64) -> String {
    let seconds = us / 1_000_000;
    let (days, second) = ((seconds / 86_400) as i64, seconds % 86_400);
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_print_as_utc() {
        assert_eq!(clock(0), "1970-01-01 00:00:00Z");
        assert_eq!(clock(951_827_696_000_000), "2000-02-29 12:34:56Z");
        assert_eq!(clock(1_795_251_000_000_000), "2026-11-21 08:50:00Z");
    }
}
