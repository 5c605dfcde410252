//! Images.

use bhatti_api::{Deleted, Image};
use http::Method;

use crate::path::{segment_path, with_query};
use crate::{Client, ClientError, Upload};

impl Client {
    /// All images, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_images(&self) -> Result<Vec<Image>, ClientError> {
        self.get("/images").await
    }

    /// One image, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn inspect_image(&self, image: &str) -> Result<Image, ClientError> {
        self.get(&segment_path("/images/", image, "")).await
    }

    /// Creates an image from a tar archive.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn import_image(&self, name: &str, archive: Upload) -> Result<Image, ClientError> {
        let path = with_query("/images/import", [("name", name)]);
        self.upload(Method::POST, &path, archive).await
    }

    /// Deletes an image that is not in use.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn delete_image(&self, image: &str) -> Result<Deleted, ClientError> {
        self.delete(&segment_path("/images/", image, "")).await
    }
}
