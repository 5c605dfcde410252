//! Named snapshots.

use bhatti_api::{CreateSnapshot, Deleted, ResumeSnapshot, Sandbox, Snapshot};

use crate::path::{sandbox_path, segment_path};
use crate::{Client, ClientError};

impl Client {
    /// Saves a sandbox under a name. The sandbox keeps running.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn create_snapshot(
        &self,
        sandbox: &str,
        request: &CreateSnapshot,
    ) -> Result<Snapshot, ClientError> {
        self.post(&sandbox_path(sandbox, "/checkpoint"), Some(request)).await
    }

    /// The caller's snapshots, newest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_snapshots(&self) -> Result<Vec<Snapshot>, ClientError> {
        self.get("/snapshots").await
    }

    /// One snapshot, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn inspect_snapshot(&self, name: &str) -> Result<Snapshot, ClientError> {
        self.get(&segment_path("/snapshots/", name, "")).await
    }

    /// Creates a sandbox from a snapshot, which stays.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn resume_snapshot(
        &self,
        name: &str,
        request: &ResumeSnapshot,
    ) -> Result<Sandbox, ClientError> {
        self.post(&segment_path("/snapshots/", name, "/resume"), Some(request)).await
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn delete_snapshot(&self, name: &str) -> Result<Deleted, ClientError> {
        self.delete(&segment_path("/snapshots/", name, "")).await
    }
}
