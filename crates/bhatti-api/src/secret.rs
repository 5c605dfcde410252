//! Secrets.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Sets a secret, new or not.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetSecret {
    /// Its name: that of the environment variable which it becomes.
    pub name: String,
    /// Its value. Nothing ever returns it.
    pub value: String,
}

/// A secret, without its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Secret {
    /// Its name.
    pub name: String,
    /// When it was first set (RFC 3339).
    pub created_at: String,
    /// When it was last set (RFC 3339).
    pub updated_at: String,
}
