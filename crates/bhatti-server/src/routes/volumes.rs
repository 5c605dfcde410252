//! `/volumes`.

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use bhatti_api::{
    AttachVolume, AttachedVolume, CloneVolume, CreateVolume, Deleted, NewVolume, ResizeVolume,
    Volume, VolumeUser,
};
use bhatti_control::VolumeInfo;
use bhatti_store::{Attach, AttachKind, Attachment};
use bhatti_types::{VolumeMib, VolumeName};

use crate::AppState;
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::json::{ApiJson, Json};
use crate::page::{Page, PageQuery, Paging};
use crate::status::{ApiError, created};

/// Default size of a volume, in MiB.
const USUAL_MIB: u64 = 1024;

/// Creates an empty volume.
#[utoipa::path(post, path = "/volumes", tag = "volumes", request_body = CreateVolume,
    responses((status = 201, body = Volume), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiJson(request): ApiJson<CreateVolume>,
) -> Result<Response, ApiError> {
    let (name, size) = (parse_name(&request.name)?, size(request.size_mb.unwrap_or(USUAL_MIB))?);
    Ok(created(Json(volume(state.control.create_volume(owner, name, size).await?))))
}

/// Lists the caller's volumes, by name.
#[utoipa::path(get, path = "/volumes", tag = "volumes", params(PageQuery),
    responses((status = 200, body = Vec<Volume>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    paging: Paging,
) -> Result<Page<Volume>, ApiError> {
    let volumes = state.control.list_volumes(owner)?;
    Ok(paging.by_key(volumes, |volume| volume.row.name.to_string()).map(volume))
}

/// Returns a volume.
#[utoipa::path(get, path = "/volumes/{volume}", tag = "volumes", params(("volume" = String, Path)),
    responses((status = 200, body = Volume), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<Volume>, ApiError> {
    Ok(Json(volume(state.control.find_volume(owner, &name)?)))
}

/// Grows a volume. The volume must not be attached to a sandbox.
#[utoipa::path(post, path = "/volumes/{volume}/resize", tag = "volumes", params(("volume" = String, Path)),
    request_body = ResizeVolume, responses((status = 200, body = Volume), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn resize(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
    ApiJson(request): ApiJson<ResizeVolume>,
) -> Result<Json<Volume>, ApiError> {
    // Report an unknown volume before an invalid size.
    state.control.find_volume(owner, &name)?;
    let size = size(request.size_mb)?;
    Ok(Json(volume(state.control.resize_volume(owner, &name, size).await?)))
}

/// Copies a volume. No sandbox may have the volume attached for writing.
#[utoipa::path(post, path = "/volumes/{volume}/clone", tag = "volumes", params(("volume" = String, Path)),
    request_body = CloneVolume, responses((status = 201, body = Volume), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn clone(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
    ApiJson(request): ApiJson<CloneVolume>,
) -> Result<Response, ApiError> {
    let copy = parse_name(&request.name)?;
    Ok(created(Json(volume(state.control.clone_volume(owner, &name, copy).await?))))
}

/// Deletes a volume and its content. The volume must not be attached to a sandbox.
#[utoipa::path(delete, path = "/volumes/{volume}", tag = "volumes", params(("volume" = String, Path)),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(name): ApiPath<String>,
) -> Result<Json<Deleted>, ApiError> {
    state.control.delete_volume(owner, &name).await?;
    Ok(Json(Deleted { status: "deleted".to_owned() }))
}

/// Returns the volumes of a new sandbox, in the order in which they are mounted.
pub(super) fn attachments(
    named: Vec<AttachVolume>,
    own: Vec<NewVolume>,
) -> Result<Vec<Attach>, ApiError> {
    let named = named.into_iter().map(|AttachVolume { name, target, readonly }| {
        attach(&name, &target, AttachKind::Named { read_only: readonly })
    });
    let own = own.into_iter().map(|NewVolume { name, size_mb, mount }| {
        attach(&name, &mount, AttachKind::Own { size: size(size_mb)?, read_only: false })
    });
    named.chain(own).collect()
}

fn attach(name: &str, mount: &str, kind: AttachKind) -> Result<Attach, ApiError> {
    let mount = mount.parse().map_err(|error| ApiError::bad_request(&error))?;
    Ok(Attach { name: parse_name(name)?, mount, kind })
}

fn parse_name(name: &str) -> Result<VolumeName, ApiError> {
    name.parse().map_err(|error| ApiError::bad_request(&error))
}

fn size(mib: u64) -> Result<VolumeMib, ApiError> {
    VolumeMib::try_from(mib).map_err(|error| ApiError::bad_request(&error))
}

/// Describes a sandbox's volume.
pub(super) fn attached(volume: &Attachment) -> AttachedVolume {
    AttachedVolume {
        name: volume.name.to_string(),
        target: volume.mount.to_string(),
        readonly: volume.read_only,
        size_mb: volume.size.get().into(),
        ephemeral: volume.volume.is_none(),
    }
}

fn volume(VolumeInfo { row, sandboxes, disk_bytes }: VolumeInfo) -> Volume {
    let user = |(sandbox, readonly)| VolumeUser { sandbox, readonly };
    Volume {
        id: row.id.to_string(),
        name: row.name.to_string(),
        size_mb: row.size.get().into(),
        disk_bytes,
        attached_to: sandboxes.into_iter().map(user).collect(),
        created_at: row.created_at,
    }
}
