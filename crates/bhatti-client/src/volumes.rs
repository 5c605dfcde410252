//! Volumes.

use bhatti_api::{CloneVolume, CreateVolume, Deleted, ResizeVolume, Volume};

use crate::path::segment_path;
use crate::{Client, ClientError};

impl Client {
    /// Creates an empty volume.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn create_volume(&self, request: &CreateVolume) -> Result<Volume, ClientError> {
        self.post("/volumes", Some(request)).await
    }

    /// The caller's volumes, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn list_volumes(&self) -> Result<Vec<Volume>, ClientError> {
        self.get("/volumes").await
    }

    /// One volume, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn inspect_volume(&self, name: &str) -> Result<Volume, ClientError> {
        self.get(&segment_path("/volumes/", name, "")).await
    }

    /// Grows a volume.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn resize_volume(
        &self,
        name: &str,
        request: &ResizeVolume,
    ) -> Result<Volume, ClientError> {
        self.post(&segment_path("/volumes/", name, "/resize"), Some(request)).await
    }

    /// Copies a volume.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn clone_volume(
        &self,
        name: &str,
        request: &CloneVolume,
    ) -> Result<Volume, ClientError> {
        self.post(&segment_path("/volumes/", name, "/clone"), Some(request)).await
    }

    /// Deletes a volume.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn delete_volume(&self, name: &str) -> Result<Deleted, ClientError> {
        self.delete(&segment_path("/volumes/", name, "")).await
    }
}
