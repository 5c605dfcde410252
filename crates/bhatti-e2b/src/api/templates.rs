//! Templates that are built from steps, their tags, and the files of their steps.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bhatti_control::{CreateError, FilesBelow, PullPolicy, TemplateBuild};
use bhatti_edge::WithTls;
use bhatti_store::TemplateRow;
use bhatti_types::{ImageConfig, TemplateName, UserId};
use http_body_util::BodyExt as _;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use super::create::base;
use super::{Caller, Id, Json, MayControl, Owner, Query};
use crate::templates::annex::{self, DEFAULT_TAG};
use crate::templates::build::{Build, status_of};
use crate::templates::steps::{SHELL, Steps, WireStep, is_hash};
use crate::templates::uploads::{Archive, ArchiveOf};
use crate::{E2b, Error, status};

/// The image that SDKs name when they mean the base template.
const BASE_IMAGE: &str = "e2bdev/base";

/// The maximum length of an uploaded archive, in bytes.
const UPLOAD_BYTES_MAX: u64 = 8 << 30;

/// The maximum number of tags in a request.
const TAGS_MAX: usize = 32;

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct NewTemplate {
    name: String,
    tags: Option<Vec<String>>,
    cpu_count: Option<u64>,
    #[serde(rename = "memoryMB")]
    memory_mb: Option<u64>,
}

/// `POST /v3/templates`: announces a build.
pub(super) async fn create(
    State(e2b): State<E2b>,
    Owner(owner): Owner,
    Json(new): Json<NewTemplate>,
) -> Result<Response, Error> {
    let invalid = |error: &dyn std::error::Error| Error::bad_request(error.to_string());
    let (name, tag) = annex::split(&new.name);
    let mut tags: Vec<String> = tag.map(str::to_owned).into_iter().collect();
    tags.extend(new.tags.unwrap_or_default());
    if tags.is_empty() {
        tags.push(DEFAULT_TAG.to_owned());
    }
    let names = names(name, &tags)?;
    let id = new_id()?;
    let mut build = Build::new(id.clone(), name.to_owned());
    build.names = names;
    build.cpus =
        new.cpu_count.map(TryInto::try_into).transpose().map_err(|error| invalid(&error))?;
    build.memory =
        new.memory_mb.map(TryInto::try_into).transpose().map_err(|error| invalid(&error))?;
    if !e2b.0.builds.add(owner, Arc::new(build)) {
        return Err(Error::new(status::TOO_MANY, "too many builds run"));
    }
    let body = json!({
        "templateID": name,
        "buildID": id,
        "public": false,
        "names": [name],
        "tags": tags,
        "aliases": [name],
    });
    Ok((status::ACCEPTED, axum::Json(body)).into_response())
}

fn names(name: &str, tags: &[String]) -> Result<Vec<TemplateName>, Error> {
    if tags.len() > TAGS_MAX {
        return Err(Error::bad_request(format!("{} tags: at most {TAGS_MAX}", tags.len())));
    }
    let mut names = Vec::new();
    for tag in tags {
        let tagged = annex::tagged(name, tag);
        let tagged = tagged.map_err(|error| Error::bad_request(error.to_string()))?;
        if !names.contains(&tagged) {
            names.push(tagged);
        }
    }
    Ok(names)
}

fn new_id() -> Result<String, Error> {
    let digits = getrandom::u64().map_err(|error| Error::internal(error.to_string()))?;
    Ok(annex::uuid(&format!("{digits:016x}")))
}

/// `GET /templates/{template}/files/{hash}`: whether the files are there, and where to send them.
pub(super) async fn files(
    State(e2b): State<E2b>,
    Caller(identity): Caller,
    MayControl(may_control): MayControl,
    Id((_template, hash)): Id<(String, String)>,
    request: Request,
) -> Result<Response, Error> {
    if !is_hash(&hash) {
        return Err(Error::bad_request(format!("invalid hash {hash:?}: expected SHA-256")));
    }
    if !may_control {
        return Err(Error::forbidden("the API key may only look: it gets no link for an upload"));
    }
    let name = ArchiveOf { owner: identity.user(), hash };
    let present = e2b.0.uploads.find(&name).is_some();
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| Error::internal(error.to_string()))?;
    let token = hex::encode(bytes);
    let url = format!("{}/e2b/uploads/{token}", origin(&request)?);
    e2b.0.uploads.add_link(token, identity, name.hash);
    let body = axum::Json(json!({ "present": present, "url": url }));
    Ok((status::CREATED, body).into_response())
}

