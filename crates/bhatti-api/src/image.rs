//! Images.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The longest archive that can be imported as an image, in bytes.
pub const CONTENT_BYTES_MAX: u64 = 10 << 30;

/// An image: the root file system that a sandbox starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Name of the image.
    pub name: String,
    /// Whether this is the default image.
    pub is_default: bool,
    /// Size of the disk, in MiB.
    pub size_mb: u64,
    /// Space that the image takes on the host's disk, in bytes.
    pub disk_bytes: u64,
    /// Source of the image.
    pub source: String,
}
