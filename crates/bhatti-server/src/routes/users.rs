//! `/users`, and the tickets with which users open WebSockets.

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use bhatti_api::{CreateUser, CreatedUser, Deleted, ErrorCode, Limits, Ticket, UpdateUser, User};
use bhatti_edge::{Identity, TICKET_GOOD_FOR, generate_key, hash_key};
use bhatti_store::UserRow;
use bhatti_types::{Quota, UserId, UserName};

use crate::AppState;
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::json::{ApiJson, Json};
use crate::page::{Page, PageQuery, Paging, cursor};
use crate::status::{ApiError, created};

/// Lists all users, oldest first. Admin only.
#[utoipa::path(get, path = "/users", tag = "users", params(PageQuery),
    responses((status = 200, body = Vec<User>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    paging: Paging,
) -> Result<Page<User>, ApiError> {
    caller.require_admin()?;
    let users = state.control.list_users()?;
    Ok(paging.by_key(users, |row| cursor(&row.created_at, row.id)).map(user))
}

/// Creates a user. Only this response contains the user's API key. Admin only.
#[utoipa::path(post, path = "/users", tag = "users", request_body = CreateUser,
    responses((status = 201, body = CreatedUser), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiJson(request): ApiJson<CreateUser>,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let CreateUser {
        name,
        max_sandboxes,
        max_cpus_per_sandbox,
        max_memory_mb_per_sandbox,
        max_snapshots,
        max_volume_mb,
        max_disk_mb,
    } = request;
    let name: UserName = name.parse().map_err(|error| ApiError::bad_request(&error))?;
    let quota = Quota {
        sandboxes: max_sandboxes.or(Quota::USUAL.sandboxes),
        cpus_per_sandbox: max_cpus_per_sandbox.or(Quota::USUAL.cpus_per_sandbox),
        memory_mib_per_sandbox: max_memory_mb_per_sandbox.or(Quota::USUAL.memory_mib_per_sandbox),
        snapshots: max_snapshots.or(Quota::USUAL.snapshots),
        volumes_mib: max_volume_mb.or(Quota::USUAL.volumes_mib),
        disk_mib: max_disk_mb.or(Quota::USUAL.disk_mib),
    };
    let api_key = generate_key()?;
    let id = UserId::from_entropy(getrandom::u64()?.to_be_bytes());
    let _changing = state.changing_keys.lock();
    let (row, key) = state.control.create_user(name, id, &hash_key(&api_key), quota)?;
    state.keyring.insert(&key);
    Ok(created(Json(with_key(row, api_key))))
}

/// Returns a user. Admin only.
#[utoipa::path(get, path = "/users/{user}", tag = "users", params(("user" = String, Path, description = "Name of the user")),
    responses((status = 200, body = User), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<User>, ApiError> {
    Ok(Json(user(find(&state, caller, &name)?)))
}

/// Changes a user's limits. Admin only.
#[utoipa::path(patch, path = "/users/{user}", tag = "users", params(("user" = String, Path, description = "Name of the user")),
    request_body = UpdateUser, responses((status = 200, body = User), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn update(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
    ApiJson(request): ApiJson<UpdateUser>,
) -> Result<Json<User>, ApiError> {
    let row = find(&state, caller, &name)?;
    not_the_admin(&row)?;
    let UpdateUser {
        max_sandboxes,
        max_cpus_per_sandbox,
        max_memory_mb_per_sandbox,
        max_snapshots,
        max_volume_mb,
        max_disk_mb,
    } = request;
    let before = row.quota;
    let quota = Quota {
        sandboxes: max_sandboxes.or(before.sandboxes),
        cpus_per_sandbox: max_cpus_per_sandbox.or(before.cpus_per_sandbox),
        memory_mib_per_sandbox: max_memory_mb_per_sandbox.or(before.memory_mib_per_sandbox),
        snapshots: max_snapshots.or(before.snapshots),
        volumes_mib: max_volume_mb.or(before.volumes_mib),
        disk_mib: max_disk_mb.or(before.disk_mib),
    };
    state.control.set_quota(&row, quota)?;
    Ok(Json(user(UserRow { quota, ..row })))
}

/// Deletes a user that owns nothing. Admin only.
#[utoipa::path(delete, path = "/users/{user}", tag = "users", params(("user" = String, Path, description = "Name of the user")),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<Deleted>, ApiError> {
    let row = find(&state, caller, &name)?;
    not_the_admin(&row)?;
    state.control.admit_delete_user(&row)?;
    state.control.forget_hidden_snapshots(row.id).await?;
    let _changing = state.changing_keys.lock();
    state.control.delete_user(&row)?;
    state.keyring.revoke_all(row.id);
    Ok(Json(Deleted { status: "deleted".to_owned() }))
}

/// Replaces all API keys of a user by a new one. The old keys become invalid. Admin only.
#[utoipa::path(post, path = "/users/{user}/rotate-key", tag = "users", params(("user" = String, Path, description = "Name of the user")),
    responses((status = 200, body = CreatedUser), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn rotate_key(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<CreatedUser>, ApiError> {
    let row = find(&state, caller, &name)?;
    not_the_admin(&row)?;
    let api_key = generate_key()?;
    let _changing = state.changing_keys.lock();
    let key = state.control.replace_keys(&row, hash_key(&api_key))?;
    // Streams that were opened with the old keys end.
    state.keyring.revoke_all(row.id);
    state.keyring.insert(&key);
    Ok(Json(with_key(row, api_key)))
}

/// Issues a ticket. With `?ticket=`, a client that cannot set headers opens one WebSocket.
#[utoipa::path(post, path = "/ws-ticket", tag = "users",
    responses((status = 201, body = Ticket), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn ticket(
    State(state): State<AppState>,
    Extension(identity): Extension<Identity>,
) -> Result<Response, ApiError> {
    let ticket = state.tickets.issue(identity)?;
    let expires_in_sec = u32::try_from(TICKET_GOOD_FOR.as_secs()).unwrap_or(u32::MAX);
    Ok(created(Json(Ticket { ticket, expires_in_sec })))
}

pub(super) fn find(state: &AppState, caller: Caller, name: &str) -> Result<UserRow, ApiError> {
    caller.require_admin()?;
    let found = state.control.find_user(name)?;
    found.ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("user `{name}` not found")))
}

fn not_the_admin(row: &UserRow) -> Result<(), ApiError> {
    if row.id != UserId::ADMIN {
        return Ok(());
    }
    let message =
        "the admin owns this machine: the admin has no key and no limits, and cannot be deleted";
    Err(ApiError::new(ErrorCode::BadRequest, message))
}

fn with_key(row: UserRow, api_key: String) -> CreatedUser {
    CreatedUser { id: row.id.to_string(), name: row.name, created_at: row.created_at, api_key }
}

fn user(row: UserRow) -> User {
    let Quota {
        sandboxes,
        cpus_per_sandbox,
        memory_mib_per_sandbox,
        snapshots,
        volumes_mib,
        disk_mib,
    } = row.quota;
    User {
        id: row.id.to_string(),
        name: row.name,
        created_at: row.created_at,
        limits: Limits {
            max_sandboxes: sandboxes,
            max_cpus_per_sandbox: cpus_per_sandbox,
            max_memory_mb_per_sandbox: memory_mib_per_sandbox,
            max_snapshots: snapshots,
            max_volume_mb: volumes_mib,
            max_disk_mb: disk_mib,
        },
    }
}
