//! Health.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Whether and how the daemon runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok`.
    pub status: String,
    /// The daemon's version.
    pub version: String,
    /// The engine that runs the sandboxes: `qemu`, `firecracker` or `docker`.
    pub engine: String,
    /// What executes the guests' instructions: `kvm`, `tcg` for software emulation, or `none` for containers, whose are this
    /// host's.
    pub accelerator: String,
    /// How sandboxes are connected unless they say otherwise: `nat` or `none`.
    pub network: String,
    /// Sandboxes of all users.
    pub sandboxes: u64,
    /// Sandboxes of an earlier daemon that this one has not taken up or removed yet: requests to them wait.
    #[serde(default)]
    pub taking_up: u64,
    /// How long the daemon has run, as `2h15m30s`.
    pub uptime: String,
}
