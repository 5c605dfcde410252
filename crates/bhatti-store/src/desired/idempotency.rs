//! The table of idempotency keys: the responses to requests that made something, for clients that
//! repeat a request because its response was lost.

use bhatti_types::UserId;
use rusqlite::{OptionalExtension, params};

use crate::{Store, StoreError, immediate};

/// How long a key is kept, in seconds.
pub const IDEMPOTENCY_SECONDS: u64 = 24 * 60 * 60;

/// The maximum number of keys that are kept of one user. The oldest are forgotten first.
const KEYS_MAX: u32 = 1_000;

/// What is known of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Repeated {
    /// The key is new, and is now reserved.
    New,
    /// The key is reserved: its request is being carried out, or the daemon has ended meanwhile.
    Reserved,
    /// The key's request was carried out.
    Done(StoredResponse),
}

/// The response to a request that was carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredResponse {
    /// Hash of the request's method, path and body.
    pub request_hash: [u8; 32],
    /// HTTP status.
    pub status: u16,
    /// JSON body.
    pub body: Vec<u8>,
}

impl Store {
    /// Looks a key up at the time `now`, in seconds since 1970, and reserves it if it is new.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn reserve_key(&self, owner: UserId, key: &str, now: u64) -> Result<Repeated, StoreError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            let kept_from = now.saturating_sub(IDEMPOTENCY_SECONDS).cast_signed();
            transaction
                .prepare_cached("DELETE FROM idempotency WHERE created_at < ?1")?
                .execute([kept_from])?;
            let found = transaction
                .prepare_cached(
                    "SELECT request_hash, status, body FROM idempotency WHERE owner = ?1 AND key = ?2",
                )?
                .query_row(params![owner.to_string(), key], |row| {
                    let status: Option<u16> = row.get(1)?;
                    Ok(match status {
                        None => Repeated::Reserved,
                        Some(status) => Repeated::Done(StoredResponse {
                            request_hash: row.get(0)?,
                            status,
                            body: row.get(2)?,
                        }),
                    })
                })
                .optional()?;
            if let Some(found) = found {
                return Ok(found);
            }
            transaction
                .prepare_cached(
                    "DELETE FROM idempotency WHERE rowid IN (SELECT rowid FROM idempotency
                     WHERE owner = ?1 AND status IS NOT NULL ORDER BY created_at DESC, rowid DESC LIMIT -1 OFFSET ?2)",
                )?
                .execute(params![owner.to_string(), KEYS_MAX - 1])?;
            transaction
                .prepare_cached("INSERT INTO idempotency (owner, key, created_at) VALUES (?1, ?2, ?3)")?
                .execute(params![owner.to_string(), key, now.cast_signed()])?;
            transaction.commit()?;
            Ok(Repeated::New)
        })
    }

    /// Keeps the response of a reserved key. Without one, forgets the key: its request made
    /// nothing.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn settle_key(
        &self,
        owner: UserId,
        key: &str,
        response: Option<&StoredResponse>,
    ) -> Result<(), StoreError> {
        self.work(|connection| {
            match response {
                Some(StoredResponse { request_hash, status, body }) => connection
                    .prepare_cached(
                        "UPDATE idempotency SET request_hash = ?3, status = ?4, body = ?5
                         WHERE owner = ?1 AND key = ?2",
                    )?
                    .execute(params![owner.to_string(), key, request_hash, status, body])?,
                None => connection
                    .prepare_cached("DELETE FROM idempotency WHERE owner = ?1 AND key = ?2")?
                    .execute(params![owner.to_string(), key])?,
            };
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_is_reserved_settled_and_forgotten() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let reserve = |key: &str, now| store.reserve_key(UserId::ADMIN, key, now).unwrap();
        assert_eq!((reserve("a", 1), reserve("a", 1)), (Repeated::New, Repeated::Reserved));
        let response = StoredResponse { request_hash: [7; 32], status: 201, body: b"{}".to_vec() };
        store.settle_key(UserId::ADMIN, "a", Some(&response)).unwrap();
        assert_eq!(reserve("a", 2), Repeated::Done(response));
        assert_eq!(reserve("b", 2), Repeated::New);
        store.settle_key(UserId::ADMIN, "b", None).unwrap();
        assert_eq!(reserve("b", 2), Repeated::New);
        assert_eq!(reserve("a", 2 + IDEMPOTENCY_SECONDS), Repeated::New, "a day later");
    }

    #[test]
    fn oldest_keys_of_a_user_are_forgotten_first() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let fill = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
            INSERT INTO idempotency (owner, key, created_at, status, request_hash, body)
            SELECT '0000000000000000', 'k' || i, i, 201, zeroblob(32), x'' FROM n";
        store.work(|connection| connection.execute(fill, [KEYS_MAX])).unwrap();
        let reserve = |key: &str| store.reserve_key(UserId::ADMIN, key, 1).unwrap();
        assert_eq!(reserve("new"), Repeated::New);
        assert!(matches!(reserve("k2"), Repeated::Done(_)));
        assert_eq!(reserve("k1"), Repeated::New, "it was the oldest");
    }
}
