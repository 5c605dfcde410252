//! Sandboxes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Makes a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSandbox {
    /// Its name; `sandbox-` and six hex digits if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its vCPUs; 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u64>,
    /// Its memory in MiB; 512 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// The environment of its processes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
}

/// A sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// `creating`, `running`, `failed` or `destroyed`.
    pub status: String,
    /// Why it has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its vCPUs.
    pub cpus: u64,
    /// Its memory in MiB.
    pub memory_mb: u64,
    /// The environment of its processes.
    pub env: BTreeMap<String, String>,
    /// When it was made (RFC 3339).
    pub created_at: String,
}

/// Says that something was taken away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// `destroyed` or `deleted`.
    pub status: String,
}
