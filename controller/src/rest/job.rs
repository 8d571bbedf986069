//! Jobs and the stream of their progress.

use std::{convert::Infallible, time::Duration};

use axum::{
    extract::State,
    response::{
        IntoResponse, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures_util::{StreamExt, stream};
use muster_api::{Job, JobState, ListQuery, Page, Problem};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{
    Shared,
    extract::{Answer, Name, Params, json, versioned},
};
use crate::core::paginate;

/// The longest a request waits for a change.
const WAIT_LIMIT_SECONDS: u32 = 60;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct WaitQuery {
    /// Wait for a version above this one.
    after: Option<u64>,
    /// At most 60.
    wait_seconds: Option<u32>,
}

/// Jobs, oldest first.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", params(ListQuery), responses((status = 200, body = Page<Job>), (status = "default", body = Problem)))]
pub async fn list(State(shared): State<Shared>, Params(query): Params<ListQuery>) -> Answer {
    json(paginate(shared.jobs.all(), |job| job.id.clone(), query.cursor.as_deref(), query.limit)?)
}

/// One job; waits for a change when asked to.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path), WaitQuery), responses((status = 200, body = Job), (status = "default", body = Problem)))]
pub async fn get(State(shared): State<Shared>, Name(id): Name, Params(query): Params<WaitQuery>) -> Answer {
    let mut job = shared.jobs.follow(&id)?;
    if let Some(after) = query.after {
        let limit = Duration::from_secs(u64::from(query.wait_seconds.unwrap_or(0).min(WAIT_LIMIT_SECONDS)));
        let news = job.wait_for(|job| job.version > after || job.state != JobState::Running);
        tokio::select! {
            // in time or not: it is answered as it stands
            _ = tokio::time::timeout(limit, news) => {}
            () = shared.stop.cancelled() => {}
        }
    }
    let job = job.borrow().clone();
    let version = job.version;
    versioned(job, version)
}

/// Server-sent events: the job after each change, until it has ended.
#[utoipa::path(get, path = "/v1/jobs/{id}/events", tag = "jobs", params(("id" = String, Path)), responses((status = 200, body = Job, content_type = "text/event-stream"), (status = "default", body = Problem)))]
pub async fn events(State(shared): State<Shared>, Name(id): Name) -> Answer {
    let mut job = shared.jobs.follow(&id)?;
    job.mark_changed();
    let events = stream::unfold(Some(job), |job| async move {
        let mut job = job?;
        job.changed().await.ok()?;
        let now = job.borrow_and_update().clone();
        let event = Event::default().event("job").json_data(&now).unwrap_or_default();
        let next = (now.state == JobState::Running).then_some(job);
        Some((Ok::<_, Infallible>(event), next))
    });
    let stop = shared.stop.clone();
    Ok(Sse::new(events.take_until(stop.cancelled_owned())).keep_alive(KeepAlive::default()).into_response())
}