/// Returns the scheme and the host that a request names.
fn origin(request: &Request) -> Result<String, Error> {
    let text = |headers: &HeaderMap, name: &str| {
        headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
    };
    let headers = request.headers();
    let host = text(headers, header::HOST.as_str());
    let host = host.ok_or_else(|| Error::bad_request("header `Host` is missing"))?;
    let has_tls = request.extensions().get::<WithTls>().is_some()
        || text(headers, "x-forwarded-proto").is_some_and(|scheme| scheme == "https");
    Ok(format!("{}://{host}", if has_tls { "https" } else { "http" }))
}

/// Receives an archive, and keeps it under a name.
pub(crate) async fn receive(
    e2b: &E2b,
    name: ArchiveOf,
    request: Request,
) -> Result<Response, Error> {
    let control = &e2b.0.control;
    let failed = |error| e2b.0.describe.creation(CreateError::Image(error));
    let room = control.archive_room(name.owner).await.map_err(failed)?.min(UPLOAD_BYTES_MAX);
    let file = control.image_upload().map_err(failed)?;
    let mut file = tokio::fs::File::from_std(file);
    let (mut body, mut received) = (request.into_body(), 0);
    let unwritten = |error: std::io::Error| Error::internal(format!("failed to write: {error}"));
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Error::bad_request(format!("broken upload: {error}")))?;
        let Some(piece) = frame.data_ref() else { continue };
        received += piece.len() as u64;
        if received > room {
            return Err(Error::new(
                status::TOO_LARGE,
                format!("the archive is larger than {room} bytes"),
            ));
        }
        file.write_all(piece).await.map_err(unwritten)?;
    }
    file.flush().await.map_err(unwritten)?;
    let reserved = control.reserve_disk(name.owner, received).await;
    let reserved = reserved.map_err(failed)?;
    e2b.0.uploads.keep(name, Archive { file: file.into_std().await, _reserved: reserved });
    Ok(status::OK.into_response())
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Start {
    force: bool,
    steps: Vec<WireStep>,
    from_image: Option<String>,
    from_template: Option<String>,
    from_image_registry: Option<Value>,
    start_cmd: Option<String>,
    ready_cmd: Option<String>,
}

/// `POST /v2/templates/{template}/builds/{build}`: begins a build.
pub(super) async fn build(
    State(e2b): State<E2b>,
    Owner(owner): Owner,
    Id((template, id)): Id<(String, String)>,
    Json(start): Json<Start>,
) -> Result<Response, Error> {
    let build = e2b.0.builds.find(owner, &template, &id).ok_or_else(|| no_build(&id))?;
    if start.from_image_registry.is_some() {
        let message = "`fromImageRegistry` is not offered by this host: use `bhatti image login`";
        return Err(Error::bad_request(message));
    }
    let (request, steps) = request(&e2b, owner, &build, start)?;
    let files = archives(&e2b, owner, &steps.files)?;
    let failed = |error| e2b.0.describe.operation(error);
    e2b.0.control.check_template(&request).map_err(|error| failed(error.into()))?;
    if !build.begin() {
        return Err(Error::conflict(format!("the build {id} has begun already")));
    }
    // In a task: a client that leaves must not leave a build that seems to run.
    let begun = tokio::spawn({
        let e2b = e2b.clone();
        async move {
            match e2b.0.control.build_template(owner, request, files).await {
                Ok(operation) => {
                    drop(tokio::spawn(build.follow(operation, steps.of)));
                    Ok(())
                }
                Err(error) => {
                    let error = e2b.0.describe.operation(error);
                    build.fail(error.message());
                    Err(error)
                }
            }
        }
    });
    begun.await.map_err(|_| Error::internal("the build could not begin"))??;
    Ok(status::ACCEPTED.into_response())
}

