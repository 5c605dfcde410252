//! JSON bodies that contain files.

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use bhatti_api::ErrorCode;
use bhatti_types::NEW_FILES_BYTES_MAX;
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use crate::AppState;
use crate::answers::Part;
use crate::auth::Caller;
use crate::json::{
    BODY_BYTES_MAX, announced, check_announced, in_time, not_arrived, parse, too_large,
};
use crate::status::ApiError;

/// Maximum size of a body, in bytes: all files of a new sandbox in base64, and everything else.
const LARGE_BODY_BYTES_MAX: usize = NEW_FILES_BYTES_MAX / 3 * 4 + BODY_BYTES_MAX;

/// Maximum number of values in a body. Each of them takes some hundred bytes of memory.
const VALUES_MAX: usize = 50_000;

/// Number of copies of a body that memory is reserved for. Of the body, the parsed request and
/// the decoded files, at most two are in memory at once.
const COPIES: usize = 2;

/// A JSON body that may be larger than others. A larger body takes memory from its user's budget,
/// for as long as `part` is held.
pub(crate) struct LargeJson<T> {
    pub(crate) value: T,
    pub(crate) part: Part,
}

impl<T: DeserializeOwned> FromRequest<AppState> for LargeJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let Some(Caller(user)) = request.extensions().get::<Caller>().copied() else {
            return Err(ApiError::new(
                ErrorCode::Unauthorized,
                "the request has no authenticated user",
            ));
        };
        check_announced(&request, LARGE_BODY_BYTES_MAX)?;
        let mut part = state.answers.part(user);
        let announced = announced(&request).and_then(|length| usize::try_from(length).ok());
        reserve(&mut part, announced.unwrap_or(0))?;
        let received = receive(request.into_body(), announced.unwrap_or(0), &mut part);
        let bytes = in_time(LARGE_BODY_BYTES_MAX, received).await?;
        check_values(&bytes)?;
        Ok(Self { value: parse(&bytes)?, part })
    }
}

/// Reserves memory for a body of `bytes`, unless the body fits the limit of ordinary bodies.
fn reserve(part: &mut Part, bytes: usize) -> Result<(), ApiError> {
    if bytes <= BODY_BYTES_MAX || part.grow_to(COPIES * bytes) {
        return Ok(());
    }
    let message = "the memory for large requests and responses is in use";
    Err(ApiError::new(ErrorCode::Busy, message)
        .hint("try again later, or create the sandbox without files and copy them: bhatti cp"))
}

/// Receives the whole body. If its length was not announced, memory is reserved as the body
/// arrives.
async fn receive(mut body: Body, announced: usize, part: &mut Part) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::with_capacity(announced);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| not_arrived(&error))?;
        let Some(data) = frame.data_ref() else { continue };
        let length = bytes.len() + data.len();
        if length > LARGE_BODY_BYTES_MAX {
            return Err(too_large(LARGE_BODY_BYTES_MAX));
        }
        reserve(part, length)?;
        bytes.extend_from_slice(data);
    }
    Ok(bytes)
}

/// Refuses a body with too many values, because each value takes far more memory than its text. A
/// body may be large because of its files, but not because of its values.
fn check_values(json: &[u8]) -> Result<(), ApiError> {
    let (mut values, mut in_string, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    if values <= VALUES_MAX {
        return Ok(());
    }
    let message = format!("the body has {values} values; the maximum is {VALUES_MAX}");
    Err(ApiError::new(ErrorCode::BadRequest, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_only_outside_of_strings() {
        let many = format!("[{}]", "\"\",".repeat(VALUES_MAX));
        assert!(check_values(many.as_bytes()).is_err());
        let text = format!(r#"{{"content":"\\\"{}"}}"#, ",[{".repeat(VALUES_MAX));
        check_values(text.as_bytes()).unwrap();
    }
}
