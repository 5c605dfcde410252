//! Templates.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Creates a template: default options for new sandboxes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTemplate {
    /// Name of the template.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
    pub name: String,
    /// Image of the sandboxes [default: `minimal`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
    pub image: Option<String>,
    /// Number of vCPUs [default: 1].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 32)]
    pub cpus: Option<u64>,
    /// Memory in MiB [default: 512].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 128, maximum = 262144)]
    pub memory_mb: Option<u64>,
    /// Size of the root disk in MiB [default: that of the image].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 256, maximum = 4194304)]
    pub disk_mb: Option<u64>,
    /// Environment variables to set.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Secrets to expose as environment variables, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// Labels to set.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Script to run once a sandbox is up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[^\\u0000]*$")]
    pub init: Option<String>,
}

/// A template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Template id.
    pub id: String,
    /// Name of the template.
    pub name: String,
    /// Image of the sandboxes.
    pub image: String,
    /// Number of vCPUs.
    pub cpus: u64,
    /// Memory in MiB.
    pub memory_mb: u64,
    /// Size of the root disk in MiB; that of the image if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mb: Option<u64>,
    /// Environment variables of the sandboxes.
    pub env: BTreeMap<String, String>,
    /// Names of the secrets of the sandboxes.
    pub secrets: Vec<String>,
    /// Labels of the sandboxes.
    pub labels: BTreeMap<String, String>,
    /// Script that runs once a sandbox is up; none if empty.
    pub init: String,
    /// Creation time (RFC 3339).
    pub created_at: String,
}
