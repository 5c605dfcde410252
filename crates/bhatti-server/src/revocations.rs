//! Keys that are none any more: what was opened with them ends.

use std::collections::HashMap;

use bhatti_types::UserId;
use parking_lot::Mutex;
use tokio::sync::watch;

/// Tells those who serve a user that its key was changed.
#[derive(Default)]
pub(crate) struct Revocations(Mutex<HashMap<UserId, watch::Sender<()>>>);

impl Revocations {
    /// Ends what `user` has opened.
    pub(crate) fn revoke(&self, user: UserId) {
        if let Some(told) = self.0.lock().remove(&user) {
            told.send_replace(());
        }
    }

    /// Resolves when the key with which `user` came is none any more.
    pub(crate) async fn revoked(&self, user: UserId) {
        let mut told = {
            let mut all = self.0.lock();
            all.entry(user).or_insert_with(|| watch::Sender::new(())).subscribe()
        };
        // A sender that is gone was removed to tell.
        drop(told.changed().await);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn one_users_streams_end_and_no_others() {
        let revocations = Arc::new(Revocations::default());
        let (alice, bob) = (UserId::from_entropy([1; 8]), UserId::from_entropy([2; 8]));
        let [hers, his] = [alice, bob].map(|user| {
            let revocations = Arc::clone(&revocations);
            tokio::spawn(async move { revocations.revoked(user).await })
        });
        tokio::task::yield_now().await;

        revocations.revoke(alice);

        hers.await.unwrap();
        assert!(!his.is_finished());
        his.abort();
    }
}
