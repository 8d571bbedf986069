//! The stream endpoint: images and boot files for agents, by digest, read-only. No command travels here.
//!
//! | request | answer |
//! |---|---|
//! | `GET /bulk/v1/ping` | 200 |
//! | `GET /bulk/v1/manifests/{digest}` | the manifest's bytes |
//! | `POST /bulk/v1/chunks`, body: up to 256 digests of 32 bytes | for each in order: length (u32, little-endian), bytes |
//! | `GET /bulk/v1/blobs/{digest}` | the blob's bytes |

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, Path, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use muster_common::{Digest, ErrorCode};
use muster_repository::Repository;
use tokio_stream::wrappers::ReceiverStream;

use crate::refusal::Refusal;

const DIGEST_LEN: usize = 32;
/// Digests in one request: 256 × 64 KiB = 16 MiB in an answer.
const CHUNKS_LIMIT: usize = 256;
/// Chunks read ahead of the network, for each request.
const READ_AHEAD: usize = 8;

/// The service.
pub fn router(repository: Repository) -> Router {
    Router::new()
        .route("/bulk/v1/ping", get(|| async { "muster" }))
        .route("/bulk/v1/manifests/{digest}", get(manifest))
        .route("/bulk/v1/chunks", post(chunks))
        .route("/bulk/v1/blobs/{digest}", get(blob))
        .layer(DefaultBodyLimit::max(CHUNKS_LIMIT * DIGEST_LEN))
        .with_state(repository)
}

fn digest_of(text: &str) -> Result<Digest, Refusal> {
    text.parse().map_err(|error| Refusal::invalid(format!("{error}")))
}

async fn read<F>(f: F) -> Result<Response, Refusal>
where
    F: FnOnce() -> Result<Vec<u8>, muster_repository::RepositoryError> + Send + 'static,
{
    let bytes = tokio::task::spawn_blocking(f)
        .await
        .map_err(|error| Refusal::new(ErrorCode::Internal, format!("read the repository: {error}")))??;
    Ok(bytes.into_response())
}

async fn manifest(State(repository): State<Repository>, Path(digest): Path<String>) -> Result<Response, Refusal> {
    let digest = digest_of(&digest)?;
    read(move || repository.manifest_bytes(&digest)).await
}

async fn blob(State(repository): State<Repository>, Path(digest): Path<String>) -> Result<Response, Refusal> {
    let digest = digest_of(&digest)?;
    read(move || repository.blob(&digest)).await
}

async fn chunks(State(repository): State<Repository>, wanted: Bytes) -> Result<Response, Refusal> {
    if wanted.is_empty() || !wanted.len().is_multiple_of(DIGEST_LEN) {
        return Err(Refusal::invalid(format!("the body must be 1 to {CHUNKS_LIMIT} digests of {DIGEST_LEN} bytes")));
    }
    let digests: Vec<Digest> = wanted
        .chunks_exact(DIGEST_LEN)
        .filter_map(|bytes| <[u8; DIGEST_LEN]>::try_from(bytes).ok().map(Digest::from_bytes))
        .collect();
    // an answer that has begun can only break off: what is known to be missing is said before
    if let Some(missing) = digests.iter().find(|digest| !repository.contains_chunk(digest)) {
        return Err(Refusal::new(ErrorCode::NotFound, format!("no chunk {missing} in this repository")));
    }
    let (send, receive) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(READ_AHEAD);
    tokio::task::spawn_blocking(move || {
        for digest in digests {
            let frame = match repository.read_chunk(&digest) {
                Ok(bytes) => {
                    let mut frame = Vec::with_capacity(4 + bytes.len());
                    frame.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
                    frame.extend_from_slice(&bytes);
                    Ok(Bytes::from(frame))
                }
                Err(error) => {
                    tracing::error!(chunk = %digest, err = %muster_common::Chain(&error), "chunk cannot be read");
                    Err(std::io::Error::other(error))
                }
            };
            let failed = frame.is_err();
            // the agent went away, or the answer is broken off
            if send.blocking_send(frame).is_err() || failed {
                break;
            }
        }
    });
    Ok(Body::from_stream(ReceiverStream::new(receive)).into_response())
}
