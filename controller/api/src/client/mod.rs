//! The typed client. One method for each operation; every error has a code.
//!
//! Cheap to clone; dropping a future cancels the request, whether or not the controller has acted on it: repeat a POST
//! with the same idempotency key to find out.

mod calls;
mod extents;
mod stream;

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use muster_common::ErrorCode;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde::{Serialize, de::DeserializeOwned};

pub use extents::{ExtentError, Extents};
pub use reqwest::Upgraded;
pub use stream::{Download, Events, Upload};

use crate::{IDEMPOTENCY_KEY, PROBLEM_JSON, Problem};

/// Where a controller listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Unix(PathBuf),
    /// Base URL, `http://127.0.0.1:7700`.
    Http(String),
}

impl FromStr for Endpoint {
    type Err = ClientError;
    /// `unix:/path`, `/path` or `http://host:port`.
    fn from_str(text: &str) -> Result<Self, ClientError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(PathBuf::from(path.strip_prefix("//").unwrap_or(path))));
        }
        if text.starts_with('/') {
            return Ok(Self::Unix(PathBuf::from(text)));
        }
        if text.starts_with("http://") && Url::parse(text).is_ok() {
            return Ok(Self::Http(text.trim_end_matches('/').to_string()));
        }
        Err(ClientError::InvalidEndpoint { text: text.to_string() })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Http(url) => f.write_str(url),
        }
    }
}

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The controller said no.
    #[error("{}", .0.detail)]
    Problem(Box<Problem>),
    #[error("{text:?} is not a controller's address: write /path/of/socket or http://host:port")]
    InvalidEndpoint { text: String },
    #[error("reach the controller at {endpoint}")]
    Connect {
        endpoint: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("{method} {path} at {endpoint}")]
    Transport {
        method: String,
        path: String,
        endpoint: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("read the answer to {method} {path}")]
    Decode {
        method: String,
        path: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("{endpoint} answered {status} without a problem body: is it a Muster controller?")]
    NotOurs { endpoint: String, status: u16 },
    #[error("build the HTTP client")]
    Build {
        #[source]
        source: reqwest::Error,
    },
    #[error("read {what}")]
    Read {
        what: String,
        #[source]
        source: std::io::Error,
    },
    /// The stream ended before its last event.
    #[error("the event stream ended early")]
    StreamEnded,
}

impl ClientError {
    /// The stable code: the controller's own, or what stands for not having reached it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Problem(problem) => ErrorCode::from_text(&problem.code).unwrap_or(ErrorCode::Internal),
            Self::InvalidEndpoint { .. } => ErrorCode::InvalidArgument,
            Self::Connect { .. } | Self::NotOurs { .. } | Self::StreamEnded => ErrorCode::Unavailable,
            Self::Transport { source, .. } if source.is_timeout() => ErrorCode::Timeout,
            Self::Transport { .. } => ErrorCode::Unavailable,
            Self::Read { .. } => ErrorCode::Io,
            Self::Decode { .. } | Self::Build { .. } => ErrorCode::Internal,
        }
    }
    /// The controller's problem, when it sent one.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem(problem) => Some(problem),
            _ => None,
        }
    }
}

/// Requests that are not streams end within this.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to a controller.
#[derive(Clone)]
pub struct Client {
    endpoint: Endpoint,
    base: String,
    http: reqwest::Client,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Client {
    /// Prepares a client; nothing is sent yet.
    ///
    /// # Errors
    /// When the HTTP client cannot be built.
    pub fn connect(endpoint: Endpoint) -> Result<Self, ClientError> {
        let builder = reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).no_proxy();
        let (builder, base) = match &endpoint {
            Endpoint::Unix(path) => (builder.unix_socket(path.as_path()), "http://localhost".to_string()),
            Endpoint::Http(url) => (builder, url.clone()),
        };
        let http = builder.build().map_err(|source| ClientError::Build { source })?;
        Ok(Self { endpoint, base, http })
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn request(&self, method: Method, path: &str) -> Request<'_> {
        let builder = self.http.request(method.clone(), format!("{}/v1{path}", self.base));
        Request { client: self, builder, method, path: path.to_string(), streaming: false }
    }
    fn get(&self, path: &str) -> Request<'_> {
        self.request(Method::GET, path)
    }
    fn post(&self, path: &str) -> Request<'_> {
        self.request(Method::POST, path)
    }
}

