//! The live view.

use std::{io::IsTerminal, time::Duration};

use muster_api::{HostState, Top};
use muster_common::ByteLen;

use super::{Session, fleet, vm};
use crate::{
    Ended,
    args::{Output, TopArgs},
    output::{Table, print, write_out},
};

pub async fn run(session: &Session, args: TopArgs) -> anyhow::Result<Ended> {
    if args.once || !std::io::stdout().is_terminal() {
        print(session.output, &session.client.top().await?, picture)?;
        return Ok(Ended::AllDone);
    }
    let mut tick = tokio::time::interval(Duration::from_secs(args.interval.max(1)));
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            _ = tokio::signal::ctrl_c() => return Ok(Ended::AllDone),
        }
        let top = session.client.top().await?;
        match session.output {
            Output::Json => write_out(&format!("{}\n", serde_json::to_string(&top)?))?,
            // home, clear below: no flicker
            Output::Table => write_out(&format!("\x1b[H\x1b[J{}", picture(&top)))?,
        }
    }
}

fn picture(top: &Top) -> String {
    let mut hosts = Table::new(&[
        "HOST",
        "STATE",
        ">CPU %",
        ">MEM USED",
        ">STORE",
        ">OF BUDGET",
        ">RATIO",
        ">FILE READS",
        ">VMS",
        ">RUNNING",
    ]);
    for h in &top.hosts {
        let metrics = h.metrics.as_ref();
        let store = h.store.as_ref();
        hosts.row([
            h.host.name.clone(),
            if h.host.state == HostState::Online { "online".into() } else { "OFFLINE".into() },
            metrics.map_or("-".into(), |m| format!("{:.0}", m.processor_percent)),
            metrics.map_or("-".into(), |m| {
                ByteLen(m.memory_total_bytes.saturating_sub(m.memory_available_bytes)).to_string()
            }),
            store.map_or("-".into(), |s| ByteLen(s.resident_bytes + s.metadata_bytes).to_string()),
            store.map_or("-".into(), |s| ByteLen(s.budget_bytes).to_string()),
            store.map_or("-".into(), |s| format!("{:.2}", s.dedup_ratio)),
            store.map_or("-".into(), |s| s.guest_file_reads.to_string()),
            h.host.vms.to_string(),
            h.host.vms_running.to_string(),
        ]);
    }
    let mut vms = Table::new(&["VM", "STATE", "GUEST", "HOST", ">CPU %", ">QEMU MEM", ">READ", ">WRITTEN", "REMARK"]);
    for v in &top.vms {
        let metrics = v.metrics.as_ref();
        vms.row([
            v.vm.name.clone(),
            vm::state(&v.vm),
            if v.vm.guest_up { "up".into() } else { "-".into() },
            v.vm.host_name.clone(),
            metrics.map_or("-".into(), |m| format!("{:.0}", m.processor_percent)),
            metrics.map_or("-".into(), |m| ByteLen(m.memory_resident_bytes).to_string()),
            metrics.map_or("-".into(), |m| ByteLen(m.disk_read_bytes).to_string()),
            metrics.map_or("-".into(), |m| ByteLen(m.disk_written_bytes).to_string()),
            v.vm.remark.clone(),
        ]);
    }
    let mut text = format!("{}\n{}\n{}", fleet::status_lines(&top.status), hosts.render(), vms.render());
    if !top.commands.is_empty() {
        let mut commands = Table::new(&["OPEN COMMAND", "VERB", "TARGET", ">ANSWERED"]);
        for c in &top.commands {
            commands.row([
                c.id.to_string(),
                c.verb.to_string(),
                c.target.clone(),
                format!("{}/{}", c.members_answered, c.members_total),
            ]);
        }
        text += &format!("\n{}", commands.render());
    }
    text
}
