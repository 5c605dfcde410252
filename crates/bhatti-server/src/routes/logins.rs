//! `/registry-logins`.

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use bhatti_api::{Deleted, SetRegistryLogin, StoredLogin};
use bhatti_control::Login;
use bhatti_node::Credentials;

use crate::AppState;
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::json::{ApiJson, Json};
use crate::page::{Page, PageQuery, Paging};
use crate::status::{ApiError, created};

/// Lists the caller's logins at registries, by registry. No request returns their passwords.
#[utoipa::path(get, path = "/registry-logins", tag = "registry-logins", params(PageQuery),
    responses((status = 200, body = Vec<StoredLogin>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    paging: Paging,
) -> Result<Page<StoredLogin>, ApiError> {
    let logins = state.control.list_logins(owner)?;
    Ok(paging.by_key(logins, |login| login.registry.clone()).map(describe))
}

/// Stores a login at a registry, after the registry has accepted it. Pulls, pushes and builds of
/// the caller use it.
#[utoipa::path(post, path = "/registry-logins", tag = "registry-logins", request_body = SetRegistryLogin,
    responses((status = 201, body = StoredLogin), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn set(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiJson(request): ApiJson<SetRegistryLogin>,
) -> Result<Response, ApiError> {
    let SetRegistryLogin { registry, username: user, password } = request;
    let login = state.control.log_in(owner, &registry, Credentials { user, password }).await?;
    Ok(created(Json(describe(login))))
}

/// Deletes a login at a registry.
#[utoipa::path(delete, path = "/registry-logins/{registry}", tag = "registry-logins", params(("registry" = String, Path)),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(registry): ApiPath<String>,
) -> Result<Json<Deleted>, ApiError> {
    state.control.log_out(owner, &registry)?;
    Ok(Json(Deleted { status: "deleted".to_owned() }))
}

fn describe(login: Login) -> StoredLogin {
    let Login { registry, user: username, created_at, updated_at } = login;
    StoredLogin { registry, username, created_at, updated_at }
}
