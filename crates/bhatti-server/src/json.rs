//! JSON bodies of requests and of answers.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use bhatti_api::ErrorCode;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::status::ApiError;

/// The largest body, in bytes.
pub(crate) const BODY_BYTES_MAX: usize = 1 << 20;

/// How long a body may take to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(30);

/// A body of JSON; an empty one is `{}`.
pub(crate) struct ApiJson<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let too_large = || {
            ApiError::new(
                ErrorCode::BodyTooLarge,
                format!("the body is larger than {BODY_BYTES_MAX} bytes"),
            )
            .hint("send large input through a streamed command or a file upload")
        };
        let announced = request
            .headers()
            .get(CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        if announced.is_some_and(|length: u64| length > BODY_BYTES_MAX as u64) {
            return Err(too_large());
        }
        // The router's body limit cuts off what was not announced.
        let bytes = timeout(BODY_LIMIT, Bytes::from_request(request, state)).await;
        let late = |_| {
            let seconds = BODY_LIMIT.as_secs();
            let message = format!("the body did not arrive within {seconds} s");
            ApiError::new(ErrorCode::BadRequest, message)
        };
        let bytes = bytes.map_err(late)?.map_err(|_| too_large())?;
        let json = if bytes.is_empty() { b"{}" } else { &bytes[..] };
        // The decoder would take an array for an object whose fields come without names.
        if json.iter().find(|byte| !byte.is_ascii_whitespace()).is_some_and(|first| *first != b'{')
        {
            return Err(ApiError::new(ErrorCode::BadRequest, "invalid json: expected an object"));
        }
        serde_json::from_slice(json)
            .map(Self)
            .map_err(|error| ApiError::new(ErrorCode::BadRequest, format!("invalid json: {error}")))
    }
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
