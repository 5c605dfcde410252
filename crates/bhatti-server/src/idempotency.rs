//! `Idempotency-Key`: a client repeats a request that makes something, because the response was
//! lost, and gets the response to the first one.
//!
//! A request with a key is carried out even if its client leaves, so that its outcome is known to
//! the next attempt.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{MatchedPath, Request};
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use bhatti_api::ErrorCode;
use bhatti_edge::Permit;
use bhatti_store::{Repeated, StoredResponse};
use bhatti_types::UserId;
use http_body_util::BodyExt;
use parking_lot::Mutex;
use ring::digest::{Context, SHA256};
use serde::Deserialize;
use tracing::Instrument;
use utoipa::IntoParams;

use crate::AppState;
use crate::json::BODY_BYTES_MAX;
use crate::status::{ApiError, Made, made, repeat};

/// The header with the key.
const HEADER: HeaderName = HeaderName::from_static("idempotency-key");
/// The header of a response that is repeated.
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// Maximum length of a key, in bytes.
const KEY_BYTES_MAX: usize = 255;

/// Maximum size of a response, in bytes, and of one that is kept. A fork of many sandboxes lists
/// them all.
const RESPONSE_BYTES_MAX: usize = 64 << 20;
const KEPT_BYTES_MAX: usize = 64 << 10;

/// What is kept in place of a longer response.
const TOO_LONG: &str =
    r#"{"note":"the request was carried out; its response was too long to keep"}"#;

/// The route that starts jobs, and runs other commands.
const EXEC: &str = "/sandboxes/{sandbox}/exec";

/// The routes that make something, all of them with `POST`.
const ROUTES: [&str; 5] = [
    "/sandboxes",
    "/sandboxes/{sandbox}/fork",
    "/sandboxes/{sandbox}/checkpoint",
    EXEC,
    "/snapshots/{snapshot}/resume",
];

/// The header in the API's description.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "the header is read where the request is admitted")]
pub(crate) struct IdempotencyKey {
    /// If a request that makes something (a job, too) is repeated with this key, it is not carried
    /// out again, and gets the first response, for a day.
    #[param(rename = "Idempotency-Key")]
    key: Option<String>,
}

/// The keys whose requests are being carried out.
#[derive(Default)]
pub(crate) struct InFlight(Arc<Mutex<HashSet<(UserId, String)>>>);

/// A key in flight, until this is dropped.
struct Reserved {
    all: Arc<Mutex<HashSet<(UserId, String)>>>,
    key: (UserId, String),
}

impl InFlight {
    fn hold(&self, key: (UserId, String)) -> Option<Reserved> {
        let all = Arc::clone(&self.0);
        all.lock().insert(key.clone()).then(|| Reserved { all: Arc::clone(&all), key })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.all.lock().remove(&self.key);
    }
}

/// The key of a request, and who sent it.
pub(crate) struct Once {
    owner: UserId,
    key: String,
    /// A request of another API is another request.
    api: &'static str,
}

impl Once {
    /// Returns the key in a request's headers.
    pub(crate) fn of(
        owner: UserId,
        request: &Request,
        api: &'static str,
    ) -> Result<Option<Self>, ApiError> {
        let Some(key) = request.headers().get(HEADER) else { return Ok(None) };
        let key = key.to_str().unwrap_or_default();
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            let message =
                format!("`Idempotency-Key` must have 1 to {KEY_BYTES_MAX} visible characters");
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
        Ok(Some(Self { owner, key: key.to_owned(), api }))
    }

    fn hasher(&self, request: &Request) -> Context {
        let path = request.uri().path_and_query().map_or("", PathAndQuery::as_str);
        let mut hash = Context::new(&SHA256);
        hash.update(format!("{}{} {path}\n", self.api, request.method()).as_bytes());
        hash
    }

    /// Carries the request out, unless its key has a response already. It is carried out even if
    /// this is canceled.
    pub(crate) async fn run<F>(
        self,
        state: &AppState,
        request: Request,
        answer: impl FnOnce(Request) -> F + Send + 'static,
    ) -> Result<Response, ApiError>
    where
        F: Future<Output = Response> + Send,
    {
        let key = &self.key;
        let held = state.in_flight.hold((self.owner, key.clone())).ok_or_else(|| {
            let message = format!("a request with the idempotency key `{key}` is in progress");
            ApiError::new(ErrorCode::RequestInProgress, message).retry_after(Duration::from_secs(1))
        })?;
        match state.control.reserve_idempotency_key(self.owner, key, now())? {
            Repeated::New => {
                let state = state.clone();
                // The request counts as one of the user's for as long as it is carried out.
                let permit = request.extensions().get::<Arc<Permit>>().cloned();
                let work = async move {
                    let response = self.carry_out(&state, request, answer).await;
                    drop((permit, held));
                    response
                };
                let carried_out = tokio::spawn(work.in_current_span());
                carried_out
                    .await
                    .map_err(|_| ApiError::new(ErrorCode::Internal, "internal error"))?
            }
            Repeated::Reserved => Err(ApiError::new(
                ErrorCode::WrongState,
                format!("it is not known what the first request with the key `{key}` made"),
            )
            .hint("look whether the resource exists, and use a new key if it does not")),
            Repeated::Done(stored) => self.replay(request, stored).await,
        }
    }

