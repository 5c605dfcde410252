//! Volumes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Makes a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name.
    pub name: String,
    /// Its size in MiB; 1024 if absent. It takes of the host's disk what is written to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_mb: Option<u64>,
}

/// Makes a volume larger.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeVolume {
    /// Its size in MiB from now on.
    pub size_mb: u64,
}

/// Copies a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneVolume {
    /// The copy's name.
    pub name: String,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its size in MiB.
    pub size_mb: u64,
    /// What it takes of the host's disk, in bytes.
    pub disk_bytes: u64,
    /// The sandboxes that have it.
    pub attached_to: Vec<VolumeUser>,
    /// When it was made (RFC 3339).
    pub created_at: String,
}

/// A sandbox that has a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeUser {
    /// The sandbox's name.
    pub sandbox: String,
    /// Whether it only reads it.
    pub readonly: bool,
}

/// A volume that a new sandbox is to have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachVolume {
    /// The volume's name.
    pub name: String,
    /// Where it is mounted: an absolute path.
    pub target: String,
    /// Whether it is only read, as any number of sandboxes may at once. Who writes it is alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
}

/// A volume of a new sandbox's own, which ends with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewVolume {
    /// Its name in this sandbox.
    pub name: String,
    /// Its size in MiB.
    pub size_mb: u64,
    /// Where it is mounted: an absolute path.
    pub mount: String,
}

/// A volume that a sandbox has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AttachedVolume {
    /// Its name.
    pub name: String,
    /// Where it is mounted.
    pub target: String,
    /// Whether it is only read.
    pub readonly: bool,
    /// Its size in MiB.
    pub size_mb: u64,
    /// Whether it is the sandbox's own, and ends with it.
    pub ephemeral: bool,
}
