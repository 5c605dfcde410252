//! Events.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its number: later events have larger ones.
    pub id: u64,
    /// When it happened (RFC 3339).
    pub at: String,
    /// What: `sandbox.created`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The sandbox that it happened to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// What that was called then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_name: Option<String>,
    /// Whose it is: a user's id.
    pub user_id: String,
    /// Anything else, by its type.
    #[schema(value_type = Object)]
    pub detail: serde_json::Value,
}
