//! Permits: the requests in flight of each user.

use std::collections::HashMap;
use std::sync::Arc;

use bhatti_types::UserId;
use parking_lot::Mutex;

/// The requests in flight, by user.
#[derive(Clone, Debug, Default)]
pub struct Permits(Arc<Mutex<HashMap<UserId, usize>>>);

/// A request in flight. It counts until this is dropped.
#[derive(Debug)]
pub struct Permit {
    user: UserId,
    all: Permits,
}

impl Permits {
    /// Admits a request. Returns `None` if `user` has `most` requests in flight.
    #[must_use]
    pub fn admit(&self, user: UserId, most: usize) -> Option<Permit> {
        let mut all = self.0.lock();
        let count = all.entry(user).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Permit { user, all: self.clone() })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut all = self.all.0.lock();
        if let Some(count) = all.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_counted_per_user_and_released() {
        let all = Permits::default();
        let (alice, bob) = (UserId::from_entropy([1; 8]), UserId::from_entropy([2; 8]));

        let permits: Vec<_> = (0..3).map(|_| all.admit(alice, 3).unwrap()).collect();

        assert!(all.admit(alice, 3).is_none() && all.admit(bob, 3).is_some());
        drop(permits);
        assert!(all.admit(alice, 3).is_some());
        assert!(all.0.lock().is_empty());
    }
}
