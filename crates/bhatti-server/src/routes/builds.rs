//! `/images/build`.

use axum::Extension;
use axum::extract::State;
use axum::extract::multipart::{Field, Multipart, MultipartError};
use axum::response::Response;
use bhatti_api::{BuildForm, BuildImage, ErrorCode, IMAGE_BYTES_MAX, Operation};
use bhatti_control::{BuildRequest, DOCKERFILE_BYTES_MAX};
use tokio::io::AsyncWriteExt;

use super::operations::describe;
use super::sandboxes::parse::pull_policy;
use crate::AppState;
use crate::auth::Caller;
use crate::json::{self, Json};
use crate::status::{ApiError, accepted};

/// Maximum length of the first part, in bytes: the Dockerfile, and its arguments and secrets.
const BUILD_BYTES_MAX: usize = 2 * DOCKERFILE_BYTES_MAX;

/// Begins to build an image from a Dockerfile, in a sandbox of its own.
///
/// The form has the parts `build`, a JSON object, and `context`, in this order. The images that the
/// Dockerfile names are pulled with the daemon's settings of registries. Layers are kept in the
/// caller's volume `build-cache`. Builds of one user run one after the other.
#[utoipa::path(post, path = "/images/build", tag = "images",
    request_body(content = BuildForm, content_type = "multipart/form-data"),
    responses((status = 202, body = Operation), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn build(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    mut form: Multipart,
) -> Result<Response, ApiError> {
    let build = part(&mut form, "build").await?;
    let request = request(json::parse(&read(build, BUILD_BYTES_MAX).await?)?)?;
    state.control.check_build(owner, &request).await?;
    let room = state.control.archive_room(owner).await?.min(IMAGE_BYTES_MAX);
    let mut context = part(&mut form, "context").await?;
    let failed = |error: std::io::Error| ApiError::internal(&error);
    let mut file = tokio::fs::File::from_std(state.control.image_upload()?);
    let mut received = 0;
    while let Some(piece) = context.chunk().await.map_err(broken)? {
        received += piece.len() as u64;
        if received > room {
            let message = format!("the context is larger than {room} bytes");
            return Err(ApiError::new(ErrorCode::BodyTooLarge, message));
        }
        file.write_all(&piece).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    let context = file.into_std().await;
    let operation = state.control.build_image(owner, request, context).await?;
    Ok(accepted(Json(describe(&operation))))
}

/// Returns the next part of a form, which must have this name.
async fn part<'a>(form: &'a mut Multipart, name: &str) -> Result<Field<'a>, ApiError> {
    let next = form.next_field().await.map_err(broken)?;
    next.filter(|part| part.name() == Some(name)).ok_or_else(|| {
        let message = format!("the form has no part `{name}`, or another part before it");
        ApiError::new(ErrorCode::BadRequest, message)
            .hint("send the part `build`, and then the part `context`")
    })
}

async fn read(mut part: Field<'_>, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut content = Vec::new();
    while let Some(piece) = part.chunk().await.map_err(broken)? {
        content.extend_from_slice(&piece);
        if content.len() > limit {
            let message = format!("the part `build` is larger than {limit} bytes");
            return Err(ApiError::new(ErrorCode::BodyTooLarge, message));
        }
    }
    Ok(content)
}

#[expect(clippy::needless_pass_by_value, reason = "`map_err` gives the value")]
fn broken(error: MultipartError) -> ApiError {
    ApiError::new(ErrorCode::BadRequest, format!("invalid form: {}", error.body_text()))
}

fn request(build: BuildImage) -> Result<BuildRequest, ApiError> {
    let bad = |error: &dyn std::error::Error| ApiError::bad_request(error);
    let BuildImage {
        name,
        dockerfile,
        args,
        secrets,
        target,
        pull,
        no_cache,
        cpus,
        memory_mb,
        network,
    } = build;
    if dockerfile.len() > DOCKERFILE_BYTES_MAX {
        let message = format!("the Dockerfile has more than {DOCKERFILE_BYTES_MAX} bytes");
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    Ok(BuildRequest {
        name: name.parse().map_err(|error| bad(&error))?,
        dockerfile,
        arguments: args,
        secrets,
        target,
        pull: pull.as_deref().map(pull_policy).transpose()?.unwrap_or_default(),
        no_cache,
        cpus: cpus.map(TryInto::try_into).transpose().map_err(|error| bad(&error))?,
        memory: memory_mb.map(TryInto::try_into).transpose().map_err(|error| bad(&error))?,
        network: network.map(|mode| mode.parse()).transpose().map_err(|error| bad(&error))?,
    })
}
