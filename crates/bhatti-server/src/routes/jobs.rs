//! `/sandboxes/{sandbox}/jobs`: commands that run without a client.

use std::io;
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bhatti_agent::{ExecEvent, ExecInput, SessionOutput};
use bhatti_api::{Deleted, ErrorCode, Job};
use bhatti_node::SandboxUse;
use bhatti_proto::SessionInfo;
use bytes::Bytes;
use futures_util::stream;
use serde::Deserialize;
use utoipa::IntoParams;

use super::sessions::of_session;
use crate::AppState;
use crate::auth::Caller;
use crate::extract::{ApiPath, ApiQuery};
use crate::json::Json;
use crate::page::{Page, PageQuery, Paging};
use crate::status::ApiError;
use crate::times::rfc3339;

/// Lists the jobs that run or have ended recently, oldest first.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/jobs", tag = "jobs", params(PageQuery, ("sandbox" = String, Path)),
    responses((status = 200, body = Vec<Job>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    paging: Paging,
) -> Result<Page<Job>, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    let jobs = used.agent.list_sessions().await?.into_iter().filter_map(job).collect();
    paging.in_order(jobs, |job| &job.id)
}

/// Returns a job.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/jobs/{job}", tag = "jobs", params(("sandbox" = String, Path), ("job" = String, Path)),
    responses((status = 200, body = Job), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath((id_or_name, id)): ApiPath<(String, String)>,
) -> Result<Json<Job>, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    find(&used, &id).await.map(Json)
}

/// Finds a job. A terminal session is not a job, so it is not found.
async fn find(used: &SandboxUse, id: &str) -> Result<Job, ApiError> {
    let mut jobs = used.agent.list_sessions().await?.into_iter().filter_map(job);
    let missing = || {
        ApiError::new(ErrorCode::NotFound, format!("job `{id}` not found"))
            .hint(format!("list them: bhatti jobs {}", used.id))
    };
    jobs.find(|job| job.id == id).ok_or_else(missing)
}

/// Kills a job, or removes a job that has ended.
#[utoipa::path(delete, path = "/sandboxes/{sandbox}/jobs/{job}", tag = "jobs", params(("sandbox" = String, Path), ("job" = String, Path)),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn kill(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath((id_or_name, id)): ApiPath<(String, String)>,
) -> Result<Json<Deleted>, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    find(&used, &id).await?;
    used.agent.kill_session(&id).await.map_err(of_session(&used, &id))?;
    Ok(Json(Deleted { status: "killed".to_owned() }))
}

/// Seconds between the stop signal and the kill.
const GRACE_DEFAULT: u32 = 10;
const GRACE_MAX: u32 = 3600;

/// How a job is stopped.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct StopQuery {
    /// Seconds after which the job is killed, 0 to 3600 (default: 10).
    #[param(maximum = 3600)]
    grace_sec: Option<u32>,
}

/// Asks a job to end: sends `SIGTERM`, or the stop signal of its image if the job is the image's
/// own command, and kills what is left of the job after the grace period. Does not wait for the
/// end.
#[utoipa::path(post, path = "/sandboxes/{sandbox}/jobs/{job}/stop", tag = "jobs",
    params(("sandbox" = String, Path), ("job" = String, Path), StopQuery),
    responses((status = 200, body = Job), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn stop(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath((id_or_name, id)): ApiPath<(String, String)>,
    ApiQuery(StopQuery { grace_sec }): ApiQuery<StopQuery>,
) -> Result<Json<Job>, ApiError> {
    let grace_sec = grace_sec.unwrap_or(GRACE_DEFAULT);
    if grace_sec > GRACE_MAX {
        let message = format!("`grace_sec` is {grace_sec}; it must be 0 to {GRACE_MAX}");
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    let used = state.control.enter(owner, &id_or_name).await?;
    find(&used, &id).await?;
    let grace = Duration::from_secs(grace_sec.into());
    used.agent.stop_session(&id, grace).await.map_err(of_session(&used, &id))?;
    find(&used, &id).await.map(Json)
}

/// Selects a part of the output.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct OutputQuery {
    /// Offset of the first byte to return (default: the first byte that is kept).
    offset: Option<u64>,
    /// Continue with new output until the job ends.
    #[serde(default)]
    follow: bool,
}

/// Returns a job's output, with both streams in the order in which they were written. The header
/// `X-Output-Offset` has the offset of the first byte.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/jobs/{job}/output", tag = "jobs",
    params(("sandbox" = String, Path), ("job" = String, Path), OutputQuery),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn output(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath((id_or_name, id)): ApiPath<(String, String)>,
    ApiQuery(OutputQuery { offset, follow }): ApiQuery<OutputQuery>,
) -> Result<Response, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    find(&used, &id).await?;
    let (info, input, output) =
        used.agent.observe(&id, offset).await.map_err(of_session(&used, &id))?;
    let begin = output.position();
    let until = if follow { u64::MAX } else { info.output_end.unwrap_or_default() };
    let place = JobOutput { output, until, state, _used: used, _input: input };
    let body = stream::unfold(place, |mut place| async move {
        let bytes = place.next().await?;
        Some((bytes, place))
    });
    let headers = [
        (CONTENT_TYPE.as_str(), "application/octet-stream".to_owned()),
        ("x-output-offset", begin.to_string()),
    ];
    Ok((headers, Body::from_stream(body)).into_response())
}

/// A client's position in a job's output.
struct JobOutput {
    output: SessionOutput,
    until: u64,
    state: AppState,
    _used: SandboxUse,
    /// Dropping the input half would end the output, too.
    _input: ExecInput,
}

impl JobOutput {
    /// Returns the next piece. If the sandbox is lost before the end, returns an error, which
    /// cuts the response off.
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        if self.output.position() >= self.until {
            return None;
        }
        loop {
            let event = tokio::select! {
                event = self.output.next() => event,
                () = self.state.stopped() => return None,
            };
            match event {
                Ok(ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes)) => {
                    let excess = self.output.position().saturating_sub(self.until);
                    let keep =
                        bytes.len().saturating_sub(usize::try_from(excess).unwrap_or(usize::MAX));
                    return Some(Ok(bytes.slice(..keep)));
                }
                Ok(ExecEvent::TimedOut) => {}
                Ok(ExecEvent::Exit(_)) => return None,
                Err(error) => return Some(Err(io::Error::other(error))),
            }
        }
    }
}

/// Converts a session into a job. Returns `None` for a terminal session.
pub(super) fn job(info: SessionInfo) -> Option<Job> {
    (!info.tty).then(|| Job {
        id: info.session_id,
        cmd: info.argv,
        running: info.running,
        exit_code: info.exit_code,
        created_at: rfc3339(info.created_at),
        output_start: info.output_start.unwrap_or_default(),
        output_end: info.output_end.unwrap_or_default(),
        restart: info.restart,
    })
}
