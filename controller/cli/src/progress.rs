//! Follows what takes time: jobs and commands. To standard error; a table that updates in place on a terminal, one line
//! for each piece of news elsewhere.

use std::{collections::BTreeMap, io::Write};

use muster_api::{Client, ClientError, Command, CommandEvent, Job, Member, Outcome};
use muster_common::ByteLen;

use crate::output::{Table, duration, on_terminal, printable};

/// One line that replaces itself on a terminal.
pub struct StatusLine {
    terminal: bool,
    shown: bool,
}

impl StatusLine {
    pub fn new() -> Self {
        Self { terminal: on_terminal(), shown: false }
    }

    /// Shows `text` until the next one; off a terminal nothing is shown.
    pub fn show(&mut self, text: &str) {
        if self.terminal {
            self.shown = true;
            eprint!("\r\x1b[2K{}", printable(text));
            let _ = std::io::stderr().flush();
        }
    }

    pub fn clear(&mut self) {
        if self.terminal && self.shown {
            self.shown = false;
            eprint!("\r\x1b[2K");
            let _ = std::io::stderr().flush();
        }
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        self.clear();
    }
}

/// `[##########..........]  52 %  266 MiB of 512 MiB`
pub fn bar(done: u64, total: u64) -> String {
    if total == 0 {
        return ByteLen(done).to_string();
    }
    let share = (done.min(total) as f64) / (total as f64);
    let filled = (share * 24.0) as usize;
    format!(
        "[{}{}] {:>3.0} %  {} of {}",
        "#".repeat(filled),
        ".".repeat(24 - filled),
        share * 100.0,
        ByteLen(done),
        ByteLen(total)
    )
}

/// What a job is at.
pub fn job_line(job: &Job) -> String {
    format!("{} {}: {} {}", job.kind, job.subject, job.phase, bar(job.done, job.total))
}

/// Follows a command until every member has its verdict.
pub async fn follow_command(client: &Client, id: &str) -> Result<Command, ClientError> {
    let terminal = on_terminal();
    let mut members: BTreeMap<String, Member> = BTreeMap::new();
    let mut drawn = 0;
    let mut retries = 0;
    'stream: loop {
        let mut events = match client.command_events(id).await {
            Ok(events) => events,
            // a controller that is started again is back in a moment; one that was never there is not waited for
            Err(ClientError::Connect { .. } | ClientError::StreamEnded) if (1..RETRIES).contains(&retries) => {
                retries += 1;
                tokio::time::sleep(RETRY_PAUSE).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        loop {
            let event = match events.next().await {
                Ok(Some(event)) => event,
                // the controller went away, or its stream broke: ask again, the command goes on without us
                Ok(None) | Err(_) if retries < RETRIES => {
                    retries += 1;
                    tokio::time::sleep(RETRY_PAUSE).await;
                    if client.command(id).await.is_ok_and(|c| c.summary.state == muster_api::CommandState::Ended) {
                        break 'stream;
                    }
                    continue 'stream;
                }
                Ok(None) => return Err(ClientError::StreamEnded),
                Err(error) => return Err(error),
            };
            match event {
                CommandEvent::Command { command } => {
                    for member in command.members {
                        if !terminal && member.verdict.is_some() && !has_answered(&members, &member) {
                            eprintln!("{}", member_line(&member));
                        }
                        members.insert(key(&member), member);
                    }
                }
                CommandEvent::Verdict { member } => {
                    if !terminal && !has_answered(&members, &member) {
                        eprintln!("{}", member_line(&member));
                    }
                    members.insert(key(&member), *member);
                }
                CommandEvent::Progress { member } => {
                    members.insert(key(&member), *member);
                }
                CommandEvent::Ended { .. } => break 'stream,
            }
            if terminal {
                drawn = redraw(&members, drawn);
            }
        }
    }
    if terminal {
        erase(drawn);
    }
    client.command(id).await
}

/// A stream that breaks this often is not a passing fault: with the pauses, a controller has 15 s to come back.
const RETRIES: u32 = 15;
const RETRY_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

fn key(member: &Member) -> String {
    format!("{}\0{}\0{}", member.host_name, member.name, member.vm.map(|v| v.to_string()).unwrap_or_default())
}

fn has_answered(members: &BTreeMap<String, Member>, member: &Member) -> bool {
    members.get(&key(member)).is_some_and(|m| m.verdict.is_some())
}

fn member_line(member: &Member) -> String {
    let Some(verdict) = &member.verdict else {
        return String::new();
    };
    let mut line = format!("{} on {}: {}", member.name, member.host_name, verdict.outcome);
    if verdict.ended_at_us > verdict.received_at_us {
        line += &format!(" after {}", duration(verdict.ended_at_us - verdict.received_at_us));
    }
    if !verdict.message.is_empty() {
        line += &format!(" ({})", verdict.message);
    }
    printable(&line)
}

fn redraw(members: &BTreeMap<String, Member>, drawn: usize) -> usize {
    erase(drawn);
    let mut text = verdict_table(members.values());
    // taller than the screen, a table cannot be redrawn in place
    const ROWS: usize = 20;
    if members.len() > ROWS {
        let answered = members.values().filter(|m| m.verdict.is_some()).count();
        text = format!("{answered} of {} members have answered\n", members.len());
    }
    eprint!("{text}");
    let _ = std::io::stderr().flush();
    text.lines().count()
}

fn erase(lines: usize) {
    if lines > 0 {
        eprint!("\x1b[{lines}A\x1b[J");
    }
}

/// CIM EnabledState: a host's verdict, a VM that is gone.
const NOT_APPLICABLE: u16 = 5;

/// One row a member.
pub fn verdict_table<'a>(members: impl Iterator<Item = &'a Member>) -> String {
    let mut table = Table::new(&["MEMBER", "HOST", "VERDICT", "STATE", "GUEST", ">TOOK", "REMARK"]);
    for member in members {
        let row = match &member.verdict {
            Some(v) => [
                member.name.clone(),
                member.host_name.clone(),
                if v.late { format!("{} (late)", v.outcome) } else { v.outcome.to_string() },
                match v.enabled_state {
                    0 | NOT_APPLICABLE => "-".into(),
                    state => muster_api::VmState::from_enabled_state(state).to_string(),
                },
                if v.guest_up { "up".into() } else { "-".into() },
                if v.ended_at_us > v.received_at_us { duration(v.ended_at_us - v.received_at_us) } else { "-".into() },
                remark(v.outcome, &v.code, &v.message),
            ],
            None => {
                let doing =
                    member.progress.as_ref().map_or(String::new(), |p| format!("{} {}", p.phase, bar(p.done, p.total)));
                [member.name.clone(), member.host_name.clone(), "...".into(), "-".into(), "-".into(), "-".into(), doing]
            }
        };
        table.row(row);
    }
    table.render()
}

fn remark(outcome: Outcome, code: &str, message: &str) -> String {
    match (outcome.is_success(), message.is_empty()) {
        (true, _) => message.to_string(),
        (false, true) => code.to_string(),
        (false, false) => format!("{message} [{code}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_shows_the_share() {
        assert_eq!(bar(1 << 29, 1 << 30), "[############............]  50 %  512 MiB of 1 GiB");
        assert_eq!(bar(4096, 0), "4 KiB");
    }
}
