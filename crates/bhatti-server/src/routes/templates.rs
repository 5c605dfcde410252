//! `/templates`: named settings that a user creates sandboxes from.

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use bhatti_api::{CreateTemplate, Deleted, ErrorCode, Template};
use bhatti_image::DEFAULT_IMAGE;
use bhatti_store::TemplateRow;
use bhatti_types::{CpuCount, DiskMib, Environment, MemoryMib, TemplateId, UserId};

use super::sandboxes::{init as check_init, labels, secrets};
use crate::AppState;
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::json::{ApiJson, Json};
use crate::page::{Page, PageQuery, Paging};
use crate::status::{ApiError, created};

/// Lists the templates that the caller can use, newest first: the own ones and public ones.
#[utoipa::path(get, path = "/templates", tag = "templates", params(PageQuery),
    responses((status = 200, body = Vec<Template>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    paging: Paging,
) -> Result<Page<Template>, ApiError> {
    let templates = state.control.list_templates(owner)?;
    let place = |row: &TemplateRow| (row.created_at.clone(), row.id.to_string());
    Ok(paging.newest_first(templates, place)?.map(template))
}

/// Creates a template.
#[utoipa::path(post, path = "/templates", tag = "templates", request_body = CreateTemplate,
    responses((status = 201, body = Template), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiJson(request): ApiJson<CreateTemplate>,
) -> Result<Response, ApiError> {
    check_public(caller, request.public)?;
    let row = parse(caller.0, request)?;
    Ok(created(Json(template(state.control.create_template(row)?))))
}

/// Returns a template.
#[utoipa::path(get, path = "/templates/{template}", tag = "templates", params(("template" = String, Path)),
    responses((status = 200, body = Template), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
) -> Result<Json<Template>, ApiError> {
    Ok(Json(template(find(&state, owner, &id_or_name)?)))
}

/// Deletes a template. Sandboxes that were created from it stay.
#[utoipa::path(delete, path = "/templates/{template}", tag = "templates", params(("template" = String, Path)),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
) -> Result<Json<Deleted>, ApiError> {
    let row = find(&state, owner, &id_or_name)?;
    if row.owner != owner {
        let message = format!("template `{}` is the admin's", row.name);
        return Err(ApiError::new(ErrorCode::Forbidden, message));
    }
    state.control.delete_template(&row).await?;
    Ok(Json(Deleted { status: "deleted".to_owned() }))
}

/// Refuses that a user makes a template public.
pub(super) fn check_public(caller: Caller, public: bool) -> Result<(), ApiError> {
    if public { caller.require_admin() } else { Ok(()) }
}

pub(super) fn find(
    state: &AppState,
    owner: UserId,
    id_or_name: &str,
) -> Result<TemplateRow, ApiError> {
    let found = state.control.find_template(owner, id_or_name)?;
    let missing =
        || ApiError::new(ErrorCode::NotFound, format!("template `{id_or_name}` not found"));
    found.ok_or_else(missing)
}

fn parse(owner: UserId, request: CreateTemplate) -> Result<TemplateRow, ApiError> {
    let bad = |error: &dyn std::error::Error| ApiError::bad_request(error);
    let CreateTemplate {
        name,
        image,
        cpus,
        memory_mb,
        disk_mb,
        env,
        secrets: wanted_secrets,
        labels: wanted_labels,
        init,
        public,
    } = request;
    let image = image.as_deref().unwrap_or(DEFAULT_IMAGE);
    let cpus = cpus.map_or(Ok(CpuCount::ONE), CpuCount::try_from);
    let memory = memory_mb.map_or(Ok(MemoryMib::DEFAULT), MemoryMib::try_from);
    Ok(TemplateRow {
        id: TemplateId::from_entropy(getrandom::u64()?.to_be_bytes()),
        owner,
        name: name.parse().map_err(|error| bad(&error))?,
        image: image.parse().map_err(|error| bad(&error))?,
        cpus: cpus.map_err(|error| bad(&error))?,
        memory: memory.map_err(|error| bad(&error))?,
        disk: disk_mb.map(DiskMib::try_from).transpose().map_err(|error| bad(&error))?,
        environment: Environment::try_from(env).map_err(|error| bad(&error))?,
        labels: labels(wanted_labels)?,
        secrets: secrets(&wanted_secrets)?,
        init: check_init(init)?.unwrap_or_default(),
        snapshot: None,
        annex: None,
        public,
        created_at: String::new(),
    })
}

fn template(row: TemplateRow) -> Template {
    Template {
        id: row.id.to_string(),
        name: row.name.to_string(),
        image: row.image.to_string(),
        cpus: row.cpus.get().into(),
        memory_mb: row.memory.get().into(),
        disk_mb: row.disk.map(|disk| disk.get().into()),
        env: row.environment.into_map(),
        secrets: row.secrets.iter().map(ToString::to_string).collect(),
        labels: row.labels.into_map(),
        init: row.init,
        is_warm: row.snapshot.is_some(),
        public: row.public,
        created_at: row.created_at,
    }
}
