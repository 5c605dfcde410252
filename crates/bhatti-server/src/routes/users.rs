//! `/users`.

use axum::extract::State;
use axum::response::Response;
use axum::{Extension, Json};
use bhatti_api::{CreateUser, CreatedUser, ErrorCode, User};
use bhatti_types::{UserId, UserName};

use crate::auth::Caller;
use crate::json::ApiJson;
use crate::status::{ApiError, created};
use crate::{AppState, keys};

pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Vec<User>>, ApiError> {
    caller.require_admin()?;
    let users = state.store.list_users()?.into_iter();
    Ok(Json(
        users
            .map(|row| User { id: row.id.to_string(), name: row.name, created_at: row.created_at })
            .collect(),
    ))
}

pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiJson(request): ApiJson<CreateUser>,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let name: UserName = request.name.parse().map_err(|error| ApiError::bad_request(&error))?;
    let no_entropy = |_| ApiError::new(ErrorCode::Internal, "this host gives no random bytes");
    let api_key = keys::generate().map_err(no_entropy)?;
    let id = UserId::from_entropy(getrandom::u64().map_err(no_entropy)?.to_be_bytes());
    let row = state.store.insert_user(name, id, &keys::hash(&api_key))?;
    Ok(created(CreatedUser {
        id: row.id.to_string(),
        name: row.name,
        created_at: row.created_at,
        api_key,
    }))
}
