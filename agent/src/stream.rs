//! The stream endpoint: bulk bytes over HTTP. No command ever travels here, and none can be given here.
//!
//! | method, path | answer |
//! |---|---|
//! | GET `/bulk/v1/ping` | JSON: host, incarnation, `lab`, evidence about file reads |
//! | GET `/bulk/v1/vms/{vm}/screenshot` | `image/png` |
//! | GET `/bulk/v1/vms/{vm}/console` | `Upgrade: muster-stream`: the serial port, raw bytes both ways |
//! | GET `/bulk/v1/vms/{vm}/vnc` | the same, RFB |
//! | GET `/bulk/v1/volumes/{volume}/export` | the volume as it is at this moment, raw |
//! | GET `/bulk/v1/vms/{vm}/snapshots/{name}/{volume}/manifest` | the manifest of a volume in a snapshot (as the controller's stream endpoint gives one of an image) |
//! | POST `/bulk/v1/vms/{vm}/snapshots/{name}/{volume}/chunks`, body: up to 256 digests of 32 bytes | for each in order: length (u32, little-endian), bytes |
//!
//! The last two are how a volume becomes an image of the controller's: it orders the snapshot over DDS (with `keep_seconds`,
//! so that it goes by itself), reads which chunks there are, and fetches those it lacks.
//!
//! Lab mode: whoever reaches the port may read. Certificates come with a later version.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, Path, Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use muster_block::BlockDevice;
use muster_common::{Chain, Digest, ErrorCode, VmId, VolumeId};
use muster_virt::Lane;
use serde_json::json;
use tokio::net::{TcpListener, UnixStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{accounting, host::Host, inventory::SnapshotSet, machines::code_of};

/// The protocol name in `Upgrade`.
pub const UPGRADE: &str = "muster-stream";
const DIGEST_LEN: usize = 32;
/// Digests in one request: 256 × 64 KiB = 16 MiB in an answer. The controller's own limit.
const CHUNKS_LIMIT: usize = 256;
/// Chunks read ahead of the network, for each request.
const READ_AHEAD: usize = 8;
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
        .route("/bulk/v1/vms/{vm}/snapshots/{name}/{volume}/manifest", get(snapshot_manifest))
        .route("/bulk/v1/vms/{vm}/snapshots/{name}/{volume}/chunks", post(snapshot_chunks))
        .layer(DefaultBodyLimit::max(CHUNKS_LIMIT * DIGEST_LEN))
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

fn invalid(text: impl std::fmt::Display) -> Problem {
    Problem(StatusCode::BAD_REQUEST, ErrorCode::InvalidArgument, text.to_string())
}

/// A snapshot, and which of its volumes is meant.
fn snapshot_of(server: &Server, vm: &str, name: &str, volume: &str) -> Result<(SnapshotSet, VolumeId), Problem> {
    let vm = known(server, vm)?;
    let volume: VolumeId = volume.parse().map_err(invalid)?;
    let gone = || not_found(format!("VM {vm} has no snapshot {name:?} (any more)"));
    let set = server.host.inventory.get(vm).and_then(|entry| entry.snapshots.get(name).cloned()).ok_or_else(gone)?;
    set.touch(server.host.now_us());
    if set.volume(volume).is_none() {
        return Err(not_found(format!("no volume {volume} in snapshot {name:?}")));
    }
    Ok((set, volume))
}

async fn snapshot_manifest(
    State(server): State<Server>,
    Path((vm, name, volume)): Path<(String, String, String)>,
) -> Result<Response, Problem> {
    let (set, volume) = snapshot_of(&server, &vm, &name, &volume)?;
    let table = set.clone();
    let read = server.streams.spawn_blocking(move || table.chunks(volume)).await;
    // reading a large volume takes a while: the time it is kept begins now
    set.touch(server.host.now_us());
    match read {
        Ok(Ok(table)) => Ok(table.manifest().to_vec().into_response()),
        Ok(Err(e)) => Err(Problem(StatusCode::INTERNAL_SERVER_ERROR, e.code(), Chain(&e).to_string())),
        Err(e) => Err(Problem(StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::Internal, format!("read a snapshot: {e}"))),
    }
}

async fn snapshot_chunks(
    State(server): State<Server>,
    Path((vm, name, volume)): Path<(String, String, String)>,
    wanted: Bytes,
) -> Result<Response, Problem> {
    let (set, volume) = snapshot_of(&server, &vm, &name, &volume)?;
    if wanted.is_empty() || !wanted.len().is_multiple_of(DIGEST_LEN) {
        return Err(invalid(format!("the body must be 1 to {CHUNKS_LIMIT} digests of {DIGEST_LEN} bytes")));
    }
    let digests: Vec<Digest> = wanted
        .chunks_exact(DIGEST_LEN)
        .filter_map(|bytes| <[u8; DIGEST_LEN]>::try_from(bytes).ok().map(Digest::from_bytes))
        .collect();
    let lookup = set.clone();
    let table = match server.streams.spawn_blocking(move || lookup.chunks(volume)).await {
        Ok(Ok(table)) => table,
        Ok(Err(e)) => return Err(Problem(StatusCode::INTERNAL_SERVER_ERROR, e.code(), Chain(&e).to_string())),
        Err(e) => {
            let text = format!("read a snapshot: {e}");
            return Err(Problem(StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::Internal, text));
        }
    };
    // an answer that has begun can only break off: what is missing is said before
    if let Some(missing) = digests.iter().find(|digest| !table.has(digest)) {
        return Err(not_found(format!("no chunk {missing} in snapshot {name:?}")));
    }
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(READ_AHEAD);
    let host = server.host.clone();
    server.streams.spawn_blocking(move || {
        let Some(snapshot) = set.volume(volume) else { return };
        for digest in &digests {
            let frame = table.read(snapshot, digest).map(|bytes| {
                let mut frame = Vec::with_capacity(4 + bytes.len());
                frame.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
                frame.extend_from_slice(&bytes);
                Bytes::from(frame)
            });
            if let Err(e) = &frame {
                tracing::error!(chunk = %digest, err = %Chain(e), "a chunk of a snapshot cannot be read");
            }
            let failed = frame.is_err();
            // the receiver goes when the client does
            if sender.blocking_send(frame.map_err(std::io::Error::other)).is_err() || failed {
                break;
            }
        }
        set.touch(host.now_us());
    });
    Ok(Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(receiver)).into_response())
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
