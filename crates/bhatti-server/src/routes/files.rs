//! `/sandboxes/{sandbox}/files`: files in the guest.

use std::io;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use bhatti_agent::{AgentClient, FileContent, FileUpload, ReadOptions};
use bhatti_api::{Deleted, Done, ErrorCode, FileEntry, MakeDirectory, RenameFile};
use bhatti_proto::FileInfo;
use bhatti_types::UserId;
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::AppState;
use crate::answers::json_answer;
use crate::auth::Caller;
use crate::extract::{ApiPath, ApiQuery};
use crate::json::{ApiJson, Json};
use crate::status::{ApiError, file_error};

/// Memory that a listing takes at most, as a multiple of the bytes that a guest sends: as
/// received, as parsed, and as the response.
const LISTING_COST: usize = 4;

/// Size of the whole file, in bytes, even if only a part is sent.
const SIZE: HeaderName = HeaderName::from_static("x-file-size");
const MODE: HeaderName = HeaderName::from_static("x-file-mode");
const IS_DIR: HeaderName = HeaderName::from_static("x-file-isdir");

/// Selects a file, and a part of it.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ReadQuery {
    /// Path in the sandbox.
    #[param(min_length = 1, max_length = 4096)]
    path: String,
    /// List the entries of a directory.
    #[serde(default)]
    ls: bool,
    /// First line to return, counted from 1.
    offset: Option<u32>,
    /// Maximum number of lines.
    limit: Option<u32>,
    /// Maximum number of bytes.
    max_bytes: Option<u64>,
    /// User to act as: a name, a number or `UID:GID` (default: the sandbox's usual user).
    user: Option<String>,
}

/// Reads a file, or some of its lines, or lists a directory.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/files", tag = "files", params(("sandbox" = String, Path), ReadQuery),
    responses((status = 200, content((Vec<u8> = "application/octet-stream"), (Vec<FileEntry> = "application/json"))),
        (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn read(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiQuery(query): ApiQuery<ReadQuery>,
) -> Result<Response, ApiError> {
    let ReadQuery { path, ls, offset, limit, max_bytes, user } = query;
    let used = state.control.enter(owner, &id_or_name).await?;
    let agent = used.agent.acting_as(user.as_deref());
    if ls {
        if offset.is_some() || limit.is_some() || max_bytes.is_some() {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                "ls takes no offset, limit or max_bytes",
            ));
        }
        return list(&state, owner, &agent, &path).await;
    }
    let options = ReadOptions { offset, limit, max_bytes };
    let content = agent.read_file(&path, options).await.map_err(file_error)?;
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(SIZE, HeaderValue::from(content.info.size));
    headers.insert(MODE, header_value(&content.info.mode));
    let body = Body::from_stream(stream::unfold(Some((content, used)), next_piece));
    Ok((headers, body).into_response())
}

async fn list(
    state: &AppState,
    owner: UserId,
    agent: &AgentClient,
    path: &str,
) -> Result<Response, ApiError> {
    let (mut part, mut is_full) = (state.answers.part(owner), false);
    let admit = |bytes: usize| {
        is_full = !part.grow_to(LISTING_COST * bytes);
        !is_full
    };
    let entries = agent.list_directory_within(path, admit).await;
    if is_full {
        return Err(ApiError::new(ErrorCode::Busy, "the memory for buffered responses is in use"));
    }
    let entries: Vec<_> = entries.map_err(file_error)?.into_iter().map(entry).collect();
    let json = serde_json::to_vec(&entries).map_err(|error| ApiError::internal(&error))?;
    Ok(json_answer(json, part))
}

/// Returns the next piece of a file. An error cuts the response off, so that a part is never
/// taken for the whole.
async fn next_piece<T>(
    reading: Option<(FileContent, T)>,
) -> Option<(io::Result<bytes::Bytes>, Option<(FileContent, T)>)> {
    let (mut content, used) = reading?;
    match content.next().await {
        Ok(Some(bytes)) => Some((Ok(bytes), Some((content, used)))),
        Ok(None) => None,
        Err(error) => Some((Err(io::Error::other(error)), None)),
    }
}

/// Selects a file or directory.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct PathQuery {
    /// Path in the sandbox.
    #[param(min_length = 1, max_length = 4096)]
    pub(super) path: String,
    /// User to act as: a name, a number or `UID:GID` (default: the sandbox's usual user).
    pub(super) user: Option<String>,
}

/// Returns facts about a file or directory in headers.
#[utoipa::path(head, path = "/sandboxes/{sandbox}/files", tag = "files", params(("sandbox" = String, Path), PathQuery),
    responses((status = 200, headers(("X-File-Size" = i64), ("X-File-Mode" = String), ("X-File-IsDir" = bool))),
        (status = "default", description = "An error, without a body.")))]
