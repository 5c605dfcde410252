//! The tables of users' images and of the users that they are shared with.
//!
//! A user means an own image or one of the admin by its name. A shared image has the name
//! `NAME@OWNER` for those with whom it is shared, so that nobody can give another user an image in
//! place of the one that the user means.

use std::collections::BTreeSet;

use bhatti_types::{ImageConfig, ImageName, QuotaExceeded, RootName, UserId};
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::{
    CountError, RowName, Store, StoreError, changed_one, check_count, from_json, immediate, now,
    parsed, sound_rows, to_json,
};

const COLUMNS: &str = "owner, name, root, source, config, blobs, size_bytes, disk_bytes, created_at, used_at, manifest";

/// Maximum number of images of one user.
const IMAGES_MAX: u32 = 1000;

/// Maximum number of users with whom an image is shared.
const SHARES_MAX: u32 = 1000;

/// An image as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRow {
    /// The owner.
    pub owner: UserId,
    /// Name of the image: what the owner calls it, or the whole reference that it was pulled by.
    pub name: ImageName,
    /// Its root file system.
    pub root: RootName,
    /// The registry and digest, or the archive, that it was made from.
    pub source: String,
    /// What it says about processes.
    pub config: ImageConfig,
    /// SHA-256 of its manifest, in hexadecimal; absent if it was not made from layers.
    pub manifest: Option<String>,
    /// SHA-256 of its manifest, configuration and layers, in hexadecimal.
    pub blobs: Vec<String>,
    /// Size of the file system, in bytes.
    pub size_bytes: u64,
    /// Disk space that the root file system takes, in bytes.
    pub disk_bytes: u64,
    /// When the image got its name (RFC 3339); the store sets it.
    pub created_at: String,
    /// When a sandbox was last created from it, in seconds since 1970.
    pub used_at: u64,
}

/// An image could not be stored.
#[derive(Debug, thiserror::Error)]
pub enum ImageInsertError {
    /// The owner has an image of that name.
    #[error("image `{0}` already exists")]
    NameTaken(ImageName),
    /// The owner has the maximum number of images.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<CountError> for ImageInsertError {
    fn from(error: CountError) -> Self {
        match error {
            CountError::TooMany(quota) => Self::Quota(quota),
            CountError::Store(error) => Self::Store(error),
        }
    }
}

/// Whether a stored image may take the place of one of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replace {
    /// It may: a reference was pulled again.
    Yes,
    /// It may not.
    No,
}

impl Store {
    /// Stores an image.
    ///
    /// # Errors
    ///
    /// Returns [`ImageInsertError::NameTaken`] if the owner has an image of that name that may not
    /// be replaced.
    pub fn insert_image(
        &self,
        row: ImageRow,
        replace: Replace,
    ) -> Result<ImageRow, ImageInsertError> {
        let row = ImageRow { created_at: now(), ..row };
        self.work(|connection| {
            let transaction = immediate(connection)?;
            let is_there = find_of(&transaction, row.owner, row.name.as_str())?.is_some();
            if is_there && replace == Replace::No {
                return Err(ImageInsertError::NameTaken(row.name.clone()));
            }
            if !is_there {
                let count = "SELECT count(*) FROM images WHERE owner = ?1";
                check_count(&transaction, count, &row.owner.to_string(), "image", IMAGES_MAX)?;
            }
            put(&transaction, &row)?;
            transaction.commit().map_err(StoreError::from)?;
            Ok(row)
        })
    }

