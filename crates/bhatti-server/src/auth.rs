//! Who is calling.

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bhatti_api::ErrorCode;
use bhatti_types::UserId;

use crate::status::ApiError;
use crate::{AppState, Listener, keys};

/// The only path that needs no caller. Compared with the path as it was sent: nothing is decoded or resolved, here or later.
const PUBLIC_PATH: &str = "/health";

/// Who is calling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller(pub(crate) UserId);

impl Caller {
    pub(crate) fn require_admin(self) -> Result<(), ApiError> {
        if self.0 == UserId::ADMIN {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::Forbidden, "only the admin may do this")
            .hint("call through the daemon's Unix socket"))
    }
}

pub(crate) async fn authenticate(
    State((state, listener)): State<(AppState, Listener)>,
    mut request: Request,
    next: Next,
) -> Response {
    if request.uri().path() != PUBLIC_PATH {
        match caller(&state, listener, &request) {
            Ok(caller) => drop(request.extensions_mut().insert(caller)),
            Err(error) => return error.into_response(),
        }
    }
    next.run(request).await
}

fn caller(state: &AppState, listener: Listener, request: &Request) -> Result<Caller, ApiError> {
    if listener == Listener::Unix {
        return Ok(Caller(UserId::ADMIN));
    }
    let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let key = header.and_then(|value| value.strip_prefix("Bearer ")).filter(|key| !key.is_empty());
    let key =
        key.ok_or_else(|| ApiError::new(ErrorCode::Unauthorized, "authorization required"))?;
    let user = state.store.find_user_by_key_hash(&keys::hash(key))?;
    user.map(|user| Caller(user.id))
        .ok_or_else(|| ApiError::new(ErrorCode::Unauthorized, "invalid api key"))
}
