//! The manifest of a snapshot.
//!
//! ```text
//!  <snapshot>/
//!    manifest.json        the manifest
//!    vm.state             the state of devices and vCPUs, as Firecracker saves it
//!    memory.pages         the pages that differ from the VM's memory file, or all if it has none
//!    memory-<number>.img  in place of `memory.pages`: all memory
//!    disk.ext4            with frozen disks: the root disk
//!    …                    other files that were copied into the snapshot
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
    /// Firecracker's version, and the other properties that the machine depends on.
    pub(crate) vmm_version: String,
    pub(crate) vmm_machine: String,
    /// The machine. In a diff, its memory is the file that the pages are based on.
    pub(crate) machine: Machine,
    pub(crate) memory: Memory,
    pub(crate) state_hash: String,
    /// The generation of a disk that stays in place: the memory belongs to this generation.
    pub(crate) disk_generation: Option<Generation>,
    /// The generations of the volumes that the guest writes, by slot.
    pub(crate) volume_generations: Vec<Option<Generation>>,
}

/// Location of the saved pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Memory {
    /// All pages, in a file that VMs map.
    Whole { file: String },
    /// The pages in `memory.pages`, with the hash of that file.
    Diff { hash: String },
}

impl Manifest {
    pub(crate) fn read(snapshot: &Path) -> Result<Self, RestoreError> {
        read_manifest(&snapshot.join(FILE), FORMAT)
    }
}
