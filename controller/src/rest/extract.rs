//! Reading requests and writing answers, with every mistake as a problem body.

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use muster_api::IDEMPOTENCY_KEY;
use muster_common::ErrorCode;
use serde::{Serialize, de::DeserializeOwned};

use super::{Caller, Shared};
use crate::{core::Core, db::StoredAnswer, refusal::Refusal};

/// What handlers answer.
pub type Answer = Result<Response, Refusal>;

/// Query parameters.
pub struct Params<T>(pub T);
impl<T: DeserializeOwned> FromRequestParts<Shared> for Params<T> {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, shared: &Shared) -> Result<Self, Refusal> {
        let Query(value) = Query::<T>::from_request_parts(parts, shared)
            .await
            .map_err(|rejection| Refusal::invalid(rejection.body_text()))?;
        Ok(Self(value))
    }
}

/// The one name in the path.
pub struct Name(pub String);
impl FromRequestParts<Shared> for Name {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, shared: &Shared) -> Result<Self, Refusal> {
        let Path(name) = Path::<String>::from_request_parts(parts, shared)
            .await
            .map_err(|rejection| Refusal::invalid(rejection.body_text()))?;
        Ok(Self(name))
    }
}

/// The version in `If-Match`, when there is one.
pub struct IfMatch(pub Option<u64>);
impl FromRequestParts<Shared> for IfMatch {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, _: &Shared) -> Result<Self, Refusal> {
        let Some(value) = parts.headers.get(header::IF_MATCH) else { return Ok(Self(None)) };
        let text = value.to_str().unwrap_or("");
        if text.trim() == "*" {
            return Ok(Self(None));
        }
        match text.trim().trim_matches('"').parse() {
            Ok(version) => Ok(Self(Some(version))),
            Err(_) => Err(Refusal::invalid(format!("If-Match is {text:?}: expected the ETag of the resource"))),
        }
    }
}

impl FromRequestParts<Shared> for Caller {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, _: &Shared) -> Result<Self, Refusal> {
        // the guard put it there
        let caller = parts.extensions.get::<Caller>().cloned();
        caller.ok_or_else(|| Refusal::new(ErrorCode::Internal, "the caller is not known"))
    }
}

/// A JSON body with all that makes a repetition of it known.
pub struct Post<T> {
    pub value: T,
    pub caller: Caller,
    key: Option<String>,
    /// Digest of method, path and body.
    request: String,
}

impl<T: DeserializeOwned> FromRequest<Shared> for Post<T> {
    type Rejection = Refusal;
    async fn from_request(request: Request, shared: &Shared) -> Result<Self, Refusal> {
        let (mut parts, body) = request.into_parts();
        let caller = Caller::from_request_parts(&mut parts, shared).await?;
        let key = idempotency_key(&parts.headers)?;
        // a web page cannot send this type without asking first (CORS), and nobody answers that
        let json = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).is_some_and(|value| {
            value.split(';').next().is_some_and(|t| t.trim().eq_ignore_ascii_case("application/json"))
        });
        if !json {
            return Err(Refusal::invalid("the body must be JSON: set Content-Type: application/json"));
        }
        let mut hash = blake3::Hasher::new();
        hash.update(parts.method.as_str().as_bytes())
            .update(b" ")
            .update(parts.uri.to_string().as_bytes())
            .update(b"\n");
        let bytes = Bytes::from_request(Request::from_parts(parts, body), shared)
            .await
            .map_err(|rejection| Refusal::invalid(rejection.body_text()))?;
        hash.update(&bytes);
        let value =
            serde_json::from_slice(&bytes).map_err(|error| Refusal::invalid(format!("read the body: {error}")))?;
        Ok(Self { value, caller, key, request: hash.finalize().to_hex().to_string() })
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Refusal> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    match value.to_str() {
        Ok(text) if (1..=200).contains(&text.len()) => Ok(Some(text.to_string())),
        _ => Err(Refusal::invalid("Idempotency-Key must be 1 to 200 visible ASCII characters")),
    }
}

impl<T: Send + 'static> Post<T> {
    /// Does it, or replays the answer that the same request under the same key had. The answer is stored in the same
    /// transaction as what it tells of.
    pub async fn once<A: Serialize + Send + 'static>(
        self,
        shared: &Shared,
        status: StatusCode,
        f: impl FnOnce(&mut Core, T, String) -> Result<A, Refusal> + Send + 'static,
    ) -> Answer {
        let Self { value, caller, key, request } = self;
        let answer = shared
            .core
            .call(move |core| {
                if let Some(key) = &key
                    && let Some(stored) = core.db.answer(key)?
                {
                    if stored.request != request {
                        return Err(Refusal::invalid("this Idempotency-Key was used for another request"));
                    }
                    return Ok(stored);
                }
                let body = serde_json::to_string(&f(core, value, caller.issuer())?)
                    .map_err(|error| Refusal::new(ErrorCode::Internal, format!("write the answer: {error}")))?;
                let answer = StoredAnswer { request, status: status.as_u16(), body };
                if let Some(key) = &key {
                    core.db.put_answer(key, &answer, core.now_us())?;
                }
                Ok(answer)
            })
            .await?;
        let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::OK);
        Ok((status, [(header::CONTENT_TYPE, "application/json")], answer.body).into_response())
    }
}

/// A value as JSON.
pub fn json<T: Serialize>(value: T) -> Answer {
    Ok(axum::Json(value).into_response())
}

/// A value as JSON with its resource version as ETag.
pub fn versioned<T: Serialize>(value: T, version: u64) -> Answer {
    let mut response = axum::Json(value).into_response();
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{version}\"")) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    Ok(response)
}

/// Done, and there is nothing to say.
pub fn nothing() -> Answer {
    Ok(StatusCode::NO_CONTENT.into_response())
}
