//! The table of secrets: their names and their encrypted values.
//!
//! Logins at registries are rows of it, too, so that they are sealed and rotated with it. Their
//! names have a prefix that no secret of a user can have.

use bhatti_types::{SecretName, UserId};
use rusqlite::{OptionalExtension, params};

use crate::{CountError, Store, StoreError, changed_one, check_count, immediate, now};

/// The maximum number of secrets of one user.
const SECRETS_MAX: u32 = 1000;

/// The prefix of the names of logins at registries. The registry follows.
pub const LOGIN_PREFIX: &str = "registry/";

/// A secret without its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretRow {
    /// Name of the secret.
    pub name: String,
    /// When the secret was first set (RFC 3339).
    pub created_at: String,
    /// When the secret was last set (RFC 3339).
    pub updated_at: String,
}

/// The encrypted value of a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ciphertext {
    /// Id of the owner.
    pub owner: String,
    /// Name of the secret.
    pub name: String,
    /// The encrypted value.
    pub bytes: Vec<u8>,
}

impl Store {
    /// Creates or replaces a secret.
    ///
    /// # Errors
    ///
    /// Returns [`CountError::TooMany`] if `owner` has the maximum number of secrets.
    pub fn set_secret(
        &self,
        owner: UserId,
        name: &SecretName,
        ciphertext: &[u8],
    ) -> Result<SecretRow, CountError> {
        self.set_sealed(owner, name.as_str(), ciphertext)
    }

    /// Creates or replaces the login of a user at a registry.
    ///
    /// # Errors
    ///
    /// Returns [`CountError::TooMany`] if `owner` has the maximum number of secrets and logins.
    pub fn set_login(
        &self,
        owner: UserId,
        registry: &str,
        ciphertext: &[u8],
    ) -> Result<SecretRow, CountError> {
        self.set_sealed(owner, &format!("{LOGIN_PREFIX}{registry}"), ciphertext)
    }

