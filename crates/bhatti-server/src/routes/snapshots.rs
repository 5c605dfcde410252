//! `/snapshots`, and the making of one: `/sandboxes/{sandbox}/checkpoint`.

use axum::extract::{Path, State};
use axum::response::Response;
use axum::{Extension, Json};
use bhatti_api::{CreateSnapshot, Deleted, ResumeSnapshot, Snapshot};
use bhatti_store::SnapshotRow;
use bhatti_supervisor::ResumeRequest;
use bhatti_types::Environment;

use super::sandboxes::{parse_name, sandbox};
use crate::AppState;
use crate::auth::Caller;
use crate::json::ApiJson;
use crate::status::{ApiError, created};

pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
    ApiJson(request): ApiJson<CreateSnapshot>,
) -> Result<Response, ApiError> {
    let name = request.name.parse().map_err(|error| ApiError::bad_request(&error))?;
    let row = state.supervisor.create_snapshot(owner, &called, name).await?;
    Ok(created(snapshot(row)))
}

pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
) -> Result<Json<Vec<Snapshot>>, ApiError> {
    Ok(Json(state.supervisor.list_snapshots(owner)?.into_iter().map(snapshot).collect()))
}

pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<Snapshot>, ApiError> {
    Ok(Json(snapshot(state.supervisor.find_snapshot(owner, &name)?)))
}

pub(crate) async fn resume(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(name): Path<String>,
    ApiJson(request): ApiJson<ResumeSnapshot>,
) -> Result<Response, ApiError> {
    let request = ResumeRequest {
        name: parse_name(request.name)?,
        environment: Environment::try_from(request.env)
            .map_err(|error| ApiError::bad_request(&error))?,
        keep_hot: request.keep_hot,
    };
    let row = state.supervisor.resume_snapshot(owner, &name, request).await?;
    Ok(created(sandbox(&state, row)))
}

pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    state.supervisor.delete_snapshot(owner, &name).await?;
    Ok(Json(Deleted { status: "deleted".to_owned() }))
}

fn snapshot(row: SnapshotRow) -> Snapshot {
    Snapshot {
        id: row.id.to_string(),
        name: row.name.to_string(),
        sandbox: row.sandbox_name.to_string(),
        sandbox_id: row.sandbox_id.to_string(),
        cpus: row.cpus.get().into(),
        memory_mb: row.memory.get().into(),
        kind: if row.is_full { "full" } else { "diff" }.to_owned(),
        memory_bytes: row.memory_bytes,
        created_at: row.created_at,
    }
}
