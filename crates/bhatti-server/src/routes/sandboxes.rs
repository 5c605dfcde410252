//! `/sandboxes`.

use axum::extract::{Path, State};
use axum::response::Response;
use axum::{Extension, Json};
use bhatti_api::{CreateSandbox, Deleted, Sandbox};
use bhatti_store::SandboxRow;
use bhatti_supervisor::SandboxRequest;
use bhatti_types::{CpuCount, Environment, MemoryMib, SandboxState};

use crate::AppState;
use crate::auth::Caller;
use crate::json::ApiJson;
use crate::status::{ApiError, created};

pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
) -> Result<Json<Vec<Sandbox>>, ApiError> {
    Ok(Json(state.supervisor.list(owner)?.into_iter().map(sandbox).collect()))
}

pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiJson(request): ApiJson<CreateSandbox>,
) -> Result<Response, ApiError> {
    let row = state.supervisor.create(owner, parse(request)?).await?;
    Ok(created(sandbox(row)))
}

pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
) -> Result<Json<Sandbox>, ApiError> {
    Ok(Json(sandbox(state.supervisor.find(owner, &called)?)))
}

pub(crate) async fn destroy(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    state.supervisor.destroy(owner, &called).await?;
    Ok(Json(Deleted { status: "destroyed".to_owned() }))
}

fn parse(request: CreateSandbox) -> Result<SandboxRequest, ApiError> {
    let CreateSandbox { name, cpus, memory_mb, env } = request;
    Ok(SandboxRequest {
        name: name
            .map(|name| name.parse())
            .transpose()
            .map_err(|error| ApiError::bad_request(&error))?,
        cpus: cpus
            .map(CpuCount::try_from)
            .transpose()
            .map_err(|error| ApiError::bad_request(&error))?,
        memory: memory_mb
            .map(MemoryMib::try_from)
            .transpose()
            .map_err(|error| ApiError::bad_request(&error))?,
        environment: Environment::try_from(env).map_err(|error| ApiError::bad_request(&error))?,
    })
}

fn sandbox(row: SandboxRow) -> Sandbox {
    let reason = match row.state {
        SandboxState::Failed(reason) => Some(reason.to_string()),
        SandboxState::Creating | SandboxState::Running | SandboxState::Destroyed => None,
    };
    Sandbox {
        id: row.id.to_string(),
        name: row.spec.name.to_string(),
        status: row.state.as_str().to_owned(),
        reason,
        cpus: row.spec.cpus.get().into(),
        memory_mb: row.spec.memory.get().into(),
        env: row.spec.environment.into_map(),
        created_at: row.created_at,
    }
}
