//! Users.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a user may have at most; what is absent has no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Limits {
    /// Sandboxes.
    pub max_sandboxes: Option<u32>,
    /// vCPUs of one sandbox.
    pub max_cpus_per_sandbox: Option<u32>,
    /// Memory of one sandbox, in MiB.
    pub max_memory_mb_per_sandbox: Option<u32>,
    /// Named snapshots.
    pub max_snapshots: Option<u32>,
    /// Volumes, all together, in MiB.
    pub max_volume_mb: Option<u32>,
    /// Disk space of the host that sandboxes and snapshots take together, in MiB.
    pub max_disk_mb: Option<u32>,
}

/// Makes a user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateUser {
    /// Its name.
    pub name: String,
    /// How many sandboxes it may have; 5 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sandboxes: Option<u32>,
    /// How many vCPUs one of them may have; 4 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cpus_per_sandbox: Option<u32>,
    /// How much memory one of them may have, in MiB; 4096 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mb_per_sandbox: Option<u32>,
    /// How many named snapshots it may have; 5 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_snapshots: Option<u32>,
    /// How large its volumes may be together, in MiB; 20480 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_volume_mb: Option<u32>,
    /// Disk space of the host that its sandboxes and snapshots may take together, in MiB; 51200 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_disk_mb: Option<u32>,
}

/// Changes what a user may have. What is absent stays; what it has already stays, too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateUser {
    /// Sandboxes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sandboxes: Option<u32>,
    /// vCPUs of one sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cpus_per_sandbox: Option<u32>,
    /// Memory of one sandbox, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mb_per_sandbox: Option<u32>,
    /// Named snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_snapshots: Option<u32>,
    /// Volumes, all together, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_volume_mb: Option<u32>,
    /// Disk space of the host that sandboxes and snapshots take together, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_disk_mb: Option<u32>,
}

/// A user that was just made, or was given another key. The key is shown this once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedUser {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was made (RFC 3339).
    pub created_at: String,
    /// Its key for `Authorization: Bearer`.
    pub api_key: String,
}

/// A user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct User {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was made (RFC 3339).
    pub created_at: String,
    /// What it may have.
    pub limits: Limits,
}

/// A ticket for one WebSocket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ticket {
    /// For `?ticket=`, once.
    pub ticket: String,
    /// How long it is good, in seconds.
    pub expires_in_sec: u32,
}
