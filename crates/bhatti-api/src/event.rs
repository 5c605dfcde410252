//! Events.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Number of the event. Later events have larger numbers.
    pub id: u64,
    /// Time of the event (RFC 3339).
    pub at: String,
    /// Type of the event, such as `sandbox.created`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Id of the sandbox that the event concerns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// Name of the sandbox at that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_name: Option<String>,
    /// Id of the user that the event belongs to.
    pub user_id: String,
    /// Further facts, depending on the type.
    #[schema(value_type = Object)]
    pub detail: serde_json::Value,
}
