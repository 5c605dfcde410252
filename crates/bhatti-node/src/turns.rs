//! Locks by key: a task waits for other tasks with the same key alone.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

/// A lock for each key that a task holds or waits for. Other keys take no memory.
pub struct Turns<K>(Mutex<HashMap<K, Weak<tokio::sync::Mutex<()>>>>);

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash> Turns<K> {
    /// Waits for the turn of `key`, which lasts as long as the guard lives. First come, first
    /// served.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a task that is canceled loses its place in the queue.
    pub async fn take(&self, key: K) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.0.lock();
            turns.retain(|_, turn| turn.strong_count() > 0);
            let turn = turns.get(&key).and_then(Weak::upgrade).unwrap_or_default();
            turns.insert(key, Arc::downgrade(&turn));
            turn
        };
        turn.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns whether a future is ready at once.
    async fn is_ready<F: Future + Unpin>(future: &mut F) -> bool {
        tokio::select! {
            biased;
            _ = future => true,
            () = std::future::ready(()) => false,
        }
    }

    #[tokio::test]
    async fn turns_of_one_key_follow_each_other_and_leave_no_entry() {
        let turns = Turns::default();
        let first = turns.take("a").await;
        assert!(is_ready(&mut Box::pin(turns.take("b"))).await, "another key is free");
        let mut second = Box::pin(turns.take("a"));
        assert!(!is_ready(&mut second).await);

        drop(first);

        drop(second.await);
        drop(turns.take("c").await);
        assert_eq!(turns.0.lock().len(), 1, "only the last key has an entry");
    }
}