pub(crate) async fn stat(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiQuery(PathQuery { path, user }): ApiQuery<PathQuery>,
) -> Result<Response, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    let agent = used.agent.acting_as(user.as_deref());
    let info = agent.stat(&path).await.map_err(file_error)?;
    let headers = [
        (SIZE, HeaderValue::from(info.size)),
        (MODE, header_value(&info.mode)),
        (IS_DIR, header_value(if info.is_dir { "true" } else { "false" })),
    ];
    Ok(headers.into_response())
}

/// Selects the file to write.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct WriteQuery {
    /// Path in the sandbox.
    #[param(min_length = 1, max_length = 4096)]
    path: String,
    /// Permission bits in octal (default: those of the existing file, or `0644`).
    mode: Option<String>,
    /// User to act as: a name, a number or `UID:GID` (default: the sandbox's usual user).
    user: Option<String>,
}

/// Writes a file.
///
/// An upload that breaks off leaves the file as it was. The content may have any length,
/// announced or not. An existing file keeps its owner, permission bits and extended attributes.
/// Symbolic links are followed.
#[utoipa::path(put, path = "/sandboxes/{sandbox}/files", tag = "files", params(("sandbox" = String, Path), WriteQuery),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = Done), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn write(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiQuery(WriteQuery { path, mode, user }): ApiQuery<WriteQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Done>, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let mode = mode.unwrap_or_default();
    let agent = used.agent.acting_as(user.as_deref());
    let upload = agent.begin_write(&path, &mode, length).await.map_err(file_error)?;
    send_content(upload, length.is_none(), body).await?;
    Ok(Json(Done { status: "ok".to_owned() }))
}

async fn send_content(mut upload: FileUpload, until_eof: bool, body: Body) -> Result<(), ApiError> {
    let mut content = body.into_data_stream();
    while let Some(piece) = content.next().await {
        // If the client disconnects, the guest's file stays as it was.
        let piece = piece.map_err(|_| {
            ApiError::new(
                ErrorCode::BadRequest,
                "the upload broke off before the end of the content",
            )
        })?;
        if upload.write(&piece).await.is_err() {
            // A guest that accepts no more has sent the reason.
            return upload.finish().await.map_err(file_error);
        }
    }
    if until_eof {
        drop(upload.end().await);
    }
    upload.finish().await.map_err(file_error)
}

/// Selects the file or directory to remove.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct RemoveQuery {
    /// Path in the sandbox.
    #[param(min_length = 1, max_length = 4096)]
    path: String,
    /// Remove a directory together with its content.
    #[serde(default)]
    recursive: bool,
    /// User to act as: a name, a number or `UID:GID` (default: the sandbox's usual user).
    user: Option<String>,
}

/// Removes a file or directory.
#[utoipa::path(delete, path = "/sandboxes/{sandbox}/files", tag = "files", params(("sandbox" = String, Path), RemoveQuery),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn remove(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiQuery(RemoveQuery { path, recursive, user }): ApiQuery<RemoveQuery>,
) -> Result<Json<Deleted>, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    used.agent.acting_as(user.as_deref()).remove(&path, recursive).await.map_err(file_error)?;
    Ok(Json(Deleted { status: "deleted".to_owned() }))
}

/// Creates a directory.
#[utoipa::path(post, path = "/sandboxes/{sandbox}/files/mkdir", tag = "files", params(("sandbox" = String, Path)),
    request_body = MakeDirectory, responses((status = 200, body = Done), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn make_directory(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiJson(request): ApiJson<MakeDirectory>,
) -> Result<Json<Done>, ApiError> {
    let MakeDirectory { path, mode, parents, user } = request;
    let used = state.control.enter(owner, &id_or_name).await?;
    let mode = mode.unwrap_or_default();
    let agent = used.agent.acting_as(user.as_deref());
    agent.make_directory(&path, &mode, parents).await.map_err(file_error)?;
    Ok(Json(Done { status: "ok".to_owned() }))
}

/// Renames a file or directory. An existing target is replaced as rename(2) does.
#[utoipa::path(post, path = "/sandboxes/{sandbox}/files/rename", tag = "files", params(("sandbox" = String, Path)),
    request_body = RenameFile, responses((status = 200, body = Done), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn rename(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiJson(request): ApiJson<RenameFile>,
) -> Result<Json<Done>, ApiError> {
    let RenameFile { from, to, user } = request;
    let used = state.control.enter(owner, &id_or_name).await?;
    used.agent.acting_as(user.as_deref()).rename(&from, &to).await.map_err(file_error)?;
    Ok(Json(Done { status: "ok".to_owned() }))
}

fn header_value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

fn entry(info: FileInfo) -> FileEntry {
    let FileInfo { name, size, mode, is_dir, mtime, symlink_target } = info;
    FileEntry { name, size, mode, is_dir, mtime, symlink_target }
}