    /// Returns the image of `user`, or else of the admin, with this name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_image(&self, user: UserId, name: &str) -> Result<Option<ImageRow>, StoreError> {
        self.work(|connection| {
            let own = find_of(connection, user, name)?;
            if own.is_some() { Ok(own) } else { find_of(connection, UserId::ADMIN, name) }
        })
    }

    /// Returns the image of the user `owner` with this name, if it is shared with `user`.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_shared_image(
        &self,
        user: UserId,
        owner: &str,
        name: &str,
    ) -> Result<Option<ImageRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM images JOIN image_shares USING (owner, name)
                 WHERE user = ?1 AND name = ?3 AND owner = (SELECT id FROM users WHERE name = ?2)"
            ))?;
            let found = query.query_row([&user.to_string(), owner, name], |row| Ok(read(row)));
            found.optional()?.transpose()
        })
    }

    /// Returns the image of `owner` with this name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_own_image(
        &self,
        owner: UserId,
        name: &str,
    ) -> Result<Option<ImageRow>, StoreError> {
        self.work(|connection| find_of(connection, owner, name))
    }

    /// Returns the images of a user, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_images(&self, owner: UserId) -> Result<Vec<ImageRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM images WHERE owner = ?1 ORDER BY name"
            ))?;
            sound_rows(&mut query, [owner.to_string()], RowName("image", 1), read)
        })
    }

    /// Returns the images that are shared with `user`, with the names of their owners.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_shared_images(&self, user: UserId) -> Result<Vec<(String, ImageRow)>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS}, (SELECT users.name FROM users WHERE id = owner) FROM images
                 JOIN image_shares USING (owner, name) WHERE user = ?1 ORDER BY name, owner"
            ))?;
            let read = |row: &Row<'_>| Ok((row.get(11)?, read(row)?));
            sound_rows(&mut query, [user.to_string()], RowName("image", 1), read)
        })
    }

    /// Returns the disk space of a user's images, in bytes: each root file system once.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn image_bytes(&self, owner: UserId) -> Result<u64, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(
                "SELECT coalesce(sum(bytes), 0) FROM
                 (SELECT max(disk_bytes) AS bytes FROM images WHERE owner = ?1 GROUP BY root)",
            )?;
            Ok(query.query_row([owner.to_string()], |row| row.get(0))?)
        })
    }

    /// Returns all users' images, those first that were used longest ago. A damaged row is an
    /// error, because its files must not count as unused.
    ///
    /// # Errors
    ///
    /// Returns an error if a row is damaged or the store fails.
    pub fn list_all_images(&self) -> Result<Vec<ImageRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM images ORDER BY used_at, owner, name"
            ))?;
            let rows = query.query_map([], |row| Ok(read(row)))?;
            rows.map(|row| row.map_err(StoreError::from).flatten()).collect()
        })
    }

    /// Returns the root file systems of all users' images.
    ///
    /// # Errors
    ///
    /// As [`list_all_images`](Self::list_all_images).
    pub fn image_roots(&self) -> Result<BTreeSet<RootName>, StoreError> {
        Ok(self.list_all_images()?.into_iter().map(|image| image.root).collect())
    }

    /// Notes that a sandbox was created from an image. An image that is gone is no error.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn touch_image(&self, owner: UserId, name: &ImageName, now: u64) -> Result<(), StoreError> {
        self.log_work(|connection| {
            connection
                .prepare_cached("UPDATE images SET used_at = ?3 WHERE owner = ?1 AND name = ?2")?
                .execute(params![owner.to_string(), name.as_str(), now])?;
            Ok(())
        })
    }

    /// Deletes an image of `owner`, and ends that it is shared.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such image.
    pub fn delete_image(&self, owner: UserId, name: &ImageName) -> Result<(), StoreError> {
        self.work(|connection| {
            changed_one(connection.execute(
                "DELETE FROM images WHERE owner = ?1 AND name = ?2",
                [&owner.to_string(), name.as_str()],
            )?)
        })
    }

    /// Lets a user use an image of `owner`. Sharing it again changes nothing.
    ///
    /// # Errors
    ///
    /// Returns an error if the image is shared with too many users, or the store fails.
    pub fn share_image(
        &self,
        owner: UserId,
        name: &ImageName,
        user: UserId,
    ) -> Result<(), CountError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            let (owner, user) = (owner.to_string(), user.to_string());
            let used: u32 = transaction.query_row(
                "SELECT count(*) FROM image_shares WHERE owner = ?1 AND name = ?2 AND user <> ?3",
                [&owner, name.as_str(), &user],
                |row| row.get(0),
            )?;
            if used >= SHARES_MAX {
                let what = "image share";
                let exceeded = QuotaExceeded::Count { what, used, max: SHARES_MAX };
                return Err(CountError::TooMany(exceeded));
            }
            transaction.execute(
                "INSERT OR IGNORE INTO image_shares (owner, name, user) VALUES (?1, ?2, ?3)",
                [&owner, name.as_str(), &user],
            )?;
            Ok(transaction.commit()?)
        })
    }

    /// Ends that a user can use an image of `owner`.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if the image is not shared with the user.
    pub fn unshare_image(
        &self,
        owner: UserId,
        name: &ImageName,
        user: UserId,
    ) -> Result<(), StoreError> {
        self.work(|connection| {
            changed_one(connection.execute(
                "DELETE FROM image_shares WHERE owner = ?1 AND name = ?2 AND user = ?3",
                [&owner.to_string(), name.as_str(), &user.to_string()],
            )?)
        })
    }

    /// Returns the names of the users with whom an image of `owner` is shared.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn image_shares(&self, owner: UserId, name: &ImageName) -> Result<Vec<String>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(
                "SELECT users.name FROM image_shares JOIN users ON users.id = image_shares.user
                 WHERE owner = ?1 AND image_shares.name = ?2 ORDER BY users.name",
            )?;
            let names = query.query_map([&owner.to_string(), name.as_str()], |row| row.get(0))?;
            Ok(names.collect::<Result<_, _>>()?)
        })
    }

    /// Returns a sandbox, snapshot or template that uses an image, if there is one: of any user if
    /// the image is the admin's, or else of its owner or of a user with whom it was shared.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn image_user(
        &self,
        owner: UserId,
        image: &ImageName,
    ) -> Result<Option<String>, StoreError> {
        self.work(|connection| {
            let of = "(image = ?1 AND ?2 IN (owner, ?3) OR
                image = ?1 || '@' || (SELECT users.name FROM users WHERE users.id = ?2))";
            let mut query = connection.prepare_cached(&format!(
                "SELECT 'sandbox `' || name || '`' FROM sandboxes WHERE {of} AND state <> 'destroyed'
                 UNION ALL SELECT 'snapshot `' || name || '`' FROM snapshots WHERE {of} AND kind = 'named'
                 UNION ALL SELECT 'template `' || name || '`' FROM templates WHERE {of} LIMIT 1",
            ))?;
            let (owner, admin) = (owner.to_string(), UserId::ADMIN.to_string());
            Ok(query.query_row([image.as_str(), &owner, &admin], |row| row.get(0)).optional()?)
        })
    }
}

