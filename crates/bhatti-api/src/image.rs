//! Images.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The longest archive that becomes an image, in bytes.
pub const CONTENT_BYTES_MAX: u64 = 10 << 30;

/// What the disk of a sandbox can begin as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Whether sandboxes that ask for none have it.
    pub is_default: bool,
    /// The size of the disk, in MiB.
    pub size_mb: u64,
    /// What it takes of the host's disk, in bytes.
    pub disk_bytes: u64,
    /// What it was made of.
    pub source: String,
}
