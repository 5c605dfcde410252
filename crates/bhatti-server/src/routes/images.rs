//! `/images`.

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bhatti_api::{
    Deleted, ErrorCode, IMAGE_BYTES_MAX, Image, ImageSettings, Operation, PrunedImages, PullImage,
    PushImage, RegistryLogin, SaveImage, TagImage,
};
use bhatti_control::UsableImage;
use bhatti_node::Credentials;
use bhatti_store::ImageRow;
use bhatti_types::{DEFAULT_IMAGE, ImageConfig, ImageName, UserId};
use futures_util::StreamExt;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;
use utoipa::IntoParams;

use super::operations::describe;
use crate::AppState;
use crate::auth::Caller;
use crate::extract::{ApiPath, ApiQuery};
use crate::json::{ApiJson, Json};
use crate::page::{Page, PageQuery, Paging};
use crate::status::{ApiError, accepted, created};
use crate::times::rfc3339;

/// Maximum length of a reference in a request, in characters, as its description says.
const REFERENCE_CHARS_MAX: usize = 200;

/// Size of the pieces of an exported image, in bytes.
const PIECE_BYTES: usize = 64 << 10;

/// Lists the images that the caller's sandboxes can start from.
#[utoipa::path(get, path = "/images", tag = "images", params(PageQuery),
    responses((status = 200, body = Vec<Image>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(user)): Extension<Caller>,
    paging: Paging,
) -> Result<Page<Image>, ApiError> {
    let images = state.control.list_images(user)?;
    let images = images.into_iter().map(|found| image(found, user)).collect();
    paging.in_order(images, |image: &Image| &image.name)
}