fn find_of(
    connection: &Connection,
    owner: UserId,
    name: &str,
) -> Result<Option<ImageRow>, StoreError> {
    let mut query = connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM images WHERE owner = ?1 AND name = ?2"))?;
    let found = query.query_row([&owner.to_string(), name], |row| Ok(read(row)));
    found.optional()?.transpose()
}

/// Inserts a row, or changes the row of that name. Its shares stay.
fn put(connection: &Connection, row: &ImageRow) -> Result<(), StoreError> {
    connection.execute(
        &format!(
            "INSERT INTO images ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
             ON CONFLICT (owner, name) DO UPDATE SET root = ?3, source = ?4, config = ?5, blobs = ?6, \
                 size_bytes = ?7, disk_bytes = ?8, created_at = ?9, used_at = ?10, manifest = ?11"
        ),
        params![
            row.owner.to_string(),
            row.name.as_str(),
            row.root.as_str(),
            row.source,
            to_json(&row.config)?,
            to_json(&row.blobs)?,
            row.size_bytes,
            row.disk_bytes,
            row.created_at,
            row.used_at,
            row.manifest,
        ],
    )?;
    Ok(())
}

fn read(row: &Row<'_>) -> Result<ImageRow, StoreError> {
    let text = |index: usize| row.get::<_, String>(index);
    Ok(ImageRow {
        owner: parsed(text(0)?.parse())?,
        name: parsed(text(1)?.parse())?,
        root: parsed(text(2)?.parse())?,
        source: text(3)?,
        config: from_json(&text(4)?)?,
        blobs: from_json(&text(5)?)?,
        size_bytes: row.get(6)?,
        disk_bytes: row.get(7)?,
        created_at: text(8)?,
        used_at: row.get(9)?,
        manifest: row.get(10)?,
    })
}

