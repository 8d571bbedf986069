//! The control socket: how `muster-agent stop` and `muster-agent status` talk to the running agent of this machine.
//!
//! A unix socket in `run_dir`, mode 0600. One JSON line in, one JSON line out, then it is closed:
//! `{"stop":{"force":false,"keep":false}}` -> `{"ok":true}` or `{"ok":false,"code":"in-use","message":"…"}`; `{"status":{}}` -> `{"ok":true,
//! "status":{…}}`.

use std::{io, os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration};

use muster_common::ErrorCode;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use crate::{
    accounting,
    host::Host,
    numa,
    stop::{Stop, prepare_stop},
};

/// Longer requests are nonsense.
const LIMIT: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    Stop {
        force: bool,
        /// Leave VMs and volumes to the next start.
        #[serde(default)]
        keep: bool,
    },
    Status {},
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reply {
    pub ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<serde_json::Value>,
}

/// Listens; a dead socket file in the way is replaced, a live one is an error.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another agent answers there"));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers until `stop`. A granted stop is passed on through `stopping`.
pub async fn serve(
    host: Arc<Host>,
    listener: UnixListener,
    stopping: watch::Sender<Option<Stop>>,
    stop: CancellationToken,
) {
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(e) => {
                    tracing::warn!(err = %e, "the control socket did not accept");
                    continue;
                }
            },
        };
        // one at a time: its users are operators
        if let Err(e) = answer(&host, stream, &stopping).await {
            tracing::debug!(err = %e, "a control request ended early");
        }
    }
}

async fn answer(host: &Arc<Host>, stream: UnixStream, stopping: &watch::Sender<Option<Stop>>) -> io::Result<()> {
    let mut reader = BufReader::new(stream.take(LIMIT));
    let mut line = String::new();
    patiently(reader.read_line(&mut line)).await?;
    let mut stream = reader.into_inner().into_inner();
    let mut granted = None;
    let reply = match serde_json::from_str::<Request>(&line) {
        Err(e) => refusal(ErrorCode::InvalidArgument, format!("not a request: {e}")),
        Ok(Request::Status {}) => {
            Reply { ok: true, code: None, message: String::new(), status: Some(status(host).await) }
        }
        // takes as long as pausing the VMs does: one left off half-way would leave them paused and the agent running
        Ok(Request::Stop { force, keep }) => {
            let how = match (force, keep) {
                (_, true) => Stop::Keep,
                (true, false) => Stop::Force,
                (false, false) => Stop::Orderly,
            };
            match prepare_stop(host, how).await {
                Ok(remark) => {
                    // looked at already: it is not to be refused for what happens in between
                    granted = Some(if keep { Stop::Keep } else { Stop::Force });
                    Reply { ok: true, code: None, message: remark, status: None }
                }
                Err(refused) => refusal(ErrorCode::InUse, refused.to_string()),
            }
        }
    };
    let mut text = serde_json::to_string(&reply).map_err(io::Error::other)?;
    text.push('\n');
    let sent = patiently(stream.write_all(text.as_bytes())).await;
    if granted.is_some() {
        // the agent may be going already: then nobody listens
        let _ = stopping.send(granted);
    }
    sent
}

/// Whoever asks has so long to send, and to take the answer.
async fn patiently<T>(io: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(PATIENCE, io).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn refusal(code: ErrorCode, message: String) -> Reply {
    Reply { ok: false, code: Some(code.as_str().into()), message, status: None }
}

async fn status(host: &Host) -> serde_json::Value {
    let directory = host.config.store_directory();
    // an empty list: it panicked, which is in the log
    let nodes = tokio::task::spawn_blocking(move || numa::nodes_of(&directory)).await.unwrap_or_default();
    let entries = host.inventory.all();
    serde_json::json!({
        "host": host.id,
        "incarnation": host.incarnation,
        "name": host.name,
        "lab": host.config.lab,
        "cell": host.config.cell,
        "stream_endpoint": *host.stream_endpoint.lock(),
        "accelerator": host.machines.accelerator(),
        "hypervisor_remark": host.machines.remark(),
        "draining": host.draining.is_set(),
        "attached_exports": host.volumes.attached(),
        "vms": entries.iter().map(|e| serde_json::json!({
            "vm": e.record.vm, "name": e.record.name, "state": e.shown_state().as_str(), "guest_up": e.guest_up,
        })).collect::<Vec<_>>(),
        "controllers": host.presence.lock().controllers().values().map(|c| c.name.clone()).collect::<Vec<_>>(),
        "scrub": host.scrub.counts(),
        "damaged_blocks": host.volumes.store.stats().damaged_blocks,
        "numa_nodes": nodes,
        "evidence": accounting::evidence(host),
    })
}

/// One request to the agent that listens on `path`.
pub async fn request(path: &Path, request: &Request) -> io::Result<Reply> {
    let mut stream = UnixStream::connect(path).await?;
    let mut text = serde_json::to_string(request).map_err(io::Error::other)?;
    text.push('\n');
    stream.write_all(text.as_bytes()).await?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await?;
    serde_json::from_str(&line).map_err(io::Error::other)
}
