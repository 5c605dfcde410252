//! `/keys`: the caller's API keys, and `/users/{user}/keys`: any user's, for the admin.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use bhatti_api::{ApiKey, CreateKey, CreatedKey, Deleted, ErrorCode, KeyScope};
use bhatti_edge::{Identity, generate_key, hash_key};
use bhatti_store::{KeyRow, StoreError};
use bhatti_types::{KeyName, UserId};

use super::users::find;
use crate::AppState;
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::json::{ApiJson, Json};
use crate::page::{Page, PageQuery, Paging, cursor};
use crate::status::{ApiError, created};
use crate::times::rfc3339;

/// Lists the caller's API keys.
#[utoipa::path(get, path = "/keys", tag = "keys", params(PageQuery),
    responses((status = 200, body = Vec<ApiKey>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    paging: Paging,
) -> Result<Page<ApiKey>, ApiError> {
    keys_of(&state, owner, paging)
}

/// Creates an API key for the caller. Only this response contains the key. It does not outlive the
/// key that creates it.
#[utoipa::path(post, path = "/keys", tag = "keys", request_body = CreateKey,
    responses((status = 201, body = CreatedKey), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(identity): Extension<Identity>,
    ApiJson(request): ApiJson<CreateKey>,
) -> Result<Response, ApiError> {
    create_for(&state, identity.user(), identity.expires_at(), request)
}

/// Deletes an API key of the caller. Everything that it opened ends.
#[utoipa::path(delete, path = "/keys/{key}", tag = "keys", params(("key" = String, Path, description = "Name of the key")),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<Deleted>, ApiError> {
    delete_of(&state, owner, &name)
}

/// Lists a user's API keys. Admin only.
#[utoipa::path(get, path = "/users/{user}/keys", tag = "keys", params(PageQuery, ("user" = String, Path, description = "Name of the user")),
    responses((status = 200, body = Vec<ApiKey>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list_of_user(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiPath(user): ApiPath<String>,
    paging: Paging,
) -> Result<Page<ApiKey>, ApiError> {
    keys_of(&state, find(&state, caller, &user)?.id, paging)
}

/// Creates an API key for a user. Only this response contains the key. Admin only.
#[utoipa::path(post, path = "/users/{user}/keys", tag = "keys", params(("user" = String, Path, description = "Name of the user")),
    request_body = CreateKey, responses((status = 201, body = CreatedKey), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn create_for_user(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiPath(user): ApiPath<String>,
    ApiJson(request): ApiJson<CreateKey>,
) -> Result<Response, ApiError> {
    create_for(&state, find(&state, caller, &user)?.id, None, request)
}

/// Deletes an API key of a user. Everything that it opened ends. Admin only.
#[utoipa::path(delete, path = "/users/{user}/keys/{key}", tag = "keys",
    params(("user" = String, Path, description = "Name of the user"), ("key" = String, Path, description = "Name of the key")),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn delete_of_user(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiPath((user, name)): ApiPath<(String, String)>,
) -> Result<Json<Deleted>, ApiError> {
    delete_of(&state, find(&state, caller, &user)?.id, &name)
}

fn keys_of(state: &AppState, owner: UserId, paging: Paging) -> Result<Page<ApiKey>, ApiError> {
    let rows = state.control.list_keys(Some(owner))?;
    let page = paging.by_key(rows, |row| cursor(&row.created_at, &row.name));
    Ok(page.map(|row| key(state, row)))
}

/// Creates a key that ends at `latest_end` (seconds since 1970) or earlier.
fn create_for(
    state: &AppState,
    owner: UserId,
    latest_end: Option<u64>,
    request: CreateKey,
) -> Result<Response, ApiError> {
    if owner == UserId::ADMIN {
        let message = "the admin has no API keys: the Unix socket is the admin's identity";
        return Err(ApiError::new(ErrorCode::Forbidden, message)
            .hint("create a user, or create a key for one: POST /users/{user}/keys"));
    }
    let CreateKey { name, scope, expires_in_sec } = request;
    let name: KeyName = name.parse().map_err(|error| ApiError::bad_request(&error))?;
    if expires_in_sec == Some(0) {
        return Err(ApiError::new(ErrorCode::BadRequest, "`expires_in_sec` must be at least 1"));
    }
    let expires_at = expires_in_sec.map(|seconds| {
        let end = SystemTime::now() + Duration::from_secs(seconds.into());
        end.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
    });
    let expires_at = expires_at.into_iter().chain(latest_end).min();
    let scope = match scope {
        KeyScope::Full => bhatti_types::KeyScope::Full,
        KeyScope::Read => bhatti_types::KeyScope::Read,
    };
    let api_key = generate_key()?;
    let _changing = state.changing_keys.lock();
    let row = state.control.create_key(owner, name, hash_key(&api_key), scope, expires_at)?;
    state.keyring.insert(&row);
    Ok(created(Json(CreatedKey { key: key(state, row), api_key })))
}

fn delete_of(state: &AppState, owner: UserId, name: &str) -> Result<Json<Deleted>, ApiError> {
    let _changing = state.changing_keys.lock();
    state.control.delete_key(owner, name).map_err(|error| match error {
        StoreError::NoSuchRow => {
            ApiError::new(ErrorCode::NotFound, format!("key `{name}` not found"))
        }
        error => error.into(),
    })?;
    state.keyring.revoke(owner, name);
    Ok(Json(Deleted { status: "deleted".to_owned() }))
}

fn key(state: &AppState, row: KeyRow) -> ApiKey {
    let used = state.keyring.used_at(row.owner, &row.name);
    let used = Some(used.max(row.last_used_at.unwrap_or_default())).filter(|used| *used > 0);
    ApiKey {
        name: row.name,
        scope: match row.scope {
            bhatti_types::KeyScope::Full => KeyScope::Full,
            bhatti_types::KeyScope::Read => KeyScope::Read,
        },
        created_at: row.created_at,
        expires_at: row.expires_at.map(rfc3339),
        last_used_at: used.map(rfc3339),
    }
}
