//! Secrets: unreadable in the store, readable in the environment of the sandboxes that were given them, and nowhere else.

use std::collections::BTreeMap;

use bhatti_secret::{SealError, UnsealError};
use bhatti_store::{CountError, SecretRow, StoreError};
use bhatti_types::{QuotaExceeded, SecretName, UserId};

use crate::{Shared, Supervisor};

/// The longest value, in bytes.
const VALUE_BYTES_MAX: usize = 64 * 1024;

/// Something could not be done with a secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// Its owner has no such secret.
    #[error("secret `{0}` not found")]
    NotFound(String),
    /// Its value cannot be that of a variable.
    #[error("a secret's value has at most {VALUE_BYTES_MAX} bytes and no NUL")]
    Value,
    /// It could not be made unreadable.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// It cannot be read any more.
    #[error("secret `{name}` cannot be read")]
    Unseal {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: UnsealError,
    },
    /// Its owner has as many as it may.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(StoreError),
}

impl From<CountError> for SecretError {
    fn from(error: CountError) -> Self {
        match error {
            CountError::TooMany(quota) => Self::Quota(quota),
            CountError::Store(error) => Self::Store(error),
        }
    }
}

impl From<StoreError> for SecretError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Supervisor {
    /// Sets a secret, new or not. Sandboxes that have it keep the value that they got.
    ///
    /// # Errors
    ///
    /// Returns [`SecretError::Value`] if the value can be that of no variable.
    pub fn set_secret(
        &self,
        owner: UserId,
        name: &SecretName,
        value: &str,
    ) -> Result<SecretRow, SecretError> {
        if value.len() > VALUE_BYTES_MAX || value.contains('\0') {
            return Err(SecretError::Value);
        }
        let sealed = self.shared.config.secret_key.seal(value.as_bytes())?;
        let row = self.shared.store.set_secret(owner, name, &sealed)?;
        self.record("secret.set", owner, None, serde_json::json!({ "name": name.as_str() }));
        Ok(row)
    }

    /// The secrets of `owner`, without their values.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_secrets(&self, owner: UserId) -> Result<Vec<SecretRow>, SecretError> {
        Ok(self.shared.store.list_secrets(owner)?)
    }

    /// Forgets a secret. Sandboxes that have it keep it.
    ///
    /// # Errors
    ///
    /// Returns [`SecretError::NotFound`] if there is none of that name.
    pub fn delete_secret(&self, owner: UserId, name: &str) -> Result<(), SecretError> {
        self.shared.store.delete_secret(owner, name).map_err(|error| match error {
            StoreError::NoSuchRow => SecretError::NotFound(name.to_owned()),
            error => error.into(),
        })?;
        self.record("secret.deleted", owner, None, serde_json::json!({ "name": name }));
        Ok(())
    }
}

/// The values of secrets, by name.
pub(crate) fn read(
    shared: &Shared,
    owner: UserId,
    names: &[SecretName],
) -> Result<BTreeMap<String, String>, SecretError> {
    names.iter().map(|name| Ok((name.to_string(), read_one(shared, owner, name)?))).collect()
}

/// The same, of those that are still there.
pub(crate) fn read_what_is_left(
    shared: &Shared,
    owner: UserId,
    names: &[SecretName],
) -> BTreeMap<String, String> {
    let value = |name: &SecretName| match read_one(shared, owner, name) {
        Ok(value) => Some((name.to_string(), value)),
        Err(error) => {
            let error = bhatti_types::Report(&error).to_string();
            tracing::warn!(%name, error, "A sandbox goes on without one of its secrets");
            None
        }
    };
    names.iter().filter_map(value).collect()
}

fn read_one(shared: &Shared, owner: UserId, name: &SecretName) -> Result<String, SecretError> {
    let sealed = shared.store.get_secret(owner, name.as_str())?;
    let sealed = sealed.ok_or_else(|| SecretError::NotFound(name.to_string()))?;
    let plain = shared.config.secret_key.unseal(&sealed);
    let plain = plain.map_err(|source| SecretError::Unseal { name: name.to_string(), source })?;
    // Only text is ever sealed.
    Ok(String::from_utf8_lossy(&plain).into_owned())
}
