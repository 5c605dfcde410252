//! `/sandboxes/{sandbox}/tar`: whole directories, as tar archives that the guest's own `tar` writes and reads.

use std::io;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bhatti_agent::{ExecEvent, ExecInput, ExecOutput};
use bhatti_api::{Done, ErrorCode};
use bhatti_proto::ExecRequest;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::AppState;
use crate::auth::Caller;
use crate::extract::{ApiPath, ApiQuery};
use crate::json::Json;
use crate::status::{ApiError, file_error};

/// The most that is kept of what `tar` complains about, in bytes.
const COMPLAINT_BYTES_MAX: usize = 4096;

/// Which directory.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct TarQuery {
    /// Its path.
    path: String,
}

/// Downloads a directory as a tar archive. Names in it are relative to the directory.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/tar", tag = "files", params(("sandbox" = String, Path), TarQuery),
    responses((status = 200, body = Vec<u8>, content_type = "application/x-tar"), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn download(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(called): ApiPath<String>,
    ApiQuery(TarQuery { path }): ApiQuery<TarQuery>,
) -> Result<Response, ApiError> {
    let used = state.supervisor.enter(owner, &called).await?;
    let info = used.agent.stat(&path).await.map_err(file_error)?;
    if !info.is_dir {
        return Err(ApiError::new(ErrorCode::NotADirectory, format!("{path} is not a directory")));
    }
    let request = tar(&["-cf", "-", "-C", &path, "--", "."]);
    let (input, output) = state.supervisor.exec(owner, &called, request, Some(&[])).await?;
    let mut archive = Archive { input, output, complaint: Vec::new() };
    // What fails at once, as a directory that is not there, is a proper error.
    let Some(first) = archive.next().await else {
        return Err(ApiError::new(ErrorCode::Internal, "tar wrote no archive"));
    };
    let first = first.map_err(|error| ApiError::new(ErrorCode::BadRequest, error.to_string()))?;
    let rest = stream::unfold(Some(archive), |archive| async move {
        let mut archive = archive?;
        let piece = archive.next().await?;
        let goes_on = piece.is_ok();
        Some((piece, goes_on.then_some(archive)))
    });
    let body = stream::iter([Ok(first)]).chain(rest);
    Ok(([(CONTENT_TYPE, "application/x-tar")], Body::from_stream(body)).into_response())
}

/// Unpacks a tar archive into a directory, which is made if it is not there.
#[utoipa::path(put, path = "/sandboxes/{sandbox}/tar", tag = "files", params(("sandbox" = String, Path), TarQuery),
    request_body(content = Vec<u8>, content_type = "application/x-tar"),
    responses((status = 200, body = Done), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn upload(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(called): ApiPath<String>,
    ApiQuery(TarQuery { path }): ApiQuery<TarQuery>,
    body: Body,
) -> Result<Json<Done>, ApiError> {
    let used = state.supervisor.enter(owner, &called).await?;
    used.agent.make_directory(&path, "", true).await.map_err(file_error)?;
    let request = tar(&["-xf", "-", "-C", &path]);
    let (mut input, output) = state.supervisor.exec(owner, &called, request, None).await?;
    let feed = async {
        let mut content = body.into_data_stream();
        while let Some(piece) = content.next().await {
            let broken =
                |_| ApiError::new(ErrorCode::BadRequest, "the archive broke off before its end");
            if input.write(&piece.map_err(broken)?).await.is_err() {
                break;
            }
        }
        // `tar` may have read enough, or have failed: its exit says which.
        drop(input.end().await);
        std::future::pending::<Result<(), ApiError>>().await
    };
    tokio::select! {
        ended = unpacked(output) => ended?,
        broken = feed => broken?,
    }
    Ok(Json(Done { status: "ok".to_owned() }))
}

fn tar(arguments: &[&str]) -> ExecRequest {
    let argv = ["tar"].iter().chain(arguments).map(|&argument| argument.to_owned()).collect();
    ExecRequest { argv, cwd: Some("/".to_owned()), ..ExecRequest::default() }
}

/// Waits for `tar` to have unpacked everything.
async fn unpacked(mut output: ExecOutput) -> Result<(), ApiError> {
    let mut complaint = Vec::new();
    loop {
        match output.next().await? {
            ExecEvent::Stderr(bytes) => note(&mut complaint, &bytes),
            ExecEvent::Stdout(_) | ExecEvent::TimedOut => {}
            ExecEvent::Exit(0) => return Ok(()),
            ExecEvent::Exit(code) => {
                return Err(ApiError::new(ErrorCode::BadRequest, failure(code, &complaint)));
            }
        }
    }
}

/// An archive on its way out.
struct Archive {
    #[expect(dead_code, reason = "without it the command would be killed")]
    input: ExecInput,
    output: ExecOutput,
    complaint: Vec<u8>,
}

impl Archive {
    /// The next piece; an error, which cuts the answer off, if `tar` failed.
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        loop {
            match self.output.next().await {
                Ok(ExecEvent::Stdout(bytes)) => return Some(Ok(bytes)),
                Ok(ExecEvent::Stderr(bytes)) => note(&mut self.complaint, &bytes),
                Ok(ExecEvent::TimedOut) => {}
                // 1: a file changed while it was read, which is what files do.
                Ok(ExecEvent::Exit(0 | 1)) => return None,
                Ok(ExecEvent::Exit(code)) => {
                    return Some(Err(io::Error::other(failure(code, &self.complaint))));
                }
                Err(error) => return Some(Err(io::Error::other(error))),
            }
        }
    }
}

fn note(complaint: &mut Vec<u8>, bytes: &[u8]) {
    let room = COMPLAINT_BYTES_MAX.saturating_sub(complaint.len());
    complaint.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

fn failure(code: i32, complaint: &[u8]) -> String {
    format!("tar failed with exit code {code}: {}", String::from_utf8_lossy(complaint).trim())
}
