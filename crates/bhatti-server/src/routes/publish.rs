//! `/sandboxes/{sandbox}/publish`: published ports, which anyone may reach.

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use bhatti_api::{Deleted, ErrorCode, Publication, PublishPort};
use bhatti_store::{PublicationRow, SandboxRow, StoreError};
use bhatti_types::Alias;

use super::sandboxes::find;
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::json::{ApiJson, Json};
use crate::page::{Page, PageQuery, Paging};
use crate::status::{ApiError, created};
use crate::{AppState, PublicAddress};

/// Maximum length of a sandbox's name in an alias, in bytes. With `-` and six digits, the alias
/// remains a DNS label.
const NAME_BYTES_MAX: usize = 56;

/// Lists the published ports of a sandbox.
#[utoipa::path(get, operation_id = "list_published", path = "/sandboxes/{sandbox}/publish", tag = "ports", params(PageQuery, ("sandbox" = String, Path)),
    responses((status = 200, body = Vec<Publication>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    paging: Paging,
) -> Result<Page<Publication>, ApiError> {
    let row = find(&state, owner, &id_or_name)?;
    let rows = state.control.list_publications(row.id)?;
    let page = paging.by_key(rows, |row| format!("{:05}", row.port));
    Ok(page.map(|row| publication(&state, row)))
}

/// Publishes a port under an alias.
///
/// Every client of the daemon's public listener then reaches the port without a key, and wakes
/// the sandbox. A port that is already published keeps its alias.
#[utoipa::path(post, path = "/sandboxes/{sandbox}/publish", tag = "ports", params(("sandbox" = String, Path)), request_body = PublishPort,
    responses((status = 201, body = Publication), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn publish(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiJson(request): ApiJson<PublishPort>,
) -> Result<Response, ApiError> {
    let row = find(&state, owner, &id_or_name)?;
    let PublishPort { port, alias } = request;
    if port == 0 {
        return Err(ApiError::new(ErrorCode::BadRequest, "port must be 1 to 65535"));
    }
    let wanted = alias.map(|alias| alias.parse::<Alias>()).transpose();
    let wanted = wanted.map_err(|error| ApiError::bad_request(&error))?;
    let published = state.control.publish(&row, port, wanted, made_up_alias(&row)?)?;
    Ok(created(Json(publication(&state, published))))
}

/// Unpublishes a port.
#[utoipa::path(delete, path = "/sandboxes/{sandbox}/publish/{port}", tag = "ports", params(("sandbox" = String, Path), ("port" = u16, Path, minimum = 1)),
    responses((status = 200, body = Deleted), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn unpublish(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath((id_or_name, port)): ApiPath<(String, u16)>,
) -> Result<Json<Deleted>, ApiError> {
    let row = find(&state, owner, &id_or_name)?;
    state.control.unpublish(&row, port).map_err(|error| match error {
        StoreError::NoSuchRow => {
            ApiError::new(ErrorCode::NotFound, format!("port {port} is not published"))
        }
        error => error.into(),
    })?;
    Ok(Json(Deleted { status: "deleted".to_owned() }))
}

/// Makes an alias from the sandbox's name, as far as a host name can contain it, and six hex
/// digits.
fn made_up_alias(row: &SandboxRow) -> Result<Alias, ApiError> {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = row.spec.name.as_str().chars().take(NAME_BYTES_MAX).map(plain).collect();
    let digits = getrandom::u32()? & 0xff_ffff;
    format!("{name}-{digits:06x}").parse().map_err(|error| ApiError::internal(&error))
}

fn publication(state: &AppState, row: PublicationRow) -> Publication {
    Publication {
        urls: urls(&state.public, row.alias.as_str()),
        alias: row.alias.to_string(),
        port: row.port,
        sandbox_id: row.sandbox_id.to_string(),
        created_at: row.created_at,
    }
}

fn urls(public: &PublicAddress, alias: &str) -> Vec<String> {
    let Some(address) = public.listener else { return Vec::new() };
    let scheme = if public.tls { "https" } else { "http" };
    let mut urls = vec![format!("{scheme}://{address}/{alias}/")];
    // URLs by host name come first: an application at the root of a host needs no adapted links.
    if address.ip().is_loopback() {
        urls.insert(0, format!("{scheme}://{alias}.localhost:{}/", address.port()));
    }
    if let Some(zone) = &public.zone {
        urls.insert(0, format!("{scheme}://{alias}.{zone}:{}/", address.port()));
    }
    urls
}
