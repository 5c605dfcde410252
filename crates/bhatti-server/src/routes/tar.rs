//! `/sandboxes/{sandbox}/tar`: directories as tar archives, which the guest agent reads and
//! writes.

use std::io;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{CONTENT_TYPE, TE, TRAILER};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use bhatti_agent::{ArchiveContent, ArchiveUpload, CallError};
use bhatti_api::{ARCHIVE_OUTCOME, ArchiveOutcome, ErrorCode, Unpacked};
use bhatti_node::SandboxUse;
use futures_util::{StreamExt, stream};
use http_body_util::StreamBody;
use hyper::body::Frame;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::AppState;
use crate::auth::Caller;
use crate::extract::{ApiPath, ApiQuery};
use crate::json::Json;
use crate::status::{ApiError, file_error};

/// Maximum length of an archive's trailer, in bytes. Names that do not fit are left out.
const OUTCOME_BYTES_MAX: usize = 8192;

/// Maximum length of an error's text in the trailer, in characters.
const ERROR_CHARS_MAX: usize = 500;

/// Selects a directory.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct TarQuery {
    /// Path of the directory in the sandbox.
    #[param(min_length = 1, max_length = 4096)]
    path: String,
    /// User to act as: a name, a number or `UID:GID` (default: the sandbox's usual user).
    user: Option<String>,
}

/// Downloads a directory as a tar archive.
///
/// Names in the archive are relative to the directory. Sockets, pipes and devices are left out.
/// With `TE: trailers`, the trailer `X-Archive-Outcome` names them.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/tar", tag = "files", params(("sandbox" = String, Path), TarQuery),
    responses((status = 200, body = Vec<u8>, content_type = "application/x-tar"), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn download(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiQuery(TarQuery { path, user }): ApiQuery<TarQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    let agent = used.agent.acting_as(user.as_deref());
    let mut content = agent.read_archive(&path).await.map_err(file_error)?;
    // If the directory is missing, or something in it is unreadable, the response is a proper
    // error.
    let first = content.next().await.map_err(file_error)?.unwrap_or_default();
    let outcome = if takes_trailers(&headers) { Outcome::Trailer } else { Outcome::Cut };
    let archive = Archive { content, outcome, _used: used };
    let rest = stream::unfold(Some(archive), |archive| async move { archive?.next().await });
    let body = stream::iter([Ok(Frame::data(first))]).chain(rest);
    let mut response = Body::new(StreamBody::new(body)).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-tar"));
    if outcome == Outcome::Trailer {
        headers.insert(TRAILER, HeaderValue::from_static(ARCHIVE_OUTCOME));
    }
    Ok(response)
}

fn takes_trailers(headers: &HeaderMap) -> bool {
    let mut accepted = headers.get_all(TE).iter().filter_map(|value| value.to_str().ok());
    accepted.any(|value| value.split(',').any(|part| part.trim() == "trailers"))
}

/// How the response reports the end of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Trailer,
    /// An incomplete archive breaks off.
    Cut,
}

/// An archive that is being downloaded.
struct Archive {
    content: ArchiveContent,
    outcome: Outcome,
    _used: SandboxUse,
}

impl Archive {
    /// Returns the next piece of the response; `None` after the last.
    async fn next(mut self) -> Option<(io::Result<Frame<Bytes>>, Option<Self>)> {
        let error = match self.content.next().await {
            Ok(Some(bytes)) => return Some((Ok(Frame::data(bytes)), Some(self))),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        match (self.outcome, error) {
            (Outcome::Trailer, error) => {
                let trailer = trailer(self.content.skipped(), error.as_ref());
                Some((Ok(Frame::trailers(trailer)), None))
            }
            (Outcome::Cut, Some(error)) => Some((Err(io::Error::other(error)), None)),
            (Outcome::Cut, None) => None,
        }
    }
}

fn trailer(skipped: &[String], error: Option<&CallError>) -> HeaderMap {
    let error = error.map(|error| error.to_string().chars().take(ERROR_CHARS_MAX).collect());
    let mut outcome = ArchiveOutcome { skipped: Vec::new(), error };
    let mut room = OUTCOME_BYTES_MAX / 12;
    for name in skipped {
        // A character takes at most twelve bytes.
        let Some(left) = room.checked_sub(name.chars().count() + 1) else { break };
        room = left;
        outcome.skipped.push(name.clone());
    }
    let json = serde_json::to_string(&outcome).unwrap_or_default();
    let mut ascii = String::new();
    for unit in json.encode_utf16() {
        match u8::try_from(unit) {
            Ok(byte) if byte.is_ascii() => ascii.push(char::from(byte)),
            _ => ascii.push_str(&format!("\\u{unit:04x}")),
        }
    }
    let name = HeaderName::from_static(ARCHIVE_OUTCOME);
    HeaderValue::try_from(ascii)
        .map(|value| HeaderMap::from_iter([(name, value)]))
        .unwrap_or_default()
}

/// Unpacks a tar archive into a directory.
///
/// The directory is created if it does not exist. Pipes and devices are left out. Existing
/// directories keep their owner and permission bits, and existing files their owner and extended
/// attributes.
#[utoipa::path(put, path = "/sandboxes/{sandbox}/tar", tag = "files", params(("sandbox" = String, Path), TarQuery),
    request_body(content = Vec<u8>, content_type = "application/x-tar"),
    responses((status = 200, body = Unpacked), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn upload(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiQuery(TarQuery { path, user }): ApiQuery<TarQuery>,
    body: Body,
) -> Result<Json<Unpacked>, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    let agent = used.agent.acting_as(user.as_deref());
    let mut upload = agent.write_archive(&path).await.map_err(file_error)?;
    send(&mut upload, body).await?;
    let skipped = upload.finish().await.map_err(file_error)?;
    Ok(Json(Unpacked { status: "ok".to_owned(), skipped }))
}

/// Sends the archive as far as the guest accepts it. A guest that accepts no more has read enough
/// or has failed, and reports which at the end.
async fn send(upload: &mut ArchiveUpload, body: Body) -> Result<(), ApiError> {
    let mut content = body.into_data_stream();
    while let Some(piece) = content.next().await {
        let piece = piece.map_err(|_| {
            ApiError::new(
                ErrorCode::BadRequest,
                "the upload broke off before the end of the archive",
            )
        })?;
        if upload.write(&piece).await.is_err() {
            return Ok(());
        }
    }
    drop(upload.end().await);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailer_is_ascii_of_limited_length_and_round_trips() {
        let read = |trailer: &HeaderMap| -> ArchiveOutcome {
            let value = trailer[ARCHIVE_OUTCOME].to_str().unwrap();
            assert!(value.len() <= OUTCOME_BYTES_MAX + 100, "{} bytes", value.len());
            serde_json::from_str(value).unwrap()
        };
        let skipped = ["a/socket".to_owned(), "größe ☃ 𝄞\n\u{1b}".to_owned()];
        assert_eq!(read(&trailer(&skipped, None)).skipped, skipped);

        let many = vec!["𝄞".repeat(100); 1000];
        let outcome = read(&trailer(&many, Some(&CallError::Lost)));
        assert!(!outcome.skipped.is_empty() && outcome.skipped.len() < 10);
        assert_eq!(outcome.error.unwrap(), CallError::Lost.to_string());
    }
}
