//! Health.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Status of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok`.
    pub status: String,
    /// Version of the daemon.
    pub version: String,
    /// Engine that runs the sandboxes: `qemu`, `firecracker` or `docker`.
    #[schema(value_type = crate::EngineName)]
    pub engine: String,
    /// Accelerator of the guests: `kvm`, `tcg` (software emulation), or `none` (containers, which
    /// share the host's kernel).
    #[schema(value_type = crate::AcceleratorName)]
    pub accelerator: String,
    /// Default network mode of sandboxes: `nat` or `none`.
    #[schema(value_type = crate::NetworkName)]
    pub network: String,
    /// Number of sandboxes of all users.
    pub sandboxes: u64,
    /// Number of sandboxes of an earlier daemon that this daemon has not yet recovered or
    /// removed. Requests to them wait.
    #[serde(default)]
    pub taking_up: u64,
    /// Time since the daemon started, such as `2h15m30s`.
    pub uptime: String,
}
