//! Sandboxes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{AttachVolume, AttachedVolume, NewVolume};

/// Makes a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
    /// The size of its root disk in MiB; that of its image if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mb: Option<u64>,
    /// The environment of its processes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Whether it stays hot, however long nobody uses it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_hot: bool,
    /// Whether it boots, rather than being forked from a template.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold_boot: bool,
    /// The template that says what is left out here, by name or id.
    #[serde(default, alias = "template_id", skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// The image that its disk begins as; the usual one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// A script that runs when it is up, as the session `init`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// Files that are put into it before `init` runs, of 16 MiB together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<NewFile>,
    /// Names of secrets that are variables of its environment, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// What is noted on it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Seconds after which it is destroyed; never if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<u32>,
    /// `nat`: it reaches its siblings and the world, but neither this host nor private networks; `none`: it has no network card. As this host
    /// can if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Private ranges that it may reach all the same, such as `192.168.1.0/24`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_allow: Vec<String>,
    /// Volumes that it has, in the order in which they are mounted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<AttachVolume>,
    /// Volumes of its own, which end with it; they are mounted after the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub new_volumes: Vec<NewVolume>,
}

/// A file that is put into a new sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewFile {
    /// Its absolute path.
    pub path: String,
    /// Its content, as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Its content in base64, instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_base64: Option<String>,
    /// Its permission bits in octal; `0644` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

/// Changes a sandbox. What is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateSandbox {
    /// Another name. Its host name stays what it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Labels that it gets; those that are `null` it loses.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, Option<String>>,
    /// Whether it stays hot, however long nobody uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_hot: Option<bool>,
}

/// Starts a sandbox that was stopped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartSandbox {
    /// Whether it boots from its disk. What was in its memory is lost then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold_boot: bool,
}

/// Forks a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
    /// Names of secrets that are variables of their environment. The parent's are not theirs unless named here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// What is noted on them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// What came of a fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Forks {
    /// The forks.
    pub sandboxes: Vec<Sandbox>,
    /// How long the parent's processes stood still, in microseconds.
    pub parent_paused_us: u64,
    /// The pages of memory that were saved, in bytes.
    pub memory_bytes: u64,
}

/// A sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What keeps it from this host and from others. A daemon that does not say has VMs.
    #[serde(default)]
    pub isolation: Isolation,
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
    /// The size of its root disk in MiB; that of its image if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mb: Option<u64>,
    /// The environment of its processes.
    pub env: BTreeMap<String, String>,
    /// Whether it stays hot, however long nobody uses it.
    pub keep_hot: bool,
    /// What is noted on it.
    pub labels: BTreeMap<String, String>,
    /// Names of the secrets that it was given.
    pub secrets: Vec<String>,
    /// The image that its disk began as.
    pub image: String,
    /// How it is connected: `nat` or `none`.
    pub network: String,
    /// Private ranges that it may reach all the same.
    pub network_allow: Vec<String>,
    /// Its address among its siblings, if it has a network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// Its volumes, in the order in which they were mounted.
    pub volumes: Vec<AttachedVolume>,
    /// Who made it: a user's id.
    pub created_by: String,
    /// When it was made (RFC 3339).
    pub created_at: String,
    /// When it was stopped (RFC 3339), if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_at: Option<String>,
    /// When it is destroyed (RFC 3339), if ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    /// What it was made from: `boot`, and why if nobody asked for that, or `template`, `sandbox` or `snapshot` and an id.
    pub origin: String,
    /// What its guest did to become itself after it had been another, part by part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub identity: Option<serde_json::Value>,
}

/// What keeps a sandbox from its host and from others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// A virtual machine: it has a kernel of its own.
    #[default]
    Vm,
    /// A container: it shares its host's kernel, which is weaker.
    Container,
}

/// Says that something was taken away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Deleted {
    /// `destroyed` or `deleted`.
    pub status: String,
}
