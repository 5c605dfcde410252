//! Authentication of callers.
//!
//! A caller on the network sends an API key in the `Authorization` header. A WebSocket client
//! that cannot set headers sends a ticket or the key in the query. Tickets and keys are removed
//! from the query here, so that no log, handler or guest ever sees them.

use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, UPGRADE};
use axum::http::uri::PathAndQuery;
use axum::http::{Method, Uri};
use bhatti_api::ErrorCode;
use bhatti_edge::{Identity, KEY_PREFIX, TICKET_PREFIX};
use bhatti_types::{KeyScope, UserId};

use crate::status::ApiError;
use crate::{AppState, Listener, console};

/// Paths that need no authentication, besides the console's. They are compared with the path as
/// it was sent: nothing is decoded or resolved, here or later.
const PUBLIC_PATHS: [&str; 2] = ["/health", "/openapi.json"];

/// The user that a request was authenticated as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller(pub(crate) UserId);

impl Caller {
    pub(crate) fn is_admin(self) -> bool {
        self.0 == UserId::ADMIN
    }

    pub(crate) fn require_admin(self) -> Result<(), ApiError> {
        if self.is_admin() {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::Forbidden, "only the admin may do this")
            .hint("call through the daemon's Unix socket"))
    }
}

/// Authenticates the caller, and stores it as an extension of the request. Returns the request in
/// any case, without the credentials in its query.
pub(crate) fn authenticate(
    state: &AppState,
    listener: Listener,
    mut request: Request,
) -> (Result<(), ApiError>, Request) {
    let shown = take_from_query(&mut request);
    let path = request.uri().path();
    if PUBLIC_PATHS.contains(&path) || console::PATHS.contains(&path) {
        return (Ok(()), request);
    }
    let known = identify(state, listener, &request, shown).and_then(|identity| {
        check_scope(&identity, &request)?;
        request.extensions_mut().insert(Caller(identity.user()));
        request.extensions_mut().insert(identity);
        Ok(())
    });
    (known, request)
}

/// Credentials in a request's query.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    Ticket(String),
    Key(String),
}

fn identify(
    state: &AppState,
    listener: Listener,
    request: &Request,
    shown: Option<Shown>,
) -> Result<Identity, ApiError> {
    if listener == Listener::Unix {
        return Ok(Identity::ADMIN);
    }
    let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let key = header.and_then(bearer).filter(|key| !key.is_empty());
    match (key, shown) {
        (Some(key), _) => of_key(state, key),
        // Every client except a WebSocket can set a header. A URL is unsafe for a key: histories
        // and other programs' logs keep it.
        (None, Some(shown)) if request.headers().contains_key(UPGRADE) => match shown {
            Shown::Key(key) => of_key(state, &key),
            Shown::Ticket(ticket) => state.tickets.redeem(&ticket).ok_or_else(|| {
                ApiError::new(
                    ErrorCode::Unauthorized,
                    "the ticket is unknown, expired or already used",
                )
                .hint("request a new ticket: POST /ws-ticket")
            }),
        },
        (None, _) => Err(ApiError::new(ErrorCode::Unauthorized, "authorization required")),
    }
}

/// Returns who a key belongs to, for APIs that send it elsewhere than in `Authorization`.
pub(crate) fn known(
    state: &AppState,
    listener: Listener,
    request: &Request,
    key: Option<String>,
) -> Result<Identity, ApiError> {
    match key {
        Some(key) if listener == Listener::Tcp => of_key(state, &key),
        _ => identify(state, listener, request, None),
    }
}

fn of_key(state: &AppState, key: &str) -> Result<Identity, ApiError> {
    let invalid = || ApiError::new(ErrorCode::Unauthorized, "invalid api key");
    let key = state.keyring.find(key).ok_or_else(invalid)?;
    if let Some(at) = key.note_use()
        && let Err(error) = state.control.note_key_use(key.owner, &key.name, at)
    {
        tracing::warn!(key = key.name, %error, "Failed to record the use of an API key");
    }
    Ok(Identity::of(key))
}

/// Refuses what the caller's key does not allow: a key that may only look changes nothing, opens
/// no WebSocket, and reaches no port of a sandbox.
pub(crate) fn check_scope(identity: &Identity, request: &Request) -> Result<(), ApiError> {
    let is_a_look = matches!(*request.method(), Method::GET | Method::HEAD)
        && !request.headers().contains_key(UPGRADE)
        && request.uri().path().split('/').nth(3) != Some("proxy");
    if identity.scope() == KeyScope::Full || is_a_look {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::Forbidden, "this API key may only look")
        .hint("use a key with the scope `full`"))
}

/// Returns the key in an `Authorization` header. The scheme's name is case-insensitive (RFC 9110,
/// section 11.1).
fn bearer(header: &str) -> Option<&str> {
    let (scheme, key) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim_start())
}

/// Removes ticket and key from the query, and returns the one to use.
fn take_from_query(request: &mut Request) -> Option<Shown> {
    let query = request.uri().query()?;
    let (mut shown, mut rest) = (None, Vec::new());
    for pair in query.split('&') {
        match pair.split_once('=') {
            // Recognized by their prefix: an application behind the proxy may have parameters of
            // the same name.
            Some(("ticket", ticket)) if ticket.starts_with(TICKET_PREFIX) => {
                shown = Some(Shown::Ticket(ticket.to_owned()));
            }
            Some(("token", key)) if key.starts_with(KEY_PREFIX) => {
                shown = shown.or_else(|| Some(Shown::Key(key.to_owned())));
            }
            _ => rest.push(pair),
        }
    }
    shown.as_ref()?;
    let path = request.uri().path();
    let rest = rest.join("&");
    let path_and_query = if rest.is_empty() { path.to_owned() } else { format!("{path}?{rest}") };
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(path_and_query).ok()?);
    *request.uri_mut() = Uri::from_parts(parts).ok()?;
    shown
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn taken(uri: &str) -> (Option<Shown>, String) {
        let mut request = Request::builder().uri(uri).body(Body::empty()).unwrap();
        (take_from_query(&mut request), request.uri().to_string())
    }

    #[test]
    fn credentials_are_removed_from_the_query() {
        let ticket = Some(Shown::Ticket("bht-ticket_1".into()));
        assert_eq!(taken("/a?x=1&ticket=bht-ticket_1&y=%2F"), (ticket, "/a?x=1&y=%2F".into()));
        let key = Some(Shown::Key("bht_k".into()));
        assert_eq!(taken("/a?token=bht_k"), (key, "/a".into()));
    }

    #[test]
    fn other_parameters_are_unchanged() {
        for uri in ["/a", "/a?", "/a?token=csrf&x=%20", "/a?ticket=1"] {
            assert_eq!(taken(uri), (None, uri.to_owned()));
        }
    }
}
