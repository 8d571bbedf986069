//! Bodies that flow: uploads, and server-sent events (WHATWG HTML, section 9.2).

use std::{collections::VecDeque, path::Path};

use bytes::Bytes;
use futures_util::StreamExt;
use reqwest::Response;
use serde::de::DeserializeOwned;
use tokio_util::io::ReaderStream;

use super::ClientError;

/// Bytes to send.
pub struct Upload {
    pub(super) body: reqwest::Body,
    len: Option<u64>,
}

impl Upload {
    /// A file, streamed. Holes are sent as zeros.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub async fn file(path: &Path) -> Result<Self, ClientError> {
        Self::file_with_progress(path, |_| ()).await
    }

    /// As [`Self::file`]; `progress` is told the bytes sent so far.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub async fn file_with_progress(
        path: &Path,
        progress: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<Self, ClientError> {
        let read = |source| ClientError::Read { what: path.display().to_string(), source };
        let file = tokio::fs::File::open(path).await.map_err(read)?;
        let len = file.metadata().await.map_err(read)?.len();
        let mut sent = 0;
        // 256 KiB: fewer system calls than the default of 4 KiB, still small against a socket buffer
        let stream = ReaderStream::with_capacity(file, 256 << 10).map(move |chunk| {
            if let Ok(bytes) = &chunk {
                sent += bytes.len() as u64;
                progress(sent);
            }
            chunk
        });
        Ok(Self { body: reqwest::Body::wrap_stream(stream), len: Some(len) })
    }

    pub fn bytes(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self { len: Some(bytes.len() as u64), body: bytes.into() }
    }

    /// How many bytes there are, when that is known.
    pub fn len(&self) -> Option<u64> {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == Some(0)
    }
}

/// Bytes that come.
pub struct Download {
    response: Response,
    data: Option<u64>,
    what: String,
}

impl Download {
    pub(super) fn new(response: Response, what: String) -> Self {
        let data = response.headers().get(crate::DATA_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
        Self { response, data, what }
    }

    /// How many bytes there are, when the answer says so.
    pub fn len(&self) -> Option<u64> {
        self.response.content_length()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// Bytes of data in an exported image.
    pub fn data_bytes(&self) -> Option<u64> {
        self.data
    }

    /// The next bytes; `None` at the end. Cancel-safe.
    ///
    /// # Errors
    /// When the answer breaks off: what came before is not whole then.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        self.response.chunk().await.map_err(|source| ClientError::Transport {
            method: "GET".into(),
            path: self.what.clone(),
            endpoint: "the controller".into(),
            source,
        })
    }
}

/// Server-sent events, each a `T` in JSON.
pub struct Events<T> {
    response: Response,
    buffer: Vec<u8>,
    data: String,
    ready: VecDeque<String>,
    kind: std::marker::PhantomData<fn() -> T>,
}

/// A line of an event stream longer than this is not ours (a whole command of 1,000 members is below 1 MiB).
const LINE_LIMIT: usize = 64 << 20;

impl<T: DeserializeOwned> Events<T> {
    pub(super) fn new(response: Response) -> Self {
        Self {
            response,
            buffer: Vec::new(),
            data: String::new(),
            ready: VecDeque::new(),
            kind: std::marker::PhantomData,
        }
    }

    /// The next event; `None` when the controller has ended the stream. Cancel-safe.
    ///
    /// # Errors
    /// When the connection breaks or an event cannot be read.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        let transport = |source| ClientError::Transport {
            method: "GET".into(),
            path: "events".into(),
            endpoint: "the controller".into(),
            source,
        };
        loop {
            if let Some(text) = self.ready.pop_front() {
                return serde_json::from_str(&text).map(Some).map_err(|source| ClientError::Decode {
                    method: "GET".into(),
                    path: "events".into(),
                    source,
                });
            }
            let Some(chunk) = self.response.chunk().await.map_err(transport)? else { return Ok(None) };
            self.feed(&chunk);
            if self.buffer.len() + self.data.len() > LINE_LIMIT {
                return Err(ClientError::StreamEnded);
            }
        }
    }

    fn feed(&mut self, chunk: &[u8]) {
        feed(&mut self.buffer, &mut self.data, &mut self.ready, chunk);
    }
}

fn feed(buffer: &mut Vec<u8>, data: &mut String, ready: &mut VecDeque<String>, chunk: &[u8]) {
    buffer.extend_from_slice(chunk);
    let mut start = 0;
    while let Some(length) = buffer[start..].iter().position(|b| *b == b'\n') {
        let line = &buffer[start..start + length];
        let line = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line)).into_owned();
        start += length + 1;
        if line.is_empty() {
            if !data.is_empty() {
                ready.push_back(std::mem::take(data));
            }
        } else if let Some(text) = line.strip_prefix("data:") {
            if !data.is_empty() {
                data.push('\n');
            }
            data.push_str(text.strip_prefix(' ').unwrap_or(text));
        }
        // comments (":"), ids and event names carry nothing we need
    }
    buffer.drain(..start);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_cut_wherever_the_network_cuts_them() {
        let text = b": hello\nevent: x\ndata: {\"a\":\ndata: 1}\n\ndata: 2\r\n\r\ndata: 3\n";
        for cut in 0..text.len() {
            let (mut buffer, mut data, mut ready) = (Vec::new(), String::new(), VecDeque::new());
            feed(&mut buffer, &mut data, &mut ready, &text[..cut]);
            feed(&mut buffer, &mut data, &mut ready, &text[cut..]);
            assert_eq!(ready, ["{\"a\":\n1}", "2"]);
        }
    }
}
