//! Named snapshots.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Saves a sandbox under a name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Name of the snapshot.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
    pub name: String,
}

/// Creates a sandbox from a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResumeSnapshot {
    /// Name of the sandbox [default: a random name].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
    pub name: Option<String>,
    /// Environment variables of later processes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Whether the sandbox stays hot when idle.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_hot: bool,
    /// Secrets to expose as environment variables, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// Labels to set.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Snapshot id.
    pub id: String,
    /// Name of the snapshot.
    pub name: String,
    /// Name of the saved sandbox at the time of the snapshot.
    pub sandbox: String,
    /// Id of the saved sandbox.
    pub sandbox_id: String,
    /// Number of vCPUs.
    pub cpus: u64,
    /// Memory in MiB.
    pub memory_mb: u64,
    /// `full`, or `diff`: only the pages that differ from a base, which is kept with the
    /// snapshot.
    #[schema(value_type = crate::SnapshotKind)]
    pub kind: String,
    /// Size of the memory pages in the snapshot, in bytes.
    pub memory_bytes: u64,
    /// Names of the volumes that the snapshot has copies of.
    pub volumes: Vec<String>,
    /// Time of the snapshot (RFC 3339).
    pub created_at: String,
}
