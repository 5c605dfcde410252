//! JSON bodies of requests and of answers.

use std::time::Duration;

use axum::body::{Bytes, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use bhatti_api::ErrorCode;
use http_body_util::LengthLimitError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::status::ApiError;

/// The largest body, in bytes.
pub(crate) const BODY_BYTES_MAX: usize = 1 << 20;

/// How long a body may take to arrive, and how many bytes of its limit give it a second more.
const BODY_LIMIT: Duration = Duration::from_secs(30);
const BODY_BYTES_PER_SECOND: usize = 1 << 20;

/// A body of JSON; an empty one is `{}`.
pub(crate) struct ApiJson<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        check_announced(&request, BODY_BYTES_MAX)?;
        parse(&read(request, BODY_BYTES_MAX).await?).map(Self)
    }
}

/// The length that a request's body is announced to have, in bytes; `None` if it is not, or is no number.
pub(crate) fn announced(request: &Request) -> Option<u64> {
    request.headers().get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Refuses a body that is announced to be too large.
pub(crate) fn check_announced(request: &Request, limit: usize) -> Result<(), ApiError> {
    let fits = announced(request).is_none_or(|length| length <= limit as u64);
    if fits { Ok(()) } else { Err(too_large(limit)) }
}

/// A request's whole body, of `limit` bytes at most.
async fn read(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    let body = to_bytes(request.into_body(), limit);
    in_time(limit, async {
        body.await.map_err(|error| match error.into_inner().downcast::<LengthLimitError>() {
            Ok(_) => too_large(limit),
            Err(error) => not_arrived(&error),
        })
    })
    .await
}

/// Waits for a body of `limit` bytes at most as long as one may take.
pub(crate) async fn in_time<T>(
    limit: usize,
    body: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    let time = BODY_LIMIT + Duration::from_secs((limit / BODY_BYTES_PER_SECOND) as u64);
    let late = |_| {
        let message = format!("the body did not arrive within {} s", time.as_secs());
        ApiError::new(ErrorCode::BadRequest, message)
    };
    timeout(time, body).await.map_err(late)?
}

/// The error of a body that was not received whole.
pub(crate) fn not_arrived(error: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::BadRequest, format!("the body did not arrive: {error}"))
}

/// What a body of JSON says; an empty one is `{}`.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let json = if bytes.is_empty() { b"{}" } else { bytes };
    // The decoder would take an array for an object whose fields come without names.
    if json.iter().find(|byte| !byte.is_ascii_whitespace()).is_some_and(|first| *first != b'{') {
        return Err(ApiError::new(ErrorCode::BadRequest, "invalid json: expected an object"));
    }
    serde_json::from_slice(json)
        .map_err(|error| ApiError::new(ErrorCode::BadRequest, format!("invalid json: {error}")))
}

/// The error of a body of more than `limit` bytes.
pub(crate) fn too_large(limit: usize) -> ApiError {
    let message = format!("the body is larger than {limit} bytes");
    ApiError::new(ErrorCode::BodyTooLarge, message)
        .hint("send large input through a streamed command or a file upload")
}

/// An answer in JSON. Axum's own takes half as many instructions again, for each piece goes through a writer that is not inlined.
pub(crate) struct Json<T>(pub(crate) T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(json) => answer(json),
            Err(error) => ApiError::internal(&error).into_response(),
        }
    }
}

/// An answer that is an array, written element by element: of a long one no more is made than its text.
pub(crate) struct JsonArray {
    text: Vec<u8>,
    elements: usize,
}

impl Default for JsonArray {
    fn default() -> Self {
        Self { text: vec![b'['], elements: 0 }
    }
}

impl JsonArray {
    /// Adds an element that is JSON.
    pub(crate) fn push(&mut self, element: &[u8]) {
        if self.elements > 0 {
            self.text.push(b',');
        }
        self.elements += 1;
        self.text.extend_from_slice(element);
    }

    pub(crate) const fn len(&self) -> usize {
        self.elements
    }
}

impl IntoResponse for JsonArray {
    fn into_response(mut self) -> Response {
        self.text.push(b']');
        answer(self.text)
    }
}

fn answer(json: Vec<u8>) -> Response {
    ([(CONTENT_TYPE, "application/json")], json).into_response()
}
