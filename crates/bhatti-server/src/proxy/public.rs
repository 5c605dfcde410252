//! The listener for published ports. Its clients need no key, and reach nothing else.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::HOST;
use axum::response::{IntoResponse, Response};
use bhatti_api::ErrorCode;
use bhatti_edge::{Admitted, OF_STRANGERS_BYTES, drain};

use super::{Target, headers, relay, split_path, with_query};
use crate::status::{ApiError, moved};
use crate::{AppState, request_id};

/// Retry delay for clients of published ports.
const RETRY: Duration = Duration::from_secs(10);

/// Domain whose names always lead to this machine.
const LOCAL_ZONE: &str = "localhost";

/// Returns a router for published ports: by host name, `alias.zone`, and by path, `/alias/…`.
/// Pages that are reached by path share a host name, so `Content-Security-Policy: sandbox` gives
/// each an origin of its own.
pub fn public_router(state: AppState) -> Router {
    Router::new().fallback(serve).with_state(state)
}

async fn serve(State(state): State<AppState>, request: Request) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let answer = async { pass_on(state, drain(request, OF_STRANGERS_BYTES)).await.into_response() };
    request_id::identify(method, path, answer).await
}

async fn pass_on(state: AppState, request: Request) -> Result<Response, ApiError> {
    let uri = request.uri();
    let (alias, prefix, path) = match alias_of_host(request.headers(), state.public.zone.as_deref())
    {
        Some(alias) => (alias.to_ascii_lowercase(), "", uri.path()),
        None => {
            let (prefix, rest) = split_path(uri.path(), 1);
            (prefix.trim_start_matches('/').to_owned(), prefix, rest)
        }
    };
    let missing = || ApiError::new(ErrorCode::NotFound, "no port is published at this address");
    let published = state.control.find_publication(&alias)?.ok_or_else(missing)?;
    state.rates.check_public(published.sandbox_id).map_err(|wait| {
        ApiError::new(ErrorCode::RateLimited, "too many requests").retry_after(wait)
    })?;
    if path.is_empty() {
        // With the slash, relative links lead below the alias.
        let location = with_query(&format!("{prefix}/"), uri.query());
        return Ok(moved(location));
    }
    let target = Target {
        identity: None,
        port: published.port,
        path_and_query: with_query(path, uri.query()),
        prefix: prefix.to_owned(),
    };
    let id_or_name = published.sandbox_id.to_string();
    let used = state.control.enter(published.owner, &id_or_name).await.map_err(|error| {
        // A stranger learns no more about a sandbox than that it cannot be reached.
        hidden(&ApiError::from(error))
    })?;
    let slot = state.visits.enter(published.sandbox_id).ok_or_else(|| {
        ApiError::new(ErrorCode::Busy, "the application has too many requests in flight")
            .retry_after(RETRY)
    })?;
    let is_by_path = !target.prefix.is_empty();
    let passed_on = relay::relay(&state, (Arc::new(used), slot), target, request).await;
    let mut response = passed_on.map_err(|error| hidden(&error))?;
    // The visit limits how many such responses there are.
    response.extensions_mut().insert(Admitted);
    if is_by_path {
        // All applications that are reached by path share one host name.
        headers::confine(response.headers_mut());
    }
    Ok(response)
}

/// Returns the error without details that a stranger need not know.
fn hidden(error: &ApiError) -> ApiError {
    match error.code {
        ErrorCode::Busy => ApiError::new(ErrorCode::Busy, "the host is busy").retry_after(RETRY),
        ErrorCode::GatewayTimeout => {
            ApiError::new(ErrorCode::GatewayTimeout, "the application does not answer")
        }
        _ => ApiError::new(ErrorCode::BadGateway, "the application cannot be reached right now"),
    }
}

/// Returns the alias in a host name: the label before the zone.
fn alias_of_host<'a>(headers: &'a HeaderMap, zone: Option<&str>) -> Option<&'a str> {
    let host = headers.get(HOST)?.to_str().ok()?;
    let host = host.rsplit_once(':').map_or(host, |(host, _port)| host);
    [zone, Some(LOCAL_ZONE)].into_iter().flatten().find_map(|zone| {
        let alias = strip_suffix_ignoring_case(host, zone)?.strip_suffix('.')?;
        (!alias.is_empty() && !alias.contains('.')).then_some(alias)
    })
}

fn strip_suffix_ignoring_case<'a>(text: &'a str, suffix: &str) -> Option<&'a str> {
    let at = text.len().checked_sub(suffix.len()).filter(|at| text.is_char_boundary(*at))?;
    let (head, tail) = text.split_at(at);
    tail.eq_ignore_ascii_case(suffix).then_some(head)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn alias_is_the_label_before_the_zone() {
        for (host, alias) in [
            ("web-1.sb.example.com", Some("web-1")),
            ("web-1.SB.example.com:8443", Some("web-1")),
            ("web-1.localhost:80", Some("web-1")),
            ("a.b.sb.example.com", None),
            ("sb.example.com", None),
            (".sb.example.com", None),
            ("evilsb.example.com", None),
            ("127.0.0.1:80", None),
            ("[::1]:80", None),
        ] {
            let headers = HeaderMap::from_iter([(HOST, HeaderValue::from_static(host))]);
            assert_eq!(alias_of_host(&headers, Some("sb.example.com")), alias, "{host}");
        }
    }
}
