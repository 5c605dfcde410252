//! Bodies of JSON with files in them.

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

/// The largest body, in bytes: all files of a new sandbox in base64, and everything else.
const LARGE_BODY_BYTES_MAX: usize = NEW_FILES_BYTES_MAX / 3 * 4 + BODY_BYTES_MAX;

/// The most values in a body. Each of them takes some hundred bytes of memory.
const VALUES_MAX: usize = 50_000;

/// A body, what is made of it, and its files' content are in memory together at no time: two of them are.
const COPIES: usize = 2;

/// A body of JSON that may be longer than others. What is longer takes memory of its user's part,
/// which is held as long as `part` is.
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

/// Sets memory aside for a body of `bytes`, unless it is as short as others.
fn reserve(part: &mut Part, bytes: usize) -> Result<(), ApiError> {
    if bytes <= BODY_BYTES_MAX || part.grow_to(COPIES * bytes) {
        return Ok(());
    }
    let message = "too many long requests and answers are under way";
    Err(ApiError::new(ErrorCode::Busy, message).hint(
        "try again later, or copy the files into the sandbox when it is there: bhatti file cp",
    ))
}

/// The whole body. One whose length was not announced takes memory as it comes.
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

/// Refuses a long body that is long for its many values rather than for its files: each takes far
/// more memory than its text.
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
    let message = format!("the body has {values} values; at most {VALUES_MAX} are taken");
    Err(ApiError::new(ErrorCode::BadRequest, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_and_what_is_text_is_not() {
        let many = format!("[{}]", "\"\",".repeat(VALUES_MAX));
        assert!(check_values(many.as_bytes()).is_err());
        let text = format!(r#"{{"content":"\\\"{}"}}"#, ",[{".repeat(VALUES_MAX));
        check_values(text.as_bytes()).unwrap();
    }
}