/// One path segment, percent-encoded: a group's path is one segment of a URL.
fn segment(text: &str) -> String {
    use fmt::Write;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~@".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // writing to a String cannot fail
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

struct Request<'a> {
    client: &'a Client,
    builder: RequestBuilder,
    method: Method,
    path: String,
    streaming: bool,
}

impl Request<'_> {
    fn query<T: Serialize + ?Sized>(mut self, query: &T) -> Self {
        self.builder = self.builder.query(query);
        self
    }
    fn json<T: Serialize + ?Sized>(mut self, body: &T) -> Self {
        self.builder = self.builder.json(body);
        self
    }
    fn header(mut self, name: &str, value: &str) -> Self {
        self.builder = self.builder.header(name, value);
        self
    }
    fn body(mut self, body: reqwest::Body) -> Self {
        self.builder = self.builder.body(body);
        self
    }
    fn if_match(self, version: Option<u64>) -> Self {
        match version {
            Some(version) => self.header("if-match", &format!("\"{version}\"")),
            None => self,
        }
    }
    fn idempotent(self, key: Option<&str>) -> Self {
        match key {
            Some(key) => self.header(IDEMPOTENCY_KEY, key),
            None => self,
        }
    }
    /// Lasts as long as it lasts.
    fn streaming(mut self) -> Self {
        self.streaming = true;
        self
    }

    async fn send(self) -> Result<Response, ClientError> {
        let endpoint = self.client.endpoint.to_string();
        let builder = if self.streaming { self.builder } else { self.builder.timeout(ANSWER_TIMEOUT) };
        let response = builder.send().await.map_err(|source| {
            if source.is_connect() {
                ClientError::Connect { endpoint: endpoint.clone(), source }
            } else {
                ClientError::Transport {
                    method: self.method.to_string(),
                    path: self.path.clone(),
                    endpoint: endpoint.clone(),
                    source,
                }
            }
        })?;
        let status = response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let ours = response
            .headers()
            .get("content-type")
            .and_then(|v| v.to_str().ok())
            .is_some_and(|v| v.starts_with(PROBLEM_JSON));
        if ours
            && let Ok(bytes) = response.bytes().await
            && let Ok(problem) = serde_json::from_slice::<Problem>(&bytes)
        {
            return Err(ClientError::Problem(Box::new(problem)));
        }
        Err(ClientError::NotOurs { endpoint, status: status.as_u16() })
    }

    async fn read<T: DeserializeOwned>(self) -> Result<T, ClientError> {
        let (method, path) = (self.method.to_string(), self.path.clone());
        let bytes = self.bytes().await?;
        serde_json::from_slice(&bytes).map_err(|source| ClientError::Decode { method, path, source })
    }

    async fn bytes(self) -> Result<bytes::Bytes, ClientError> {
        let (method, path, endpoint) = (self.method.to_string(), self.path.clone(), self.client.endpoint.to_string());
        let response = self.send().await?;
        response.bytes().await.map_err(|source| ClientError::Transport { method, path, endpoint, source })
    }

    async fn done(self) -> Result<(), ClientError> {
        self.send().await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_from_text() {
        assert_eq!("/run/m.sock".parse::<Endpoint>().unwrap(), Endpoint::Unix("/run/m.sock".into()));
        assert_eq!("unix:/run/m.sock".parse::<Endpoint>().unwrap(), Endpoint::Unix("/run/m.sock".into()));
        assert_eq!("unix:///run/m.sock".parse::<Endpoint>().unwrap(), Endpoint::Unix("/run/m.sock".into()));
        assert_eq!(
            "http://127.0.0.1:7700/".parse::<Endpoint>().unwrap(),
            Endpoint::Http("http://127.0.0.1:7700".into())
        );
        assert_eq!("7700".parse::<Endpoint>().unwrap_err().code(), ErrorCode::InvalidArgument);
    }

    #[test]
    fn a_group_path_is_one_segment() {
        assert_eq!(segment("school/lab1"), "school%2Flab1");
        assert_eq!(segment("debian@2"), "debian@2");
    }
}
