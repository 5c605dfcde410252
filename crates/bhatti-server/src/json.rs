//! JSON bodies of requests and responses.

use std::time::Duration;

use axum::body::{Bytes, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use bhatti_api::ErrorCode;
use http_body_util::LengthLimitError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::timeout;

use crate::status::ApiError;

/// Maximum size of a body, in bytes.
pub(crate) const BODY_BYTES_MAX: usize = 1 << 20;

/// Time limit for a body to arrive. Each `BODY_BYTES_PER_SECOND` bytes of the body's size limit
/// add a second.
const BODY_LIMIT: Duration = Duration::from_secs(30);
const BODY_BYTES_PER_SECOND: usize = 1 << 20;

/// A JSON body. An empty body counts as `{}`.
pub(crate) struct ApiJson<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        check_announced(&request, BODY_BYTES_MAX)?;
        parse(&read(request, BODY_BYTES_MAX).await?).map(Self)
    }
}

/// Returns the announced length of a request's body, in bytes; `None` if the request has no valid
/// `Content-Length`.
pub(crate) fn announced(request: &Request) -> Option<u64> {
    request.headers().get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Refuses a body whose announced length exceeds `limit`.
pub(crate) fn check_announced(request: &Request, limit: usize) -> Result<(), ApiError> {
    let fits = announced(request).is_none_or(|length| length <= limit as u64);
    if fits { Ok(()) } else { Err(too_large(limit)) }
}

/// Reads a request's whole body, of at most `limit` bytes.
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

/// Waits for a body of at most `limit` bytes, within the time limit for such a body.
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

/// Returns the error for a body that did not arrive completely.
pub(crate) fn not_arrived(error: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::BadRequest, format!("the body did not arrive: {error}"))
}

/// Parses a JSON body. An empty body counts as `{}`.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let json = if bytes.is_empty() { b"{}" } else { bytes };
    // Serde would accept an array in place of an object, as field values without names.
    if json.iter().find(|byte| !byte.is_ascii_whitespace()).is_some_and(|first| *first != b'{') {
        return Err(ApiError::new(ErrorCode::BadRequest, "invalid json: expected an object"));
    }
    serde_json::from_slice(json).or_else(|error| {
        let refused = || ApiError::new(ErrorCode::BadRequest, format!("invalid json: {error}"));
        // As values, a body takes many times its size, so long bodies are not read a second time.
        if json.len() > BODY_BYTES_MAX {
            return Err(refused());
        }
        let mut value = serde_json::from_slice(json).map_err(|_| refused())?;
        make_integers(&mut value);
        serde_json::from_value(value).map_err(|_| refused())
    })
}

/// Replaces numbers such as `2.0` by integers: JSON does not tell them apart, and some clients
/// write all numbers so.
fn make_integers(value: &mut Value) {
    match value {
        Value::Array(elements) => elements.iter_mut().for_each(make_integers),
        Value::Object(fields) => fields.values_mut().for_each(make_integers),
        Value::Number(number) => {
            let text = number.to_string();
            let whole = text.strip_suffix(".0").and_then(|whole| whole.parse::<i64>().ok());
            if let Some(whole) = whole {
                *number = whole.into();
            }
        }
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// Returns the error for a body of more than `limit` bytes.
pub(crate) fn too_large(limit: usize) -> ApiError {
    let message = format!("the body is larger than {limit} bytes");
    ApiError::new(ErrorCode::BodyTooLarge, message)
        .hint("send large input through a streamed command or a file upload")
}

/// A JSON response. Axum's own type takes half as many instructions again, because each piece
/// goes through a writer that is not inlined.
pub(crate) struct Json<T>(pub(crate) T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(json) => answer(json),
            Err(error) => ApiError::internal(&error).into_response(),
        }
    }
}

/// A response that is a JSON array, written element by element. Of a long list, only the text is
/// in memory as a whole.
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
    /// Appends an element that is already JSON.
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

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[test]
    fn whole_number_is_an_integer_in_any_notation() {
        #[derive(Debug, Deserialize)]
        struct Body {
            numbers: Vec<u32>,
        }
        let numbers = |json: &str| parse::<Body>(json.as_bytes()).map(|body| body.numbers);
        assert_eq!(numbers(r#"{"numbers":[1,2.0]}"#).unwrap(), [1, 2]);
        let long = format!(r#"{{"numbers":[2.0{}]}}"#, ",1".repeat(BODY_BYTES_MAX / 2));
        assert!(numbers(&long).is_err(), "a long body was read a second time");
        for json in [r#"{"numbers":[2.5]}"#, r#"{"numbers":[-1.0]}"#, r#"{"numbers":["2.0"]}"#] {
            let error = numbers(json).unwrap_err();
            assert!(error.message.starts_with("invalid json: invalid"), "{}", error.message);
        }
    }
}
