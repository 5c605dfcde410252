//! Sandboxes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{AttachVolume, AttachedVolume, NewVolume};

/// Creates a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSandbox {
    /// Name [default: `sandbox-` and six hex digits; with a template, the template's name in
    /// place of `sandbox`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
    pub name: Option<String>,
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
    /// Whether the sandbox stays hot when idle.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_hot: bool,
    /// Whether to boot the sandbox instead of forking it from a base snapshot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold_boot: bool,
    /// Template that supplies the options not given here, by name or id.
    #[serde(default, alias = "template_id", skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Image to start from: a name, or a reference such as `python:3.12-slim` [default:
    /// `minimal`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,254}$")]
    pub image: Option<String>,
    /// When to pull the image from its registry: `missing`, `always` or `never` [default:
    /// `missing`]. The request waits for the pull; `POST /images/pull` shows its progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<crate::PullPolicy>)]
    pub pull: Option<String>,
    /// Whether to run the image's command as a job that restarts with the sandbox.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub start: bool,
    /// Script to run once the sandbox is up, as the session `init`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[^\\u0000]*$")]
    pub init: Option<String>,
    /// Files to write before `init` runs, at most 16 MiB in total.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<NewFile>,
    /// Secrets to expose as environment variables, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// Labels to set.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Seconds after which the sandbox is destroyed or stopped [default: never].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub timeout_sec: Option<u32>,
    /// What happens after `timeout_sec`: `destroy` or `stop` [default: `destroy`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<crate::OnTimeoutName>)]
    pub on_timeout: Option<String>,
    /// Network mode: `nat` (the sandbox reaches its owner's other sandboxes and the internet, but
    /// neither the host nor private networks) or `none` (no network card) [default: the daemon's
    /// default mode].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<crate::NetworkName>)]
    pub network: Option<String>,
    /// Private ranges to allow with `nat`, such as `192.168.1.0/24`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_allow: Vec<String>,
    /// Volumes to attach, in mount order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<AttachVolume>,
    /// Volumes to create with the sandbox and to destroy with it. They are mounted after
    /// `volumes`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub new_volumes: Vec<NewVolume>,
}

/// A file to write into a new sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewFile {
    /// Absolute path.
    #[schema(min_length = 1, max_length = 4096, pattern = "^[^\\u0000]+$")]
    pub path: String,
    /// Content, as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Content in base64, in place of `content`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_base64: Option<String>,
    /// Permission bits in octal [default: `0644`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

/// Changes a sandbox. Absent fields stay unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateSandbox {
    /// New name. The host name inside the sandbox stays the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
    pub name: Option<String>,
    /// Labels to set; a value of `null` removes the label.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, Option<String>>,
    /// Whether the sandbox stays hot when idle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_hot: Option<bool>,
    /// Seconds from now after which the sandbox is destroyed or stopped; 0 removes the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<u32>,
    /// What happens when the time is over: `destroy` or `stop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<crate::OnTimeoutName>)]
    pub on_timeout: Option<String>,
}

/// Starts a stopped sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartSandbox {
    /// Whether to boot from the disk. The contents of the memory are then lost.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold_boot: bool,
}

/// Forks a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkSandbox {
    /// Number of forks [default: 1].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100)]
    pub count: Option<u32>,
    /// Name of the fork; with several forks, the prefix of `NAME-1`, `NAME-2` and so on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
    pub name: Option<String>,
    /// Environment variables of later processes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Whether the forks inherit the parent's environment.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub inherit_env: bool,
    /// Secrets to expose as environment variables, by name. The forks do not inherit the parent's
    /// secrets unless they are named here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// Labels to set.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// Result of a fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Forks {
    /// The new sandboxes.
    pub sandboxes: Vec<Sandbox>,
    /// Time for which the parent's processes were paused, in microseconds.
    pub parent_paused_us: u64,
    /// Size of the saved memory pages, in bytes.
    pub memory_bytes: u64,
}

/// A sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sandbox {
    /// Sandbox id.
    pub id: String,
    /// Name of the sandbox.
    pub name: String,
    /// Isolation of the sandbox from the host and from other sandboxes. If absent (older
    /// daemons), the sandbox is a VM.
    #[serde(default)]
    pub isolation: Isolation,
    /// `creating`, `running`, `stopped`, `failed` or `destroyed`.
    #[schema(value_type = crate::SandboxStatus)]
    pub status: String,
    /// Activity of a running sandbox: `hot`, `warm` (paused) or `cold` (saved). A request makes
    /// it hot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<crate::ThermalState>)]
    pub thermal: Option<String>,
    /// Reason for the state `failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Number of vCPUs.
    pub cpus: u64,
    /// Memory in MiB.
    pub memory_mb: u64,
    /// Size of the root disk in MiB; that of the image if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mb: Option<u64>,
    /// Environment variables of the sandbox.
    pub env: BTreeMap<String, String>,
    /// Whether the sandbox stays hot when idle.
    pub keep_hot: bool,
    /// Labels of the sandbox.
    pub labels: BTreeMap<String, String>,
    /// Names of the sandbox's secrets.
    pub secrets: Vec<String>,
    /// Image that the sandbox started from.
    pub image: String,
    /// Network mode: `nat` or `none`.
    #[schema(value_type = crate::NetworkName)]
    pub network: String,
    /// Private ranges that are allowed with `nat`.
    pub network_allow: Vec<String>,
    /// Address in the owner's network, if the sandbox has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// Attached volumes, in mount order.
    pub volumes: Vec<AttachedVolume>,
    /// Id of the user that created the sandbox and owns it.
    pub created_by: String,
    /// Creation time (RFC 3339).
    pub created_at: String,
    /// Time of the stop (RFC 3339), if the sandbox is stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_at: Option<String>,
    /// Time at which the sandbox will be destroyed or stopped (RFC 3339), if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    /// What happens then: `destroy` or `stop`. Absent without a time limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<crate::OnTimeoutName>)]
    pub on_timeout: Option<String>,
    /// Origin of the sandbox: `boot`, with the reason if the request did not ask for a boot; or
    /// `template` (a base snapshot), `sandbox` or `snapshot`, with an id.
    pub origin: String,
    /// The guest's report on the identity that it took on after it was restored, part by part.
    /// Absent in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub identity: Option<serde_json::Value>,
}

/// Isolation of a sandbox from the host and from other sandboxes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// A virtual machine with its own kernel.
    #[default]
    Vm,
    /// A container, which shares the host's kernel. This isolation is weaker.
    Container,
}

/// A resource was deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Deleted {
    /// `destroyed` (sandboxes), `killed` (sessions and jobs) or `deleted`.
    pub status: String,
}
