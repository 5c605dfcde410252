//! Resource usage.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Resource usage of a sandbox that has a VM, as measured on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// Id of the sandbox.
    pub sandbox_id: String,
    /// CPU time of the VM since it started, in milliseconds. Starts at 0 with each new VM.
    pub cpu_ms: u64,
    /// Memory of the VM, in bytes. A page that several VMs share counts in equal parts.
    pub memory_bytes: u64,
}
