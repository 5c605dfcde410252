//! `/sandboxes`.

use axum::extract::{Path, State};
use axum::response::Response;
use axum::{Extension, Json};
use bhatti_api::{
    CreateSandbox, Deleted, ForkSandbox, Forks, Sandbox, StartSandbox, UpdateSandbox,
};
use bhatti_store::SandboxRow;
use bhatti_supervisor::{ForkRequest, SandboxRequest};
use bhatti_types::{CpuCount, Environment, MemoryMib, SandboxName, SandboxState};

use crate::AppState;
use crate::auth::Caller;
use crate::json::ApiJson;
use crate::status::{ApiError, created};

pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
) -> Result<Json<Vec<Sandbox>>, ApiError> {
    let rows = state.supervisor.list(owner)?;
    Ok(Json(rows.into_iter().map(|row| sandbox(&state, row)).collect()))
}

pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiJson(request): ApiJson<CreateSandbox>,
) -> Result<Response, ApiError> {
    let row = state.supervisor.create(owner, parse(request)?).await?;
    Ok(created(sandbox(&state, row)))
}

pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
) -> Result<Json<Sandbox>, ApiError> {
    let row = state.supervisor.find(owner, &called)?;
    Ok(Json(sandbox(&state, row)))
}

pub(crate) async fn update(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
    ApiJson(request): ApiJson<UpdateSandbox>,
) -> Result<Json<Sandbox>, ApiError> {
    let UpdateSandbox { keep_hot } = request;
    let row = match keep_hot {
        Some(keep_hot) => state.supervisor.set_keep_hot(owner, &called, keep_hot).await?,
        None => state.supervisor.find(owner, &called)?,
    };
    Ok(Json(sandbox(&state, row)))
}

pub(crate) async fn pause(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
) -> Result<Json<Sandbox>, ApiError> {
    let row = state.supervisor.pause(owner, &called).await?;
    Ok(Json(sandbox(&state, row)))
}

pub(crate) async fn resume(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
) -> Result<Json<Sandbox>, ApiError> {
    let row = state.supervisor.resume(owner, &called).await?;
    Ok(Json(sandbox(&state, row)))
}

pub(crate) async fn stop(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
) -> Result<Json<Sandbox>, ApiError> {
    let row = state.supervisor.stop(owner, &called).await?;
    Ok(Json(sandbox(&state, row)))
}

pub(crate) async fn start(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
    ApiJson(request): ApiJson<StartSandbox>,
) -> Result<Json<Sandbox>, ApiError> {
    let row = state.supervisor.start(owner, &called, request.cold_boot).await?;
    Ok(Json(sandbox(&state, row)))
}

pub(crate) async fn fork(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
    ApiJson(request): ApiJson<ForkSandbox>,
) -> Result<Response, ApiError> {
    let ForkSandbox { count, name, env, inherit_env } = request;
    let request = ForkRequest {
        count,
        name: parse_name(name)?,
        environment: Environment::try_from(env).map_err(|error| ApiError::bad_request(&error))?,
        inherit_environment: inherit_env,
    };
    let forked = state.supervisor.fork(owner, &called, request).await?;
    Ok(created(Forks {
        sandboxes: forked.sandboxes.into_iter().map(|row| sandbox(&state, row)).collect(),
        parent_paused_us: u64::try_from(forked.paused.as_micros()).unwrap_or(u64::MAX),
        memory_bytes: forked.snapshot.memory_bytes,
    }))
}

pub(crate) async fn destroy(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    state.supervisor.destroy(owner, &called).await?;
    Ok(Json(Deleted { status: "destroyed".to_owned() }))
}

pub(super) fn parse_name(name: Option<String>) -> Result<Option<SandboxName>, ApiError> {
    name.map(|name| name.parse()).transpose().map_err(|error| ApiError::bad_request(&error))
}

fn parse(request: CreateSandbox) -> Result<SandboxRequest, ApiError> {
    let CreateSandbox { name, cpus, memory_mb, env, keep_hot, cold_boot } = request;
    Ok(SandboxRequest {
        name: parse_name(name)?,
        cpus: cpus
            .map(CpuCount::try_from)
            .transpose()
            .map_err(|error| ApiError::bad_request(&error))?,
        memory: memory_mb
            .map(MemoryMib::try_from)
            .transpose()
            .map_err(|error| ApiError::bad_request(&error))?,
        environment: Environment::try_from(env).map_err(|error| ApiError::bad_request(&error))?,
        keep_hot,
        cold_boot,
    })
}

pub(super) fn sandbox(state: &AppState, row: SandboxRow) -> Sandbox {
    let reason = match row.state {
        SandboxState::Failed(reason) => Some(reason.to_string()),
        SandboxState::Creating
        | SandboxState::Running
        | SandboxState::Stopped
        | SandboxState::Destroyed => None,
    };
    let thermal = state.supervisor.thermal(&row).map(|thermal| thermal.as_str().to_owned());
    Sandbox {
        id: row.id.to_string(),
        name: row.spec.name.to_string(),
        status: row.state.as_str().to_owned(),
        thermal,
        reason,
        cpus: row.spec.cpus.get().into(),
        memory_mb: row.spec.memory.get().into(),
        env: row.spec.environment.into_map(),
        keep_hot: row.spec.keep_hot,
        created_at: row.created_at,
        origin: row.origin,
        identity: row.identity.and_then(|report| serde_json::from_str(&report).ok()),
    }
}
