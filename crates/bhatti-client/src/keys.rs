//! API keys.

use bhatti_api::{ApiKey, CreateKey, CreatedKey, Deleted};

use crate::path::segment_path;
use crate::{Client, ClientError};

/// Returns the path of the keys of a user; of the caller if `None`.
fn path(user: Option<&str>) -> String {
    user.map_or_else(|| "/keys".to_owned(), |user| segment_path("/users/", user, "/keys"))
}

impl Client {
    /// Lists the API keys of a user; of the caller if `None`. Only the admin names a user.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_keys(&self, user: Option<&str>) -> Result<Vec<ApiKey>, ClientError> {
        self.get(&path(user)).await
    }

    /// Creates an API key. Only this answer contains the key.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn create_key(
        &self,
        user: Option<&str>,
        request: &CreateKey,
    ) -> Result<CreatedKey, ClientError> {
        self.post(&path(user), Some(request)).await
    }

    /// Deletes an API key. Everything that it opened ends.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn delete_key(&self, user: Option<&str>, key: &str) -> Result<Deleted, ClientError> {
        self.delete(&segment_path(&format!("{}/", path(user)), key, "")).await
    }
}
