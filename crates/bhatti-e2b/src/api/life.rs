//! Time limits, pauses, connections and forks.

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bhatti_control::{ForkRequest, unix_seconds_after};
use bhatti_store::SandboxRow;
use bhatti_types::{SandboxState, TimeLimitChange};
use serde::Deserialize;
use serde_json::json;

use super::create::seconds;
use super::{Id, Json, Owner, find, no_sandbox, objects};
use crate::settings::{Settings, TIMEOUT_SEC};
use crate::{E2b, Error, status};

/// The shortest time that a sandbox gets when a request wakes it.
const AUTO_RESUME_MIN_SEC: u32 = 300;

/// Seconds that a fork lives, if the request names no time.
const FORK_SEC: i64 = 15;

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Change {
    timeout: Option<i64>,
    duration: Option<i64>,
    memory: Option<bool>,
    count: Option<u32>,
}

/// `DELETE /sandboxes/{id}`.
pub(super) async fn destroy(
    State(e2b): State<E2b>,
    owner: Owner,
    Id(id): Id,
) -> Result<StatusCode, Error> {
    let row = find(&e2b, owner, &id)?;
    let destroyed = e2b.0.control.destroy(row.owner, &row.id.to_string()).await;
    match destroyed.map_err(|error| e2b.0.describe.using(error)) {
        Ok(()) => Ok(status::NO_CONTENT),
        Err(error) if error.is_not_found() => Err(no_sandbox(&id)),
        Err(error) => Err(error),
    }
}

/// `POST /sandboxes/{id}/timeout`.
pub(super) async fn set_timeout(
    State(e2b): State<E2b>,
    owner: Owner,
    Id(id): Id,
    Json(change): Json<Change>,
) -> Result<StatusCode, Error> {
    let timeout = change.timeout.ok_or_else(|| Error::bad_request("`timeout` is missing"))?;
    let timeout = seconds(timeout)?;
    let row = find_running(&e2b, owner, &id)?;
    set_end(&e2b, &row, timeout, false).await?;
    Ok(status::NO_CONTENT)
}

/// `POST /sandboxes/{id}/refreshes`: only lengthens.
pub(super) async fn refresh(
    State(e2b): State<E2b>,
    owner: Owner,
    Id(id): Id,
    Json(change): Json<Change>,
) -> Result<StatusCode, Error> {
    let row = find_running(&e2b, owner, &id)?;
    let duration = seconds(change.duration.unwrap_or_else(|| TIMEOUT_SEC.into()))?;
    set_end(&e2b, &row, duration, true).await?;
    Ok(status::NO_CONTENT)
}

/// Returns a sandbox that runs. To these requests, a paused one does not exist.
fn find_running(e2b: &E2b, owner: Owner, id: &str) -> Result<SandboxRow, Error> {
    let row = find(e2b, owner, id)?;
    if row.state == SandboxState::Running { Ok(row) } else { Err(no_sandbox(id)) }
}

/// Sets when a running sandbox ends. A paused one has no end: at the end, it would be destroyed.
async fn set_end(
    e2b: &E2b,
    row: &SandboxRow,
    seconds: u32,
    only_later: bool,
) -> Result<SandboxRow, Error> {
    let at = unix_seconds_after(Duration::from_secs(seconds.into()));
    let expires_at = Some(Some(at));
    let change = TimeLimitChange { expires_at, only_later, only_running: true, on_timeout: None };
    change_limit(e2b, row, change).await
}

async fn change_limit(
    e2b: &E2b,
    row: &SandboxRow,
    change: TimeLimitChange,
) -> Result<SandboxRow, Error> {
    let id = row.id.to_string();
    let changed = e2b.0.control.change_time_limit(row.owner, &id, change).await;
    changed.map_err(|error| e2b.0.describe.using(error))
}

/// `POST /v2/sandboxes/{id}/connect`: starts a paused sandbox, and gives a running one more time.
pub(super) async fn connect(
    State(e2b): State<E2b>,
    owner: Owner,
    Id(id): Id,
    Json(change): Json<Change>,
) -> Result<Response, Error> {
    let timeout = seconds(change.timeout.unwrap_or_else(|| TIMEOUT_SEC.into()))?;
    let row = find(&e2b, owner, &id)?;
    let settings = Settings::of(&row);
    let (status, row) = match row.state {
        SandboxState::Running => (status::OK, set_end(&e2b, &row, timeout, true).await?),
        SandboxState::Stopped => {
            let is_disk_only = settings.is_disk_only || change.memory == Some(false);
            let settings = Settings { is_disk_only, ..settings.clone() };
            (status::CREATED, resume(&e2b, &row, &settings, Some(timeout)).await?)
        }
        SandboxState::Creating => return Err(Error::conflict("the sandbox is being created")),
        SandboxState::Failed(_) | SandboxState::Destroyed => return Err(no_sandbox(&id)),
    };
    Ok((status, axum::Json(objects::sandbox(&e2b, &row, &settings))).into_response())
}

/// `POST /sandboxes/{id}/resume`, of older SDKs.
pub(super) async fn resume_stopped(
    State(e2b): State<E2b>,
    owner: Owner,
    Id(id): Id,
    Json(change): Json<Change>,
) -> Result<Response, Error> {
    let timeout = seconds(change.timeout.unwrap_or_else(|| TIMEOUT_SEC.into()))?;
    let row = find(&e2b, owner, &id)?;
    match row.state {
        SandboxState::Stopped => {}
        SandboxState::Running => {
            return Err(Error::conflict(format!("sandbox {id} is already running")));
        }
        _ => return Err(no_sandbox(&id)),
    }
    let settings = Settings::of(&row);
    let row = resume(&e2b, &row, &settings, Some(timeout)).await?;
    let body = axum::Json(objects::sandbox(&e2b, &row, &settings));
    Ok((status::CREATED, body).into_response())
}

