//! The table of API keys. Only hashes of keys are stored.

use bhatti_types::{KeyName, KeyScope, UserId};
use rusqlite::{Connection, Row, params};

use crate::{
    CountError, RowName, Store, StoreError, changed_one, check_count, immediate, is_taken, now,
    parsed, sound_rows,
};

const COLUMNS: &str = "owner, name, hash, scope, created_at, expires_at, last_used_at";

/// The maximum number of API keys of one user.
const KEYS_MAX: u32 = 100;

/// An API key as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    /// The user that the key authenticates.
    pub owner: UserId,
    /// Name of the key, unique among its owner's keys.
    pub name: String,
    /// SHA-256 of the key.
    pub hash: [u8; 32],
    /// What the key allows.
    pub scope: KeyScope,
    /// When the key was created (RFC 3339).
    pub created_at: String,
    /// When the key expires, in seconds since 1970.
    pub expires_at: Option<u64>,
    /// When the key was last used, in seconds since 1970, to the minute.
    pub last_used_at: Option<u64>,
}

/// A key could not be added.
#[derive(Debug, thiserror::Error)]
pub enum KeyInsertError {
    /// The owner has a key of that name.
    #[error("key `{0}` already exists")]
    NameTaken(KeyName),
    /// The owner has the maximum number of keys, or the store failed.
    #[error(transparent)]
    Count(#[from] CountError),
}

impl From<StoreError> for KeyInsertError {
    fn from(error: StoreError) -> Self {
        Self::Count(CountError::Store(error))
    }
}

impl Store {
    /// Adds a key. Removes expired keys of the owner first.
    ///
    /// # Errors
    ///
    /// Returns [`KeyInsertError::NameTaken`] if the owner has a key of that name.
    pub fn insert_key(
        &self,
        owner: UserId,
        name: KeyName,
        hash: [u8; 32],
        scope: KeyScope,
        expires_at: Option<u64>,
    ) -> Result<KeyRow, KeyInsertError> {
        let row = KeyRow {
            owner,
            name: name.to_string(),
            hash,
            scope,
            created_at: now(),
            expires_at,
            last_used_at: None,
        };
        self.work(|connection| {
            let transaction = immediate(connection)?;
            delete_expired(&transaction, owner).map_err(StoreError::from)?;
            let count = "SELECT count(*) FROM api_keys WHERE owner = ?1";
            check_count(&transaction, count, &owner.to_string(), "API key", KEYS_MAX)?;
            match insert(&transaction, &row) {
                Ok(()) => Ok(transaction.commit().map_err(StoreError::from)?),
                Err(error) if is_taken(&error) => Err(KeyInsertError::NameTaken(name)),
                Err(error) => Err(StoreError::from(error).into()),
            }
        })?;
        Ok(row)
    }

    /// Gives a user the new key `name` in place of all others, with the scope `full` and no end.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails. The earlier keys stay valid then.
    pub fn replace_keys(
        &self,
        owner: UserId,
        name: &str,
        hash: [u8; 32],
    ) -> Result<KeyRow, StoreError> {
        let row = KeyRow {
            owner,
            name: name.to_owned(),
            hash,
            scope: KeyScope::Full,
            created_at: now(),
            expires_at: None,
            last_used_at: None,
        };
        self.work(|connection| {
            let transaction = immediate(connection)?;
            transaction
                .prepare_cached("DELETE FROM api_keys WHERE owner = ?1")?
                .execute([owner.to_string()])?;
            insert(&transaction, &row)?;
            Ok::<_, StoreError>(transaction.commit()?)
        })?;
        Ok(row)
    }

    /// Returns the keys of a user; of all users if `None`.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_keys(&self, owner: Option<UserId>) -> Result<Vec<KeyRow>, StoreError> {
        self.work(|connection| {
            let sql = format!(
                "SELECT {COLUMNS} FROM api_keys WHERE owner = ?1 OR ?1 IS NULL
                 ORDER BY owner, created_at, name"
            );
            let mut query = connection.prepare_cached(&sql)?;
            let owner = owner.map(|owner| owner.to_string());
            sound_rows(&mut query, params![owner], RowName("key", 1), read)
        })
    }

    /// Deletes a key.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if the owner has no such key.
    pub fn delete_key(&self, owner: UserId, name: &str) -> Result<(), StoreError> {
        self.work(|connection| changed_one(delete(connection, owner, name)?))
    }