/// Returns an image, by its name or by a reference in any form.
#[utoipa::path(get, path = "/images/{image}", tag = "images", params(("image" = String, Path)),
    responses((status = 200, body = Image), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(Caller(user)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<Image>, ApiError> {
    let found = state.control.usable_image(user, &name)?;
    let (mut shared_with, mut config) = (Vec::new(), None);
    if let UsableImage::Owned(row) | UsableImage::Shared { row, .. } = &found {
        config = Some(settings(row.config.clone()));
        if row.owner == user {
            shared_with = state.control.image_shares(row)?;
        }
    }
    Ok(Json(Image { shared_with, config, ..image(found, user) }))
}

/// Names the image to import.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ImportQuery {
    /// Name of the image.
    name: String,
}

/// Creates an image of the caller from a tar archive.
///
/// The archive holds a root file system, what `docker save` writes for one image, or an OCI
/// layout. It may be compressed with gzip, xz or zstd. Nothing in it is run.
#[utoipa::path(post, path = "/images/import", tag = "images", params(ImportQuery),
    request_body(content = Vec<u8>, content_type = "application/x-tar"),
    responses((status = 201, body = Image), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn import(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiQuery(ImportQuery { name }): ApiQuery<ImportQuery>,
    body: Body,
) -> Result<Response, ApiError> {
    let name: ImageName = name.parse().map_err(|error| ApiError::bad_request(&error))?;
    let bytes_max = state.control.admit_import(owner, &name).await?;
    let bytes_max = bytes_max.unwrap_or(u64::MAX).min(IMAGE_BYTES_MAX);
    let archive = receive(body, state.control.image_upload()?, bytes_max).await?;
    let made = state.control.import_image(owner, name, archive).await?;
    Ok(created(Json(image(UsableImage::Owned(made), owner))))
}

/// Writes a request's body into a file.
async fn receive(
    body: Body,
    upload: std::fs::File,
    bytes_max: u64,
) -> Result<std::fs::File, ApiError> {
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
        if received > bytes_max {
            let message = format!("the archive is larger than {bytes_max} bytes");
            return Err(ApiError::new(ErrorCode::BodyTooLarge, message));
        }
        file.write_all(&piece).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    Ok(file.into_std().await)
}

/// Begins to pull an image from its registry, or joins the caller's operation that pulls it.
///
/// The image becomes the caller's, under its whole reference. A reference that the caller has
/// already then names what the registry has now.
#[utoipa::path(post, path = "/images/pull", tag = "images", request_body = PullImage,
    responses((status = 202, body = Operation), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn pull(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiJson(request): ApiJson<PullImage>,
) -> Result<Response, ApiError> {
    let PullImage { image, login } = request;
    check_reference(&image)?;
    let operation = state.control.pull_image(owner, &image, credentials(login))?;
    Ok(accepted(Json(describe(&operation))))
}

/// Begins to save the root file system of a sandbox as an image of the caller, or joins the
/// operation that does so.
///
/// The sandbox may run or be stopped. The image has the settings of the sandbox's image.
#[utoipa::path(post, path = "/images/save", tag = "images", request_body = SaveImage,
    responses((status = 202, body = Operation), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn save(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiJson(SaveImage { sandbox, name }): ApiJson<SaveImage>,
) -> Result<Response, ApiError> {
    let name = name.parse().map_err(|error| ApiError::bad_request(&error))?;
    let operation = state.control.save_image(owner, &sandbox, name).await?;
    Ok(accepted(Json(describe(&operation))))
}

/// Refuses a reference that is empty or too long, with what it stands for, to be a name.
fn check_reference(reference: &str) -> Result<(), ApiError> {
    if (1..=REFERENCE_CHARS_MAX).contains(&reference.chars().count()) {
        return Ok(());
    }
    let message = format!("a reference has 1 to {REFERENCE_CHARS_MAX} characters");
    Err(ApiError::new(ErrorCode::BadRequest, message))
}

fn credentials(login: Option<RegistryLogin>) -> Option<Credentials> {
    login.map(|RegistryLogin { username: user, password }| Credentials { user, password })
}

/// Begins to push an image to a registry, or joins the caller's operation that pushes it there.
#[utoipa::path(post, path = "/images/{image}/push", tag = "images", params(("image" = String, Path)),
    request_body = PushImage,
    responses((status = 202, body = Operation), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn push(
    State(state): State<AppState>,
    Extension(Caller(user)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
    ApiJson(request): ApiJson<PushImage>,
) -> Result<Response, ApiError> {
    let PushImage { to, login } = request;
    let to = to.as_deref().unwrap_or(&name);
    check_reference(to)?;
    let operation = state.control.push_image(user, &name, to, credentials(login))?;
    Ok(accepted(Json(describe(&operation))))
}

/// Gives an image another name, which the caller owns.
#[utoipa::path(post, path = "/images/{image}/tag", tag = "images", params(("image" = String, Path)),
    request_body = TagImage,
    responses((status = 201, body = Image), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn tag(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
    ApiJson(TagImage { name: new }): ApiJson<TagImage>,
) -> Result<Response, ApiError> {
    let new = new.parse().map_err(|error| ApiError::bad_request(&error))?;
    let row = state.control.tag_image(owner, &name, new).await?;
    Ok(created(Json(image(UsableImage::Owned(row), owner))))
}

/// Deletes the caller's images that no sandbox, snapshot or template uses.
#[utoipa::path(post, path = "/images/prune", tag = "images",
    responses((status = 200, body = PrunedImages), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn prune(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
) -> Result<Json<PrunedImages>, ApiError> {
    let (deleted, freed_bytes) = state.control.prune_images(owner)?;
    let deleted = deleted.into_iter().map(String::from).collect();
    Ok(Json(PrunedImages { deleted, freed_bytes }))
}

/// Lets another user create sandboxes from an image of the caller.
#[utoipa::path(put, path = "/images/{image}/shares/{user}", tag = "images",
    params(("image" = String, Path), ("user" = String, Path)),
    responses((status = 200, body = Image), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn share(
    state: State<AppState>,
    caller: Extension<Caller>,
    ApiPath((name, user)): ApiPath<(String, String)>,
) -> Result<Json<Image>, ApiError> {
    state.control.share_image(caller.0.0, &name, &user)?;
    get(state, caller, ApiPath(name)).await
}

/// Ends that another user can create sandboxes from an image of the caller. Sandboxes stay.
#[utoipa::path(delete, path = "/images/{image}/shares/{user}", tag = "images",
    params(("image" = String, Path), ("user" = String, Path)),
    responses((status = 200, body = Image), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn unshare(
    state: State<AppState>,
    caller: Extension<Caller>,
    ApiPath((name, user)): ApiPath<(String, String)>,
) -> Result<Json<Image>, ApiError> {
    state.control.unshare_image(caller.0.0, &name, &user)?;
    get(state, caller, ApiPath(name)).await
}

/// Returns an image as a tar archive of an OCI layout, which Docker can load, too.
#[utoipa::path(get, path = "/images/{image}/export", tag = "images", params(("image" = String, Path)),
    responses((status = 200, body = Vec<u8>, content_type = "application/x-tar"), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn export(
    State(state): State<AppState>,
    Extension(Caller(user)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Response, ApiError> {
    let archive = state.control.export_image(user, &name).await?;
    let body = Body::from_stream(ReaderStream::with_capacity(archive, PIECE_BYTES));
    Ok(([(CONTENT_TYPE, "application/x-tar")], body).into_response())
}

/// Deletes an image of the caller that no sandbox, snapshot or template uses. The admin can delete
/// images that were built on the host, too.
#[utoipa::path(delete, path = "/images/{image}", tag = "images", params(("image" = String, Path)),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<Deleted>, ApiError> {
    state.control.delete_image(owner, &name).await?;
    Ok(Json(Deleted { status: "deleted".to_owned() }))
}

fn image(found: UsableImage, user: UserId) -> Image {
    match found {
        UsableImage::Host(summary) => Image {
            is_default: summary.name == DEFAULT_IMAGE,
            name: summary.name,
            owner: "host".to_owned(),
            size_mb: summary.size_bytes >> 20,
            disk_bytes: summary.disk_bytes,
            source: summary.source,
            ..Image::default()
        },
        UsableImage::Shared { name, row } => Image { name, ..image(UsableImage::Owned(row), user) },
        UsableImage::Owned(row) => {
            let owner = if row.owner == user { "me" } else { "other" };
            let ImageRow { name, source, size_bytes, disk_bytes, created_at, used_at, .. } = row;
            Image {
                name: name.into(),
                owner: owner.to_owned(),
                size_mb: size_bytes >> 20,
                disk_bytes,
                source,
                created_at: Some(created_at),
                used_at: Some(rfc3339(used_at)),
                ..Image::default()
            }
        }
    }
}

fn settings(config: ImageConfig) -> ImageSettings {
    ImageSettings {
        env: config.env,
        user: config.user,
        workdir: config.workdir,
        entrypoint: config.entrypoint,
        cmd: config.cmd,
        exposed_ports: config.exposed_ports,
        labels: config.labels,
        shell: config.shell,
        stop_signal: config.stop_signal,
    }
}
