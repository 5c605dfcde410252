//! The table of users.

use bhatti_types::{KeyScope, Quota, UserId, UserName};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::keys::{self, KeyRow};
use crate::{
    RowName, Store, StoreError, changed_one, immediate, is_taken, now, parsed, sound_rows,
};

const COLUMNS: &str = "id, name, created_at, max_sandboxes, max_cpus, max_memory_mib, max_snapshots, max_volumes_mib, max_disk_mib";

/// Name of the API key that a user is created with.
pub const DEFAULT_KEY: &str = "default";

/// A user as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserRow {
    /// Id of the user.
    pub id: UserId,
    /// Name of the user.
    pub name: String,
    /// When the user was created (RFC 3339).
    pub created_at: String,
    /// The user's limits.
    pub quota: Quota,
}

/// A user could not be added.
#[derive(Debug, thiserror::Error)]
pub enum UserInsertError {
    /// A user of that name exists.
    #[error("user `{0}` already exists")]
    NameTaken(UserName),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A user could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum UserDeleteError {
    /// The user owns resources, which would be left without an owner.
    #[error("user owns {count} {what}(s)")]
    Owns {
        /// The number of resources.
        count: u32,
        /// The kind of resource.
        what: &'static str,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<rusqlite::Error> for UserDeleteError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

impl Store {
    /// Adds a user with an API key that has this SHA-256: the key [`DEFAULT_KEY`].
    ///
    /// # Errors
    ///
    /// Returns [`UserInsertError::NameTaken`] if the name is in use.
    pub fn insert_user(
        &self,
        name: UserName,
        id: UserId,
        key_hash: &[u8; 32],
        quota: Quota,
    ) -> Result<(UserRow, KeyRow), UserInsertError> {
        let row = UserRow { id, name: name.to_string(), created_at: now(), quota };
        let Quota {
            sandboxes,
            cpus_per_sandbox,
            memory_mib_per_sandbox,
            snapshots,
            volumes_mib,
            disk_mib,
        } = quota;
        let key = KeyRow {
            owner: id,
            name: DEFAULT_KEY.to_owned(),
            hash: *key_hash,
            scope: KeyScope::Full,
            created_at: row.created_at.clone(),
            expires_at: None,
            last_used_at: None,
        };
        self.work(|connection| {
            let transaction = immediate(connection)?;
            let inserted = transaction.execute(
                &format!(
                    "INSERT INTO users ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)"
                ),
                params![
                    row.id.to_string(),
                    row.name,
                    row.created_at,
                    sandboxes,
                    cpus_per_sandbox,
                    memory_mib_per_sandbox,
                    snapshots,
                    volumes_mib,
                    disk_mib,
                ],
            );
            match inserted {
                Err(error) if is_taken(&error) => return Err(UserInsertError::NameTaken(name)),
                inserted => inserted.map_err(StoreError::from)?,
            };
            keys::insert(&transaction, &key).map_err(StoreError::from)?;
            Ok(transaction.commit().map_err(StoreError::from)?)
        })?;
        Ok((row, key))
    }

    /// Returns the user with this name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_user(&self, name: &str) -> Result<Option<UserRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection
                .prepare_cached(&format!("SELECT {COLUMNS} FROM users WHERE name = ?1"))?;
            query.query_row([name], |row| Ok(read(row))).optional()?.transpose()
        })
    }

    /// Returns all users, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_users(&self) -> Result<Vec<UserRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection
                .prepare_cached(&format!("SELECT {COLUMNS} FROM users ORDER BY created_at, id"))?;
            sound_rows(&mut query, [], RowName("user", 0), read)
        })
    }

    /// Sets a user's quota. Resources that the user already owns stay.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if the user does not exist.
    pub fn set_user_quota(&self, id: UserId, quota: Quota) -> Result<(), StoreError> {
        let Quota {
            sandboxes,
            cpus_per_sandbox,
            memory_mib_per_sandbox,
            snapshots,
            volumes_mib,
            disk_mib,
        } = quota;
        self.work(|connection| {
            let changed = connection.execute(
                "UPDATE users SET max_sandboxes = ?2, max_cpus = ?3, max_memory_mib = ?4, max_snapshots = ?5, max_volumes_mib = ?6, max_disk_mib = ?7 WHERE id = ?1",
                params![id.to_string(), sandboxes, cpus_per_sandbox, memory_mib_per_sandbox, snapshots, volumes_mib, disk_mib],
            )?;
            changed_one(changed)
        })
    }

    /// Checks whether a user owns nothing that the user sees, so that it can be deleted.
    ///
    /// # Errors
    ///
    /// Returns [`UserDeleteError::Owns`] if the user owns something.
    pub fn admit_delete_user(&self, id: UserId) -> Result<(), UserDeleteError> {
        self.work(|connection| check_owns_nothing(connection, id))
    }

    /// Deletes a user that owns nothing.
    ///
    /// # Errors
    ///
    /// Returns [`UserDeleteError::Owns`] if the user owns something.
    pub fn delete_user(&self, id: UserId) -> Result<(), UserDeleteError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            check_owns_nothing(&transaction, id)?;
            transaction.execute("DELETE FROM secrets WHERE owner = ?1", [id.to_string()])?;
            changed_one(transaction.execute("DELETE FROM users WHERE id = ?1", [id.to_string()])?)?;
            Ok(transaction.commit()?)
        })
    }
}

