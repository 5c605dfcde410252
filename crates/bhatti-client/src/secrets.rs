//! Secrets.

use bhatti_api::{Deleted, Secret, SetSecret};

use crate::path::segment_path;
use crate::{Client, ClientError};

impl Client {
    /// The caller's secrets, without their values.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_secrets(&self) -> Result<Vec<Secret>, ClientError> {
        self.get("/secrets").await
    }

    /// Sets a new or existing secret.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn set_secret(&self, request: &SetSecret) -> Result<Secret, ClientError> {
        self.post("/secrets", Some(request)).await
    }

    /// Deletes a secret.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn delete_secret(&self, name: &str) -> Result<Deleted, ClientError> {
        self.delete(&segment_path("/secrets/", name, "")).await
    }
}
