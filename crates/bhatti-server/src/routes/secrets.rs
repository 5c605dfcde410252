//! `/secrets`.

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use bhatti_api::{Deleted, Secret, SetSecret};
use bhatti_store::SecretRow;

use crate::AppState;
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::json::{ApiJson, Json};
use crate::page::{Page, PageQuery, Paging};
use crate::status::{ApiError, created};

/// Lists the caller's secrets by name. No request returns their values.
#[utoipa::path(get, path = "/secrets", tag = "secrets", params(PageQuery),
    responses((status = 200, body = Vec<Secret>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    paging: Paging,
) -> Result<Page<Secret>, ApiError> {
    let secrets = state.control.list_secrets(owner)?;
    Ok(paging.by_key(secrets, |row| row.name.clone()).map(secret))
}

/// Creates or replaces a secret. Sandboxes that have the secret keep the earlier value.
#[utoipa::path(post, path = "/secrets", tag = "secrets", request_body = SetSecret,
    responses((status = 201, body = Secret), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn set(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiJson(request): ApiJson<SetSecret>,
) -> Result<Response, ApiError> {
    let SetSecret { name, value } = request;
    let name = name.parse().map_err(|error| ApiError::bad_request(&error))?;
    Ok(created(Json(secret(state.control.set_secret(owner, &name, &value)?))))
}

/// Deletes a secret. Sandboxes that have the secret keep it.
#[utoipa::path(delete, path = "/secrets/{name}", tag = "secrets", params(("name" = String, Path)),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<Deleted>, ApiError> {
    state.control.delete_secret(owner, &name)?;
    Ok(Json(Deleted { status: "deleted".to_owned() }))
}

fn secret(row: SecretRow) -> Secret {
    Secret { name: row.name, created_at: row.created_at, updated_at: row.updated_at }
}