fn no_build(id: &str) -> Error {
    Error::not_found(format!("build {id:?} not found"))
}

/// Returns the request to the step builder.
fn request(
    e2b: &E2b,
    owner: UserId,
    build: &Build,
    start: Start,
) -> Result<(TemplateBuild, Steps), Error> {
    let is_given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let (template, image, mut steps) = match (start.from_image, is_given(start.from_template)) {
        (_, Some(name)) => {
            let row = find(e2b, owner, &name)?;
            let ImageConfig { user, workdir, .. } = settings(e2b, &row)?;
            let steps = Steps::from_template(&start.steps, &user, &workdir)?;
            (Some(row), None, steps)
        }
        (image, None) => {
            let image = is_given(image).unwrap_or_else(|| BASE_IMAGE.to_owned());
            let name = image.strip_suffix(":latest").unwrap_or(&image);
            let image = if name == BASE_IMAGE { base(e2b, owner)? } else { image };
            (None, Some(image), Steps::from_image(&start.steps)?)
        }
    };
    let image = image.map(|image| image.parse()).transpose();
    let image = image.map_err(|error| Error::bad_request(format!("fromImage: {error}")))?;
    let Some((name, aliases)) = build.names.split_first() else {
        return Err(Error::internal("a build without a name"));
    };
    let request = TemplateBuild {
        name: name.clone(),
        template,
        image,
        pull: if start.force { PullPolicy::Always } else { PullPolicy::Missing },
        steps: std::mem::take(&mut steps.all),
        start: is_given(start.start_cmd),
        ready: is_given(start.ready_cmd),
        cpus: build.cpus,
        memory: build.memory,
        disk: None,
        no_cache: start.force || start.steps.iter().any(|step| step.force == Some(true)),
        shell: SHELL.map(str::to_owned).to_vec(),
        aliases: aliases.to_vec(),
        annex: Some(annex::of_build(&build.id)),
        public: false,
    };
    Ok((request, steps))
}

/// Returns the settings that the sandboxes of a template have.
fn settings(e2b: &E2b, row: &TemplateRow) -> Result<ImageConfig, Error> {
    let settings = e2b.0.control.settings_of_template(row);
    settings.map_err(|error| e2b.0.describe.store(error))
}

