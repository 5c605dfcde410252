//! Extractors of path and query parameters, and their errors.

use std::fmt::Display;
use std::str::FromStr;

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;
use bhatti_api::ErrorCode;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};

use crate::status::ApiError;

/// Parameters of a path, decoded once.
pub(crate) struct ApiPath<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for ApiPath<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::from_request_parts(parts, state).await;
        path.map(|Path(value)| Self(value)).map_err(|error| ApiError::bad_request(&error))
    }
}

/// Parameters of a query. Unknown parameters are refused.
pub(crate) struct ApiQuery<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for ApiQuery<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parse_query(parts.uri.query()).map(Self)
    }
}

fn parse_query<T: DeserializeOwned>(query: Option<&str>) -> Result<T, ApiError> {
    serde_html_form::from_str(query.unwrap_or_default())
        .map_err(|error| ApiError::new(ErrorCode::BadRequest, format!("invalid query: {error}")))
}

/// Deserializes a number of a query. By default, an empty value counts as none.
pub(crate) fn number<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: Display>,
{
    let text = String::deserialize(deserializer)?;
    let number = text.parse().map_err(|error| D::Error::custom(format!("`{text}`: {error}")))?;
    Ok(Some(number))
}

/// Returns whether a request accepts a response of the media type `wanted`.
pub(crate) fn accepts(headers: &axum::http::HeaderMap, wanted: &str) -> bool {
    let accept = headers.get(axum::http::header::ACCEPT).and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| {
        accept
            .split(',')
            .any(|kind| kind.split(';').next().is_some_and(|kind| kind.trim() == wanted))
    })
}
