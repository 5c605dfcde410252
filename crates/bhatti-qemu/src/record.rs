//! The record of a machine, from which a later daemon adopts it.

use bhatti_vmm::Volume;
use serde::{Deserialize, Serialize};

/// The VMM process of a sandbox, and its machine.
pub(crate) type Record = bhatti_vmm::Record<Machine>;

/// A VM without its process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpus: u8,
    pub(crate) memory_mib: u32,
    /// The file in the VM's directory that its memory is a private mapping of.
    pub(crate) memory: String,
    /// The topmost layer of the disk, in the VM's directory.
    pub(crate) disk: String,
    /// The size of the root disk in bytes; 0 if it is that of the image.
    #[serde(default)]
    pub(crate) disk_bytes: u64,
    /// Whether the VM has a network card.
    #[serde(default)]
    pub(crate) has_network: bool,
    /// The content of the volume slots.
    #[serde(default)]
    pub(crate) volumes: Vec<Option<Volume>>,
}
