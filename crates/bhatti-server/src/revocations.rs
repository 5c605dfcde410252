//! Revoked keys: the streams that were opened with a revoked key end.

use std::collections::HashMap;

use bhatti_types::UserId;
use parking_lot::Mutex;
use tokio::sync::watch;

/// Notifies the streams of a user that the user's key was revoked.
#[derive(Default)]
pub(crate) struct Revocations(Mutex<HashMap<UserId, watch::Sender<()>>>);

impl Revocations {
    /// Ends the streams that `user` has opened.
    pub(crate) fn revoke(&self, user: UserId) {
        if let Some(told) = self.0.lock().remove(&user) {
            told.send_replace(());
        }
    }

    /// Resolves when the key of `user` is revoked.
    pub(crate) async fn revoked(&self, user: UserId) {
        let mut told = {
            let mut all = self.0.lock();
            all.entry(user).or_insert_with(|| watch::Sender::new(())).subscribe()
        };
        // `revoke` removes the sender, so a closed channel means the same as a message.
        drop(told.changed().await);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn revocation_ends_only_the_streams_of_its_user() {
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
