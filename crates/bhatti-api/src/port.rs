//! Ports in a sandbox.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A TCP port that something listens at in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Port {
    /// The port.
    pub container_port: u16,
    /// Where the daemon's API reaches it.
    pub proxy_url: String,
    /// The sandbox, in the list of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
}

/// Publishes a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishPort {
    /// The port in the guest.
    pub port: u16,
    /// What it is called; the sandbox's name and six hex digits if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
}

/// A published port. Whoever reaches the daemon's public listener reaches it, without a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Publication {
    /// What it is called.
    pub alias: String,
    /// The port in the guest.
    pub port: u16,
    /// The sandbox.
    pub sandbox_id: String,
    /// When it was published (RFC 3339).
    pub created_at: String,
    /// Where it is reached, if the daemon has a public listener.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
}
