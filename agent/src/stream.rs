//! The stream endpoint: bulk bytes over HTTP. No command ever travels here, and none can be given here.
//!
//! | method, path | answer |
//! |---|---|
//! | GET `/bulk/v1/ping` | JSON: host, incarnation, `lab`, evidence about file reads |
//! | GET `/bulk/v1/vms/{vm}/screenshot` | `image/png` |
//! | GET `/bulk/v1/vms/{vm}/console` | `Upgrade: muster-stream`: the serial port, raw bytes both ways |
//! | GET `/bulk/v1/vms/{vm}/vnc` | the same, RFB |
//! | GET `/bulk/v1/volumes/{volume}/export` | the volume as it is at this moment, raw |
//!
//! Lab mode: whoever reaches the port may read. Certificates come with a later version.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use muster_block::BlockDevice;
use muster_common::{Chain, ErrorCode, VmId, VolumeId};
use muster_virt::Lane;
use serde_json::json;
use tokio::net::{TcpListener, UnixStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{accounting, host::Host, machines::code_of};

/// The protocol name in `Upgrade`.
pub const UPGRADE: &str = "muster-stream";
/// Bytes of a volume read and sent at once.
const PIECE: usize = 1 << 20;

#[derive(Clone)]
struct Server {
    host: Arc<Host>,
    /// Upgraded connections and volume readers.
    streams: TaskTracker,
    stop: CancellationToken,
}

/// An answer that is an error: status and JSON with a stable code.
struct Problem(StatusCode, ErrorCode, String);

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "code": self.1.as_str(), "message": self.2 }))).into_response()
    }
}