/// Starts a stopped sandbox. Without a time, it gets that of its creation, but at least five
/// minutes.
///
/// # Cancel safety
///
/// A start that has begun is finished: a sandbox that runs must have its end.
pub(crate) async fn resume(
    e2b: &E2b,
    row: &SandboxRow,
    settings: &Settings,
    seconds: Option<u32>,
) -> Result<SandboxRow, Error> {
    let (e2b, row, settings) = (e2b.clone(), row.clone(), settings.clone());
    finished(async move {
        let (control, id) = (&e2b.0.control, row.id.to_string());
        let started = control.start(row.owner, &id, settings.is_disk_only).await;
        let is_first = started.is_ok();
        if let Err(error) = started {
            // Another request may have started it.
            let now = control.find(row.owner, &id).map_err(|error| e2b.0.describe.using(error))?;
            if now.state != SandboxState::Running {
                return Err(e2b.0.describe.using(error));
            }
        }
        // What the next pause at the end of the time does.
        let next = Settings { is_disk_only: !settings.keeps_memory, ..Settings::of(&row) };
        let kept = control.set_annex(row.id, &next.to_annex());
        kept.map_err(|error| e2b.0.describe.store(error))?;
        let seconds = seconds.unwrap_or_else(|| settings.timeout_sec.max(AUTO_RESUME_MIN_SEC));
        // The end that another request has set is not made earlier.
        let has_end = row_now(&e2b, &row)?.time_limit.expires_at.is_some();
        set_end(&e2b, &row, seconds, !is_first && has_end).await
    })
    .await
}

fn row_now(e2b: &E2b, row: &SandboxRow) -> Result<SandboxRow, Error> {
    let found = e2b.0.control.find(row.owner, &row.id.to_string());
    found.map_err(|error| e2b.0.describe.using(error))
}

/// Carries work out to its end, also if the client goes away.
async fn finished<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|_| Err(Error::internal("the request was interrupted")))
}

/// `POST /sandboxes/{id}/pause`.
pub(super) async fn pause(
    State(e2b): State<E2b>,
    owner: Owner,
    Id(id): Id,
    Json(change): Json<Change>,
) -> Result<StatusCode, Error> {
    let row = find(&e2b, owner, &id)?;
    match row.state {
        SandboxState::Running => {}
        SandboxState::Stopped => {
            return Err(Error::conflict(format!("sandbox {id} is already paused")));
        }
        SandboxState::Creating => return Err(Error::conflict("the sandbox is being created")),
        SandboxState::Failed(_) | SandboxState::Destroyed => return Err(no_sandbox(&id)),
    }
    finished(pause_running(e2b, row, change.memory == Some(false))).await
}

async fn pause_running(e2b: E2b, row: SandboxRow, is_disk_only: bool) -> Result<StatusCode, Error> {
    let control = &e2b.0.control;
    let before = Settings::of(&row);
    let settings = Settings { is_disk_only, ..before.clone() };
    let keep = |settings: &Settings| {
        let kept = control.set_annex(row.id, &settings.to_annex());
        kept.map_err(|error| e2b.0.describe.store(error))
    };
    keep(&settings)?;
    // First: a paused sandbox has no end, and must not meet the one it had.
    let without = TimeLimitChange { expires_at: Some(None), ..TimeLimitChange::default() };
    change_limit(&e2b, &row, without).await?;
    if let Err(error) = control.stop(row.owner, &row.id.to_string()).await {
        keep(&before)?;
        let expires_at = Some(row.time_limit.expires_at);
        let again = TimeLimitChange { expires_at, ..TimeLimitChange::default() };
        change_limit(&e2b, &row, again).await?;
        return Err(e2b.0.describe.using(error));
    }
    // A request that came meanwhile may have set an end.
    change_limit(&e2b, &row, without).await?;
    Ok(status::NO_CONTENT)
}

/// `POST /sandboxes/{id}/fork`.
pub(super) async fn fork(
    State(e2b): State<E2b>,
    owner: Owner,
    Id(id): Id,
    Json(change): Json<Change>,
) -> Result<Response, Error> {
    let timeout = seconds(change.timeout.unwrap_or(FORK_SEC))?;
    if timeout == 0 {
        return Err(Error::bad_request("timeout must be at least 1 second"));
    }
    let row = find_running(&e2b, owner, &id)?;
    let request = ForkRequest {
        count: change.count,
        inherit_environment: true,
        labels: row.spec.labels.clone(),
        lifetime: Some(Duration::from_secs(timeout.into())),
        on_timeout: row.time_limit.on_timeout,
        ..ForkRequest::default()
    };
    let forked = e2b.0.control.fork(row.owner, &row.id.to_string(), request).await;
    let forked = forked.map_err(|error| e2b.0.describe.fork(error))?;
    let forks: Vec<_> = forked
        .sandboxes
        .iter()
        .map(|fork| json!({ "sandbox": objects::sandbox(&e2b, fork, &Settings::of(fork)) }))
        .collect();
    Ok((status::CREATED, axum::Json(forks)).into_response())
}
