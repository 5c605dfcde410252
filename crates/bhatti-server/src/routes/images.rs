//! `/images`.

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use bhatti_api::{Deleted, ErrorCode, IMAGE_BYTES_MAX, Image};
use bhatti_image::{DEFAULT_IMAGE, ImageSummary, ImportError, RemoveError, SetupError};
use bhatti_types::ImageName;
use futures_util::StreamExt;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use utoipa::IntoParams;

use crate::AppState;
use crate::auth::Caller;
use crate::extract::{ApiPath, ApiQuery};
use crate::json::Json;
use crate::page::{Page, PageQuery, Paging};
use crate::status::{ApiError, created};

/// Lists the images that sandboxes can start from.
#[utoipa::path(get, path = "/images", tag = "images", params(PageQuery),
    responses((status = 200, body = Vec<Image>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    paging: Paging,
) -> Result<Page<Image>, ApiError> {
    paging.in_order(all(&state)?, |image| &image.name)
}

/// Returns an image.
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

/// Names the image to import.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ImportQuery {
    /// Name of the image.
    name: String,
}

/// Creates an image from a tar archive.
///
/// The archive holds a root file system, what `docker save` writes for one image, or an OCI
/// layout. It may be compressed with gzip, xz or zstd. Nothing in it is run. Admin only.
#[utoipa::path(post, path = "/images/import", tag = "images", params(ImportQuery),
    request_body(content = Vec<u8>, content_type = "application/x-tar"),
    responses((status = 201, body = Image), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn import(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiQuery(ImportQuery { name }): ApiQuery<ImportQuery>,
    body: Body,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let name: ImageName = name.parse().map_err(|error| ApiError::bad_request(&error))?;
    if all(&state)?.iter().any(|image| image.name == name.as_str()) {
        let message = format!("image `{name}` already exists");
        return Err(ApiError::new(ErrorCode::NameTaken, message).hint("choose another name"));
    }
    let upload = state.images.upload().map_err(|error| ApiError::internal(&error))?;
    let archive = receive(body, upload).await?;
    let made = state.images.import(&name, archive).await?;
    state.control.record(
        "image.imported",
        caller.0,
        None,
        serde_json::json!({ "image": name.as_str() }),
    );
    Ok(created(Json(image(made))))
}

/// Writes a request's body into a file.
async fn receive(body: Body, upload: std::fs::File) -> Result<std::fs::File, ApiError> {
    let failed = |error: std::io::Error| ApiError::internal(&error);
    let mut file = tokio::fs::File::from_std(upload);
    let (mut content, mut received) = (body.into_data_stream(), 0);
    while let Some(piece) = content.next().await {
        let broken = |_| {
            ApiError::new(
                ErrorCode::BadRequest,
                "the upload broke off before the end of the archive",
            )
        };
        let piece = piece.map_err(broken)?;
        received += piece.len() as u64;
        if received > IMAGE_BYTES_MAX {
            let message = format!("the archive is larger than {IMAGE_BYTES_MAX} bytes");
            return Err(ApiError::new(ErrorCode::BodyTooLarge, message));
        }
        file.write_all(&piece).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    Ok(file.into_std().await)
}

/// Deletes an image that no sandbox, snapshot or template uses. Admin only.
#[utoipa::path(delete, path = "/images/{image}", tag = "images", params(("image" = String, Path)),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<Deleted>, ApiError> {
    caller.require_admin()?;
    let missing = |_| ApiError::new(ErrorCode::NotFound, format!("image `{name}` not found"));
    let image: ImageName = name.parse().map_err(missing)?;
    if let Some(user) = state.control.image_user(&image)? {
        let message = format!("image `{image}` is in use by {user}");
        return Err(
            ApiError::new(ErrorCode::WrongState, message).hint("destroy or delete that first")
        );
    }
    let (images, removed) = (state.images.clone(), image.clone());
    let removal = tokio::task::spawn_blocking(move || images.remove(&removed)).await;
    removal.map_err(|error| ApiError::internal(&error))??;
    state.control.record(
        "image.deleted",
        caller.0,
        None,
        serde_json::json!({ "image": image.as_str() }),
    );
    Ok(Json(Deleted { status: "deleted".to_owned() }))
}

impl From<ImportError> for ApiError {
    fn from(error: ImportError) -> Self {
        match &error {
            ImportError::NameTaken(_) => {
                Self::new(ErrorCode::NameTaken, error.to_string()).hint("choose another name")
            }
            ImportError::Archive { .. } => Self::new(ErrorCode::BadRequest, error.to_string())
                .hint("send a tar of a root file system (`docker export`), of one image (`docker save`) or of an OCI layout, plain or compressed with gzip, xz or zstd"),
            ImportError::TooLarge(_) | ImportError::WrongLayer(_) => Self::new(ErrorCode::BadRequest, error.to_string()),
            ImportError::Build(SetupError::DiskFull { .. }) => disk_full(),
            error if error.is_disk_full() => disk_full(),
            ImportError::Host(_) | ImportError::File(_) | ImportError::Build(_) | ImportError::Store(_) => {
                Self::internal(&error)
            }
        }
    }
}

fn disk_full() -> ApiError {
    ApiError::new(ErrorCode::Busy, "the disk of the daemon's host has no space for the image")
}

impl From<RemoveError> for ApiError {
    fn from(error: RemoveError) -> Self {
        match &error {
            RemoveError::NotFound(_) => Self::new(ErrorCode::NotFound, error.to_string()),
            RemoveError::IsDefault(_) => Self::new(ErrorCode::WrongState, error.to_string()),
            RemoveError::Store(_) => Self::internal(&error),
        }
    }
}

fn all(state: &AppState) -> Result<Vec<Image>, ApiError> {
    let images = state.images.summaries().map_err(|error| ApiError::internal(&error))?;
    Ok(images.into_iter().map(image).collect())
}

fn image(summary: ImageSummary) -> Image {
    Image {
        is_default: summary.name == DEFAULT_IMAGE,
        name: summary.name,
        size_mb: summary.size_bytes >> 20,
        disk_bytes: summary.disk_bytes,
        source: summary.source,
    }
}
