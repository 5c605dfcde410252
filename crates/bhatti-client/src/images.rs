//! Images.

use bhatti_api::{
    BuildImage, Deleted, Image, Operation, PrunedImages, PullImage, PushImage, SaveImage,
    SetRegistryLogin, StoredLogin, TagImage,
};
use http::Method;

use crate::path::{segment_path, with_query};
use crate::{Client, ClientError, Download, Upload};

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

    /// Begins to pull an image from its registry, or joins the operation that pulls it.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn pull_image(&self, request: &PullImage) -> Result<Operation, ClientError> {
        self.post("/images/pull", Some(request)).await
    }

    /// The caller's logins at registries, without their passwords.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_registry_logins(&self) -> Result<Vec<StoredLogin>, ClientError> {
        self.get("/registry-logins").await
    }

    /// Stores a login at a registry, after the registry has accepted it.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn set_registry_login(
        &self,
        request: &SetRegistryLogin,
    ) -> Result<StoredLogin, ClientError> {
        self.post("/registry-logins", Some(request)).await
    }

    /// Deletes a login at a registry.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn delete_registry_login(&self, registry: &str) -> Result<Deleted, ClientError> {
        self.delete(&segment_path("/registry-logins/", registry, "")).await
    }

    /// Begins to build an image from a Dockerfile and a tar archive of its context.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn build_image(
        &self,
        request: &BuildImage,
        context: Upload,
    ) -> Result<Operation, ClientError> {
        let build = serde_json::to_string(request)
            .map_err(|error| ClientError::Unexpected(error.to_string()))?;
        self.upload_form("/images/build", ("build", &build), ("context", context)).await
    }

    /// The log of an operation from byte `offset` on, until the operation has ended.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn operation_log(&self, id: &str, offset: u64) -> Result<Download, ClientError> {
        let path = segment_path("/operations/", id, &format!("/log?offset={offset}"));
        self.download(Method::GET, &path, &[]).await
    }

    /// Begins to push an image to a registry, or joins the operation that pushes it.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn push_image(
        &self,
        image: &str,
        request: &PushImage,
    ) -> Result<Operation, ClientError> {
        self.post(&segment_path("/images/", image, "/push"), Some(request)).await
    }

    /// Begins to save a sandbox as an image, or joins the operation that does so.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn save_image(&self, request: &SaveImage) -> Result<Operation, ClientError> {
        self.post("/images/save", Some(request)).await
    }

    /// An operation, once it has ended or `wait` seconds have passed.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn operation(&self, id: &str, wait: u32) -> Result<Operation, ClientError> {
        self.get(&segment_path("/operations/", id, &format!("?wait={wait}"))).await
    }

    /// All operations, newest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_operations(&self) -> Result<Vec<Operation>, ClientError> {
        self.get("/operations").await
    }

    /// Cancels an operation.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn cancel_operation(&self, id: &str) -> Result<Operation, ClientError> {
        self.delete(&segment_path("/operations/", id, "")).await
    }

    /// An image as a tar archive of an OCI layout.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn export_image(&self, image: &str) -> Result<Download, ClientError> {
        self.download(Method::GET, &segment_path("/images/", image, "/export"), &[]).await
    }

    /// Gives an image another name.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn tag_image(&self, image: &str, name: &str) -> Result<Image, ClientError> {
        let request = TagImage { name: name.to_owned() };
        self.post(&segment_path("/images/", image, "/tag"), Some(&request)).await
    }

    /// Deletes the caller's images that are not in use.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn prune_images(&self) -> Result<PrunedImages, ClientError> {
        self.post("/images/prune", None::<&()>).await
    }

    /// Lets another user use an image.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn share_image(&self, image: &str, user: &str) -> Result<Image, ClientError> {
        self.call(Method::PUT, &share_path(image, user), None::<&()>).await
    }

    /// Ends that another user can use an image.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn unshare_image(&self, image: &str, user: &str) -> Result<Image, ClientError> {
        self.delete(&share_path(image, user)).await
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

fn share_path(image: &str, user: &str) -> String {
    segment_path(&segment_path("/images/", image, "/shares/"), user, "")
}
