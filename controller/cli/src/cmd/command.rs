//! Orders: sending, following, showing.

use std::collections::BTreeMap;

use muster_api::{Command, CommandQuery, CommandState, CreateCommand, TargetKind, Verb};
use muster_common::ErrorCode;
use serde_json::Value;

use super::Session;
use crate::{
    Ended,
    args::{CommandVerb, Deadline, Target},
    output::{Table, duration, print},
    progress,
};

/// Sends an order to a target and follows it to the end.
pub async fn order(
    session: &Session,
    verb: Verb,
    kind: TargetKind,
    target: Target,
    arguments: BTreeMap<String, Value>,
) -> anyhow::Result<Ended> {
    let command = send(session, verb, kind, &target, arguments).await?;
    finish(session, &command, &target.deadline).await
}

/// Sends an order; the answer holds its id and its frozen members.
pub async fn send(
    session: &Session,
    verb: Verb,
    kind: TargetKind,
    target: &Target,
    arguments: BTreeMap<String, Value>,
) -> anyhow::Result<Command> {
    let create = CreateCommand {
        verb,
        target: target.targets.clone(),
        target_kind: Some(kind),
        arguments,
        timeout_seconds: Some(seconds(&target.deadline)),
        retry_of: None,
    };
    Ok(session.client.create_command(&create, Some(&idempotency_key())).await?)
}

/// One order however often its request is repeated.
pub fn idempotency_key() -> String {
    uuid::Uuid::new_v4().to_string()
}

pub fn seconds(deadline: &Deadline) -> u32 {
    u32::try_from(deadline.timeout).unwrap_or(u32::MAX)
}

/// Waits (unless told not to) and prints the verdict of every member.
pub async fn finish(session: &Session, command: &Command, deadline: &Deadline) -> anyhow::Result<Ended> {
    if deadline.no_wait {
        print(session.output, command, |c| format!("{}\n", c.summary.id))?;
        return Ok(Ended::AllDone);
    }
    let command = follow(session, &command.summary.id.to_string()).await?;
    print(session.output, &command, verdicts)?;
    Ok(ended(&command))
}

/// Follows a command to its end; says how to come back to it when that breaks.
pub async fn follow(session: &Session, id: &str) -> anyhow::Result<Command> {
    progress::follow_command(&session.client, id).await.map_err(|error| {
        let there = !matches!(error.code(), ErrorCode::NotFound | ErrorCode::InvalidArgument);
        let error = anyhow::Error::from(error);
        if there {
            error.context(format!("follow command {id} (it goes on; `muster command watch {id}` follows it again)"))
        } else {
            error
        }
    })
}

pub fn ended(command: &Command) -> Ended {
    let all = command.members.iter().all(|m| m.verdict.as_ref().is_some_and(|v| v.outcome.is_success()));
    if all { Ended::AllDone } else { Ended::SomeFailed }
}

/// The table of verdicts and a line that sums up.
pub fn verdicts(command: &Command) -> String {
    let summary = &command.summary;
    let mut members: Vec<_> = command.members.iter().collect();
    members.sort_by(|a, b| (&a.name, &a.host_name).cmp(&(&b.name, &b.host_name)));
    let mut text = progress::verdict_table(members.into_iter());
    let outcomes: Vec<String> = summary.outcomes.iter().map(|(outcome, n)| format!("{n} {outcome}")).collect();
    // VMs to be created were no target yet
    let target = if summary.target.is_empty() { String::new() } else { format!(" {}", summary.target) };
    text += &format!(
        "{}{target}: {}",
        summary.verb,
        if outcomes.is_empty() { "no verdict yet".to_string() } else { outcomes.join(", ") }
    );
    if summary.last_verdict_after_us > 0 {
        text += &format!(
            "; first verdict after {}, last after {}",
            duration(summary.first_verdict_after_us),
            duration(summary.last_verdict_after_us)
        );
    }
    text.push('\n');
    text
}

pub async fn run(session: &Session, verb: CommandVerb) -> anyhow::Result<Ended> {
    match verb {
        CommandVerb::Ls { limit } => {
            let page = session.client.commands(&CommandQuery { limit: Some(limit), ..CommandQuery::default() }).await?;
            print(session.output, &page.items, |items| {
                let mut table =
                    Table::new(&["ID", "VERB", "TARGET", "ISSUER", "STATE", ">ANSWERED", "OUTCOMES", ">LAST VERDICT"]);
                for c in items {
                    table.row([
                        c.id.to_string(),
                        c.verb.to_string(),
                        c.target.clone(),
                        c.issuer.clone(),
                        if c.state == CommandState::Open { "open".into() } else { "ended".into() },
                        format!("{}/{}", c.members_answered, c.members_total),
                        c.outcomes.iter().map(|(o, n)| format!("{n} {o}")).collect::<Vec<_>>().join(", "),
                        if c.last_verdict_after_us > 0 { duration(c.last_verdict_after_us) } else { "-".into() },
                    ]);
                }
                table.render()
            })?;
            Ok(Ended::AllDone)
        }
        CommandVerb::Show { id } => {
            let command = session.client.command(&id).await?;
            print(session.output, &command, verdicts)?;
            Ok(Ended::AllDone)
        }
        CommandVerb::Watch { id } => {
            let command = follow(session, &id).await?;
            print(session.output, &command, verdicts)?;
            Ok(ended(&command))
        }
    }
}
