//! REST `/v1`: on a unix socket, and in lab mode on 127.0.0.1. Handlers only translate; the core decides.
//!
//! Who may ask: on the socket root, the controller's own user, and the members of a configured group (by the socket's mode);
//! on 127.0.0.1 every local user, but no foreign web page: the Host header must name this machine (DNS rebinding), and an
//! Origin, when there is one, must be this server.

mod command;
mod export;
mod extract;
mod fleet;
mod image;
mod job;
mod log;
mod openapi;
mod stream;
mod system;

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::{ConnectInfo, Request, State, connect_info::Connected},
    http::{HeaderValue, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::IncomingStream,
};
use muster_api::{LAB_HEADER, PROBLEM_JSON};
use muster_common::{Clock, ErrorCode};
use muster_repository::Repository;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{config::Config, core::Handle, jobs::Jobs, refusal::Refusal};

pub use openapi::document;
pub(crate) use stream::{agents_refusal, unreachable_agent};

/// What handlers need.
#[derive(Clone)]
pub struct Shared {
    pub core: Handle,
    pub jobs: Jobs,
    pub repository: Repository,
    pub config: Arc<Config>,
    pub clock: Arc<dyn Clock>,
    /// Ends streams that would last.
    pub stop: CancellationToken,
    /// Imports and proxied streams; the controller waits for them when it stops.
    pub tasks: TaskTracker,
    /// To the agents' stream endpoints.
    pub agents: reqwest::Client,
    /// Imports at a time: each uses all cores.
    pub imports: Arc<tokio::sync::Semaphore>,
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    Unix { uid: Option<u32> },
    Tcp(SocketAddr),
}

impl Caller {
    /// For the log and for a command's issuer.
    pub fn issuer(&self) -> String {
        match self {
            Self::Unix { uid: Some(uid) } => format!("uid:{uid}"),
            Self::Unix { uid: None } => "uid:unknown".to_string(),
            Self::Tcp(_) => "http:local".to_string(),
        }
    }
    /// May name files of this machine: whoever it is could read them all the same.
    pub fn is_trusted(&self) -> bool {
        matches!(self, Self::Unix { uid: Some(uid) } if *uid == 0 || *uid == own_uid())
    }
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self::Unix { uid: stream.io().peer_cred().ok().map(|peer| peer.uid()) }
    }
}
impl Connected<IncomingStream<'_, TcpListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        Self::Tcp(*stream.remote_addr())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let problem = self.into_problem();
        let status =
            axum::http::StatusCode::from_u16(problem.status).unwrap_or(axum::http::StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(problem)).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        response
    }
}

