//! API keys.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What an API key allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeyScope {
    /// Everything that the owner may do.
    #[default]
    Full,
    /// Only look: the holder changes nothing, runs nothing and reaches no ports.
    Read,
}

/// A new API key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateKey {
    /// Name of the key, unique among its owner's keys.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
    pub name: String,
    /// What the key allows.
    #[serde(default)]
    pub scope: KeyScope,
    /// Seconds until the key expires. Without it, the key is valid until it is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    #[schema(minimum = 1)]
    pub expires_in_sec: Option<u32>,
}

/// An API key, without its secret text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiKey {
    /// Name of the key.
    pub name: String,
    /// What the key allows.
    pub scope: KeyScope,
    /// Creation time (RFC 3339).
    pub created_at: String,
    /// When the key expires (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    /// When the key was last used (RFC 3339), to the minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<String>,
}

/// A new API key. Its text is shown only once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedKey {
    /// The key's details.
    #[serde(flatten)]
    pub key: ApiKey,
    /// The key, for `Authorization: Bearer`.
    pub api_key: String,
}
