//! The routes, one file per resource. Each route is described beside its handler; [`open_api`]
//! collects the descriptions.

mod builds;
mod description;
mod events;
mod exec;
mod exec_stream;
mod files;
mod forward;
mod health;
mod images;
mod jobs;
mod keys;
mod logins;
mod operations;
mod ports;
mod publish;
mod sandboxes;
mod secrets;
mod sessions;
mod shell;
mod snapshots;
mod tar;
mod templates;
mod usage;
mod users;
mod volumes;
mod watch;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{any, get};
use bhatti_api::{ErrorBody, ErrorCode};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::json::BODY_BYTES_MAX;
use crate::status::ApiError;
use crate::{AppState, proxy};

/// Description of the parts that all routes share.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "bhatti",
        description = "Runs untrusted code and AI agents in Linux microVMs.\n\nEvery error has the body `ErrorBody`. Sandboxes are addressed by id or name.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    modifiers(&BearerKey),
    security(("api_key" = [])),
    components(schemas(ErrorBody, ErrorCode, sandboxes::IfExists))
)]
struct Description;

struct BearerKey;

impl Modify for BearerKey {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some(
                "An API key. WebSockets also accept `?ticket=` (see `POST /ws-ticket`) or `?token=`. The daemon's Unix socket needs no key.",
            ))
            .build();
        let components = api.components.get_or_insert_default();
        components.add_security_scheme("api_key", SecurityScheme::Http(bearer));
    }
}

fn described() -> OpenApiRouter<AppState> {
    let small = OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(health::get))
        .routes(routes!(health::metrics))
        .routes(routes!(sandboxes::list, sandboxes::create))
        .routes(routes!(sandboxes::get, sandboxes::update, sandboxes::destroy))
        .routes(routes!(sandboxes::pause))
        .routes(routes!(sandboxes::resume))
        .routes(routes!(sandboxes::stop))
        .routes(routes!(sandboxes::start))
        .routes(routes!(sandboxes::fork))
        .routes(routes!(exec::run))
        .routes(routes!(exec_stream::run))
        .routes(routes!(shell::run))
        .routes(routes!(jobs::list))
        .routes(routes!(jobs::get, jobs::kill))
        .routes(routes!(jobs::stop))
        .routes(routes!(jobs::output))
        .routes(routes!(sessions::list))
        .routes(routes!(sessions::kill))
        .routes(routes!(files::make_directory))
        .routes(routes!(files::rename))
        .routes(routes!(watch::watch))
        .routes(routes!(ports::list))
        .routes(routes!(ports::list_all))
        .routes(routes!(forward::run))
        .routes(routes!(usage::list))
        .routes(routes!(publish::list, publish::publish))
        .routes(routes!(publish::unpublish))
        .routes(routes!(snapshots::create))
        .routes(routes!(snapshots::list))
        .routes(routes!(snapshots::get, snapshots::delete))
        .routes(routes!(snapshots::resume))
        .routes(routes!(templates::list, templates::create))
        .routes(routes!(templates::get, templates::delete))
        .routes(routes!(secrets::list, secrets::set))
        .routes(routes!(secrets::delete))
        .routes(routes!(volumes::list, volumes::create))
        .routes(routes!(volumes::get, volumes::delete))
        .routes(routes!(volumes::resize))
        .routes(routes!(volumes::clone))
        .routes(routes!(images::list))
        .routes(routes!(images::get, images::delete))
        .routes(routes!(images::pull))
        .routes(routes!(images::push))
        .routes(routes!(images::save))
        .routes(routes!(images::prune))
        .routes(routes!(images::tag))
        .routes(routes!(images::export))
        .routes(routes!(images::share, images::unshare))
        .routes(routes!(logins::list, logins::set))
        .routes(routes!(logins::delete))
        .routes(routes!(operations::list))
        .routes(routes!(operations::get, operations::cancel))
        .routes(routes!(operations::log))
        .routes(routes!(users::list, users::create))
        .routes(routes!(users::get, users::update, users::delete))
        .routes(routes!(users::rotate_key))
        .routes(routes!(users::ticket))
        .routes(routes!(keys::list, keys::create))
        .routes(routes!(keys::delete))
        .routes(routes!(keys::list_of_user, keys::create_for_user))
        .routes(routes!(keys::delete_of_user))
        .routes(routes!(events::list))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX));
    // These requests have bodies that are passed on as they arrive, and may have any length.
    let streamed = OpenApiRouter::new()
        .routes(routes!(files::read, files::stat, files::write, files::remove))
        .routes(routes!(tar::download, tar::upload))
        .routes(routes!(images::import))
        .routes(routes!(builds::build))
        .routes(routes!(builds::build_template))
        .routes(routes!(proxy::to_port))
        .layer(DefaultBodyLimit::disable());
    small.merge(streamed)
}

/// Returns the OpenAPI description of the API.
#[must_use]
pub fn open_api() -> utoipa::openapi::OpenApi {
    let mut api = described().into_openapi();
    description::complete(&mut api);
    api
}

/// Returns a router with every route of the API.
pub(crate) fn router() -> Router<AppState> {
    let (router, mut api) = described().split_for_parts();
    description::complete(&mut api);
    let description = axum::body::Bytes::from(serde_json::to_vec(&api).unwrap_or_default());
    let describe = move || async move {
        ([(axum::http::header::CONTENT_TYPE, "application/json")], description)
    };
    router
        // The same as `proxy::to_port`, for the paths below.
        .route("/sandboxes/{sandbox}/proxy/{port}/", any(proxy::to_path))
        .route("/sandboxes/{sandbox}/proxy/{port}/{*rest}", any(proxy::to_path))
        .route("/openapi.json", get(describe))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
}

async fn no_route() -> ApiError {
    ApiError::new(ErrorCode::NotFound, "not found")
}

async fn no_method() -> ApiError {
    ApiError::new(ErrorCode::MethodNotAllowed, "method not allowed")
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMITTED: &str = include_str!("../../../docs/openapi.json");

    #[test]
    fn operations_have_unique_ids() {
        let mut ids = std::collections::BTreeSet::new();
        for (path, item) in serde_json::to_value(open_api()).unwrap()["paths"].as_object().unwrap()
        {
            for (method, operation) in item.as_object().unwrap() {
                if let Some(id) = operation["operationId"].as_str() {
                    assert!(ids.insert(id.to_owned()), "{method} {path}: {id} is taken");
                }
            }
        }
        assert!(ids.contains("sandboxes_list") && ids.len() > 60, "{ids:?}");
    }

    #[test]
    fn committed_openapi_document_matches_the_code() {
        let described = serde_json::to_string_pretty(&open_api()).unwrap() + "\n";

        assert!(COMMITTED == described, "run `cargo xtask openapi`");
    }
}
