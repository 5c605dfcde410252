//! What a snapshot says of itself.
//!
//! ```text
//!  <snapshot>/
//!    manifest.json       this
//!    vm.state            the devices and the processors, as Firecracker saves them
//!    memory.pages        the pages that differ from the VM's own memory file, or all if it has none
//!    memory-<number>.img instead: all memory
//!    disk.ext4           with frozen disks: the root disk
//!    …                   whatever else was to be copied into it
//! ```

use std::path::Path;

use bhatti_engine::RestoreError;
use bhatti_vmm::{Generation, read_manifest};
use serde::{Deserialize, Serialize};

use crate::machine::Machine;

pub(crate) const FILE: &str = "manifest.json";
pub(crate) const STATE: &str = "vm.state";
pub(crate) const PAGES: &str = "memory.pages";

/// The version of this layout.
pub(crate) const FORMAT: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: u32,
    /// Firecracker's version, and what else the machine depends on.
    pub(crate) vmm_version: String,
    pub(crate) vmm_machine: String,
    /// The machine; of a diff, its memory is the file that the pages stand on.
    pub(crate) machine: Machine,
    pub(crate) memory: Memory,
    pub(crate) state_hash: String,
    /// Of a disk that stays in place: when it was written last. It is the generation that the memory belongs to.
    pub(crate) disk_generation: Option<Generation>,
    /// The same of the volumes that it writes, each in its place.
    pub(crate) volume_generations: Vec<Option<Generation>>,
}

/// Where the pages are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Memory {
    /// All, in a file that VMs map.
    Whole { file: String },
    /// Some; the hash of them.
    Diff { hash: String },
}

impl Manifest {
    pub(crate) fn read(snapshot: &Path) -> Result<Self, RestoreError> {
        read_manifest(&snapshot.join(FILE), FORMAT)
    }
}
