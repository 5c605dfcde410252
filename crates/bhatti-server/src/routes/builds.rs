//! `/images/build` and `/templates/build`.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Extension;
use axum::body::Body;
use axum::extract::multipart::MultipartRejection;
use axum::extract::multipart::{Field, Multipart, MultipartError};
use axum::extract::{FromRequest, Request, State};
use axum::response::Response;
use bhatti_api::{
    BuildForm, BuildImage, BuildTemplate, BuildTemplateForm, CopyFiles, ErrorCode, IMAGE_BYTES_MAX,
    Operation, TemplateStep,
};
use bhatti_control::{BuildRequest, DOCKERFILE_BYTES_MAX, OperationFailure, Step, TemplateBuild};
use bhatti_store::TemplateRow;
use futures_util::StreamExt;
use tokio::io::AsyncWriteExt;

use super::operations::describe;
use super::sandboxes::parse::pull_policy;
use super::templates;
use crate::AppState;
use crate::auth::Caller;
use crate::json::{self, Json};
use crate::status::{ApiError, accepted};

/// Maximum length of the first part, in bytes: the Dockerfile, and its arguments and secrets.
const BUILD_BYTES_MAX: usize = 2 * DOCKERFILE_BYTES_MAX;

/// Maximum of what a form has before its files, in bytes.
const FORM_BYTES_MAX: u64 = BUILD_BYTES_MAX as u64 + (1 << 20);

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
    request: Request,
) -> Result<Response, ApiError> {
    let (mut form, allowance) = form(request).await?;
    let build = part(&mut form, "build").await?;
    let request = build_request(json::parse(&read(build, BUILD_BYTES_MAX).await?)?)?;
    state.control.check_build(owner, &request).await?;
    let room = state.control.archive_room(owner).await?.min(IMAGE_BYTES_MAX);
    let context = part(&mut form, "context").await?;
    allowance.lift();
    let context = receive(context, state.control.image_upload()?, room).await?;
    let operation = state.control.build_image(owner, request, context).await?;
    Ok(accepted(Json(describe(&operation))))
}

/// Begins to build a template from steps, in a sandbox.
///
/// The form has the part `build`, a JSON object, and, if a step copies files, the part `files`. The
/// result of each step is cached, so an unchanged step runs once. Sandboxes of the template start
/// from a snapshot in which the start command runs already.
#[utoipa::path(post, path = "/templates/build", tag = "templates",
    request_body(content = BuildTemplateForm, content_type = "multipart/form-data"),
    responses((status = 202, body = Operation), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn build_template(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let owner = caller.0;
    let (mut form, allowance) = form(request).await?;
    let build = part(&mut form, "build").await?;
    let build: BuildTemplate = json::parse(&read(build, BUILD_BYTES_MAX).await?)?;
    templates::check_public(caller, build.public)?;
    let base = build.template.as_deref().map(|name| templates::find(&state, owner, name));
    let request = template_request(build, base.transpose()?)?;
    state.control.check_template(&request).map_err(OperationFailure::from)?;
    let files = match form.next_field().await.map_err(broken)? {
        Some(files) if files.name() == Some("files") => {
            allowance.lift();
            let room = state.control.archive_room(owner).await?.min(IMAGE_BYTES_MAX);
            let files = receive(files, state.control.image_upload()?, room).await?;
            vec![(PathBuf::new(), files)]
        }
        Some(_) => {
            let message = "the form has another part than `build` and `files`";
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
        None => Vec::new(),
    };
    let operation = state.control.build_template(owner, request, files).await?;
    Ok(accepted(Json(describe(&operation))))
}

/// Writes a part of a form into a file.
async fn receive(mut part: Field<'_>, upload: File, room: u64) -> Result<File, ApiError> {
    let failed = |error: std::io::Error| ApiError::internal(&error);
    let mut file = tokio::fs::File::from_std(upload);
    let mut received = 0;
    while let Some(piece) = part.chunk().await.map_err(broken)? {
        received += piece.len() as u64;
        if received > room {
            let message = format!("the archive is larger than {room} bytes");
            return Err(ApiError::new(ErrorCode::BodyTooLarge, message));
        }
        file.write_all(&piece).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    Ok(file.into_std().await)
}

/// Bytes of a request that may still arrive before the part with files.
#[derive(Clone)]
struct BytesAllowed(Arc<AtomicU64>);

impl BytesAllowed {
    /// Lets any number of bytes arrive: the part with files has begun, which has its own limit.
    fn lift(&self) {
        self.0.store(u64::MAX, Ordering::Relaxed);
    }

    /// Counts bytes that arrived.
    fn take(&self, bytes: usize) -> Result<(), std::io::Error> {
        let take = |left: u64| left.checked_sub(bytes as u64);
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        taken.map(drop).map_err(|_| std::io::Error::other("too long before its files"))
    }
}

/// Reads a request as a form. What is before the part with files, and between parts, is kept in
/// memory, so it has a limit.
async fn form(request: Request) -> Result<(Multipart, BytesAllowed), ApiError> {
    let allowed = BytesAllowed(Arc::new(AtomicU64::new(FORM_BYTES_MAX)));
    let counted = allowed.clone();
    let request = request.map(|body| {
        Body::from_stream(body.into_data_stream().map(move |piece| {
            let piece = piece.map_err(std::io::Error::other)?;
            counted.take(piece.len()).map(|()| piece)
        }))
    });
    let invalid = |error: MultipartRejection| {
        ApiError::new(ErrorCode::BadRequest, format!("invalid form: {}", error.body_text()))
            .hint("send multipart/form-data")
    };
    let form = Multipart::from_request(request, &()).await.map_err(invalid)?;
    Ok((form, allowed))
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

fn build_request(build: BuildImage) -> Result<BuildRequest, ApiError> {
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

fn template_request(
    build: BuildTemplate,
    base: Option<TemplateRow>,
) -> Result<TemplateBuild, ApiError> {
    let bad = |error: &dyn std::error::Error| ApiError::bad_request(error);
    let BuildTemplate {
        name,
        image,
        template: _,
        pull,
        steps,
        start,
        ready,
        cpus,
        memory_mb,
        disk_mb,
        no_cache,
        public,
    } = build;
    if base.is_some() && image.is_some() {
        let message = "a build begins with either an image or a template";
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    Ok(TemplateBuild {
        name: name.parse().map_err(|error| bad(&error))?,
        template: base,
        image: image.map(|image| image.parse()).transpose().map_err(|error| bad(&error))?,
        pull: pull.as_deref().map(pull_policy).transpose()?.unwrap_or_default(),
        steps: steps.into_iter().map(step).collect(),
        start: start.filter(|command| !command.is_empty()),
        ready: ready.filter(|command| !command.is_empty()),
        cpus: cpus.map(TryInto::try_into).transpose().map_err(|error| bad(&error))?,
        memory: memory_mb.map(TryInto::try_into).transpose().map_err(|error| bad(&error))?,
        disk: disk_mb.map(TryInto::try_into).transpose().map_err(|error| bad(&error))?,
        no_cache,
        shell: Vec::new(),
        aliases: Vec::new(),
        annex: None,
        public,
    })
}

fn step(step: TemplateStep) -> Step {
    match step {
        TemplateStep::Run(command) => Step::Run { command, user: None },
        TemplateStep::Copy(CopyFiles { from, to, user }) => Step::Copy { from, to, user },
        TemplateStep::Env(variables) => Step::Env(variables),
        TemplateStep::Workdir(path) => Step::Workdir(path),
        TemplateStep::User(user) => Step::User(user),
    }
}
