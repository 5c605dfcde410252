//! Who a caller is, and for how long.
//!
//! All keys are in memory, so a request needs no query of the store, and a stranger's key costs
//! only a hash. Validity is a level, not an event: a stream that asks after its key has ended
//! learns that the key has ended.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bhatti_store::KeyRow;
use bhatti_types::{KeyScope, UserId};
use parking_lot::RwLock;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::keys;

/// How exactly the time of a key's last use is kept.
const USE_SECONDS: u64 = 60;

/// How long to sleep at most before the wall clock is read again: it may have been set.
const CLOCK_LOOK: Duration = Duration::from_secs(60);

/// A valid or ended API key.
#[derive(Debug)]
pub struct Key {
    /// The user that the key authenticates.
    pub owner: UserId,
    /// The key's name.
    pub name: String,
    /// What the key allows.
    pub scope: KeyScope,
    /// When the key expires, in seconds since 1970.
    expires_at: Option<u64>,
    /// When the key was last used, in seconds since 1970.
    used_at: AtomicU64,
    revoked: watch::Sender<bool>,
}

impl Key {
    fn of(row: &KeyRow) -> Arc<Self> {
        Arc::new(Self {
            owner: row.owner,
            name: row.name.clone(),
            scope: row.scope,
            expires_at: row.expires_at,
            used_at: AtomicU64::new(row.last_used_at.unwrap_or_default()),
            revoked: watch::Sender::new(false),
        })
    }

    fn is_expired(&self) -> bool {
        self.expires_at.is_some_and(|end| end <= now())
    }

    fn is_valid(&self) -> bool {
        !*self.revoked.borrow() && !self.is_expired()
    }

