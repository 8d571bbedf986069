//! Console, screen and screenshot of a VM: passed on from the stream endpoint of its host. No command ever goes this way.

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use muster_api::{Problem, STREAM_PROTOCOL};
use muster_common::{Chain, ErrorCode};

use super::{
    Shared,
    extract::{Answer, Name},
};
use crate::refusal::Refusal;

/// A PNG of the VM's screen.
#[utoipa::path(get, path = "/v1/vms/{vm}/screenshot", tag = "vms", params(("vm" = String, Path)), responses((status = 200, body = Vec<u8>, content_type = "image/png"), (status = "default", body = Problem)))]
pub async fn screenshot(State(shared): State<Shared>, Name(name): Name) -> Answer {
    let (vm, endpoint) = shared.core.call(move |core| core.stream_of(&name)).await?;
    let answer = shared
        .agents
        .get(format!("{endpoint}/bulk/v1/vms/{vm}/screenshot"))
        .timeout(std::time::Duration::from_secs(30))
        .send()
        .await
        .map_err(|error| unreachable_agent(&endpoint, &error))?;
    let status = answer.status();
    let bytes = answer.bytes().await.map_err(|error| unreachable_agent(&endpoint, &error))?;
    if !status.is_success() {
        return Err(agents_refusal(status, &bytes));
    }
    Ok(([(header::CONTENT_TYPE, "image/png")], bytes).into_response())
}

/// The serial console: raw bytes both ways after the upgrade.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", tag = "vms", params(("vm" = String, Path)), responses((status = 101), (status = "default", body = Problem)))]
pub async fn console(State(shared): State<Shared>, Name(name): Name, request: Request) -> Answer {
    pass_on(shared, name, "console", request).await
}

/// VNC (RFB): raw bytes both ways after the upgrade.
#[utoipa::path(get, path = "/v1/vms/{vm}/vnc", tag = "vms", params(("vm" = String, Path)), responses((status = 101), (status = "default", body = Problem)))]
pub async fn vnc(State(shared): State<Shared>, Name(name): Name, request: Request) -> Answer {
    pass_on(shared, name, "vnc", request).await
}

pub(crate) fn unreachable_agent(endpoint: &str, error: &reqwest::Error) -> Refusal {
    Refusal::new(ErrorCode::Unavailable, format!("reach the host's stream endpoint {endpoint}: {}", Chain(error)))
}

/// What an agent's stream endpoint sends with an error.
#[derive(serde::Deserialize)]
struct AgentsWords {
    code: String,
    message: String,
}

/// The agent's own words, when it sent some; its status otherwise.
pub(crate) fn agents_refusal(status: StatusCode, body: &Bytes) -> Refusal {
    match serde_json::from_slice::<AgentsWords>(body) {
        Ok(words) => {
            let code = ErrorCode::from_text(&words.code).unwrap_or(ErrorCode::Unavailable);
            Refusal::new(code, words.message)
        }
        Err(_) => {
            let text: String = String::from_utf8_lossy(body).chars().take(200).collect();
            let code = if status == StatusCode::NOT_FOUND { ErrorCode::NotFound } else { ErrorCode::Unavailable };
            Refusal::new(code, format!("the host answered {status}: {text}"))
        }
    }
}

fn asks_for_upgrade(headers: &HeaderMap) -> bool {
    headers
        .get(header::UPGRADE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.eq_ignore_ascii_case(STREAM_PROTOCOL))
}

async fn pass_on(shared: Shared, name: String, what: &str, mut request: Request) -> Answer {
    if !asks_for_upgrade(request.headers()) {
        let detail = format!("a {what} is a stream: send Connection: upgrade and Upgrade: {STREAM_PROTOCOL}");
        return Err(Refusal::invalid(detail));
    }
    let (vm, endpoint) = shared.core.call(move |core| core.stream_of(&name)).await?;
    let answer = shared
        .agents
        .get(format!("{endpoint}/bulk/v1/vms/{vm}/{what}"))
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, STREAM_PROTOCOL)
        .send()
        .await
        .map_err(|error| unreachable_agent(&endpoint, &error))?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = answer.status();
        let bytes = answer.bytes().await.unwrap_or_default();
        return Err(agents_refusal(status, &bytes));
    }
    let mut agent = answer.upgrade().await.map_err(|error| unreachable_agent(&endpoint, &error))?;
    let client = hyper::upgrade::on(&mut request);
    let stop = shared.stop.clone();
    shared.tasks.spawn(async move {
        // the client went away before the upgrade: nothing to pass on
        let Ok(client) = client.await else { return };
        let mut client = hyper_util::rt::TokioIo::new(client);
        tokio::select! {
            // either end may go at any time; that is how a console ends
            _ = tokio::io::copy_bidirectional(&mut client, &mut agent) => {}
            () = stop.cancelled() => {}
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(STREAM_PROTOCOL));
    Ok(response)
}
