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
    /// Whether it stays hot, however long nobody uses it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_hot: bool,
    /// Whether it boots, rather than being forked from a template.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold_boot: bool,
}

/// Changes a sandbox. What is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateSandbox {
    /// Whether it stays hot, however long nobody uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_hot: Option<bool>,
}

/// Starts a sandbox that was stopped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartSandbox {
    /// Whether it boots from its disk. What was in its memory is lost then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold_boot: bool,
}

/// Forks a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkSandbox {
    /// How many forks; 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// The fork's name; of several, what their names begin with: `NAME-1` and so on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The environment of processes to come.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Whether the parent's environment is theirs too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub inherit_env: bool,
}

/// What came of a fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forks {
    /// The forks.
    pub sandboxes: Vec<Sandbox>,
    /// How long the parent's processes stood still, in microseconds.
    pub parent_paused_us: u64,
    /// The pages of memory that were saved, in bytes.
    pub memory_bytes: u64,
}

/// A sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// `creating`, `running`, `stopped`, `failed` or `destroyed`.
    pub status: String,
    /// Of one that runs, what it costs right now: `hot`, `warm` (paused) or `cold` (saved). A request makes it hot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thermal: Option<String>,
    /// Why it has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its vCPUs.
    pub cpus: u64,
    /// Its memory in MiB.
    pub memory_mb: u64,
    /// The environment of its processes.
    pub env: BTreeMap<String, String>,
    /// Whether it stays hot, however long nobody uses it.
    pub keep_hot: bool,
    /// When it was made (RFC 3339).
    pub created_at: String,
    /// What it was made from: `boot`, or `template`, `sandbox` or `snapshot` and an id.
    pub origin: String,
    /// What its guest did to become itself after it had been another, part by part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<serde_json::Value>,
}

/// Says that something was taken away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// `destroyed` or `deleted`.
    pub status: String,
}
