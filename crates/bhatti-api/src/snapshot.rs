//! Snapshots with a name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Saves a sandbox under a name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// The name.
    pub name: String,
}

/// Makes a sandbox of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResumeSnapshot {
    /// The sandbox's name; a random one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The environment of processes to come.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Whether it stays hot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_hot: bool,
    /// Names of secrets that are variables of its environment.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// What is noted on it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The sandbox that was saved, by the name that it had then.
    pub sandbox: String,
    /// The same by its id.
    pub sandbox_id: String,
    /// Its vCPUs.
    pub cpus: u64,
    /// Its memory in MiB.
    pub memory_mb: u64,
    /// `full`, or `diff`: then what it differs from is kept beside it.
    pub kind: String,
    /// The pages of memory in it, in bytes.
    pub memory_bytes: u64,
    /// The names of the volumes that it has copies of.
    pub volumes: Vec<String>,
    /// When it was taken (RFC 3339).
    pub created_at: String,
}
