//! The control plane: sandboxes and snapshots of the owner of a key.

mod create;
mod life;
mod list;
mod metrics;
mod objects;
mod snapshots;
mod templates;

use axum::Router;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::response::IntoResponse;
use axum::routing::{delete, get, post, put};
use bhatti_edge::Identity;
use bhatti_store::SandboxRow;
use bhatti_types::{KeyScope, UserId};
use http_body_util::{BodyExt, Limited};
use serde::de::DeserializeOwned;

use crate::{E2b, Error, status};

pub(crate) use life::resume;
pub(crate) use templates::receive;

/// The largest body of a request, in bytes.
const BODY_BYTES_MAX: usize = 1 << 20;

/// Who sent a request.
#[derive(Clone, Debug)]
pub(crate) struct Caller(pub(crate) Identity);

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        let caller = parts.extensions.get::<Self>().cloned();
        caller.ok_or_else(|| Error::unauthorized("the request has no API key"))
    }
}

/// The user whose key a request has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner(pub(crate) UserId);

impl<S: Sync> FromRequestParts<S> for Owner {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        Caller::from_request_parts(parts, state).await.map(|caller| Self(caller.0.user()))
    }
}

/// Whether the key of a request may control sandboxes, rather than only look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MayControl(pub(crate) bool);

impl<S: Sync> FromRequestParts<S> for MayControl {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let caller = Caller::from_request_parts(parts, state).await;
        caller.map(|caller| Self(caller.0.scope() == KeyScope::Full))
    }
}

/// A JSON body. An empty one means an empty object.
pub(crate) struct Json<T>(pub(crate) T);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Error;

    async fn from_request(request: Request, _: &S) -> Result<Self, Error> {
        let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect().await;
        let body = body.map_err(|_| {
            Error::bad_request(format!("the body is incomplete or has over {BODY_BYTES_MAX} bytes"))
        })?;
        let bytes = body.to_bytes();
        let json = if bytes.is_empty() { b"{}" } else { &*bytes };
        let parsed = serde_json::from_slice(json);
        parsed.map(Self).map_err(|error| Error::bad_request(format!("invalid body: {error}")))
    }
}

/// The query. Parameters that are left out have their defaults.
pub(crate) struct Query<T>(pub(crate) T);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        let query = serde_html_form::from_str(parts.uri.query().unwrap_or_default());
        query.map(Self).map_err(|error| Error::bad_request(format!("invalid query: {error}")))
    }
}

/// A segment of the path, or several, decoded. Its reject is an error of this API.
pub(crate) struct Id<T = String>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Id<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let path = axum::extract::Path::<T>::from_request_parts(parts, state).await;
        path.map(|path| Self(path.0)).map_err(|error| Error::bad_request(error.body_text()))
    }
}

/// Returns the routes.
pub(crate) fn router() -> Router<E2b> {
    Router::new()
        .route("/sandboxes", get(list::list).post(create::create_v1))
        .route("/v2/sandboxes", get(list::list).post(create::create))
        .route("/sandboxes/{id}", get(list::get).delete(life::destroy))
        .route("/sandboxes/{id}/timeout", post(life::set_timeout))
        .route("/sandboxes/{id}/refreshes", post(life::refresh))
        .route("/sandboxes/{id}/connect", post(life::connect))
        .route("/v2/sandboxes/{id}/connect", post(life::connect))
        .route("/sandboxes/{id}/pause", post(life::pause))
        .route("/sandboxes/{id}/resume", post(life::resume_stopped))
        .route("/sandboxes/{id}/fork", post(life::fork))
        .route("/sandboxes/{id}/snapshots", post(snapshots::create))
        .route("/sandboxes/{id}/metrics", get(metrics::metrics))
        .route("/sandboxes/{id}/network", put(metrics::update_network))
        .route("/snapshots", get(snapshots::list))
        .route("/v3/templates", post(templates::create))
        .route("/v2/templates/{template}/builds/{build}", post(templates::build))
        .route("/templates/{template}/builds/{build}/status", get(templates::build_status))
        .route("/templates/{template}/files/{hash}", get(templates::files))
        .route("/templates/aliases/{name}", get(templates::alias))
        .route("/templates/tags", post(templates::add_tags).delete(templates::remove_tags))
        .route("/templates/{id}/tags", get(templates::list_tags))
        .route("/templates/{id}", delete(snapshots::delete))
        .route("/health", get(async || status::OK))
        .fallback(async |request: Request| {
            let (method, path) = (request.method(), request.uri().path());
            Error::not_found(format!("bhatti does not serve {method} {path} of E2B's API"))
                .into_response()
        })
}

/// Returns the owner's sandbox with this id or name.
fn find(e2b: &E2b, Owner(owner): Owner, id: &str) -> Result<SandboxRow, Error> {
    let found = e2b.0.control.find(owner, id).map_err(|error| e2b.0.describe.using(error));
    found.map_err(|error| if error.is_not_found() { no_sandbox(id) } else { error })
}

fn no_sandbox(id: &str) -> Error {
    Error::not_found(format!("sandbox \"{id}\" does not exist or you have no access to it"))
}
