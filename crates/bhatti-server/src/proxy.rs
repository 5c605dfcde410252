//! Proxy to ports of guests, through the guest agent: by the API's own path, and by published
//! aliases.
//!
//! Neither needs a network: the guest agent connects to the port inside the guest. The
//! credentials that a caller sends to the daemon are never passed on.

mod addresses;
mod headers;
mod public;
mod relay;
mod visits;

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use bhatti_api::ErrorCode;
use bhatti_edge::Identity;
use bhatti_node::SandboxUse;
use percent_encoding::percent_decode_str;

use crate::AppState;
use crate::extract::ApiPath;
use crate::status::ApiError;

pub use public::public_router;
pub(crate) use visits::Visits;

/// Application in a sandbox that a request goes to.
struct Target {
    /// User whose key authorized the request; `None` for a published port.
    identity: Option<Identity>,
    port: u16,
    /// Path and query that the application receives.
    path_and_query: String,
    /// Prefix of the path that leads to the application, which does not see it.
    prefix: String,
}

/// Passes a request on to a port in a sandbox.
///
/// `/sandboxes/{sandbox}/proxy/{port}/` and any path below it do the same. All HTTP methods,
/// event streams and WebSockets work. A response gets another `Content-Security-Policy` beside
/// its own, which gives pages an origin of their own. It loses headers that apply to the whole
/// origin, such as `Service-Worker-Allowed` and `Clear-Site-Data`.
#[utoipa::path(method(get, head, post, put, patch, delete, options), path = "/sandboxes/{sandbox}/proxy/{port}", tag = "ports",
    params(("sandbox" = String, Path), ("port" = u16, Path, minimum = 1)),
    responses((status = "default", description = "The application's response, or `ErrorBody` if the application cannot be reached.")))]
pub(crate) async fn to_port(
    State(state): State<AppState>,
    Extension(identity): Extension<Identity>,
    ApiPath((id_or_name, port)): ApiPath<(String, String)>,
    request: Request,
) -> Result<Response, ApiError> {
    pass_on(&state, identity, &id_or_name, &port, request).await
}

/// Does the same as [`to_port`], for longer paths.
pub(crate) async fn to_path(
    State(state): State<AppState>,
    Extension(identity): Extension<Identity>,
    request: Request,
) -> Result<Response, ApiError> {
    // Split by hand, because the router would decode the rest of the path as well. The rest
    // belongs to the application and need not be text.
    let mut segments = request.uri().path().split('/').skip(2);
    let id_or_name = percent_decode_str(segments.next().unwrap_or_default());
    let id_or_name = id_or_name.decode_utf8_lossy().into_owned();
    let port = segments.nth(1).unwrap_or_default().to_owned();
    pass_on(&state, identity, &id_or_name, &port, request).await
}

async fn pass_on(
    state: &AppState,
    identity: Identity,
    id_or_name: &str,
    port: &str,
    request: Request,
) -> Result<Response, ApiError> {
    let owner = identity.user();
    let port = port.parse().ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| ApiError::new(ErrorCode::BadRequest, "invalid port"))?;
    let uri = request.uri();
    // The path as it was sent: encoded parts belong to the application.
    let (prefix, rest) = split_path(uri.path(), 4);
    let target = Target {
        identity: Some(identity),
        port,
        path_and_query: with_query(rest, uri.query()),
        prefix: prefix.to_owned(),
    };
    let used = state.control.enter(owner, id_or_name).await?;
    let mut response = relay::relay(state, (Arc::new(used), ()), target, request).await?;
    headers::confine(response.headers_mut());
    Ok(response)
}

/// Relays a request of another API to a port of a sandbox, with the path as it was sent.
pub(crate) async fn relay_to(
    state: &AppState,
    used: Arc<SandboxUse>,
    port: u16,
    request: Request,
) -> Result<Response, ApiError> {
    let uri = request.uri();
    let target = Target {
        identity: None,
        port,
        path_and_query: with_query(uri.path(), uri.query()),
        prefix: String::new(),
    };
    relay::relay(state, (used, ()), target, request).await
}

/// Splits a path after its first `segments` segments.
fn split_path(path: &str, segments: usize) -> (&str, &str) {
    let end = path.match_indices('/').nth(segments).map_or(path.len(), |(at, _)| at);
    path.split_at(end)
}

fn with_query(path: &str, query: Option<&str>) -> String {
    let path = if path.is_empty() { "/" } else { path };
    query.map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_passed_on_as_it_was_sent() {
        for (path, prefix, rest) in [
            ("/sandboxes/dev/proxy/80", "/sandboxes/dev/proxy/80", ""),
            ("/sandboxes/dev/proxy/80/", "/sandboxes/dev/proxy/80", "/"),
            ("/sandboxes/d%2Fv/proxy/80/a%2Fb//c/", "/sandboxes/d%2Fv/proxy/80", "/a%2Fb//c/"),
        ] {
            assert_eq!(split_path(path, 4), (prefix, rest));
        }
        assert_eq!(with_query("", Some("a=%20")), "/?a=%20");
        assert_eq!(with_query("/x", None), "/x");
    }
}
