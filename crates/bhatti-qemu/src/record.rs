//! What a later daemon must know of a machine.

use bhatti_vmm::Volume;
use serde::{Deserialize, Serialize};

/// The VMM process of a sandbox, and what it was started with.
pub(crate) type Record = bhatti_vmm::Record<Machine>;

/// A VM but for its process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpus: u8,
    pub(crate) memory_mib: u32,
    /// The file in its directory that its memory is a private mapping of.
    pub(crate) memory: String,
    /// The topmost layer of its disk, in its directory.
    pub(crate) disk: String,
    /// Whether it has a network card.
    #[serde(default)]
    pub(crate) has_network: bool,
    /// What is in its places for volumes.
    #[serde(default)]
    pub(crate) volumes: Vec<Option<Volume>>,
}
