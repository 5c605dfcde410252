//! Secrets.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Sets a new or existing secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetSecret {
    /// Name of the secret, and of the environment variable that holds it.
    #[schema(pattern = "^[a-zA-Z_][a-zA-Z0-9_]{0,62}$")]
    pub name: String,
    /// Value of the secret. No request returns it.
    #[schema(max_length = 65536, pattern = "^[^\\u0000]*$")]
    pub value: String,
}

/// A secret, without its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Secret {
    /// Name of the secret.
    pub name: String,
    /// Time at which the secret was first set (RFC 3339).
    pub created_at: String,
    /// Time at which the secret was last set (RFC 3339).
    pub updated_at: String,
}
