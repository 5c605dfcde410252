//! Volumes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Creates a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Name of the volume.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}$")]
    pub name: String,
    /// Size in MiB [default: 1024]. The volume takes disk space of the host only for written
    /// data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 16, maximum = 16777216)]
    pub size_mb: Option<u64>,
}

/// Grows a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeVolume {
    /// New size in MiB.
    #[schema(minimum = 16, maximum = 16777216)]
    pub size_mb: u64,
}

/// Copies a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneVolume {
    /// Name of the copy.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}$")]
    pub name: String,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Volume id.
    pub id: String,
    /// Name of the volume.
    pub name: String,
    /// Size in MiB.
    pub size_mb: u64,
    /// Space that the volume takes on the host's disk, in bytes.
    pub disk_bytes: u64,
    /// Sandboxes that the volume is attached to.
    pub attached_to: Vec<VolumeUser>,
    /// Creation time (RFC 3339).
    pub created_at: String,
}

/// A sandbox that a volume is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeUser {
    /// Name of the sandbox.
    pub sandbox: String,
    /// Whether the volume is attached read-only.
    pub readonly: bool,
}

/// A volume to attach to a new sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachVolume {
    /// Name of the volume.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}$")]
    pub name: String,
    /// Mount point: an absolute path.
    pub target: String,
    /// Whether to attach the volume read-only. A volume can be attached read-only to any number
    /// of sandboxes, or writable to one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
}

/// A volume to create with a new sandbox, and to destroy with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewVolume {
    /// Name of the volume in this sandbox.
    #[schema(pattern = "^[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}$")]
    pub name: String,
    /// Size in MiB.
    #[schema(minimum = 16, maximum = 16777216)]
    pub size_mb: u64,
    /// Mount point: an absolute path.
    pub mount: String,
}

/// A volume that is attached to a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AttachedVolume {
    /// Name of the volume.
    pub name: String,
    /// Mount point.
    pub target: String,
    /// Whether the volume is attached read-only.
    pub readonly: bool,
    /// Size in MiB.
    pub size_mb: u64,
    /// Whether the volume is destroyed with the sandbox.
    pub ephemeral: bool,
}
