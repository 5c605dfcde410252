//! Sandboxes, and the daemon itself.

use bhatti_api::{
    CreateSandbox, Deleted, ForkSandbox, Forks, Health, Sandbox, StartSandbox, UpdateSandbox, Usage,
};
use http::Method;

use crate::path::{sandbox_path, with_query};
use crate::{Client, ClientError};

impl Client {
    /// The daemon's status.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.get("/health").await
    }

    /// The daemon's metrics, in the text format of Prometheus.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        self.get_text("/metrics").await
    }

    /// Creates a sandbox and waits until it is up.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn create(&self, request: &CreateSandbox) -> Result<Sandbox, ClientError> {
        self.post("/sandboxes", Some(request)).await
    }

    /// Creates a sandbox, or returns the existing sandbox of that name in its current state.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn create_or_return(&self, request: &CreateSandbox) -> Result<Sandbox, ClientError> {
        self.post("/sandboxes?if_exists=return", Some(request)).await
    }

    /// The caller's sandboxes, newest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list(&self) -> Result<Vec<Sandbox>, ClientError> {
        self.list_labelled(&[]).await
    }

    /// The caller's sandboxes with all of these labels (`KEY=VALUE`), newest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_labelled(&self, labels: &[String]) -> Result<Vec<Sandbox>, ClientError> {
        let labels = labels.iter().map(|label| ("label", label.as_str()));
        self.get(&with_query("/sandboxes", labels)).await
    }

    /// One sandbox, by id or name.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn inspect(&self, sandbox: &str) -> Result<Sandbox, ClientError> {
        self.get(&sandbox_path(sandbox, "")).await
    }

    /// Changes a sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn update(
        &self,
        sandbox: &str,
        request: &UpdateSandbox,
    ) -> Result<Sandbox, ClientError> {
        self.call(Method::PATCH, &sandbox_path(sandbox, ""), Some(request)).await
    }

    /// Pauses a sandbox until its next use.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn pause(&self, sandbox: &str) -> Result<Sandbox, ClientError> {
        self.post(&sandbox_path(sandbox, "/pause"), None::<&()>).await
    }

    /// Makes a sandbox hot, unless it is stopped.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn resume(&self, sandbox: &str) -> Result<Sandbox, ClientError> {
        self.post(&sandbox_path(sandbox, "/resume"), None::<&()>).await
    }

    /// Saves a sandbox and ends its VM, until the sandbox is started.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn stop(&self, sandbox: &str) -> Result<Sandbox, ClientError> {
        self.post(&sandbox_path(sandbox, "/stop"), None::<&()>).await
    }

    /// Starts a stopped sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn start(
        &self,
        sandbox: &str,
        request: &StartSandbox,
    ) -> Result<Sandbox, ClientError> {
        self.post(&sandbox_path(sandbox, "/start"), Some(request)).await
    }

    /// Forks a sandbox: its memory, its processes and its disk.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn fork(&self, sandbox: &str, request: &ForkSandbox) -> Result<Forks, ClientError> {
        self.post(&sandbox_path(sandbox, "/fork"), Some(request)).await
    }

    /// Destroys a sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn destroy(&self, sandbox: &str) -> Result<Deleted, ClientError> {
        self.delete(&sandbox_path(sandbox, "")).await
    }

    /// The resource usage of the caller's sandboxes that have a VM.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn usage(&self) -> Result<Vec<Usage>, ClientError> {
        self.get("/usage").await
    }
}
