//! `/operations`: work that outlasts the request that began it.

use std::convert::Infallible;
use std::time::{Duration, UNIX_EPOCH};

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bhatti_api::{ErrorCode, LayerProgress, Operation, OperationError};
use bhatti_control::{OperationKind, OperationState};
use bhatti_types::UserId;
use futures_util::stream;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::AppState;
use crate::auth::Caller;
use crate::extract::{ApiPath, ApiQuery, number};
use crate::json::Json;
use crate::page::{Page, PageQuery, Paging};
use crate::status::{ApiError, operation_failure};
use crate::times::rfc3339;

/// Maximum of `wait`, in seconds.
const WAIT_SECONDS_MAX: u32 = 60;

/// Lists the caller's operations, newest first: those that run, and the last 32 that ended since
/// the daemon started.
#[utoipa::path(get, path = "/operations", tag = "operations", params(PageQuery),
    responses((status = 200, body = Vec<Operation>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    paging: Paging,
) -> Result<Page<Operation>, ApiError> {
    let operations = state.control.list_operations(owner).iter().map(describe).collect();
    paging.in_order(operations, |operation: &Operation| &operation.id)
}

/// Says how long to wait.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct WaitQuery {
    /// Seconds to wait for the end of the operation, 0 to 60 [default: 0].
    #[param(maximum = 60)]
    #[serde(default, deserialize_with = "number")]
    wait: Option<u32>,
}

/// Returns an operation, once it has ended or the time to wait is over.
#[utoipa::path(get, path = "/operations/{operation}", tag = "operations",
    params(("operation" = String, Path), WaitQuery),
    responses((status = 200, body = Operation), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id): ApiPath<String>,
    ApiQuery(WaitQuery { wait }): ApiQuery<WaitQuery>,
) -> Result<Json<Operation>, ApiError> {
    let wait = wait.unwrap_or_default();
    if wait > WAIT_SECONDS_MAX {
        let message = format!("wait must be at most {WAIT_SECONDS_MAX}, not {wait}");
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    let operation = find(&state, owner, &id)?;
    tokio::select! {
        _ = operation.ended() => {}
        () = tokio::time::sleep(Duration::from_secs(wait.into())) => {}
        () = state.stopped() => {}
    }
    Ok(Json(describe(&operation)))
}

/// Says where to begin.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct LogQuery {
    /// Byte of the log to begin with [default: 0].
    #[serde(default, deserialize_with = "number")]
    offset: Option<u64>,
}

/// Returns the log of an operation as it is written, until the operation has ended.
///
/// The last 256 KiB are kept. Builds have a log.
#[utoipa::path(get, path = "/operations/{operation}/log", tag = "operations",
    params(("operation" = String, Path), LogQuery),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn log(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id): ApiPath<String>,
    ApiQuery(LogQuery { offset }): ApiQuery<LogQuery>,
) -> Result<Response, ApiError> {
    let operation = find(&state, owner, &id)?;
    let place = (operation, offset.unwrap_or_default(), state);
    let body = stream::unfold(place, |(operation, from, state)| async move {
        let part = tokio::select! {
            part = operation.output(from) => part?,
            () = state.stopped() => return None,
        };
        let end = part.start + part.bytes.len() as u64;
        Some((Ok::<_, Infallible>(part.bytes), (operation, end, state)))
    });
    let kind = [(CONTENT_TYPE, "application/octet-stream")];
    Ok((kind, Body::from_stream(body)).into_response())
}

/// Cancels an operation. One that has ended stays as it is.
#[utoipa::path(delete, path = "/operations/{operation}", tag = "operations", params(("operation" = String, Path)),
    responses((status = 200, body = Operation), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn cancel(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id): ApiPath<String>,
) -> Result<Json<Operation>, ApiError> {
    let operation = find(&state, owner, &id)?;
    operation.cancel();
    Ok(Json(describe(&operation)))
}

fn find(state: &AppState, owner: UserId, id: &str) -> Result<bhatti_control::Operation, ApiError> {
    let missing = || ApiError::new(ErrorCode::NotFound, format!("operation `{id}` not found"));
    state.control.find_operation(owner, id).ok_or_else(missing)
}

fn began(operation: &bhatti_control::Operation) -> String {
    rfc3339(operation.began().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
}

/// Describes an operation.
pub(super) fn describe(operation: &bhatti_control::Operation) -> Operation {
    let state = operation.state();
    let status = match &state {
        OperationState::Running => "running",
        OperationState::Done(_) => "done",
        OperationState::Failed(_) => "failed",
        OperationState::Canceled => "canceled",
    };
    let error = match &state {
        OperationState::Failed(error) => Some(operation_failure(error)),
        _ => None,
    };
    let error = error.map(|ApiError { code, message, hint, .. }| OperationError {
        code,
        error: message,
        hint,
    });
    let kind = match operation.kind() {
        OperationKind::Pull => "pull",
        OperationKind::Push => "push",
        OperationKind::Save => "save",
        OperationKind::Build => "build",
        OperationKind::Template => "template",
    };
    let layers = operation.layers().into_iter().map(|layer| LayerProgress {
        digest: format!("sha256:{}", layer.sha256),
        bytes: layer.bytes,
        arrived: layer.arrived,
        unpacked: layer.unpacked,
    });
    Operation {
        id: operation.id().to_owned(),
        kind: kind.to_owned(),
        image: operation.image().to_owned(),
        status: status.to_owned(),
        created_at: began(operation),
        layers: layers.collect(),
        error,
    }
}
