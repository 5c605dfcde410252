//! `/sandboxes`.

use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use bhatti_api::{
    CreateSandbox, Deleted, ErrorCode, ForkSandbox, Forks, Isolation, Sandbox, StartSandbox,
    UpdateSandbox,
};
use bhatti_control::{CreateError, ForkRequest};
use bhatti_store::{SandboxChange, SandboxFilter, SandboxRow};
use bhatti_types::{Environment, SandboxState, Thermal, TimeLimitChange, UserId};
use serde::Deserialize;
use utoipa::IntoParams;

pub(super) mod parse;

use crate::AppState;
use crate::auth::Caller;
use crate::extract::{ApiPath, ApiQuery, number};
use crate::idempotency::IdempotencyKey;
use crate::json::{ApiJson, Json, JsonArray};
use crate::large_json::LargeJson;
use crate::page::{ListPath, check_limit, cursor, next_link, with_link};
use crate::status::{ApiError, created};
use crate::times::rfc3339;

pub(super) use parse::{init, labels, name as parse_name, secrets};

/// Header of a response whose sandbox existed before the request.
const EXISTING: &str = "x-bhatti-existing";

/// Selects a part of the list.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListQuery {
    /// Only sandboxes with this label, as `KEY=VALUE` (repeatable; all must match).
    #[serde(default)]
    label: Vec<String>,
    /// Maximum number of sandboxes to return, 1 to 1000 (default: all). If there are more, the
    /// response has a `Link` header with `rel="next"`.
    #[param(minimum = 1, maximum = 1000)]
    #[serde(default, deserialize_with = "number")]
    limit: Option<u32>,
    /// Cursor to continue after, from a `Link` header.
    after: Option<String>,
}

