//! How many requests a user may have under way at once: each holds a connection, and those that stream hold memory on the way to and from
//! the guest.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::Request;
use bhatti_api::ErrorCode;
use bhatti_types::UserId;
use parking_lot::Mutex;

use crate::AppState;
use crate::auth::Caller;
use crate::status::ApiError;

/// Requests of one user at once, answers that are being read and open WebSockets included.
const OF_USER_MAX: usize = 512;
/// Those of the admin, who owns the machine.
const OF_ADMIN_MAX: usize = 4096;

/// What all users have under way.
#[derive(Default)]
pub(crate) struct Concurrency(Arc<Mutex<HashMap<UserId, usize>>>);

/// One request of a user, until this is dropped.
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

/// Lets a request of a known caller through if it has not too many under way. The permit is an extension of the request; it is to be held
/// until the answer has been sent.
pub(crate) fn limit(state: &AppState, mut request: Request) -> Result<Request, ApiError> {
    let Some(caller) = request.extensions().get::<Caller>().copied() else { return Ok(request) };
    let most = if caller.is_admin() { OF_ADMIN_MAX } else { OF_USER_MAX };
    let permit = state.concurrency.admit(caller.0, most).ok_or_else(|| {
        ApiError::new(ErrorCode::RateLimited, format!("{most} requests are under way"))
            .hint("read the answers, or close streams and WebSockets that are not needed")
    })?;
    request.extensions_mut().insert(Arc::new(permit));
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_a_users_own_and_come_back() {
        let all = Concurrency::default();
        let (alice, bob) = (UserId::from_entropy([1; 8]), UserId::from_entropy([2; 8]));

        let permits: Vec<_> = (0..3).map(|_| all.admit(alice, 3).unwrap()).collect();

        assert!(all.admit(alice, 3).is_none() && all.admit(bob, 3).is_some());
        drop(permits);
        assert!(all.admit(alice, 3).is_some());
        assert!(all.0.lock().is_empty());
    }
}
