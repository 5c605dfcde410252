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

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bhatti_engine::{MemoryKind, RestoreError};
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

/// Tells whether a file has been written since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Generation {
    bytes: u64,
    modified_sec: i64,
    modified_nsec: i64,
}

impl Generation {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let file = fs::metadata(path)?;
        Ok(Self { bytes: file.len(), modified_sec: file.mtime(), modified_nsec: file.mtime_nsec() })
    }
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
        let text = fs::read(snapshot.join(FILE)).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => damaged("it has no manifest"),
            _ => RestoreError::File { step: "read the snapshot's manifest", source },
        })?;
        let manifest: Self = serde_json::from_slice(&text)
            .map_err(|error| damaged(&format!("its manifest cannot be read: {error}")))?;
        if manifest.format != FORMAT {
            return Err(RestoreError::Mismatch {
                what: "format",
                needed: manifest.format.to_string(),
                found: FORMAT.to_string(),
            });
        }
        Ok(manifest)
    }
}

pub(crate) fn damaged(what: &str) -> RestoreError {
    RestoreError::Damaged { what: what.to_owned() }
}

/// Checks something that must be the same.
pub(crate) fn same(what: &'static str, needed: &str, found: &str) -> Result<(), RestoreError> {
    if needed == found {
        return Ok(());
    }
    Err(RestoreError::Mismatch { what, needed: needed.to_owned(), found: found.to_owned() })
}
