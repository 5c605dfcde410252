//! Images.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ErrorCode, ImageOwner, NetworkName, OperationKind, OperationStatus, PullPolicy};

/// The longest archive that can be imported as an image, in bytes.
pub const CONTENT_BYTES_MAX: u64 = 10 << 30;

/// An image: the root file system that a sandbox starts from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Name of the image. That of a pulled image is its whole reference.
    pub name: String,
    /// Whether this is the default image.
    pub is_default: bool,
    /// Whose image it is. Only its owner can delete or share it.
    #[serde(default)]
    #[schema(value_type = ImageOwner)]
    pub owner: String,
    /// Size of the disk, in MiB.
    pub size_mb: u64,
    /// Space that the image takes on the host's disk, in bytes.
    pub disk_bytes: u64,
    /// Source of the image.
    pub source: String,
    /// When the image was made or pulled (RFC 3339). Images that were built on the host have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
    /// When a sandbox was last created from the image (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_at: Option<String>,
    /// Users that can use the image, too. Only its owner sees them, in the response about this
    /// image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_with: Vec<String>,
    /// What the image says about processes, in the response about this image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ImageSettings>,
}

/// What an image says about the processes of its sandboxes. Absent fields are not set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageSettings {
    /// Environment variables.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// User of the processes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Working directory.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub workdir: String,
    /// Command that runs the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Arguments of the entrypoint, or the command if there is no entrypoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Ports on which the image's application listens, such as `8080/tcp`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exposed_ports: Vec<String>,
    /// Labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Shell for commands that are one text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shell: Vec<String>,
    /// Signal that asks the command to end.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
}

/// A login at a registry.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegistryLogin {
    /// User name.
    pub username: String,
    /// Password or token.
    pub password: String,
}

impl std::fmt::Debug for RegistryLogin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryLogin").field("username", &self.username).finish_non_exhaustive()
    }
}

/// Stores a login at a registry.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRegistryLogin {
    /// Registry, such as `docker.io` or `registry.example.com:5000`.
    #[schema(
        pattern = "^(localhost|[a-zA-Z0-9]+(-+[a-zA-Z0-9]+)*(\\.[a-zA-Z0-9]+(-+[a-zA-Z0-9]+)*)+(:[0-9]+)?|\
                   [a-zA-Z0-9]+(-+[a-zA-Z0-9]+)*:[0-9]+)$"
    )]
    pub registry: String,
    /// User name.
    #[schema(min_length = 1, max_length = 256)]
    pub username: String,
    /// Password or token. No request returns it.
    #[schema(min_length = 1, max_length = 8192)]
    pub password: String,
}

/// A login at a registry, without its password.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StoredLogin {
    /// Registry.
    pub registry: String,
    /// User name; empty if it cannot be read.
    pub username: String,
    /// Time at which the login was first stored (RFC 3339).
    pub created_at: String,
    /// Time at which the login was last stored (RFC 3339).
    pub updated_at: String,
}

/// Pulls an image from its registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PullImage {
    /// Image, such as `python:3.12-slim` or `registry.example.com/team/app@sha256:…`.
    #[schema(min_length = 1, max_length = 200)]
    pub image: String,
    /// Login at the registry [default: the stored one, if there is any].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub login: Option<RegistryLogin>,
}

/// Pushes an image to a registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PushImage {
    /// Reference to push it as, such as `registry.example.com/team/app:1` [default: the image's
    /// name].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 200)]
    pub to: Option<String>,
    /// Login at the registry [default: the stored one, if there is any].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub login: Option<RegistryLogin>,
}

/// Saves a sandbox as an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SaveImage {
    /// Sandbox to save, by name or id.
    pub sandbox: String,
    /// Name of the image.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,254}$")]
    pub name: String,
}

/// Builds an image from a Dockerfile.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildImage {
    /// Name of the image. An image of the caller with that name is replaced.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,254}$")]
    pub name: String,
    /// Content of the Dockerfile.
    pub dockerfile: String,
    /// Values of the Dockerfile's arguments (`ARG`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub args: BTreeMap<String, String>,
    /// Secrets by id, for steps that mount them (`RUN --mount=type=secret,id=ID`). They are not in
    /// the image.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, String>,
    /// Stage to build, by name or number [default: the last one].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// When to pull the images that the Dockerfile names: `missing`, `always` or `never` [default:
    /// `missing`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<PullPolicy>)]
    pub pull: Option<String>,
    /// Whether to run all steps, also those whose results are in the cache.
    #[serde(default)]
    pub no_cache: bool,
    /// vCPUs of the build's sandbox, 1 to 32 [default: 2].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 32)]
    pub cpus: Option<u64>,
    /// Memory of the build's sandbox, in MiB [default: 2048].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub memory_mb: Option<u64>,
    /// Network of the build's sandbox: `nat` or `none` [default: the daemon's default].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<NetworkName>)]
    pub network: Option<String>,
}

impl std::fmt::Debug for BuildImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BuildImage").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A build and its context.
#[derive(ToSchema)]
pub struct BuildForm {
    /// The build, as the first part.
    pub build: BuildImage,
    /// The context: a tar archive, plain or compressed with gzip or xz.
    #[schema(value_type = String, format = Binary)]
    pub context: Vec<u8>,
}

/// Gives an image another name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TagImage {
    /// New name.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,254}$")]
    pub name: String,
}

/// Images that were deleted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PrunedImages {
    /// Their names.
    pub deleted: Vec<String>,
    /// Disk space that this freed, in bytes.
    pub freed_bytes: u64,
}

/// Work that outlasts the request that began it: an image that is pulled, pushed or made, or a
/// template that is made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Id of the operation.
    pub id: String,
    /// What it does.
    #[schema(value_type = OperationKind)]
    pub kind: String,
    /// Reference or name of the image, or name of the template.
    pub image: String,
    /// State of the operation.
    #[schema(value_type = OperationStatus)]
    pub status: String,
    /// When it began (RFC 3339).
    pub created_at: String,
    /// Layers of the image, lowest first; those of a pull are known once the registry has named
    /// them. The first one of a push is the configuration.
    pub layers: Vec<LayerProgress>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<OperationError>,
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperationError {
    /// Error code, for programs.
    pub code: ErrorCode,
    /// Error text, for people.
    pub error: String,
    /// How to fix the problem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Progress of a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LayerProgress {
    /// Digest of the layer.
    pub digest: String,
    /// Length of the layer as the registry has it, in bytes.
    pub bytes: u64,
    /// Bytes that have arrived, here or at the registry.
    pub arrived: u64,
    /// Whether the layer has been unpacked.
    pub unpacked: bool,
}
