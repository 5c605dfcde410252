//! Ports in a sandbox.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A TCP port with a listener in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Port {
    /// Port in the guest.
    pub container_port: u16,
    /// Path of the port's proxy in the daemon's API.
    pub proxy_url: String,
    /// Id of the sandbox, in the list of all ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
}

/// Publishes a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishPort {
    /// Port in the guest.
    #[schema(minimum = 1, maximum = 65535)]
    pub port: u16,
    /// Alias of the port [default: the sandbox's name and six hex digits].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    pub alias: Option<String>,
}

/// A published port. Any client that reaches the daemon's public listener reaches the port
/// without an API key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Publication {
    /// Alias of the port.
    pub alias: String,
    /// Port in the guest.
    pub port: u16,
    /// Id of the sandbox.
    pub sandbox_id: String,
    /// Time of publication (RFC 3339).
    pub created_at: String,
    /// URLs of the port, if the daemon has a public listener.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
}