    fn set_sealed(
        &self,
        owner: UserId,
        name: &str,
        ciphertext: &[u8],
    ) -> Result<SecretRow, CountError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            let is_new: bool = transaction.query_row(
                "SELECT NOT EXISTS (SELECT 1 FROM secrets WHERE owner = ?1 AND name = ?2)",
                params![owner.to_string(), name],
                |row| row.get(0),
            )?;
            if is_new {
                let count = "SELECT count(*) FROM secrets WHERE owner = ?1";
                check_count(&transaction, count, &owner.to_string(), "secret", SECRETS_MAX)?;
            }
            let mut upsert = transaction.prepare_cached(
                "INSERT INTO secrets (owner, name, ciphertext, created_at, updated_at) VALUES (?1, ?2, ?3, ?4, ?4)
                 ON CONFLICT (owner, name) DO UPDATE SET ciphertext = ?3, updated_at = ?4
                 RETURNING created_at, updated_at",
            )?;
            let parameters = params![owner.to_string(), name, ciphertext, now()];
            let row = upsert.query_row(parameters, |row| {
                Ok(SecretRow {
                    name: name.to_string(),
                    created_at: row.get(0)?,
                    updated_at: row.get(1)?,
                })
            })?;
            drop(upsert);
            transaction.commit()?;
            Ok(row)
        })
    }

    /// Deletes the secrets of all users, because their key is lost. Returns the number of
    /// secrets.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn forget_all_secrets(&self) -> Result<usize, StoreError> {
        self.work(|connection| Ok(connection.execute("DELETE FROM secrets", [])?))
    }

    /// Returns the ciphertext of a secret.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn get_secret(&self, owner: UserId, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.work(|connection| {
            let mut query = connection
                .prepare_cached("SELECT ciphertext FROM secrets WHERE owner = ?1 AND name = ?2")?;
            Ok(query.query_row(params![owner.to_string(), name], |row| row.get(0)).optional()?)
        })
    }

    /// Returns the secrets of `owner`, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_secrets(&self, owner: UserId) -> Result<Vec<SecretRow>, StoreError> {
        let mut rows = self.sealed_rows(owner)?;
        rows.retain(|row| !row.name.starts_with(LOGIN_PREFIX));
        Ok(rows)
    }

    /// Returns the logins of `owner`, each named by its registry, in order.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_logins(&self, owner: UserId) -> Result<Vec<SecretRow>, StoreError> {
        let rows = self.sealed_rows(owner)?.into_iter();
        let login = |row: SecretRow| {
            let registry = row.name.strip_prefix(LOGIN_PREFIX)?.to_owned();
            Some(SecretRow { name: registry, ..row })
        };
        Ok(rows.filter_map(login).collect())
    }

    fn sealed_rows(&self, owner: UserId) -> Result<Vec<SecretRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(
                "SELECT name, created_at, updated_at FROM secrets WHERE owner = ?1 ORDER BY name",
            )?;
            let rows = query.query_map([owner.to_string()], |row| {
                Ok(SecretRow {
                    name: row.get(0)?,
                    created_at: row.get(1)?,
                    updated_at: row.get(2)?,
                })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// Returns the ciphertexts of all users.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn ciphertexts(&self) -> Result<Vec<Ciphertext>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare("SELECT owner, name, ciphertext FROM secrets")?;
            let rows = query.query_map([], |row| {
                Ok(Ciphertext { owner: row.get(0)?, name: row.get(1)?, bytes: row.get(2)? })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// Replaces ciphertexts, all or none. The secrets keep their values and times.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn replace_ciphertexts(&self, ciphertexts: &[Ciphertext]) -> Result<(), StoreError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            for Ciphertext { owner, name, bytes } in ciphertexts {
                transaction.execute(
                    "UPDATE secrets SET ciphertext = ?3 WHERE owner = ?1 AND name = ?2",
                    params![owner, name, bytes],
                )?;
            }
            Ok(transaction.commit()?)
        })
    }

    /// Deletes a secret.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such secret.
    pub fn delete_secret(&self, owner: UserId, name: &str) -> Result<(), StoreError> {
        self.work(|connection| {
            let deleted = connection.execute(
                "DELETE FROM secrets WHERE owner = ?1 AND name = ?2",
                params![owner.to_string(), name],
            )?;
            changed_one(deleted)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_belongs_to_its_owner_and_can_be_replaced() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let name = "TOKEN".parse().unwrap();
        let first = store.set_secret(UserId::ADMIN, &name, b"1").unwrap();

        let second = store.set_secret(UserId::ADMIN, &name, b"2").unwrap();

        assert_eq!(second.created_at, first.created_at);
        assert_eq!(store.get_secret(UserId::ADMIN, "TOKEN").unwrap(), Some(b"2".to_vec()));
        let other = UserId::from_entropy([1; 8]);
        assert_eq!(store.get_secret(other, "TOKEN").unwrap(), None);
        assert!(matches!(store.delete_secret(other, "TOKEN"), Err(StoreError::NoSuchRow)));
        let sealed_at = second.updated_at.clone();
        assert_eq!(store.list_secrets(UserId::ADMIN).unwrap(), [second]);
        let mut sealed = store.ciphertexts().unwrap();
        sealed[0].bytes = b"3".to_vec();
        store.replace_ciphertexts(&sealed).unwrap();
        assert_eq!(store.get_secret(UserId::ADMIN, "TOKEN").unwrap(), Some(b"3".to_vec()));
        assert_eq!(store.list_secrets(UserId::ADMIN).unwrap()[0].updated_at, sealed_at);
        store.delete_secret(UserId::ADMIN, "TOKEN").unwrap();
        assert_eq!(store.list_secrets(UserId::ADMIN).unwrap(), []);
    }

    #[test]
    fn logins_are_no_secrets_that_users_see() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let login = store.set_login(UserId::ADMIN, "r.example:5000", b"1").unwrap();
        assert_eq!(login.name, "registry/r.example:5000");
        assert_eq!(store.list_secrets(UserId::ADMIN).unwrap(), []);
        let listed = store.list_logins(UserId::ADMIN).unwrap();
        assert_eq!(listed.iter().map(|row| &*row.name).collect::<Vec<_>>(), ["r.example:5000"]);
        assert_eq!(store.ciphertexts().unwrap().len(), 1);
    }
}