/// Returns the text of a sandbox's column: absent for an image that says nothing.
pub(crate) fn config_text(config: &ImageConfig) -> Result<Option<String>, StoreError> {
    if *config == ImageConfig::default() { Ok(None) } else { to_json(config).map(Some) }
}

/// Parses the column that [`config_text`] wrote.
pub(crate) fn read_config(text: Option<&str>) -> Result<ImageConfig, StoreError> {
    text.map_or_else(|| Ok(ImageConfig::default()), from_json)
}

#[cfg(test)]
mod tests {
    use bhatti_types::{CpuCount, MemoryMib, Quota, TemplateId};

    use super::*;
    use crate::TemplateRow;

    fn row(owner: UserId, name: &str, root: &str) -> ImageRow {
        ImageRow {
            owner,
            name: name.parse().unwrap(),
            root: format!("rootfs-oci1-{root}.ext4").parse().unwrap(),
            source: "registry sha256:1".to_owned(),
            config: ImageConfig { user: "app".to_owned(), ..ImageConfig::default() },
            manifest: Some("ab".repeat(32)),
            blobs: vec!["ab".repeat(32)],
            size_bytes: 4096,
            disk_bytes: 1024,
            created_at: String::new(),
            used_at: 5,
        }
    }

    /// Makes a store with two users beside the admin.
    fn store() -> (tempfile::TempDir, Store, [UserId; 2]) {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let users = [1, 2].map(|number| {
            let id = UserId::from_entropy([number; 8]);
            let name = format!("user{number}").parse().unwrap();
            store.insert_user(name, id, &[number; 32], Quota::USUAL).unwrap();
            id
        });
        (data, store, users)
    }

    #[test]
    fn image_is_stored_with_every_field_and_replaced_only_if_asked() {
        let (_data, store, [user, _]) = store();
        let first = store.insert_image(row(user, "web", "a"), Replace::No).unwrap();
        assert_eq!(store.find_own_image(user, "web").unwrap().as_ref(), Some(&first));

        let taken = store.insert_image(row(user, "web", "b"), Replace::No);
        assert!(matches!(taken, Err(ImageInsertError::NameTaken(_))));
        assert_eq!(store.find_own_image(user, "web").unwrap(), Some(first));

        let second = store.insert_image(row(user, "web", "b"), Replace::Yes).unwrap();
        assert_eq!(store.list_images(user).unwrap(), std::slice::from_ref(&second));
        store.touch_image(user, &second.name, 9).unwrap();
        assert_eq!(store.list_all_images().unwrap()[0].used_at, 9);
        store.delete_image(user, &second.name).unwrap();
        assert!(matches!(store.delete_image(user, &second.name), Err(StoreError::NoSuchRow)));
    }

