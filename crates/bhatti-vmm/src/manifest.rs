//! The manifest of a snapshot.
//!
//! ```text
//!  <snapshot>/
//!    manifest.json     the manifest
//!    device.state      the state of devices and vCPUs, as QEMU saves it
//!    vm.state          the state of devices and vCPUs, as Firecracker saves it
//!    memory.pages      of a diff: the pages that differ from the machine's memory file
//!    memory-*.img      all memory, or the base of a diff with frozen disks
//!    disk-*.qcow2, …   with frozen disks: the layers of the root disk
//!    disk.ext4         with frozen disks: the root disk, if it has no layers
//!    …                 other files that were copied into the snapshot
//! ```

use std::io;
use std::ops::RangeInclusive;
use std::path::Path;

use bhatti_engine::RestoreError;
use bhatti_host::durable;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files::read_at_most;
use crate::generation::{Generation, damaged, same};
use crate::machine::Machine;

/// The manifest's file.
const FILE: &str = "manifest.json";
/// The pages of a diff. See [`write_pages`](crate::write_pages).
pub const PAGES: &str = "memory.pages";

/// The field with the checksum of all others.
const CHECKSUM: &str = "checksum";

/// The maximum size of a manifest, in bytes.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// A snapshot's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the snapshot's layout.
    pub format: u32,
    /// The VMM's version.
    pub vmm_version: String,
    /// The other properties that the machine depends on.
    pub vmm_machine: String,
    /// The machine.
    pub machine: Machine,
    /// The saved pages.
    pub memory: SavedMemory,
    /// Hash of the state of devices and vCPUs.
    #[serde(alias = "devices_hash")]
    pub state_hash: String,
    /// The generation of a disk that stays in place: the memory belongs to this generation.
    pub disk_generation: Option<Generation>,
    /// The generations of the volumes that the guest writes, by slot.
    pub volume_generations: Vec<Option<Generation>>,
}

/// The pages that a snapshot contains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SavedMemory {
    /// All pages, in a file that VMs map: the machine's memory file, or `file` in snapshots of
    /// earlier versions.
    #[serde(alias = "whole")]
    Full {
        /// The file, if it is not the machine's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file: Option<String>,
    },
    /// The pages that differ from the machine's memory file, with the hash of their file.
    Diff {
        /// The hash.
        hash: String,
    },
}

impl Manifest {
    /// Reads the manifest of a snapshot.
    ///
    /// # Errors
    ///
    /// Returns [`RestoreError::Damaged`] if the manifest is missing or unreadable, and
    /// [`RestoreError::Mismatch`] if its format differs.
    pub(crate) fn read(
        snapshot: &Path,
        formats: RangeInclusive<u32>,
    ) -> Result<Self, RestoreError> {
        let text = read_at_most(&snapshot.join(FILE), MANIFEST_BYTES_MAX);
        let text = text.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => damaged("the manifest is missing"),
            _ => RestoreError::File { step: "read the snapshot's manifest", source },
        })?;
        let unreadable =
            |error: serde_json::Error| damaged(&format!("the manifest is unreadable: {error}"));
        let mut content: Value = serde_json::from_slice(&text).map_err(unreadable)?;
        let sum = content.as_object_mut().and_then(|fields| fields.remove(CHECKSUM));
        // Earlier versions wrote none.
        if sum.is_some_and(|sum| sum != checksum(&content)) {
            return Err(damaged("its manifest was altered"));
        }
        let format = content["format"].as_u64().and_then(|format| u32::try_from(format).ok());
        if !format.is_some_and(|format| formats.contains(&format)) {
            let known = formats.end().to_string();
            same("format", &content["format"].to_string(), &known)?;
        }
        let mut manifest: Self = serde_json::from_value(content).map_err(unreadable)?;
        if let SavedMemory::Full { file: file @ Some(_) } = &mut manifest.memory {
            manifest.machine.memory = file.take();
        }
        Ok(manifest)
    }

    /// Writes the manifest of the snapshot in `directory` durably, with a checksum: a field that
    /// is damaged may look like one that an earlier version did not write.
    ///
    /// # Errors
    ///
    /// Returns the error of writing.
    pub(crate) fn write(&self, directory: &Path) -> io::Result<()> {
        let mut content = serde_json::to_value(self)?;
        let sum = checksum(&content);
        content[CHECKSUM] = sum.into();
        durable::write_sealed(&directory.join(FILE), &serde_json::to_vec_pretty(&content)?)
    }
}

/// Returns the checksum of a manifest's other fields.
fn checksum(content: &Value) -> String {
    blake3::hash(content.to_string().as_bytes()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Manifests of each engine, as versions before the common layout wrote them.
    const EARLIER: [&str; 2] = [
        r#"{"format":2,"vmm_version":"10.0.2","vmm_machine":"x86_64 tcg","machine":{"cpus":1,
            "memory_mib":512,"memory":"memory-1.img","disk":"disk-1.qcow2","disk_bytes":0,
            "has_network":true,"volumes":[null]},"memory":{"kind":"full","hash":"00"},
            "memory_bytes":4096,"devices_hash":"11","devices_bytes":9,"disk_generation":null,
            "volume_generations":[]}"#,
        r#"{"format":2,"vmm_version":"1.16.1","vmm_machine":"x86_64 kvm","machine":{"cpus":1,
            "memory_mib":512,"memory":null,"is_unsaved":false,"has_network":true,
            "volumes":[null]},"memory":{"kind":"whole","file":"memory-1.img"},"state_hash":"11",
            "disk_generation":null,"volume_generations":[]}"#,
    ];

    #[test]
    fn manifests_of_earlier_versions_are_read() {
        let directory = tempfile::tempdir().unwrap();
        for (text, disk) in EARLIER.into_iter().zip(["disk-1.qcow2", "disk.ext4"]) {
            std::fs::write(directory.path().join(FILE), text).unwrap();
            let manifest = Manifest::read(directory.path(), 2..=3).unwrap();
            assert_eq!(manifest.machine.memory.as_deref(), Some("memory-1.img"));
            assert_eq!(manifest.memory, SavedMemory::Full { file: None });
            assert_eq!((manifest.machine.disk.as_str(), &*manifest.state_hash), (disk, "11"));
            let format = Manifest::read(directory.path(), 3..=4).unwrap_err();
            assert!(matches!(format, RestoreError::Mismatch { .. }), "{format}");
        }
    }

    #[test]
    fn damage_to_any_byte_is_noticed_or_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        std::fs::write(&path, EARLIER[0]).unwrap();
        let manifest = Manifest::read(directory.path(), 2..=3).unwrap();
        std::fs::remove_file(&path).unwrap();
        manifest.write(directory.path()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            std::fs::write(&path, damaged).unwrap();
            let read = Manifest::read(directory.path(), 2..=3);
            assert!(read.is_err() || read.unwrap() == manifest, "byte {at}");
        }
    }
}
