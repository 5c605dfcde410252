//! Ports of sandboxes.

use bhatti_api::{Deleted, Port, Publication, PublishPort};

use crate::path::sandbox_path;
use crate::{Client, ClientError};

impl Client {
    /// The TCP ports with a listener in a sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_ports(&self, sandbox: &str) -> Result<Vec<Port>, ClientError> {
        self.get(&sandbox_path(sandbox, "/ports")).await
    }

    /// The TCP ports with a listener in all hot sandboxes.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_all_ports(&self) -> Result<Vec<Port>, ClientError> {
        self.get("/ports").await
    }

    /// The published ports of a sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_published(&self, sandbox: &str) -> Result<Vec<Publication>, ClientError> {
        self.get(&sandbox_path(sandbox, "/publish")).await
    }

    /// Publishes a port.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn publish(
        &self,
        sandbox: &str,
        request: &PublishPort,
    ) -> Result<Publication, ClientError> {
        self.post(&sandbox_path(sandbox, "/publish"), Some(request)).await
    }

    /// Unpublishes a port.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn unpublish(&self, sandbox: &str, port: u16) -> Result<Deleted, ClientError> {
        self.delete(&sandbox_path(sandbox, &format!("/publish/{port}"))).await
    }
}