impl Store {
    /// Returns a user's quota.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if the user does not exist.
    pub fn quota(&self, id: UserId) -> Result<Quota, StoreError> {
        self.work(|connection| quota_of(connection, id))
    }
}

fn check_owns_nothing(connection: &Connection, id: UserId) -> Result<(), UserDeleteError> {
    for (table, what) in [
        ("sandboxes", "sandbox"),
        ("snapshots", "snapshot"),
        ("secrets", "secret"),
        ("templates", "template"),
        ("images", "image"),
        ("volumes", "volume"),
    ] {
        // Logins at registries go with the user, and so do snapshots that the user does not
        // see.
        let of = match table {
            "secrets" => "AND name NOT LIKE 'registry/%'",
            "snapshots" => "AND kind = 'named'",
            _ => "",
        };
        let count: u32 = connection.query_row(
            &format!("SELECT count(*) FROM {table} WHERE owner = ?1 {of}"),
            [id.to_string()],
            |row| row.get(0),
        )?;
        if count > 0 {
            return Err(UserDeleteError::Owns { count, what });
        }
    }
    Ok(())
}

/// Returns a user's quota.
pub(crate) fn quota_of(connection: &Connection, id: UserId) -> Result<Quota, StoreError> {
    let mut query =
        connection.prepare_cached(&format!("SELECT {COLUMNS} FROM users WHERE id = ?1"))?;
    let found = query.query_row([id.to_string()], quota).optional()?;
    found.ok_or(StoreError::NoSuchRow)
}

fn quota(row: &Row<'_>) -> rusqlite::Result<Quota> {
    Ok(Quota {
        sandboxes: row.get(3)?,
        cpus_per_sandbox: row.get(4)?,
        memory_mib_per_sandbox: row.get(5)?,
        snapshots: row.get(6)?,
        volumes_mib: row.get(7)?,
        disk_mib: row.get(8)?,
    })
}

fn read(row: &Row<'_>) -> Result<UserRow, StoreError> {
    Ok(UserRow {
        id: parsed(row.get::<_, String>(0)?.parse())?,
        name: row.get(1)?,
        created_at: row.get(2)?,
        quota: quota(row)?,
    })
}

#[cfg(test)]
mod tests {
    use bhatti_types::{VolumeId, VolumeMib};

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        (data, store)
    }

    fn add(store: &Store, name: &str, number: u8) -> Result<UserRow, UserInsertError> {
        let id = UserId::from_entropy([number; 8]);
        Ok(store.insert_user(name.parse().unwrap(), id, &[number; 32], Quota::USUAL)?.0)
    }

    #[test]
    fn user_is_found_by_its_name() {
        let (_data, store) = store();
        let alice = add(&store, "alice", 1).unwrap();

        assert_eq!(store.find_user("alice").unwrap(), Some(alice));
        assert_eq!(store.find_user("bob").unwrap(), None);
    }

    #[test]
    fn user_names_are_unique() {
        let (_data, store) = store();

        assert!(matches!(add(&store, "admin", 1), Err(UserInsertError::NameTaken(_))));
    }

    #[test]
    fn quota_is_stored_and_can_be_changed() {
        let (_data, store) = store();
        let alice = add(&store, "alice", 1).unwrap();
        let quota = Quota { sandboxes: None, snapshots: Some(0), ..Quota::USUAL };

        store.set_user_quota(alice.id, quota).unwrap();

        assert_eq!(store.find_user("alice").unwrap(), Some(UserRow { quota, ..alice }));
        assert_eq!(store.find_user("admin").unwrap().unwrap().quota, Quota::default());
    }

    #[test]
    fn user_that_owns_something_is_not_deleted() {
        let (_data, store) = store();
        let alice = add(&store, "alice", 1).unwrap();
        store.set_secret(alice.id, &"KEY".parse().unwrap(), b"x").unwrap();

        let refused = store.delete_user(alice.id);
        assert!(matches!(refused, Err(UserDeleteError::Owns { count: 1, what: "secret" })));

        store.delete_secret(alice.id, "KEY").unwrap();
        let volume = crate::VolumeRow {
            id: VolumeId::from_entropy([1; 8]),
            owner: alice.id,
            name: "data".parse().unwrap(),
            size: VolumeMib::try_from(64u64).unwrap(),
            work: None,
            created_at: String::new(),
        };
        let volume = store.insert_volume(volume).unwrap();
        let refused = store.delete_user(alice.id);
        assert!(matches!(refused, Err(UserDeleteError::Owns { count: 1, what: "volume" })));

        store.delete_volume(volume.id, || Ok::<_, crate::VolumeError>(())).unwrap();
        store.delete_user(alice.id).unwrap();
        assert_eq!(store.find_user("alice").unwrap(), None);
    }
}
