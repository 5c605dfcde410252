//! Ports of guests, reached through the agent: by the API's own path, and by aliases that were published.
//!
//! Neither needs a network: the agent dials the port inside. Nothing of what a caller showed to be let in goes along.

mod headers;
mod public;
mod relay;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use bhatti_api::ErrorCode;

use crate::AppState;
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::status::ApiError;

pub use public::public_router;

/// An application in a sandbox, as a request is to reach it.
struct Target {
    port: u16,
    /// The path and query that it is asked for.
    path_and_query: String,
    /// The part of the path by which it is reached, and which it does not see.
    prefix: String,
}

/// Passes a request on to a port in a sandbox; `/sandboxes/{sandbox}/proxy/{port}/` and any path below it do the same. HTTP of all methods,
/// event streams and WebSockets work.
#[utoipa::path(method(get, head, post, put, patch, delete, options), path = "/sandboxes/{sandbox}/proxy/{port}", tag = "ports",
    params(("sandbox" = String, Path), ("port" = u16, Path)),
    responses((status = "default", description = "What the application answers; or `ErrorBody`, if it cannot be reached.")))]
pub(crate) async fn to_port(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiPath((called, port)): ApiPath<(String, String)>,
    request: Request,
) -> Result<Response, ApiError> {
    pass_on(&state, caller, &called, &port, request).await
}

/// The same, for longer paths.
pub(crate) async fn to_path(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    ApiPath(parameters): ApiPath<Vec<(String, String)>>,
    request: Request,
) -> Result<Response, ApiError> {
    let [(_, called), (_, port), ..] = &parameters[..] else {
        return Err(ApiError::new(ErrorCode::NotFound, "not found"));
    };
    pass_on(&state, caller, called, port, request).await
}

async fn pass_on(
    state: &AppState,
    Caller(owner): Caller,
    called: &str,
    port: &str,
    request: Request,
) -> Result<Response, ApiError> {
    let port = port.parse().ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| ApiError::new(ErrorCode::BadRequest, "invalid port"))?;
    let uri = request.uri();
    // The path as it was sent: what is encoded in it is the application's.
    let (prefix, rest) = split_path(uri.path(), 4);
    let target =
        Target { port, path_and_query: with_query(rest, uri.query()), prefix: prefix.to_owned() };
    let used = state.supervisor.enter(owner, called).await?;
    relay::relay(state, used, target, request).await
}

/// Splits a path behind its first `segments` segments.
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
