//! Users.

use bhatti_api::{CreateUser, CreatedUser, Deleted, UpdateUser, User};
use http::Method;

use crate::path::segment_path;
use crate::{Client, ClientError};

impl Client {
    /// Creates a user. Only this answer contains the API key.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn create_user(&self, request: &CreateUser) -> Result<CreatedUser, ClientError> {
        self.post("/users", Some(request)).await
    }

    /// All users.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_users(&self) -> Result<Vec<User>, ClientError> {
        self.get("/users").await
    }

    /// One user, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn inspect_user(&self, user: &str) -> Result<User, ClientError> {
        self.get(&segment_path("/users/", user, "")).await
    }

    /// Changes the limits of a user.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn update_user(&self, user: &str, request: &UpdateUser) -> Result<User, ClientError> {
        self.call(Method::PATCH, &segment_path("/users/", user, ""), Some(request)).await
    }

    /// Deletes a user that owns nothing.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn delete_user(&self, user: &str) -> Result<Deleted, ClientError> {
        self.delete(&segment_path("/users/", user, "")).await
    }

    /// Gives a user a new API key. The old key becomes invalid.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn rotate_key(&self, user: &str) -> Result<CreatedUser, ClientError> {
        self.post(&segment_path("/users/", user, "/rotate-key"), None::<&()>).await
    }
}