/// Lists the caller's sandboxes, newest first.
#[utoipa::path(get, path = "/sandboxes", tag = "sandboxes", params(ListQuery),
    responses((status = 200, body = Vec<Sandbox>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ListPath(path): ListPath,
    ApiQuery(query): ApiQuery<ListQuery>,
) -> Result<Response, ApiError> {
    check_limit(query.limit)?;
    let limit = query.limit;
    let filter = parse::filter(query)?;
    let isolation = isolation(&state);
    let (mut sandboxes, mut last, mut next) = (JsonArray::default(), None, None);
    let mut listings = state.listings.lock();
    state.control.each_sandbox(owner, &filter, |stored| {
        let id = stored.id()?;
        if limit.is_some_and(|limit| sandboxes.len() >= limit as usize) {
            next = next_page(&path, &filter, limit, last.as_deref());
            return Ok(());
        }
        let thermal = if stored.is_running()? { state.control.thermal(id) } else { None };
        sandboxes.push(listings.text(&stored, id, thermal, |row| listed(isolation, thermal, row))?);
        if limit.is_some() {
            last = Some(cursor(stored.created_at()?, id));
        }
        Ok(())
    })?;
    drop(listings);
    Ok(with_link(sandboxes, next))
}

/// Returns the `Link` header of the page after the sandbox with the cursor `last`.
fn next_page(
    path: &str,
    filter: &SandboxFilter,
    limit: Option<u32>,
    last: Option<&str>,
) -> Option<HeaderValue> {
    let limit = limit?.to_string();
    let labels: Vec<_> =
        filter.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let mut query = vec![("limit", limit.as_str()), ("after", last?)];
    query.extend(labels.iter().map(|label| ("label", label.as_str())));
    next_link(path, &query)
}

/// Selects the behavior if the name is taken.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct CreateQuery {
    /// With `return`, if a sandbox of that name exists, it is the response, with the header
    /// `X-Bhatti-Existing: true`.
    if_exists: Option<IfExists>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum IfExists {
    Return,
}

/// Creates a sandbox and waits until it can be used.
#[utoipa::path(post, path = "/sandboxes", tag = "sandboxes", params(IdempotencyKey, CreateQuery), request_body = CreateSandbox,
    responses((status = 201, body = Sandbox), (status = 200, body = Sandbox, description = "A sandbox of that name already exists."),
        (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiQuery(query): ApiQuery<CreateQuery>,
    LargeJson { value: request, part: _part }: LargeJson<CreateSandbox>,
) -> Result<Response, ApiError> {
    let template = match &request.template {
        Some(id_or_name) => {
            let found = state.control.find_template(owner, id_or_name)?;
            Some(found.ok_or_else(|| {
                ApiError::new(ErrorCode::NotFound, format!("template `{id_or_name}` not found"))
            })?)
        }
        None => None,
    };
    let request = parse::create(request, template)?;
    let name = request.name.clone();
    match state.control.create(owner, request).await {
        Ok(row) => Ok(created(Json(sandbox(&state, row)))),
        Err(CreateError::NameTaken(taken)) if query.if_exists == Some(IfExists::Return) => {
            let name = name.map_or_else(|| taken.to_string(), |name| name.to_string());
            let row = state.control.find(owner, &name)?;
            let existing = HeaderMap::from_iter([(
                axum::http::HeaderName::from_static(EXISTING),
                HeaderValue::from_static("true"),
            )]);
            Ok((existing, Json(sandbox(&state, row))).into_response())
        }
        Err(error) => Err(error.into()),
    }
}

/// Returns a sandbox.
#[utoipa::path(get, path = "/sandboxes/{sandbox}", tag = "sandboxes", params(("sandbox" = String, Path)),
    responses((status = 200, body = Sandbox), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
) -> Result<Json<Sandbox>, ApiError> {
    let row = state.control.find(owner, &id_or_name)?;
    Ok(Json(sandbox(&state, row)))
}

/// Changes a sandbox's name, labels, time limit, or whether it stays hot.
#[utoipa::path(patch, path = "/sandboxes/{sandbox}", tag = "sandboxes", params(("sandbox" = String, Path)),
    request_body = UpdateSandbox, responses((status = 200, body = Sandbox), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn update(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiJson(request): ApiJson<UpdateSandbox>,
) -> Result<Json<Sandbox>, ApiError> {
    let UpdateSandbox { name, labels, keep_hot, timeout_sec, on_timeout } = request;
    let limit = parse::time_limit(timeout_sec, on_timeout.as_deref())?;
    let mut row = state.control.find(owner, &id_or_name)?;
    let change = SandboxChange { name: parse::name(name)?, labels };
    if change != SandboxChange::default() {
        row = state.control.edit(owner, &row.id.to_string(), change)?;
    }
    if let Some(keep_hot) = keep_hot {
        row = state.control.set_keep_hot(owner, &row.id.to_string(), keep_hot).await?;
    }
    if limit != TimeLimitChange::default() {
        row = state.control.change_time_limit(owner, &row.id.to_string(), limit).await?;
    }
    Ok(Json(sandbox(&state, row)))
}

/// Pauses a sandbox until the next request that uses it.
#[utoipa::path(post, path = "/sandboxes/{sandbox}/pause", tag = "sandboxes", params(("sandbox" = String, Path)),
    responses((status = 200, body = Sandbox), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn pause(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
) -> Result<Json<Sandbox>, ApiError> {
    let row = state.control.pause(owner, &id_or_name).await?;
    Ok(Json(sandbox(&state, row)))
}

/// Makes a sandbox hot. A stopped sandbox must be started instead.
#[utoipa::path(post, path = "/sandboxes/{sandbox}/resume", tag = "sandboxes", params(("sandbox" = String, Path)),
    responses((status = 200, body = Sandbox), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn resume(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
) -> Result<Json<Sandbox>, ApiError> {
    let row = state.control.resume(owner, &id_or_name).await?;
    Ok(Json(sandbox(&state, row)))
}

/// Stops a sandbox.
///
/// The sandbox is saved with its memory and processes, and its VM ends until the sandbox is
/// started. An engine that cannot save memory ends the processes.
#[utoipa::path(post, path = "/sandboxes/{sandbox}/stop", tag = "sandboxes", params(("sandbox" = String, Path)),
    responses((status = 200, body = Sandbox), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn stop(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
) -> Result<Json<Sandbox>, ApiError> {
    let row = state.control.stop(owner, &id_or_name).await?;
    Ok(Json(sandbox(&state, row)))
}

/// Starts a stopped sandbox.
#[utoipa::path(post, path = "/sandboxes/{sandbox}/start", tag = "sandboxes", params(("sandbox" = String, Path)),
    request_body = StartSandbox, responses((status = 200, body = Sandbox), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn start(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiJson(request): ApiJson<StartSandbox>,
) -> Result<Json<Sandbox>, ApiError> {
    let row = state.control.start(owner, &id_or_name, request.cold_boot).await?;
    Ok(Json(sandbox(&state, row)))
}

/// Forks a sandbox with its memory, its processes and its disk. The parent keeps running.
#[utoipa::path(post, path = "/sandboxes/{sandbox}/fork", tag = "sandboxes", params(IdempotencyKey, ("sandbox" = String, Path)),
    request_body = ForkSandbox, responses((status = 201, body = Forks), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn fork(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiJson(request): ApiJson<ForkSandbox>,
) -> Result<Response, ApiError> {
    let ForkSandbox { count, name, env, inherit_env, secrets, labels } = request;
    let request = ForkRequest {
        count,
        name: parse::name(name)?,
        environment: Environment::try_from(env).map_err(|error| ApiError::bad_request(&error))?,
        inherit_environment: inherit_env,
        labels: parse::labels(labels)?,
        secrets: parse::secrets(&secrets)?,
        ..ForkRequest::default()
    };
    let forked = state.control.fork(owner, &id_or_name, request).await?;
    Ok(created(Json(Forks {
        sandboxes: forked.sandboxes.into_iter().map(|row| sandbox(&state, row)).collect(),
        parent_paused_us: u64::try_from(forked.paused.as_micros()).unwrap_or(u64::MAX),
        memory_bytes: forked.snapshot.memory_bytes,
    })))
}

/// Destroys a sandbox, and waits until all of it is removed.
#[utoipa::path(delete, path = "/sandboxes/{sandbox}", tag = "sandboxes", params(("sandbox" = String, Path)),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn destroy(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
) -> Result<Json<Deleted>, ApiError> {
    state.control.destroy(owner, &id_or_name).await?;
    Ok(Json(Deleted { status: "destroyed".to_owned() }))
}

/// Finds a sandbox of `owner` by id or name. A sandbox of another user gives the same error as
/// one that does not exist.
pub(super) fn find(
    state: &AppState,
    owner: UserId,
    id_or_name: &str,
) -> Result<SandboxRow, ApiError> {
    Ok(state.control.find(owner, id_or_name)?)
}

/// Describes a sandbox with all that is known of it.
pub(super) fn sandbox(state: &AppState, mut row: SandboxRow) -> Sandbox {
    let identity = row.identity.take();
    let identity = identity.and_then(|report| serde_json::from_str(&report).ok());
    let thermal = state.control.thermal(row.id);
    Sandbox { identity, ..listed(isolation(state), thermal, row) }
}

/// Returns how the engine separates a sandbox from its host and from other sandboxes.
fn isolation(state: &AppState) -> Isolation {
    if state.control.capabilities().shares_kernel { Isolation::Container } else { Isolation::Vm }
}

/// Describes a sandbox as lists show it.
fn listed(isolation: Isolation, thermal: Option<Thermal>, row: SandboxRow) -> Sandbox {
    let reason = match row.state {
        SandboxState::Failed(reason) => Some(reason.to_string()),
        SandboxState::Creating
        | SandboxState::Running
        | SandboxState::Stopped
        | SandboxState::Destroyed => None,
    };
    Sandbox {
        id: row.id.to_string(),
        name: row.spec.name.into(),
        isolation,
        status: row.state.as_str().to_owned(),
        thermal: thermal.map(|thermal| thermal.as_str().to_owned()),
        reason,
        cpus: row.spec.cpus.get().into(),
        memory_mb: row.spec.memory.get().into(),
        disk_mb: row.spec.disk.map(|disk| disk.get().into()),
        env: row.spec.environment.into_map(),
        keep_hot: row.spec.keep_hot,
        labels: row.spec.labels.into_map(),
        secrets: row.spec.secrets.iter().map(ToString::to_string).collect(),
        image: row.spec.image.into(),
        network: row.spec.network.mode.as_str().to_owned(),
        network_allow: row.spec.network.allow.to_texts(),
        volumes: row.volumes.iter().map(super::volumes::attached).collect(),
        ip: row.address.map(|address| address.to_string()),
        created_by: row.owner.to_string(),
        created_at: row.created_at,
        stopped_at: row.stopped_at,
        expires_at: row.time_limit.expires_at.map(rfc3339),
        on_timeout: row
            .time_limit
            .expires_at
            .map(|_| row.time_limit.on_timeout.as_str().to_owned()),
        origin: row.origin,
        identity: None,
    }
}
