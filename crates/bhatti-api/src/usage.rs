//! What sandboxes use.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a sandbox that has a VM uses of the host, seen from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// The sandbox.
    pub sandbox_id: String,
    /// The time of processors since its VM began, in milliseconds. It begins anew with each VM.
    pub cpu_ms: u64,
    /// Its memory, in bytes; what forks have in common counts in parts.
    pub memory_bytes: u64,
}
