//! The machine that a VMM runs.

use std::path::PathBuf;

use bhatti_engine::VolumeFile;
use serde::{Deserialize, Serialize};

/// Size of the disk in an empty volume slot, in bytes.
pub const EMPTY_VOLUME_BYTES: u64 = 1 << 20;

/// Link address of a network card until its guest sets another.
pub const UNCONFIGURED_MAC: &str = "06:62:00:00:00:00";

/// A VM without its process, as its record and its snapshots describe it. All files but the
/// volumes are named relative to the VM's directory, or to the snapshot's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Number of vCPUs.
    pub cpus: u8,
    /// Size of the memory, in MiB.
    pub memory_mib: u32,
    /// The file with the content of the pages that are not dirty, which the memory is a private
    /// mapping of. `None` if the VMM has no such file, or if the dirty pages are unknown.
    pub memory: Option<String>,
    /// Whether the VM booted and was never saved: every page with content is dirty.
    #[serde(default)]
    pub is_unsaved: bool,
    /// The root disk's file, or its topmost layer.
    #[serde(default = "single_file")]
    pub disk: String,
    /// The size of the root disk in bytes; 0 if it is that of the image.
    #[serde(default)]
    pub disk_bytes: u64,
    /// Whether the VM has a network card.
    #[serde(default)]
    pub has_network: bool,
    /// The content of the volume slots.
    #[serde(default)]
    pub volumes: Vec<Option<Volume>>,
}

/// The disk of a machine whose description does not name it: earlier versions did not name disks
/// of a single file.
fn single_file() -> String {
    "disk.ext4".to_owned()
}

impl Machine {
    /// Returns the size of the memory, in bytes.
    #[must_use]
    pub const fn memory_bytes(&self) -> u64 {
        (self.memory_mib as u64) << 20
    }

    /// Returns the memory file's name; empty if there is no memory file.
    #[must_use]
    pub fn memory_file(&self) -> &str {
        self.memory.as_deref().unwrap_or_default()
    }
}

/// A file that is attached to a VM as a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// The file.
    pub path: PathBuf,
    /// Whether the VM only reads it.
    pub read_only: bool,
}

impl From<VolumeFile> for Volume {
    fn from(VolumeFile { path, read_only, .. }: VolumeFile) -> Self {
        Self { path, read_only }
    }
}

/// Returns the content of a machine's volume slots.
pub(crate) fn volumes(files: &[Option<VolumeFile>]) -> Vec<Option<Volume>> {
    files.iter().cloned().map(|file| file.map(Volume::from)).collect()
}
