//! Users.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Limits of a user. An absent limit means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Limits {
    /// Maximum number of sandboxes.
    pub max_sandboxes: Option<u32>,
    /// Maximum number of vCPUs of one sandbox.
    pub max_cpus_per_sandbox: Option<u32>,
    /// Maximum memory of one sandbox, in MiB.
    pub max_memory_mb_per_sandbox: Option<u32>,
    /// Maximum number of named snapshots.
    pub max_snapshots: Option<u32>,
    /// Maximum total size of volumes, in MiB.
    pub max_volume_mb: Option<u32>,
    /// Maximum total disk space of sandboxes and snapshots on the host, in MiB.
    pub max_disk_mb: Option<u32>,
}

/// Creates a user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateUser {
    /// Name of the user.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
    pub name: String,
    /// Maximum number of sandboxes [default: 5].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sandboxes: Option<u32>,
    /// Maximum number of vCPUs of one sandbox [default: 4].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cpus_per_sandbox: Option<u32>,
    /// Maximum memory of one sandbox, in MiB [default: 4096].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mb_per_sandbox: Option<u32>,
    /// Maximum number of named snapshots [default: 5].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_snapshots: Option<u32>,
    /// Maximum total size of volumes, in MiB [default: 20480].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_volume_mb: Option<u32>,
    /// Maximum total disk space of sandboxes and snapshots on the host, in MiB [default: 51200].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_disk_mb: Option<u32>,
}

/// Changes the limits of a user. Absent limits stay unchanged. Existing resources are kept, even
/// above a new limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateUser {
    /// Maximum number of sandboxes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sandboxes: Option<u32>,
    /// Maximum number of vCPUs of one sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cpus_per_sandbox: Option<u32>,
    /// Maximum memory of one sandbox, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mb_per_sandbox: Option<u32>,
    /// Maximum number of named snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_snapshots: Option<u32>,
    /// Maximum total size of volumes, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_volume_mb: Option<u32>,
    /// Maximum total disk space of sandboxes and snapshots on the host, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_disk_mb: Option<u32>,
}

/// A new user, or a user with a new API key. The key is shown only once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedUser {
    /// User id.
    pub id: String,
    /// Name of the user.
    pub name: String,
    /// Creation time (RFC 3339).
    pub created_at: String,
    /// API key, for `Authorization: Bearer`.
    pub api_key: String,
}

/// A user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct User {
    /// User id.
    pub id: String,
    /// Name of the user.
    pub name: String,
    /// Creation time (RFC 3339).
    pub created_at: String,
    /// Limits of the user.
    pub limits: Limits,
}

/// A ticket for one WebSocket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ticket {
    /// Ticket for the query parameter `ticket`. Works once.
    pub ticket: String,
    /// Lifetime of the ticket, in seconds.
    pub expires_in_sec: u32,
}
