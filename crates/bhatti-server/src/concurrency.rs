//! Limits a user's requests in flight. Each request holds a connection, and a streaming request
//! holds memory on the way to and from the guest.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::Request;
use bhatti_api::ErrorCode;
use bhatti_types::UserId;
use parking_lot::Mutex;

use crate::AppState;
use crate::auth::Caller;
use crate::status::ApiError;

/// Maximum number of a user's requests in flight, including responses that are being read and
/// open WebSockets.
const OF_USER_MAX: usize = 512;
/// The same limit for the admin, who owns the machine.
const OF_ADMIN_MAX: usize = 4096;

/// Number of requests in flight, by user.
#[derive(Default)]
pub(crate) struct Concurrency(Arc<Mutex<HashMap<UserId, usize>>>);

/// One request of a user, counted until this is dropped.
pub(crate) struct Permit {
    user: UserId,
    all: Arc<Mutex<HashMap<UserId, usize>>>,
}

impl Concurrency {
    fn admit(&self, user: UserId, most: usize) -> Option<Permit> {
        let mut all = self.0.lock();
        let count = all.entry(user).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Permit { user, all: Arc::clone(&self.0) })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        if let Some(count) = all.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.user);
            }
        }
    }
}

/// Admits a request of an authenticated caller that has not too many in flight. The permit
/// becomes an extension of the request, and must be held until the response has been sent.
pub(crate) fn limit(state: &AppState, mut request: Request) -> Result<Request, ApiError> {
    let Some(caller) = request.extensions().get::<Caller>().copied() else { return Ok(request) };
    let most = if caller.is_admin() { OF_ADMIN_MAX } else { OF_USER_MAX };
    let permit = state.concurrency.admit(caller.0, most).ok_or_else(|| {
        ApiError::new(
            ErrorCode::RateLimited,
            format!("the maximum of {most} requests is in flight"),
        )
        .hint("read the pending responses, or close unneeded streams and WebSockets")
    })?;
    request.extensions_mut().insert(Arc::new(permit));
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_counted_per_user_and_released() {
        let all = Concurrency::default();
        let (alice, bob) = (UserId::from_entropy([1; 8]), UserId::from_entropy([2; 8]));

        let permits: Vec<_> = (0..3).map(|_| all.admit(alice, 3).unwrap()).collect();

        assert!(all.admit(alice, 3).is_none() && all.admit(bob, 3).is_some());
        drop(permits);
        assert!(all.admit(alice, 3).is_some());
        assert!(all.0.lock().is_empty());
    }
}
