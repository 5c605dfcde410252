//! Secrets: sealed in the store, in plain text only in the environment of sandboxes that use them.

use std::collections::BTreeMap;
use std::sync::Arc;

use bhatti_secret::{SealError, SecretKey, UnsealError};
use bhatti_store::{CountError, SecretRow, Store, StoreError};
use bhatti_types::{QuotaExceeded, Report, SecretName, UserId};
use tracing::warn;

use crate::Control;

/// Maximum length of a value, in bytes.
const VALUE_BYTES_MAX: usize = 64 * 1024;

/// An operation on a secret failed.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The owner has no such secret.
    #[error("secret `{0}` not found")]
    NotFound(String),
    /// The value cannot be that of an environment variable.
    #[error("a secret's value has at most {VALUE_BYTES_MAX} bytes and no NUL")]
    Value,
    /// The value could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The value cannot be unsealed.
    #[error("secret `{name}` cannot be read")]
    Unseal {
        /// The secret's name.
        name: String,
        /// The cause.
        #[source]
        source: UnsealError,
    },
    /// The owner's quota of secrets is used up.
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

/// Returns the context for which a secret is sealed: a ciphertext that is moved to another row of
/// the store cannot be decrypted.
#[must_use]
pub fn seal_context(owner: &str, name: &str) -> String {
    format!("{owner}/{name}")
}

/// Seals and unseals the secrets of the store.
pub(crate) struct Secrets {
    key: SecretKey,
    store: Arc<Store>,
}

impl Secrets {
    pub(crate) const fn new(key: SecretKey, store: Arc<Store>) -> Self {
        Self { key, store }
    }

    /// Encrypts a value for a context.
    pub(crate) fn seal(&self, context: &str, plain: &[u8]) -> Result<Vec<u8>, SealError> {
        self.key.seal(context, plain)
    }

    /// Decrypts a value that was sealed for this context.
    pub(crate) fn unseal(&self, context: &str, sealed: &[u8]) -> Result<Vec<u8>, UnsealError> {
        self.key.unseal(context, sealed)
    }

    /// Returns the values of secrets, by name.
    pub(crate) fn read(
        &self,
        owner: UserId,
        names: &[SecretName],
    ) -> Result<BTreeMap<String, String>, SecretError> {
        names.iter().map(|name| Ok((name.to_string(), self.read_one(owner, name)?))).collect()
    }

    /// Returns the values of those secrets that can be read. The others are logged.
    pub(crate) fn read_existing(
        &self,
        owner: UserId,
        names: &[SecretName],
    ) -> BTreeMap<String, String> {
        let value = |name: &SecretName| match self.read_one(owner, name) {
            Ok(value) => Some((name.to_string(), value)),
            Err(error) => {
                warn!(%name, error = %Report(&error), "Booting a sandbox without one of its secrets");
                None
            }
        };
        names.iter().filter_map(value).collect()
    }

    fn read_one(&self, owner: UserId, name: &SecretName) -> Result<String, SecretError> {
        let sealed = self.store.get_secret(owner, name.as_str())?;
        let sealed = sealed.ok_or_else(|| SecretError::NotFound(name.to_string()))?;
        let plain = self.key.unseal(&seal_context(&owner.to_string(), name.as_str()), &sealed);
        let plain =
            plain.map_err(|source| SecretError::Unseal { name: name.to_string(), source })?;
        // Only text is ever sealed.
        Ok(String::from_utf8_lossy(&plain).into_owned())
    }
}

impl Control {
    /// Creates or replaces a secret. Sandboxes that use it keep the value that they have.
    ///
    /// # Errors
    ///
    /// Returns [`SecretError::Value`] if no environment variable can have the value.
    pub fn set_secret(
        &self,
        owner: UserId,
        name: &SecretName,
        value: &str,
    ) -> Result<SecretRow, SecretError> {
        if value.len() > VALUE_BYTES_MAX || value.contains('\0') {
            return Err(SecretError::Value);
        }
        let context = seal_context(&owner.to_string(), name.as_str());
        let sealed = self.inner.secrets.key.seal(&context, value.as_bytes())?;
        let row = self.inner.store.set_secret(owner, name, &sealed)?;
        self.record("secret.set", owner, None, serde_json::json!({ "name": name.as_str() }));
        Ok(row)
    }

    /// Returns the secrets of `owner`, without their values.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_secrets(&self, owner: UserId) -> Result<Vec<SecretRow>, SecretError> {
        Ok(self.inner.store.list_secrets(owner)?)
    }

    /// Deletes a secret. Sandboxes that use it keep its value.
    ///
    /// # Errors
    ///
    /// Returns [`SecretError::NotFound`] if the owner has no secret of that name.
    pub fn delete_secret(&self, owner: UserId, name: &str) -> Result<(), SecretError> {
        self.inner.store.delete_secret(owner, name).map_err(|error| match error {
            StoreError::NoSuchRow => SecretError::NotFound(name.to_owned()),
            error => error.into(),
        })?;
        self.record("secret.deleted", owner, None, serde_json::json!({ "name": name }));
        Ok(())
    }
}
