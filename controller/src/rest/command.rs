//! Commands and the stream of their verdicts.

use std::{collections::VecDeque, convert::Infallible};

use axum::{
    extract::State,
    http::StatusCode,
    response::{
        IntoResponse, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures_util::{Stream, StreamExt, stream};
use muster_api::{Command, CommandEvent, CommandQuery, CommandState, CommandSummary, CreateCommand, Page, Problem};
use muster_common::CommandId;
use tokio::sync::watch;

use super::{
    Shared,
    extract::{Answer, Name, Params, Post, json, versioned},
};
use crate::{
    core::{Handle, limit_of},
    refusal::Refusal,
};

fn id_of(text: &str) -> Result<CommandId, Refusal> {
    text.parse().map_err(|error| Refusal::invalid(format!("{error}")))
}

/// Commands, newest first.
#[utoipa::path(get, path = "/v1/commands", tag = "commands", params(CommandQuery), responses((status = 200, body = Page<CommandSummary>), (status = "default", body = Problem)))]
pub async fn list(State(shared): State<Shared>, Params(query): Params<CommandQuery>) -> Answer {
    let limit = limit_of(query.limit)?;
    let before = query.cursor.as_deref().map(id_of).transpose()?;
    let mut items = shared.core.call(move |core| core.commands(before, query.open, limit + 1)).await?;
    let more = items.len() > limit;
    items.truncate(limit);
    let next = if more { items.last().map(|last| last.id.to_string()) } else { None };
    json(Page { items, next })
}

/// Gives an order: durable, with its frozen members, when this answers.
#[utoipa::path(post, path = "/v1/commands", tag = "commands", request_body = CreateCommand, params(("idempotency-key" = Option<String>, Header)), responses((status = 202, body = Command), (status = "default", body = Problem)))]
pub async fn create(State(shared): State<Shared>, post: Post<CreateCommand>) -> Answer {
    post.once(&shared, StatusCode::ACCEPTED, |core, create, issuer| {
        let id = core.command(create, issuer)?;
        core.command_view(id)
    })
    .await
}

/// One command with its members and their verdicts.
#[utoipa::path(get, path = "/v1/commands/{id}", tag = "commands", params(("id" = String, Path)), responses((status = 200, body = Command), (status = "default", body = Problem)))]
pub async fn get(State(shared): State<Shared>, Name(id): Name) -> Answer {
    let id = id_of(&id)?;
    let command = shared.core.call(move |core| core.command_view(id)).await?;
    let version = command.summary.version;
    versioned(command, version)
}

/// Server-sent events: the command, then each verdict and progress, then its end.
#[utoipa::path(get, path = "/v1/commands/{id}/events", tag = "commands", params(("id" = String, Path)), responses((status = 200, body = CommandEvent, content_type = "text/event-stream"), (status = "default", body = Problem)))]
pub async fn events(State(shared): State<Shared>, Name(id): Name) -> Answer {
    let id = id_of(&id)?;
    // subscribed before the first look: nothing in between is missed
    let mut changes = shared.core.commands();
    changes.mark_unchanged();
    let command = shared.core.call(move |core| core.command_view(id)).await?;
    let follow = Follow::new(shared.core.clone(), changes, command);
    let stop = shared.stop.clone();
    let events = stream::unfold(follow, |mut follow| async move {
        let event = follow.next().await?;
        Some((event, follow))
    });
    Ok(Sse::new(as_sse(events).take_until(stop.cancelled_owned())).keep_alive(KeepAlive::default()).into_response())
}

fn as_sse(events: impl Stream<Item = CommandEvent>) -> impl Stream<Item = Result<Event, Infallible>> {
    events.map(|event| {
        let kind = match event {
            CommandEvent::Command { .. } => "command",
            CommandEvent::Verdict { .. } => "verdict",
            CommandEvent::Progress { .. } => "progress",
            CommandEvent::Ended { .. } => "ended",
        };
        Ok(Event::default().event(kind).json_data(&event).unwrap_or_default())
    })
}

/// Looks again after each change and says what differs from the last look. A follower that is slow misses steps in between,
/// never the last word.
struct Follow {
    core: Handle,
    changes: watch::Receiver<u64>,
    last: Command,
    ready: VecDeque<CommandEvent>,
    over: bool,
}

impl Follow {
    fn new(core: Handle, changes: watch::Receiver<u64>, command: Command) -> Self {
        let mut ready = VecDeque::from([CommandEvent::Command { command: Box::new(command.clone()) }]);
        let over = command.summary.state == CommandState::Ended;
        if over {
            ready.push_back(CommandEvent::Ended { summary: Box::new(command.summary.clone()) });
        }
        Self { core, changes, last: command, ready, over }
    }

    async fn next(&mut self) -> Option<CommandEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.over {
                return None;
            }
            self.changes.changed().await.ok()?;
            let id = self.last.summary.id;
            let now = self.core.call(move |core| core.command_view(id)).await.ok()?;
            for (before, member) in self.last.members.iter().zip(&now.members) {
                if before.verdict != member.verdict {
                    self.ready.push_back(CommandEvent::Verdict { member: Box::new(member.clone()) });
                } else if before.progress != member.progress && member.progress.is_some() {
                    self.ready.push_back(CommandEvent::Progress { member: Box::new(member.clone()) });
                }
            }
            if now.summary.state == CommandState::Ended {
                self.ready.push_back(CommandEvent::Ended { summary: Box::new(now.summary.clone()) });
                self.over = true;
            }
            self.last = now;
        }
    }
}
