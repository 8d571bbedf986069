//! The event and usage logs.

use std::time::Duration;

use axum::extract::State;
use muster_api::{Event, EventQuery, Page, Problem, Usage, UsageQuery};

use super::{
    Shared,
    extract::{Answer, Params, json},
};
use crate::{
    core::{Handle, limit_of},
    db::EventFilter,
    refusal::Refusal,
};

/// The longest a request waits for an event.
const WAIT_LIMIT_SECONDS: u32 = 60;

fn place(cursor: Option<&str>) -> Result<u64, Refusal> {
    cursor.map_or(Ok(0), |text| text.parse().map_err(|_| Refusal::invalid(format!("{text:?} is not a cursor"))))
}

/// Events, oldest first. `next` is always there: ask again with it for what comes later.
#[utoipa::path(get, path = "/v1/events", tag = "logs", params(EventQuery), responses((status = 200, body = Page<Event>), (status = "default", body = Problem)))]
pub async fn events(State(shared): State<Shared>, Params(query): Params<EventQuery>) -> Answer {
    let limit = limit_of(query.limit)?;
    let mut news = shared.core.events();
    news.mark_unchanged();
    let after = match query.cursor.as_deref() {
        Some("end") => shared.core.call(|core| Ok(core.db.last_event()?)).await?,
        cursor => place(cursor)?,
    };
    let wait = Duration::from_secs(u64::from(query.wait_seconds.unwrap_or(0).min(WAIT_LIMIT_SECONDS)));
    let deadline = tokio::time::Instant::now() + wait;
    loop {
        let items = look(&shared.core, &query, after, limit).await?;
        let over = tokio::time::Instant::now() >= deadline || shared.stop.is_cancelled();
        if !items.is_empty() || over {
            let next = items.last().map_or(after, |last| last.sequence);
            return json(Page { items, next: Some(next.to_string()) });
        }
        tokio::select! {
            _ = tokio::time::timeout_at(deadline, news.changed()) => {}
            () = shared.stop.cancelled() => {}
        }
    }
}

async fn look(core: &Handle, query: &EventQuery, after: u64, limit: usize) -> Result<Vec<Event>, Refusal> {
    let (host, vm, kind) = (query.host.clone(), query.vm.clone(), query.kind.clone());
    core.call(move |core| {
        let names = core.names();
        // an id is good even when what it names is gone: the log remembers
        let host = host.map(|text| text.parse().or_else(|_| names.host(&text))).transpose()?;
        let vm = vm.map(|text| text.parse().or_else(|_| names.vm(&text))).transpose()?;
        let mut events = core.db.events(&EventFilter { after, limit, host, vm, kind })?;
        for event in &mut events {
            event.host_name = event.host.map(|id| core.inventory.host_name(id)).unwrap_or_default();
            event.vm_name =
                event.vm.and_then(|id| names.vms.get(&id)).map(|(name, _)| name.clone()).unwrap_or_default();
        }
        Ok(events)
    })
    .await
}

/// The usage log: a row for each minute of each host and VM, oldest first.
#[utoipa::path(get, path = "/v1/usage", tag = "logs", params(UsageQuery), responses((status = 200, body = Page<Usage>), (status = "default", body = Problem)))]
pub async fn usage(State(shared): State<Shared>, Params(query): Params<UsageQuery>) -> Answer {
    let limit = limit_of(query.limit)?;
    let after = place(query.cursor.as_deref())?;
    let items = shared
        .core
        .call(move |core| {
            let names = core.names();
            let host = query.host.map(|text| text.parse().or_else(|_| names.host(&text))).transpose()?;
            let vm = query.vm.map(|text| text.parse().or_else(|_| names.vm(&text))).transpose()?;
            Ok(core.db.usage(after, limit, host, vm)?)
        })
        .await?;
    let next = if items.len() == limit { items.last().map(|last| last.sequence.to_string()) } else { None };
    json(Page { items, next })
}