/// Returns the archives that steps copy from, each in a directory of its hash.
fn archives(e2b: &E2b, owner: UserId, hashes: &[String]) -> Result<Vec<FilesBelow>, Error> {
    let mut archives = Vec::new();
    for hash in hashes {
        let found = e2b.0.uploads.find(&ArchiveOf { owner, hash: hash.clone() });
        let archive = found.ok_or_else(|| {
            Error::bad_request(format!("the files {hash} are not there: upload them first"))
        })?;
        let file = archive.reopen().map_err(|error| Error::internal(error.to_string()))?;
        archives.push((PathBuf::from(hash), file));
    }
    Ok(archives)
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Offset {
    logs_offset: usize,
}

/// `GET /templates/{template}/builds/{build}/status`.
pub(super) async fn build_status(
    State(e2b): State<E2b>,
    Owner(owner): Owner,
    Id((template, id)): Id<(String, String)>,
    Query(Offset { logs_offset }): Query<Offset>,
) -> Result<Response, Error> {
    if let Some(build) = e2b.0.builds.find(owner, &template, &id) {
        return Ok(axum::Json(build.status(logs_offset)).into_response());
    }
    let rows = rows(&e2b, owner, &template)?;
    if rows.iter().any(|row| annex::build_id(row) == id) {
        return Ok(axum::Json(status_of(&template, &id, "ready")).into_response());
    }
    Err(no_build(&id))
}

/// `GET /templates/aliases/{name}`.
pub(super) async fn alias(
    State(e2b): State<E2b>,
    Owner(owner): Owner,
    Id(name): Id,
) -> Result<Response, Error> {
    let (own, _) = annex::split(&name);
    let rows = rows(&e2b, owner, own)?;
    let Some(row) = rows.first() else { return Err(no_template(&name)) };
    Ok(axum::Json(json!({ "templateID": own, "public": row.public })).into_response())
}

fn not_owned(row: &TemplateRow) -> Error {
    Error::forbidden(format!("template {:?} is the admin's", row.name.as_str()))
}

fn no_template(name: &str) -> Error {
    Error::not_found(format!("template {name:?} not found"))
}

/// Returns all tags of a template.
fn rows(e2b: &E2b, owner: UserId, name: &str) -> Result<Vec<TemplateRow>, Error> {
    let all = e2b.0.control.list_templates(owner);
    let mut all = all.map_err(|error| e2b.0.describe.store(error))?;
    all.retain(|row| annex::tag_of(row, name).is_some());
    Ok(all)
}

/// Returns the template with this name and tag.
fn find(e2b: &E2b, owner: UserId, name: &str) -> Result<TemplateRow, Error> {
    let (own, tag) = annex::split(name);
    let named = annex::tagged(own, tag.unwrap_or(DEFAULT_TAG)).map_err(|_| no_template(name))?;
    let found = e2b.0.control.find_template(owner, named.as_str());
    found.map_err(|error| e2b.0.describe.store(error))?.ok_or_else(|| no_template(name))
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Tags {
    target: String,
    name: String,
    tags: Vec<String>,
}

/// `POST /templates/tags`: gives a template more tags.
pub(super) async fn add_tags(
    State(e2b): State<E2b>,
    Owner(owner): Owner,
    Json(Tags { target, tags, .. }): Json<Tags>,
) -> Result<Response, Error> {
    let row = find(&e2b, owner, &target)?;
    if row.owner != owner {
        return Err(not_owned(&row));
    }
    let (name, _) = annex::split(row.name.as_str());
    let names = names(name, &tags)?;
    let named = e2b.0.control.tag_template(&row, names).await;
    named.map_err(|error| e2b.0.describe.operation(error.into()))?;
    let body = axum::Json(json!({ "tags": tags, "buildID": annex::build_id(&row) }));
    Ok((status::CREATED, body).into_response())
}

/// `DELETE /templates/tags`.
pub(super) async fn remove_tags(
    State(e2b): State<E2b>,
    Owner(owner): Owner,
    Json(Tags { name, tags, .. }): Json<Tags>,
) -> Result<StatusCode, Error> {
    let (own, _) = annex::split(&name);
    let mut found = Vec::new();
    for tag in &tags {
        found.push(find(&e2b, owner, &format!("{own}:{tag}"))?);
    }
    delete_rows(&e2b, owner, found).await?;
    Ok(status::NO_CONTENT)
}

/// `GET /templates/{template}/tags`.
pub(super) async fn list_tags(
    State(e2b): State<E2b>,
    Owner(owner): Owner,
    Id(name): Id,
) -> Result<Response, Error> {
    let (own, _) = annex::split(&name);
    let rows = rows(&e2b, owner, own)?;
    if rows.is_empty() {
        return Err(no_template(&name));
    }
    let described = |row: &TemplateRow| {
        json!({
            "tag": annex::tag_of(row, own),
            "buildID": annex::build_id(row),
            "createdAt": row.created_at,
        })
    };
    Ok(axum::Json(rows.iter().map(described).collect::<Vec<_>>()).into_response())
}

/// Deletes a template: one tag if the name has one, or else all.
pub(super) async fn delete(e2b: &E2b, owner: UserId, name: &str) -> Result<(), Error> {
    let deleted = match annex::split(name) {
        (own, None) => rows(e2b, owner, own)?,
        (_, Some(_)) => Vec::new(),
    };
    // A tag, or an id.
    let deleted = if deleted.is_empty() { vec![find(e2b, owner, name)?] } else { deleted };
    delete_rows(e2b, owner, deleted).await
}

/// Deletes the rows that are the owner's own, if there is one.
async fn delete_rows(e2b: &E2b, owner: UserId, rows: Vec<TemplateRow>) -> Result<(), Error> {
    let (own, public): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| row.owner == owner);
    if let (true, Some(row)) = (own.is_empty(), public.first()) {
        return Err(not_owned(row));
    }
    for row in own {
        let deleted = e2b.0.control.delete_template(&row).await;
        deleted.map_err(|error| e2b.0.describe.store(error))?;
    }
    Ok(())
}
