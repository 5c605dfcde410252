//! Images.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What the disks of sandboxes begin as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Whether sandboxes that ask for none have it.
    pub is_default: bool,
}
