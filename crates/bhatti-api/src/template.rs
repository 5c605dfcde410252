//! Templates.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::PullPolicy;

/// Creates a template: default options for new sandboxes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTemplate {
    /// Name of the template.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._:-]{0,127}$")]
    pub name: String,
    /// Image of the sandboxes [default: `minimal`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,254}$")]
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
    /// Whether all users can create sandboxes from it. Only the admin can make it so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub public: bool,
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
    /// Whether the sandboxes start from a snapshot, with the processes that ran when the template
    /// was built.
    pub is_warm: bool,
    /// Whether all users can create sandboxes from it.
    pub public: bool,
    /// Creation time (RFC 3339).
    pub created_at: String,
}

/// Builds a template from steps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildTemplate {
    /// Name of the template. A template of the caller with that name is replaced.
    #[serde(default)]
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._:-]{0,127}$")]
    pub name: String,
    /// Image to begin with [default: `minimal`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,254}$")]
    pub image: Option<String>,
    /// Template to begin with, in place of an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// When to pull the image: `missing`, `always` or `never` [default: `missing`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<PullPolicy>)]
    pub pull: Option<String>,
    /// Steps, in their order.
    #[serde(default)]
    pub steps: Vec<TemplateStep>,
    /// Command that runs in the template's sandboxes from their beginning. It restarts when a
    /// sandbox boots anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    /// Command that succeeds when the start command is ready. It is tried for 10 minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<String>,
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
    /// Whether to run all steps, also those whose results are in the cache.
    #[serde(default)]
    pub no_cache: bool,
    /// Whether all users can create sandboxes from it. Only the admin can make it so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub public: bool,
}

/// A step of a template: an object with one of these keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TemplateStep {
    /// Command to run with the image's shell.
    Run(String),
    /// Files to copy.
    Copy(CopyFiles),
    /// Variables of the environment to set, for the next steps and for the sandboxes.
    Env(BTreeMap<String, String>),
    /// Working directory to set.
    Workdir(String),
    /// User to set.
    User(String),
}

/// Copies files of the request into a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CopyFiles {
    /// File, or directory whose content is copied; `.` for all files.
    pub from: String,
    /// Absolute path in the sandbox. A file is put into it if it ends with `/`.
    pub to: String,
    /// User that the files belong to [default: root].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// A build of a template, and its files.
#[derive(ToSchema)]
pub struct BuildTemplateForm {
    /// The build, as the first part.
    pub build: BuildTemplate,
    /// What the steps copy: a tar archive [default: none].
    #[schema(value_type = Option<String>, format = Binary)]
    pub files: Option<Vec<u8>>,
}
