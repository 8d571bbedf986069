//! An image as a stream of bytes. The client writes the file: the controller may live in another mount namespace, run as
//! another user, on another machine.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::header,
    response::IntoResponse,
};
use muster_api::{DATA_HEADER, ExportFormat, ExportQuery, Extents, Problem};
use muster_common::{Chain, ErrorCode};
use muster_repository::{
    export::Qcow2Writer,
    source::{ReadAt, SourceError, Span},
};
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use super::{
    Shared,
    extract::{Answer, Name, Params},
};
use crate::refusal::Refusal;

/// Bytes read and sent at once.
const PIECE: u64 = 1 << 20;
/// Pieces read ahead of the network.
const READ_AHEAD: usize = 4;

/// Why an answer that has begun breaks off.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("the client went away")]
    Gone,
}

type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), Broken>;

/// The bytes of an image, read from the repository; each chunk is verified on its way. Damage at the front is an error;
/// an answer that breaks off later is not whole.
#[utoipa::path(get, path = "/v1/images/{image}/export", tag = "images", params(("image" = String, Path), ExportQuery), responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), (status = "default", body = Problem)))]
pub async fn export(State(shared): State<Shared>, Name(name): Name, Params(query): Params<ExportQuery>) -> Answer {
    let image = shared.core.call(move |core| Ok(core.image(&name)?.clone())).await?;
    let (repository, format) = (shared.repository.clone(), query.format);
    let prepared = tokio::task::spawn_blocking(move || {
        let manifest = Arc::new(repository.manifest(&image.digest)?);
        let data = manifest.data_bytes().0;
        let source: Arc<dyn ReadAt> = Arc::new(repository.reader(manifest));
        let form = match format {
            ExportFormat::Raw => Form::Raw(source),
            ExportFormat::Extents => Form::Extents(source),
            ExportFormat::Qcow2 => Form::Qcow2(Qcow2Writer::new(source)?),
        };
        Ok::<_, Refusal>((form, data))
    });
    let (form, data) = prepared
        .await
        .map_err(|error| Refusal::new(ErrorCode::Internal, format!("read the repository: {error}")))??;
    let len = form.len();
    let (send, mut receive) = mpsc::channel::<Result<Bytes, SourceError>>(READ_AHEAD);
    let stop = shared.stop.clone();
    shared.tasks.spawn_blocking(move || {
        let mut sink = |bytes: &[u8]| {
            let gone = stop.is_cancelled() || send.blocking_send(Ok(Bytes::copy_from_slice(bytes))).is_err();
            if gone { Err(Broken::Gone) } else { Ok(()) }
        };
        if let Err(Broken::Source(error)) = form.write(&mut sink) {
            tracing::error!(image = %image.digest, err = %Chain(&error), "an image cannot be read");
            let _ = send.blocking_send(Err(error));
        }
    });
    let first = receive.recv().await.transpose()?;
    // from here on the answer can only break off
    let rest =
        ReceiverStream::new(receive).map(|piece| piece.map_err(|e| std::io::Error::other(Chain(&e).to_string())));
    let pieces = tokio_stream::iter(first.map(Ok)).chain(rest);
    let mut response = Body::from_stream(pieces).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/octet-stream"));
    headers.insert(DATA_HEADER, data.into());
    if let Some(len) = len {
        headers.insert(header::CONTENT_LENGTH, len.into());
    }
    Ok(response)
}

enum Form {
    Raw(Arc<dyn ReadAt>),
    Extents(Arc<dyn ReadAt>),
    Qcow2(Qcow2Writer),
}

impl Form {
    fn len(&self) -> Option<u64> {
        match self {
            Self::Raw(source) => Some(source.size().0),
            Self::Extents(_) => None,
            Self::Qcow2(writer) => Some(writer.file_len()),
        }
    }

    fn write(&self, sink: Sink<'_>) -> Result<(), Broken> {
        match self {
            Self::Raw(source) => raw(&**source, sink),
            Self::Extents(source) => extents(&**source, sink),
            Self::Qcow2(writer) => writer.write(sink),
        }
    }
}

fn raw(source: &dyn ReadAt, sink: Sink<'_>) -> Result<(), Broken> {
    let size = source.size().0;
    let mut piece = vec![0; PIECE.min(size) as usize];
    for at in (0..size).step_by(PIECE as usize) {
        let piece = &mut piece[..(size - at).min(PIECE) as usize];
        source.read_at(at, piece)?;
        sink(piece)?;
    }
    Ok(())
}

fn extents(source: &dyn ReadAt, sink: Sink<'_>) -> Result<(), Broken> {
    let size = source.size().0;
    let head = Extents::head(0, 0).len();
    let mut frame = Vec::new();
    let mut at = 0;
    while at < size {
        let mut spans = Vec::new();
        source.spans(at, size - at, &mut spans)?;
        if spans.iter().all(|span| span.len == 0) {
            spans = vec![Span { len: size - at, zero: false }];
        }
        for Span { len, zero } in spans {
            let end = at.saturating_add(len).min(size);
            while !zero && at < end {
                let len = (end - at).min(PIECE) as usize;
                frame.resize(head + len, 0);
                frame[..head].copy_from_slice(&Extents::head(at, len));
                source.read_at(at, &mut frame[head..])?;
                sink(&frame)?;
                at += len as u64;
            }
            at = end;
        }
    }
    sink(&Extents::head(size, 0))
}

#[cfg(test)]
mod tests {
    use muster_repository::{Repository, storage::MemoryStorage};

    use super::*;

    #[test]
    fn extents_and_raw_say_the_same_and_extents_leave_zeros_out() {
        let mut bytes = vec![0u8; (5 << 20) + 512];
        bytes[1 << 20..(3 << 20) + 70_000].fill(7);
        let last = bytes.len() - 1;
        bytes[last] = 9;
        let repository = Repository::open(Arc::new(MemoryStorage::new())).unwrap();
        let go = &mut |_| std::ops::ControlFlow::Continue(());
        let digest = repository.ingest(&bytes, &Default::default(), go).unwrap().digest;
        let reader: Arc<dyn ReadAt> = Arc::new(repository.reader(Arc::new(repository.manifest(&digest).unwrap())));
        let written = |form: Form| {
            let mut out = Vec::new();
            form.write(&mut |piece: &[u8]| {
                out.extend_from_slice(piece);
                Ok(())
            })
            .unwrap();
            assert!(form.len().is_none_or(|len| len == out.len() as u64));
            out
        };
        assert!(written(Form::Raw(reader.clone())) == bytes);
        let stream = written(Form::Extents(reader.clone()));
        assert!(stream.len() < 3 << 20, "{}", stream.len());
        let mut disk = vec![0; bytes.len()];
        let mut extents = Extents::default();
        extents
            .feed(&stream, &mut |at, piece| {
                disk[at as usize..at as usize + piece.len()].copy_from_slice(piece);
                Ok(())
            })
            .unwrap();
        assert_eq!(extents.finish().unwrap(), bytes.len() as u64);
        assert!(disk == bytes);
        assert!(written(Form::Qcow2(Qcow2Writer::new(reader).unwrap())).starts_with(b"QFI\xfb"));
    }
}
