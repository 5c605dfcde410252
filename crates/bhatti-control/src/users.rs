//! Users, their quotas and their API keys. Keys are known here by their hashes alone.

use bhatti_store::{
    DEFAULT_KEY, KeyInsertError, KeyRow, StoreError, UserDeleteError, UserInsertError, UserRow,
};
use bhatti_types::{KeyName, KeyScope, Quota, UserId, UserName};
use serde_json::json;

use crate::Control;

impl Control {
    /// Returns all users, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_users(&self) -> Result<Vec<UserRow>, StoreError> {
        self.inner.store.list_users()
    }

    /// Returns the user with this name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_user(&self, name: &str) -> Result<Option<UserRow>, StoreError> {
        self.inner.store.find_user(name)
    }

    /// Creates a user with one API key.
    ///
    /// # Errors
    ///
    /// Returns an error if the name is taken, or the store fails.
    pub fn create_user(
        &self,
        name: UserName,
        id: UserId,
        key_hash: &[u8; 32],
        quota: Quota,
    ) -> Result<(UserRow, KeyRow), UserInsertError> {
        let created = self.inner.store.insert_user(name, id, key_hash, quota)?;
        self.record_of_user("user.created", &created.0);
        Ok(created)
    }

    /// Replaces a user's quota.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn set_quota(&self, user: &UserRow, quota: Quota) -> Result<(), StoreError> {
        self.inner.store.set_user_quota(user.id, quota)?;
        self.record_of_user("user.changed", user);
        Ok(())
    }

    /// Checks whether a user owns nothing and can be deleted.
    ///
    /// # Errors
    ///
    /// Returns an error if the user owns something, or the store fails.
    pub fn admit_delete_user(&self, user: &UserRow) -> Result<(), UserDeleteError> {
        self.inner.store.admit_delete_user(user.id)
    }

    /// Deletes a user that owns nothing, with all keys.
    ///
    /// # Errors
    ///
    /// Returns an error if the user owns something, or the store fails.
    pub fn delete_user(&self, user: &UserRow) -> Result<(), UserDeleteError> {
        self.inner.store.delete_user(user.id)?;
        self.record_of_user("user.deleted", user);
        Ok(())
    }

    /// Replaces all API keys of a user by one.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn replace_keys(&self, user: &UserRow, key_hash: [u8; 32]) -> Result<KeyRow, StoreError> {
        let key = self.inner.store.replace_keys(user.id, DEFAULT_KEY, key_hash)?;
        self.record_of_user("user.key_rotated", user);
        Ok(key)
    }

    /// Returns the API keys of `owner`, or of all users, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_keys(&self, owner: Option<UserId>) -> Result<Vec<KeyRow>, StoreError> {
        self.inner.store.list_keys(owner)
    }

    /// Creates an API key that ends at `expires_at` (seconds since 1970).
    ///
    /// # Errors
    ///
    /// Returns an error if the name is taken, the owner has too many keys, or the store fails.
    pub fn create_key(
        &self,
        owner: UserId,
        name: KeyName,
        hash: [u8; 32],
        scope: KeyScope,
        expires_at: Option<u64>,
    ) -> Result<KeyRow, KeyInsertError> {
        let key = self.inner.store.insert_key(owner, name, hash, scope, expires_at)?;
        self.record("key.created", owner, None, json!({ "key": key.name }));
        Ok(key)
    }

    /// Deletes an API key.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if the owner has no key of that name.
    pub fn delete_key(&self, owner: UserId, name: &str) -> Result<(), StoreError> {
        self.inner.store.delete_key(owner, name)?;
        self.record("key.deleted", owner, None, json!({ "key": name }));
        Ok(())
    }

    /// Notes that a key was used at `at` (seconds since 1970).
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn note_key_use(&self, owner: UserId, name: &str, at: u64) -> Result<(), StoreError> {
        self.inner.store.note_key_use(owner, name, at)
    }

    fn record_of_user(&self, kind: &'static str, user: &UserRow) {
        self.record(kind, UserId::ADMIN, None, json!({ "user": user.name }));
    }
}