/// The service of `/v1`.
pub fn router(shared: Shared) -> Router {
    let v1 = Router::new()
        .route("/status", get(system::status))
        .route("/doctor", get(system::doctor))
        .route("/top", get(system::top))
        .route("/openapi.json", get(openapi::serve))
        .route("/hosts", get(fleet::list_hosts))
        .route("/hosts/{host}", get(fleet::get_host).delete(fleet::forget_host))
        .route("/metrics/hosts", get(fleet::host_metrics))
        .route("/metrics/vms", get(fleet::vm_metrics))
        .route("/metrics/volumes", get(fleet::volume_metrics))
        .route("/stores", get(fleet::list_stores))
        .route("/stores/{host}", get(fleet::get_store))
        .route("/vms", get(fleet::list_vms).post(fleet::create_vms))
        .route("/vms/{vm}", get(fleet::get_vm).delete(fleet::delete_vm))
        .route("/vms/{vm}/screenshot", get(stream::screenshot))
        .route("/vms/{vm}/console", get(stream::console))
        .route("/vms/{vm}/vnc", get(stream::vnc))
        .route("/volumes", get(fleet::list_volumes))
        .route("/backups", get(fleet::list_backups))
        .route("/groups", get(fleet::list_groups).post(fleet::create_group))
        .route("/groups/{path}", get(fleet::get_group).patch(fleet::change_group).delete(fleet::delete_group))
        .route("/images", get(image::list).post(image::import))
        .route("/images/import", post(image::import_by_path))
        .route("/images/estimate", post(image::estimate_file))
        .route("/images/{image}", get(image::get).delete(image::delete))
        .route("/images/{image}/estimate", get(image::estimate))
        .route("/images/commit", post(image::commit))
        .route("/images/{image}/export", get(export::export))
        .route("/images/{image}/pull", post(image::pull))
        .route("/images/{image}/verify", post(image::verify))
        .route("/blobs", post(image::put_blob))
        .route("/templates", get(image::list_templates).post(image::create_template))
        .route(
            "/templates/{name}",
            get(image::get_template).patch(image::change_template).delete(image::delete_template),
        )
        .route("/jobs", get(job::list))
        .route("/jobs/{id}", get(job::get))
        .route("/jobs/{id}/events", get(job::events))
        .route("/commands", get(command::list).post(command::create))
        .route("/commands/{id}", get(command::get))
        .route("/commands/{id}/events", get(command::events))
        .route("/events", get(log::events))
        .route("/usage", get(log::usage));
    Router::new()
        .nest("/v1", v1)
        .fallback(|request: Request| async move {
            let detail = format!("nothing at {} {}", request.method(), request.uri().path());
            Refusal::new(ErrorCode::NotFound, detail)
        })
        .method_not_allowed_fallback(|request: Request| async move {
            let detail = format!("{} cannot be used on {}", request.method(), request.uri().path());
            let mut response = Refusal::invalid(detail).into_response();
            *response.status_mut() = axum::http::StatusCode::METHOD_NOT_ALLOWED;
            response
        })
        .layer(middleware::from_fn_with_state(shared.clone(), guard))
        .with_state(shared)
}

/// Lets in who may ask, and says in every answer that this is lab mode.
async fn guard(
    State(shared): State<Shared>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    mut request: Request,
    next: Next,
) -> Response {
    let mut response = match allowed(&shared, &caller, &request) {
        Ok(()) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(refusal) => {
            tracing::warn!(?caller, err = %refusal.detail, "request refused");
            refusal.into_response()
        }
    };
    if shared.config.lab {
        response.headers_mut().insert(LAB_HEADER, HeaderValue::from_static("true"));
    }
    response
}

fn allowed(shared: &Shared, caller: &Caller, request: &Request) -> Result<(), Refusal> {
    let denied = |detail: &str| Err(Refusal::new(ErrorCode::PermissionDenied, detail));
    match caller {
        // with a group, the mode of the socket has decided who gets here
        Caller::Unix { .. } if caller.is_trusted() || shared.config.api.socket_group.is_some() => Ok(()),
        Caller::Unix { .. } => denied("only root and the controller's own user may use this socket"),
        Caller::Tcp(address) => {
            if !shared.config.lab || !address.ip().is_loopback() {
                return denied("HTTP is served to this machine only, in lab mode");
            }
            let host = request.headers().get(header::HOST).and_then(|value| value.to_str().ok()).unwrap_or("");
            if !is_local(host) {
                return denied("the Host header does not name this machine");
            }
            match request.headers().get(header::ORIGIN).map(|value| value.to_str().unwrap_or("")) {
                Some(origin) if origin.strip_prefix("http://") != Some(host) => {
                    denied("requests from pages of other origins are refused")
                }
                _ => Ok(()),
            }
        }
    }
}

/// True for the names of this machine's loopback, with or without a port.
fn is_local(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((name, port)) => (name, port.strip_prefix(':')),
            None => return false,
        },
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    matches!(name, "127.0.0.1" | "localhost" | "::1") && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        for good in ["127.0.0.1", "127.0.0.1:7700", "localhost:1", "[::1]:7700", "[::1]"] {
            assert!(is_local(good), "{good}");
        }
        for bad in ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "127.0.0.1:x", "10.0.0.1"] {
            assert!(!is_local(bad), "{bad}");
        }
    }
}
