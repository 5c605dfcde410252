//! Limits a user's requests in flight. Each request holds a connection, and a streaming request
//! holds memory on the way to and from the guest.

use std::sync::Arc;

use axum::extract::Request;
use bhatti_api::ErrorCode;

use crate::AppState;
use crate::auth::Caller;
use crate::status::ApiError;

/// Maximum number of a user's requests in flight, including responses that are being read and
/// open WebSockets.
const OF_USER_MAX: usize = 512;
/// The same limit for the admin, who owns the machine.
const OF_ADMIN_MAX: usize = 4096;

/// Admits a request of an authenticated caller that has not too many in flight. The permit
/// becomes an extension of the request, and must be held until the response has been sent.
pub(crate) fn limit(state: &AppState, mut request: Request) -> Result<Request, ApiError> {
    let Some(caller) = request.extensions().get::<Caller>().copied() else { return Ok(request) };
    let most = if caller.is_admin() { OF_ADMIN_MAX } else { OF_USER_MAX };
    let permit = state.permits.admit(caller.0, most).ok_or_else(|| {
        ApiError::new(
            ErrorCode::RateLimited,
            format!("the maximum of {most} requests is in flight"),
        )
        .hint("read the pending responses, or close unneeded streams and WebSockets")
    })?;
    request.extensions_mut().insert(Arc::new(permit));
    Ok(request)
}
