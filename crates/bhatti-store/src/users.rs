//! The table of users. Of their keys only hashes are kept.

use bhatti_types::{UserId, UserName};
use rusqlite::{ErrorCode, OptionalExtension, Row, params};

use crate::{Store, StoreError, now};

/// A user as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserRow {
    /// Its id.
    pub id: UserId,
    /// Its name.
    pub name: String,
    /// When it was made (RFC 3339).
    pub created_at: String,
}

/// A user could not be added.
#[derive(Debug, thiserror::Error)]
pub enum UserInsertError {
    /// There is one of that name.
    #[error("user `{0}` already exists")]
    NameTaken(UserName),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Adds a user whose key has this SHA-256.
    ///
    /// # Errors
    ///
    /// Returns [`UserInsertError::NameTaken`] if the name is in use.
    pub fn insert_user(
        &self,
        name: UserName,
        id: UserId,
        key_hash: &[u8; 32],
    ) -> Result<UserRow, UserInsertError> {
        let row = UserRow { id, name: name.to_string(), created_at: now() };
        let inserted = self.connection.lock().execute(
            "INSERT INTO users (id, name, api_key_hash, created_at) VALUES (?1, ?2, ?3, ?4)",
            params![row.id.to_string(), row.name, key_hash, row.created_at],
        );
        match inserted {
            Ok(_) => Ok(row),
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {
                Err(UserInsertError::NameTaken(name))
            }
            Err(error) => Err(UserInsertError::Store(error.into())),
        }
    }

    /// The user whose key has this SHA-256. The look-up compares hashes, so its timing says nothing about keys.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_user_by_key_hash(
        &self,
        key_hash: &[u8; 32],
    ) -> Result<Option<UserRow>, StoreError> {
        let connection = self.connection.lock();
        let mut query = connection
            .prepare_cached("SELECT id, name, created_at FROM users WHERE api_key_hash = ?1")?;
        query.query_row([key_hash], |row| Ok(read(row))).optional()?.transpose()
    }

    /// All users, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_users(&self) -> Result<Vec<UserRow>, StoreError> {
        let connection = self.connection.lock();
        let mut query = connection
            .prepare_cached("SELECT id, name, created_at FROM users ORDER BY created_at, id")?;
        query.query_map([], |row| Ok(read(row)))?.map(|row| row?).collect()
    }
}

fn read(row: &Row<'_>) -> Result<UserRow, StoreError> {
    let id: String = row.get(0)?;
    let id = id.parse().map_err(|error| StoreError::Damaged(format!("{error}")))?;
    Ok(UserRow { id, name: row.get(1)?, created_at: row.get(2)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_is_found_by_the_hash_of_its_key() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let alice = store
            .insert_user("alice".parse().unwrap(), UserId::from_entropy([1; 8]), &[1; 32])
            .unwrap();

        assert_eq!(store.find_user_by_key_hash(&[1; 32]).unwrap(), Some(alice));
        assert_eq!(store.find_user_by_key_hash(&[2; 32]).unwrap(), None);
    }

    #[test]
    fn name_is_taken_once() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();

        let taken =
            store.insert_user("admin".parse().unwrap(), UserId::from_entropy([1; 8]), &[1; 32]);

        assert!(matches!(taken, Err(UserInsertError::NameTaken(_))));
    }
}