    /// Notes when a key was used, in seconds since 1970. Not flushed: a power cut may lose it.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn note_key_use(&self, owner: UserId, name: &str, at: u64) -> Result<(), StoreError> {
        self.log_work(|connection| {
            let mut update = connection.prepare_cached(
                "UPDATE api_keys SET last_used_at = ?3 WHERE owner = ?1 AND name = ?2",
            )?;
            update.execute(params![owner.to_string(), name, at.cast_signed()])?;
            Ok(())
        })
    }
}

fn delete_expired(connection: &Connection, owner: UserId) -> rusqlite::Result<usize> {
    let now = jiff::Timestamp::now().as_second();
    connection
        .prepare_cached("DELETE FROM api_keys WHERE owner = ?1 AND expires_at <= ?2")?
        .execute(params![owner.to_string(), now])
}

pub(super) fn insert(connection: &Connection, row: &KeyRow) -> rusqlite::Result<()> {
    let mut insert = connection.prepare_cached(&format!(
        "INSERT INTO api_keys ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, NULL)"
    ))?;
    insert.execute(params![
        row.owner.to_string(),
        row.name,
        row.hash,
        row.scope.as_str(),
        row.created_at,
        row.expires_at.map(u64::cast_signed),
    ])?;
    Ok(())
}

fn delete(connection: &Connection, owner: UserId, name: &str) -> rusqlite::Result<usize> {
    connection
        .prepare_cached("DELETE FROM api_keys WHERE owner = ?1 AND name = ?2")?
        .execute(params![owner.to_string(), name])
}

fn read(row: &Row<'_>) -> Result<KeyRow, StoreError> {
    let seconds = |column| row.get(column).map(|at: Option<i64>| at.map(i64::cast_unsigned));
    Ok(KeyRow {
        owner: parsed(row.get::<_, String>(0)?.parse())?,
        name: row.get(1)?,
        hash: row.get(2)?,
        scope: parsed(row.get::<_, String>(3)?.parse())?,
        created_at: row.get(4)?,
        expires_at: seconds(5)?,
        last_used_at: seconds(6)?,
    })
}

#[cfg(test)]
mod tests {
    use bhatti_types::Quota;

    use super::*;

    #[test]
    fn keys_of_a_user_are_added_replaced_and_deleted() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let alice = UserId::from_entropy([1; 8]);
        let names = |store: &Store| -> Vec<String> {
            store.list_keys(None).unwrap().into_iter().map(|row| row.name).collect()
        };
        store.insert_user("alice".parse().unwrap(), alice, &[1; 32], Quota::USUAL).unwrap();
        assert_eq!(names(&store), ["default"]);

        let ci = || "ci".parse().unwrap();
        let row =
            store.insert_key(alice, ci(), [2; 32], KeyScope::Read, Some(u32::MAX.into())).unwrap();
        let taken = store.insert_key(alice, ci(), [3; 32], KeyScope::Full, None).unwrap_err();
        assert!(matches!(taken, KeyInsertError::NameTaken(_)), "{taken}");
        store.note_key_use(alice, "ci", 9).unwrap();
        let found =
            store.list_keys(None).unwrap().into_iter().find(|key| key.name == "ci").unwrap();
        assert_eq!(found, KeyRow { last_used_at: Some(9), ..row });

        store.delete_key(alice, "ci").unwrap();
        assert!(matches!(store.delete_key(alice, "ci"), Err(StoreError::NoSuchRow)));
        store.insert_key(alice, ci(), [3; 32], KeyScope::Full, None).unwrap();
        store.replace_keys(alice, "default", [4; 32]).unwrap();
        let left = store.list_keys(None).unwrap();
        assert_eq!((left.len(), left[0].hash), (1, [4; 32]));

        for (number, byte) in (1..KEYS_MAX).zip(5..) {
            let (name, hash) = (format!("k{number}").parse().unwrap(), [byte; 32]);
            store.insert_key(alice, name, hash, KeyScope::Full, None).unwrap();
        }
        let refused = store.insert_key(alice, ci(), [255; 32], KeyScope::Full, None).unwrap_err();
        assert!(matches!(refused, KeyInsertError::Count(CountError::TooMany(_))), "{refused}");
        store.delete_key(alice, "k1").unwrap();
        store.insert_key(alice, ci(), [255; 32], KeyScope::Full, Some(7)).unwrap();
        // An expired key does not count, and its name is free.
        let again = store.insert_key(alice, ci(), [254; 32], KeyScope::Full, None).unwrap();
        assert_eq!(store.list_keys(Some(alice)).unwrap().last(), Some(&again));
        assert_eq!(store.list_keys(Some(UserId::ADMIN)).unwrap(), []);
        store.delete_user(alice).unwrap();
        assert_eq!(names(&store), Vec::<String>::new());
    }
}
