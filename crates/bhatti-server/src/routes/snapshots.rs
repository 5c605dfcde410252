//! `/snapshots`, and `/sandboxes/{sandbox}/checkpoint`, which creates a snapshot.

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use bhatti_api::{CreateSnapshot, Deleted, ResumeSnapshot, Snapshot};
use bhatti_control::ResumeRequest;
use bhatti_store::SnapshotRow;
use bhatti_types::Environment;

use super::sandboxes::{labels, parse_name, sandbox, secrets};
use crate::AppState;
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::idempotency::IdempotencyKey;
use crate::json::{ApiJson, Json};
use crate::page::{Page, PageQuery, Paging};
use crate::status::{ApiError, created};

/// Saves a sandbox under a name as a snapshot. The sandbox keeps running.
#[utoipa::path(post, path = "/sandboxes/{sandbox}/checkpoint", tag = "snapshots", params(IdempotencyKey, ("sandbox" = String, Path)),
    request_body = CreateSnapshot, responses((status = 201, body = Snapshot), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiJson(request): ApiJson<CreateSnapshot>,
) -> Result<Response, ApiError> {
    let name = request.name.parse().map_err(|error| ApiError::bad_request(&error))?;
    let row = state.control.create_snapshot(owner, &id_or_name, name).await?;
    Ok(created(Json(snapshot(row))))
}

/// Lists the caller's snapshots, newest first.
#[utoipa::path(get, path = "/snapshots", tag = "snapshots", params(PageQuery),
    responses((status = 200, body = Vec<Snapshot>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    paging: Paging,
) -> Result<Page<Snapshot>, ApiError> {
    let snapshots = state.control.list_snapshots(owner)?;
    let place = |row: &SnapshotRow| (row.created_at.clone(), row.id.to_string());
    Ok(paging.newest_first(snapshots, place)?.map(snapshot))
}

/// Returns a snapshot.
#[utoipa::path(get, path = "/snapshots/{snapshot}", tag = "snapshots", params(("snapshot" = String, Path)),
    responses((status = 200, body = Snapshot), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<Snapshot>, ApiError> {
    Ok(Json(snapshot(state.control.find_snapshot(owner, &name)?)))
}

/// Creates a sandbox from a snapshot. The snapshot stays.
#[utoipa::path(post, path = "/snapshots/{snapshot}/resume", tag = "snapshots", params(IdempotencyKey, ("snapshot" = String, Path)),
    request_body = ResumeSnapshot, responses((status = 201, body = bhatti_api::Sandbox), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn resume(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
    ApiJson(request): ApiJson<ResumeSnapshot>,
) -> Result<Response, ApiError> {
    let request = ResumeRequest {
        name: parse_name(request.name)?,
        environment: Environment::try_from(request.env)
            .map_err(|error| ApiError::bad_request(&error))?,
        keep_hot: request.keep_hot,
        labels: labels(request.labels)?,
        secrets: secrets(&request.secrets)?,
    };
    let row = state.control.resume_snapshot(owner, &name, request).await?;
    Ok(created(Json(sandbox(&state, row))))
}

/// Deletes a snapshot. Sandboxes that were created from it stay.
#[utoipa::path(delete, path = "/snapshots/{snapshot}", tag = "snapshots", params(("snapshot" = String, Path)),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<Deleted>, ApiError> {
    state.control.delete_snapshot(owner, &name).await?;
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
        volumes: row.volumes.iter().map(|volume| volume.name.to_string()).collect(),
        created_at: row.created_at,
    }
}
