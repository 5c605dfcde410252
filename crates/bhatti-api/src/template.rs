//! Templates: what sandboxes have in common.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Makes a template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTemplate {
    /// Its name.
    pub name: String,
    /// The image of its sandboxes; the usual one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Their vCPUs; 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u64>,
    /// Their memory in MiB; 512 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// The size of their root disks in MiB; that of the image if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mb: Option<u64>,
    /// Their environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Names of their secrets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// Their labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// A script that runs when they are up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
}

/// A template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The image of its sandboxes.
    pub image: String,
    /// Their vCPUs.
    pub cpus: u64,
    /// Their memory in MiB.
    pub memory_mb: u64,
    /// The size of their root disks in MiB; that of the image if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mb: Option<u64>,
    /// Their environment.
    pub env: BTreeMap<String, String>,
    /// Names of their secrets.
    pub secrets: Vec<String>,
    /// Their labels.
    pub labels: BTreeMap<String, String>,
    /// A script that runs when they are up; none if empty.
    pub init: String,
    /// When it was made (RFC 3339).
    pub created_at: String,
}