    /// Notes that the key is used now. Returns the time, in seconds since 1970, if the last use
    /// was a while ago and must be recorded.
    pub fn note_use(&self) -> Option<u64> {
        let (now, before) = (now(), self.used_at.load(Ordering::Relaxed));
        if now < before.saturating_add(USE_SECONDS) {
            return None;
        }
        let stored =
            self.used_at.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed);
        stored.is_ok().then_some(now)
    }

    /// Returns when the key was last used, in seconds since 1970; 0 if never.
    pub fn used_at(&self) -> u64 {
        self.used_at.load(Ordering::Relaxed)
    }

    /// Resolves when the key is no longer valid. Cancel safe.
    async fn ended(&self) {
        let mut revoked = self.revoked.subscribe();
        let expired = async {
            match self.expires_at {
                Some(end) => {
                    while !self.is_expired() {
                        let left = Duration::from_secs(end.saturating_sub(now()));
                        sleep(left.min(CLOCK_LOOK)).await;
                    }
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // The sender lives as long as the key.
            _revoked = revoked.wait_for(|revoked| *revoked) => {}
            () = expired => {}
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The user that a request was authenticated as, and the key that did it. The admin, who calls
/// through the Unix socket, has no key.
#[derive(Clone, Debug)]
pub struct Identity {
    user: UserId,
    key: Option<Arc<Key>>,
}

impl Identity {
    /// The admin, on the Unix socket.
    pub const ADMIN: Self = Self { user: UserId::ADMIN, key: None };

    /// The owner of a key.
    #[must_use]
    pub fn of(key: Arc<Key>) -> Self {
        Self { user: key.owner, key: Some(key) }
    }

    /// Returns the user.
    #[must_use]
    pub const fn user(&self) -> UserId {
        self.user
    }

    /// Returns what the caller may do.
    #[must_use]
    pub fn scope(&self) -> KeyScope {
        self.key.as_ref().map_or(KeyScope::Full, |key| key.scope)
    }

    /// Returns when the caller's key expires, in seconds since 1970.
    #[must_use]
    pub fn expires_at(&self) -> Option<u64> {
        self.key.as_ref()?.expires_at
    }

    /// Whether the caller is known for as long as the connection lasts.
    #[must_use]
    pub const fn is_lasting(&self) -> bool {
        self.key.is_none()
    }

    /// Whether the caller may still act.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.key.as_ref().is_none_or(|key| key.is_valid())
    }

    /// Resolves when the caller's key is no longer valid. Cancel safe.
    pub async fn ended(&self) {
        match &self.key {
            Some(key) => key.ended().await,
            None => std::future::pending().await,
        }
    }
}

/// All API keys, by their hash.
#[derive(Debug, Default)]
pub struct Keyring(RwLock<HashMap<[u8; 32], Arc<Key>>>);

impl Keyring {
    /// Creates a keyring with these keys.
    #[must_use]
    pub fn new(rows: &[KeyRow]) -> Self {
        Self(RwLock::new(rows.iter().map(|row| (row.hash, Key::of(row))).collect()))
    }

    /// Returns the valid key with this text. Text that does not look like a key costs nothing.
    pub fn find(&self, text: &str) -> Option<Arc<Key>> {
        if !keys::is_formed(text) {
            return None;
        }
        let key = self.0.read().get(&keys::hash(text)).cloned()?;
        key.is_valid().then_some(key)
    }

    /// Adds a key that was stored. Forgets keys that have expired.
    pub fn insert(&self, row: &KeyRow) {
        let mut keys = self.0.write();
        keys.retain(|_, key| key.is_valid());
        keys.insert(row.hash, Key::of(row));
    }

    /// Ends a key that was deleted from the store, with everything that it opened. Returns whether
    /// there was one.
    pub fn revoke(&self, owner: UserId, name: &str) -> bool {
        self.end(|key| key.owner == owner && key.name == name)
    }

    /// Ends all keys of a user. Returns whether there were any.
    pub fn revoke_all(&self, owner: UserId) -> bool {
        self.end(|key| key.owner == owner)
    }

    fn end(&self, is_ended: impl Fn(&Key) -> bool) -> bool {
        let mut keys = self.0.write();
        let before = keys.len();
        keys.retain(|_, key| {
            let ends = is_ended(key);
            if ends {
                key.revoked.send_replace(true);
            }
            !ends
        });
        keys.len() < before
    }

    /// Returns when the key `name` of `owner` was last used, in seconds since 1970; 0 if never.
    pub fn used_at(&self, owner: UserId, name: &str) -> u64 {
        let keys = self.0.read();
        let key = keys.values().find(|key| key.owner == owner && key.name == name);
        key.map_or(0, |key| key.used_at())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(owner: u8, name: &str, text: &str, expires_at: Option<u64>) -> KeyRow {
        KeyRow {
            owner: UserId::from_entropy([owner; 8]),
            name: name.to_owned(),
            hash: keys::hash(text),
            scope: KeyScope::Full,
            created_at: String::new(),
            expires_at,
            last_used_at: None,
        }
    }

    #[tokio::test]
    async fn stream_that_begins_after_the_revocation_ends_too() {
        let (hers, his) = (keys::generate().unwrap(), keys::generate().unwrap());
        let rows = [row(1, "default", &hers, None), row(2, "default", &his, None)];
        let keyring = Keyring::new(&rows);
        let alice = Identity::of(keyring.find(&hers).unwrap());
        let bob = Identity::of(keyring.find(&his).unwrap());

        assert!(keyring.revoke(alice.user(), "default"));

        // No task waited for the end when it happened.
        alice.ended().await;
        assert!(!alice.is_valid() && keyring.find(&hers).is_none());
        assert!(bob.is_valid() && keyring.find(&his).is_some());
        assert!(!keyring.revoke(alice.user(), "default"));
    }

    #[tokio::test]
    async fn expired_key_is_unknown_and_its_streams_end() {
        let text = keys::generate().unwrap();
        let keyring = Keyring::new(&[row(1, "ci", &text, Some(now() + 2))]);
        let identity = Identity::of(keyring.find(&text).unwrap());

        identity.ended().await;

        assert!(keyring.find(&text).is_none() && !identity.is_valid());
    }

    #[test]
    fn use_is_recorded_once_a_minute() {
        let text = keys::generate().unwrap();
        let keyring = Keyring::new(&[row(1, "ci", &text, None)]);
        let key = keyring.find(&text).unwrap();
        assert!(key.note_use().is_some());
        assert_eq!(key.note_use(), None);
        assert_eq!(keyring.used_at(key.owner, "ci"), key.used_at());
    }

    #[test]
    fn text_that_is_no_key_is_unknown() {
        let keyring = Keyring::default();
        for text in ["", "bht_", "x", "bht_00", &"bht_zz".repeat(20)] {
            assert!(keyring.find(text).is_none(), "{text}");
        }
    }
}