impl From<muster_virt::HypervisorError> for Problem {
    fn from(e: muster_virt::HypervisorError) -> Self {
        let code = code_of(e.kind());
        let status = match code {
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            ErrorCode::InvalidState => StatusCode::CONFLICT,
            ErrorCode::Unsupported => StatusCode::NOT_IMPLEMENTED,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        let hint = if code == ErrorCode::InvalidState { " (is it running?)" } else { "" };
        Problem(status, code, format!("{}{hint}", Chain(&e)))
    }
}

fn not_found(what: impl Into<String>) -> Problem {
    Problem(StatusCode::NOT_FOUND, ErrorCode::NotFound, what.into())
}

/// Serves until `stop`, then ends every stream.
pub async fn serve(host: Arc<Host>, listener: TcpListener, stop: CancellationToken) {
    let server = Server { host, streams: TaskTracker::new(), stop: stop.clone() };
    let streams = server.streams.clone();
    let router = Router::new()
        .route("/bulk/v1/ping", get(ping))
        .route("/bulk/v1/vms/{vm}/screenshot", get(screenshot))
        .route("/bulk/v1/vms/{vm}/console", get(console))
        .route("/bulk/v1/vms/{vm}/vnc", get(vnc))
        .route("/bulk/v1/volumes/{volume}/export", get(export))
        .with_state(server);
    let served = axum::serve(listener, router).with_graceful_shutdown({
        let stop = stop.clone();
        async move { stop.cancelled().await }
    });
    // a client that does not end its request must not keep the agent from stopping
    let hard_stop = async {
        stop.cancelled().await;
        tokio::time::sleep(Duration::from_secs(2)).await;
    };
    tokio::select! {
        result = served => if let Err(e) = result {
            tracing::error!(err = %e, "the stream endpoint ended");
        },
        () = hard_stop => {}
    }
    streams.close();
    streams.wait().await;
}

async fn ping(State(server): State<Server>) -> Response {
    let host = &server.host;
    Json(json!({
        "host": host.id,
        "incarnation": host.incarnation,
        "name": host.name,
        "lab": host.config.lab,
        "evidence": accounting::evidence(host),
    }))
    .into_response()
}

fn known(server: &Server, vm: &str) -> Result<VmId, Problem> {
    let id: VmId =
        vm.parse().map_err(|e| Problem(StatusCode::BAD_REQUEST, ErrorCode::InvalidArgument, format!("{e}")))?;
    server.host.inventory.get(id).map(|_| id).ok_or_else(|| not_found(format!("no VM {id} on this host")))
}

async fn screenshot(State(server): State<Server>, Path(vm): Path<String>) -> Result<Response, Problem> {
    let vm = known(&server, &vm)?;
    let shot = server.host.machines.call(Lane::Host, "screenshot", move |h| h.screenshot(vm)?.to_png()).await?;
    Ok(([(header::CONTENT_TYPE, "image/png")], shot).into_response())
}

async fn console(State(server): State<Server>, Path(vm): Path<String>, request: Request) -> Result<Response, Problem> {
    let vm = known(&server, &vm)?;
    let socket = server.host.console_socket(vm);
    bridge(server, socket, request).await
}

async fn vnc(State(server): State<Server>, Path(vm): Path<String>, request: Request) -> Result<Response, Problem> {
    let vm = known(&server, &vm)?;
    let socket = server.host.vnc_socket(vm);
    bridge(server, socket, request).await
}

/// Joins an upgraded connection to a unix socket of the hypervisor.
async fn bridge(server: Server, socket: PathBuf, mut request: Request) -> Result<Response, Problem> {
    let wanted = request.headers().get(header::UPGRADE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if !wanted.eq_ignore_ascii_case(UPGRADE) {
        let text = format!("ask for Upgrade: {UPGRADE}");
        return Err(Problem(StatusCode::UPGRADE_REQUIRED, ErrorCode::InvalidArgument, text));
    }
    let mut guest = UnixStream::connect(&socket).await.map_err(|e| {
        let text = format!("the VM has no such stream now (is it running?): {e}");
        Problem(StatusCode::CONFLICT, ErrorCode::InvalidState, text)
    })?;
    let upgrade = hyper::upgrade::on(&mut request);
    let stop = server.stop.clone();
    server.streams.spawn(async move {
        let client = match upgrade.await {
            Ok(client) => client,
            Err(e) => {
                tracing::debug!(err = %e, "a stream was not upgraded");
                return;
            }
        };
        let mut client = TokioIo::new(client);
        tokio::select! {
            // either side may go at any time
            _ = tokio::io::copy_bidirectional(&mut client, &mut guest) => {}
            () = stop.cancelled() => {}
        }
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static(UPGRADE)),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

async fn export(State(server): State<Server>, Path(volume): Path<String>) -> Result<Response, Problem> {
    let id: VolumeId =
        volume.parse().map_err(|e| Problem(StatusCode::BAD_REQUEST, ErrorCode::InvalidArgument, format!("{e}")))?;
    let volume =
        server.host.volumes.store.volume(id).ok_or_else(|| not_found(format!("no volume {id} on this host")))?;
    let snapshot =
        volume.snapshot().map_err(|e| Problem(StatusCode::INSUFFICIENT_STORAGE, e.code(), Chain(&e).to_string()))?;
    let size = snapshot.geometry().size.bytes();
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(4);
    server.streams.spawn_blocking(move || {
        let mut offset = 0;
        while offset < size {
            let len = (size - offset).min(PIECE as u64) as usize;
            let mut piece = vec![0; len];
            let read = snapshot.read_at(offset, &mut piece).map(|()| Bytes::from(piece)).map_err(std::io::Error::other);
            let failed = read.is_err();
            // the receiver goes when the client does
            if sender.blocking_send(read).is_err() || failed {
                return;
            }
            offset += len as u64;
        }
    });
    let body = Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(receiver));
    let headers =
        [(header::CONTENT_TYPE, "application/octet-stream".to_string()), (header::CONTENT_LENGTH, size.to_string())];
    Ok((headers, body).into_response())
}

/// What the host topic says: as configured, else by what it listens on.
pub fn advertised(config: &crate::config::Config, bound: SocketAddr) -> String {
    if let Some(url) = &config.stream.advertise {
        return url.trim_end_matches('/').to_string();
    }
    let address = match config.interface {
        _ if !bound.ip().is_unspecified() => bound.ip(),
        Some(interface) => interface,
        None => first_address().unwrap_or(bound.ip()),
    };
    format!("http://{}", SocketAddr::new(address, bound.port()))
}

/// The first address of this machine that is not loopback.
fn first_address() -> Option<std::net::IpAddr> {
    let networks = sysinfo::Networks::new_with_refreshed_list().ok()?;
    let mut addresses: Vec<std::net::IpAddr> =
        networks.values().flat_map(|n| n.ip_networks()).map(|n| n.addr).filter(|a| !a.is_loopback()).collect();
    // IPv4 first: link-local IPv6 addresses need a scope that a URL does not carry
    addresses.sort_by_key(|a| (!a.is_ipv4(), *a));
    addresses.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn the_advertised_address_is_one_others_can_use() {
        let mut config = Config::minimal("/s", "/r", muster_common::ByteLen::gib(1));
        let any: SocketAddr = "0.0.0.0:7800".parse().unwrap();
        config.interface = Some("10.1.2.3".parse().unwrap());
        assert_eq!(advertised(&config, any), "http://10.1.2.3:7800");
        assert_eq!(advertised(&config, "127.0.0.1:5".parse().unwrap()), "http://127.0.0.1:5");
        config.stream.advertise = Some("http://proxy/".into());
        assert_eq!(advertised(&config, any), "http://proxy");
    }
}
