//! The record of a VM, from which a later daemon adopts it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bhatti_engine::VolumeFile;
use bhatti_host::durable;
use bhatti_host::process::ProcessId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

const FILE: &str = "vm.json";

/// The VMM process of a sandbox, and its machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record<M> {
    pid: u32,
    started_ticks: u64,
    /// The machine that the VMM was started with.
    pub machine: M,
}

/// The part of a record that every engine understands.
#[derive(Deserialize)]
struct Process {
    pid: u32,
    started_ticks: u64,
}

/// Returns the recorded process of the VM in `directory`.
pub(crate) fn recorded_process(directory: &Path) -> io::Result<ProcessId> {
    let Process { pid, started_ticks } = serde_json::from_slice(&fs::read(directory.join(FILE))?)?;
    Ok(ProcessId { pid, started_ticks })
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
#[must_use]
pub fn volumes(files: &[Option<VolumeFile>]) -> Vec<Option<Volume>> {
    files.iter().cloned().map(|file| file.map(Volume::from)).collect()
}

impl<M: Serialize + DeserializeOwned> Record<M> {
    /// Creates the record of a process.
    pub const fn new(process: ProcessId, machine: M) -> Self {
        let ProcessId { pid, started_ticks } = process;
        Self { pid, started_ticks, machine }
    }

    /// Reads the record of the VM in `directory`.
    ///
    /// # Errors
    ///
    /// Returns an error if the record is missing or malformed.
    pub fn read(directory: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(directory.join(FILE))?)?)
    }

    /// Writes the record durably: the process does not outlive the host, but the disk does, and
    /// the record identifies the disk.
    ///
    /// # Errors
    ///
    /// Returns the error of writing.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        // Sealed, because the VMM writes to the same directory and must not change its own
        // record.
        durable::write_sealed(&directory.join(FILE), &serde_json::to_vec(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_is_stored_and_a_truncated_record_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let machine = vec![None, Some(Volume { path: "/v.ext4".into(), read_only: true })];
        let record = Record::new(ProcessId { pid: 7, started_ticks: 8 }, machine);
        record.write(directory.path()).unwrap();
        assert_eq!(Record::read(directory.path()).unwrap(), record);
        let process = recorded_process(directory.path()).unwrap();
        assert_eq!(process, ProcessId { pid: 7, started_ticks: 8 });

        fs::remove_file(directory.path().join(FILE)).unwrap();
        fs::write(directory.path().join(FILE), r#"{"pid":7"#).unwrap();

        assert!(Record::<Vec<Option<Volume>>>::read(directory.path()).is_err());
    }
}