    #[test]
    fn name_means_an_own_image_or_one_of_the_admin_and_never_a_shared_one() {
        let (_data, store, [one, other]) = store();
        let web: ImageName = "web".parse().unwrap();
        let owner = |user| store.find_image(user, "web").unwrap().map(|image| image.owner);
        store.insert_image(row(one, "web", "ones"), Replace::No).unwrap();
        store.share_image(one, &web, other).unwrap();
        store.share_image(one, &web, other).unwrap();
        assert_eq!((owner(one), owner(other)), (Some(one), None));
        assert_eq!(store.list_images(other).unwrap(), []);
        assert_eq!(store.list_shared_images(other).unwrap()[0].0, "user1");
        assert_eq!(store.image_shares(one, &web).unwrap(), ["user2"]);

        store.insert_image(row(UserId::ADMIN, "web", "admins"), Replace::No).unwrap();
        assert_eq!((owner(one), owner(other)), (Some(one), Some(UserId::ADMIN)));

        // A new version stays shared.
        store.insert_image(row(one, "web", "new"), Replace::Yes).unwrap();
        let shared = |user| store.find_shared_image(user, "user1", "web").unwrap();
        assert!(shared(other).unwrap().root.as_str().contains("new"));
        assert_eq!(shared(one), None);

        store.unshare_image(one, &web, other).unwrap();
        assert!(matches!(store.unshare_image(one, &web, other), Err(StoreError::NoSuchRow)));
        assert_eq!(shared(other), None);
    }

    #[test]
    fn root_counts_once_for_its_owner() {
        let (_data, store, [one, other]) = store();
        for (user, name, root) in
            [(one, "a", "1"), (one, "b", "1"), (one, "c", "2"), (other, "a", "1")]
        {
            store.insert_image(row(user, name, root), Replace::No).unwrap();
        }

        assert_eq!(store.image_bytes(one).unwrap(), 2048);
        assert_eq!(store.image_bytes(UserId::ADMIN).unwrap(), 0);
        assert_eq!(store.image_roots().unwrap().len(), 2);
    }

    #[test]
    fn image_is_used_by_its_owner_and_by_those_with_whom_it_is_shared() {
        let (_data, store, [one, other]) = store();
        let web: ImageName = "web".parse().unwrap();
        let template = |number: u8, image: &str| TemplateRow {
            id: TemplateId::from_entropy([number; 8]),
            owner: other,
            name: format!("ci{number}").parse().unwrap(),
            image: image.parse().unwrap(),
            cpus: CpuCount::ONE,
            memory: MemoryMib::DEFAULT,
            disk: None,
            environment: bhatti_types::Environment::default(),
            labels: bhatti_types::Labels::default(),
            secrets: Vec::new(),
            snapshot: None,
            annex: None,
            public: false,
            init: String::new(),
            created_at: String::new(),
        };
        store.insert_template(template(1, "web")).unwrap();
        assert_eq!(store.image_user(one, &web).unwrap(), None);
        assert!(store.image_user(other, &web).unwrap().is_some());
        assert!(store.image_user(UserId::ADMIN, &web).unwrap().is_some());

        store.insert_template(template(2, "web@user1")).unwrap();
        assert_eq!(store.image_user(one, &web).unwrap().as_deref(), Some("template `ci2`"));
    }

    #[test]
    fn user_with_images_stays_and_shares_go_with_their_user() {
        let (_data, store, [one, other]) = store();
        let web: ImageName = "web".parse().unwrap();
        store.insert_image(row(one, "web", "a"), Replace::No).unwrap();
        store.share_image(one, &web, other).unwrap();

        store.delete_user(one).unwrap_err();
        store.delete_user(other).unwrap();

        assert_eq!(store.image_shares(one, &web).unwrap(), Vec::<String>::new());
        store.delete_image(one, &web).unwrap();
        store.delete_user(one).unwrap();
    }

    #[test]
    fn damaged_image_is_hidden_from_lists_but_its_files_are_not_unused() {
        let (_data, store, [one, _]) = store();
        store.insert_image(row(one, "web", "a"), Replace::No).unwrap();
        let damage = "UPDATE images SET config = '['";
        store.connection.lock().execute(damage, []).unwrap();

        assert_eq!(store.list_images(one).unwrap(), []);
        assert!(matches!(store.image_roots(), Err(StoreError::Damaged(_))));
    }
}
