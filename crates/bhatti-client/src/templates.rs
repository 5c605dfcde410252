//! Templates.

use bhatti_api::{BuildTemplate, CreateTemplate, Deleted, Operation, Template};

use crate::path::segment_path;
use crate::{Client, ClientError, Upload};

impl Client {
    /// Creates a template.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn create_template(&self, request: &CreateTemplate) -> Result<Template, ClientError> {
        self.post("/templates", Some(request)).await
    }

    /// Begins to build a template. `files` is a tar archive of what its steps copy.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn build_template(
        &self,
        request: &BuildTemplate,
        files: Upload,
    ) -> Result<Operation, ClientError> {
        let build = serde_json::to_string(request)
            .map_err(|error| ClientError::Unexpected(error.to_string()))?;
        self.upload_form("/templates/build", ("build", &build), ("files", files)).await
    }

    /// The caller's templates, newest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_templates(&self) -> Result<Vec<Template>, ClientError> {
        self.get("/templates").await
    }

    /// One template, by id or name.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn inspect_template(&self, template: &str) -> Result<Template, ClientError> {
        self.get(&segment_path("/templates/", template, "")).await
    }

    /// Deletes a template.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn delete_template(&self, template: &str) -> Result<Deleted, ClientError> {
        self.delete(&segment_path("/templates/", template, "")).await
    }
}
