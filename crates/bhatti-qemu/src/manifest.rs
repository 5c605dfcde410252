//! The manifest of a snapshot.
//!
//! ```text
//!  <snapshot>/
//!    manifest.json       the manifest
//!    device.state        the devices' state, as QEMU saves it
//!    memory.pages        of a diff: the pages that differ from the base
//!    memory-<hash>.img   of a full snapshot: all memory; of a diff with frozen disks: its base
//!    disk-*.qcow2, …     with frozen disks: all layers
//!    …                   other files that were copied into the snapshot
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
    /// QEMU's version, and the other properties that the machine depends on.
    pub(crate) vmm_version: String,
    pub(crate) vmm_machine: String,
    /// The machine. Its memory is the file that the pages are based on, its disk the topmost
    /// layer.
    pub(crate) machine: Machine,
    pub(crate) memory: Memory,
    pub(crate) memory_bytes: u64,
    pub(crate) devices_hash: String,
    pub(crate) devices_bytes: u64,
    /// The generation of a disk that stays in place: the memory belongs to this generation.
    pub(crate) disk_generation: Option<Generation>,
    /// The generations of the volumes that the guest writes, by slot.
    pub(crate) volume_generations: Vec<Option<Generation>>,
}

/// The kind and the hash of the saved pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Memory {
    /// All pages, in the machine's memory file.
    Full { hash: String },
    /// The pages that differ from the machine's memory file.
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
