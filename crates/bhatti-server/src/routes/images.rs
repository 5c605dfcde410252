//! `/images`.

use axum::Json;
use axum::extract::State;
use bhatti_api::{ErrorCode, Image};
use bhatti_image::DEFAULT_IMAGE;

use crate::AppState;
use crate::extract::ApiPath;
use crate::status::ApiError;

/// Lists the images that sandboxes can begin as.
#[utoipa::path(get, path = "/images", tag = "images",
    responses((status = 200, body = Vec<Image>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Vec<Image>>, ApiError> {
    Ok(Json(all(&state)?))
}

/// One image.
#[utoipa::path(get, path = "/images/{image}", tag = "images", params(("image" = String, Path)),
    responses((status = 200, body = Image), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<Image>, ApiError> {
    let found = all(&state)?.into_iter().find(|image| image.name == name);
    let missing = || ApiError::new(ErrorCode::NotFound, format!("image `{name}` not found"));
    found.map(Json).ok_or_else(missing)
}

fn all(state: &AppState) -> Result<Vec<Image>, ApiError> {
    let names = state.images.images().map_err(|error| ApiError::internal(&error))?;
    let image = |name: String| Image { is_default: name == DEFAULT_IMAGE, name };
    Ok(names.into_iter().map(image).collect())
}
