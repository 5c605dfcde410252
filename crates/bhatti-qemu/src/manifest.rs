//! What a snapshot says of itself.
//!
//! ```text
//!  <snapshot>/
//!    manifest.json       this
//!    device.state        the devices, as QEMU saves them
//!    memory.pages        of a diff: the pages that differ from the base
//!    memory-<hash>.img   of a full snapshot: all memory; of a diff with frozen disks: its base
//!    disk-*.qcow2, …     with frozen disks: all layers
//!    …                   whatever else was to be copied into it
//! ```

use std::path::Path;

use bhatti_engine::{MemoryKind, RestoreError};
use bhatti_vmm::{Generation, read_manifest};
use serde::{Deserialize, Serialize};

use crate::record::Machine;

pub(crate) const FILE: &str = "manifest.json";
pub(crate) const DEVICES: &str = "device.state";
pub(crate) const PAGES: &str = "memory.pages";

/// The version of this layout.
pub(crate) const FORMAT: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: u32,
    /// QEMU's version, and what else the machine depends on.
    pub(crate) vmm_version: String,
    pub(crate) vmm_machine: String,
    /// The machine; its memory is the file that the pages stand on, its disk the topmost layer.
    pub(crate) machine: Machine,
    pub(crate) memory: Memory,
    pub(crate) memory_bytes: u64,
    pub(crate) devices_hash: String,
    pub(crate) devices_bytes: u64,
    /// Of a disk that stays in place: when it was written last. It is the generation that the memory belongs to.
    pub(crate) disk_generation: Option<Generation>,
    /// The same of the volumes that it writes, each in its place.
    pub(crate) volume_generations: Vec<Option<Generation>>,
}

/// Which pages there are, and their hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Memory {
    /// All, in the machine's memory file.
    Full { hash: String },
    /// Those that differ from the machine's memory file.
    Diff { hash: String },
}

impl Memory {
    pub(crate) const fn kind(&self) -> MemoryKind {
        match self {
            Self::Full { .. } => MemoryKind::Full,
            Self::Diff { .. } => MemoryKind::Diff,
        }
    }
}

impl Manifest {
    /// Reads the manifest of a snapshot.
    pub(crate) fn read(snapshot: &Path) -> Result<Self, RestoreError> {
        read_manifest(&snapshot.join(FILE), FORMAT)
    }
}