    /// Answers the request, and keeps the response if it has made something.
    async fn carry_out<F: Future<Output = Response>>(
        &self,
        state: &AppState,
        request: Request,
        answer: impl FnOnce(Request) -> F,
    ) -> Result<Response, ApiError> {
        let Self { owner, key, .. } = self;
        let hash = Arc::new(Mutex::new(self.hasher(&request)));
        let hashed = Arc::clone(&hash);
        let request = request.map(|body| {
            Body::new(body.map_frame(move |frame| {
                if let Some(data) = frame.data_ref() {
                    hashed.lock().update(data);
                }
                frame
            }))
        });
        let response = answer(request).await;
        match made(&response) {
            Made::Something => {}
            Made::Nothing => {
                state.control.settle_idempotency_key(*owner, key, None)?;
                return Ok(response);
            }
            // The key stays reserved: a repeated request might make the thing twice.
            Made::Unknown => return Ok(response),
        }
        let status = response.status().as_u16();
        let (parts, body) = response.into_parts();
        let body = to_bytes(body, RESPONSE_BYTES_MAX).await;
        let body = body.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
        let request_hash = hash.lock().clone().finish();
        let request_hash =
            request_hash.as_ref().try_into().map_err(|error| ApiError::internal(&error))?;
        let stored = StoredResponse { request_hash, status, body: kept(&body) };
        state.control.settle_idempotency_key(*owner, key, Some(&stored))?;
        Ok(Response::from_parts(parts, Body::from(body)))
    }

    /// Returns the response to the first request, if this one is the same.
    async fn replay(&self, request: Request, stored: StoredResponse) -> Result<Response, ApiError> {
        let mut hash = self.hasher(&request);
        let mut body = request.into_body();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| ApiError::bad_request(&error))?;
            hash.update(frame.data_ref().map_or(&[][..], Bytes::as_ref));
        }
        if hash.finish().as_ref() != stored.request_hash {
            return Err(ApiError::new(
                ErrorCode::IdempotencyMismatch,
                "the idempotency key was used for another request",
            )
            .hint("use a new key for each request, and the same key only to repeat it"));
        }
        let mut response = repeat(stored.status, stored.body);
        response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
        Ok(response)
    }
}

/// Carries a request of the native API out. One that makes something and has a key is carried out
/// once.
pub(crate) async fn run(
    state: &AppState,
    owner: UserId,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let makes = *request.method() == Method::POST && route.is_some_and(|it| ROUTES.contains(&it));
    let once = if makes { Once::of(owner, &request, "")? } else { None };
    let Some(once) = once else { return Ok(next.run(request).await) };
    let (request, makes) = makes_something(request).await?;
    if !makes {
        return Ok(next.run(request).await);
    }
    once.run(state, request, |request| next.run(request)).await
}

/// Returns whether a request makes something that stays: a command makes nothing unless it is a
/// job. The body of a command is read for this.
async fn makes_something(request: Request) -> Result<(Request, bool), ApiError> {
    #[derive(Deserialize)]
    struct Command {
        #[serde(default)]
        detach: bool,
    }
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    if route != Some(EXEC) {
        return Ok((request, true));
    }
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, BODY_BYTES_MAX).await;
    let body = body.map_err(|error| ApiError::bad_request(&error))?;
    // The handler refuses a malformed body.
    let is_job = serde_json::from_slice(&body).is_ok_and(|Command { detach }| detach);
    Ok((Request::from_parts(parts, Body::from(body)), is_job))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Returns what is kept of a response.
fn kept(body: &[u8]) -> Vec<u8> {
    if body.len() > KEPT_BYTES_MAX { TOO_LONG.into() } else { body.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_response_is_kept_as_a_note() {
        let longest = vec![b' '; KEPT_BYTES_MAX];
        assert_eq!(kept(&longest), longest);
        let note: serde_json::Value =
            serde_json::from_slice(&kept(&[longest, vec![b' ']].concat())).unwrap();
        assert!(note["note"].as_str().unwrap().contains("was carried out"), "{note}");
    }
}
