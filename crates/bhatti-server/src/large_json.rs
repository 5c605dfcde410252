//! Bodies of JSON with files in them.

use axum::extract::{FromRequest, Request};
use bhatti_api::ErrorCode;
use bhatti_types::NEW_FILES_BYTES_MAX;
use serde::de::DeserializeOwned;

use crate::AppState;
use crate::answers::Part;
use crate::auth::Caller;
use crate::json::{BODY_BYTES_MAX, announced, check_announced, parse, read};
use crate::status::ApiError;

/// The largest body, in bytes: all files of a new sandbox in base64, and everything else.
const LARGE_BODY_BYTES_MAX: usize = NEW_FILES_BYTES_MAX / 3 * 4 + BODY_BYTES_MAX;

/// A body, what is made of it, and its files' content are in memory together at no time: two of them are.
const COPIES: usize = 2;

/// A body of JSON that may be longer than others. What is longer takes memory of its user's part, which is held as long as `part` is.
pub(crate) struct LargeJson<T> {
    pub(crate) value: T,
    pub(crate) part: Part,
}

impl<T: DeserializeOwned> FromRequest<AppState> for LargeJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let Some(Caller(user)) = request.extensions().get::<Caller>().copied() else {
            return Err(ApiError::new(ErrorCode::Unauthorized, "nobody is known to ask this"));
        };
        check_announced(&request, LARGE_BODY_BYTES_MAX)?;
        let length = announced(&request).and_then(|length| usize::try_from(length).ok());
        let limit = length.unwrap_or(LARGE_BODY_BYTES_MAX).max(BODY_BYTES_MAX);
        let mut part = state.answers.part(user);
        if limit > BODY_BYTES_MAX && !part.grow_to(COPIES * limit) {
            let message = "too many long requests and answers are under way";
            return Err(ApiError::new(ErrorCode::Busy, message)
                .hint("try again later, or copy the files into the sandbox when it is there"));
        }
        let bytes = read(request, limit).await?;
        Ok(Self { value: parse(&bytes)?, part })
    }
}
