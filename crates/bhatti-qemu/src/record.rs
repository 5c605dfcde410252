//! What a later daemon must know of a VM.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bhatti_engine::VolumeFile;
use bhatti_host::durable;
use bhatti_host::process::ProcessId;
use serde::{Deserialize, Serialize};

const FILE: &str = "vm.json";

/// The VMM process of a sandbox, and what it was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) pid: u32,
    pub(crate) started_ticks: u64,
    pub(crate) machine: Machine,
}

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

/// A file that it has as a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Volume {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
}

impl From<VolumeFile> for Volume {
    fn from(VolumeFile { path, read_only }: VolumeFile) -> Self {
        Self { path, read_only }
    }
}

/// What a machine has in its places for volumes.
pub(crate) fn volumes(files: &[Option<VolumeFile>]) -> Vec<Option<Volume>> {
    files.iter().cloned().map(|file| file.map(Volume::from)).collect()
}

impl Record {
    pub(crate) fn new(process: ProcessId, machine: Machine) -> Self {
        let ProcessId { pid, started_ticks } = process;
        Self { pid, started_ticks, machine }
    }

    pub(crate) const fn process(&self) -> ProcessId {
        ProcessId { pid: self.pid, started_ticks: self.started_ticks }
    }

    pub(crate) fn read(directory: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(directory.join(FILE))?)?)
    }

    /// Durably: the process does not outlive the machine, but the disk does, and this says which it is.
    pub(crate) fn write(&self, directory: &Path) -> io::Result<()> {
        durable::write(&directory.join(FILE), &serde_json::to_vec(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_survives_and_a_torn_one_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine {
            cpus: 1,
            memory_mib: 512,
            memory: "memory".to_owned(),
            disk: "disk.qcow2".to_owned(),
            has_network: true,
            volumes: vec![None, Some(Volume { path: "/v.ext4".into(), read_only: true })],
        };
        let record = Record::new(ProcessId { pid: 7, started_ticks: 8 }, machine);
        record.write(directory.path()).unwrap();
        assert_eq!(Record::read(directory.path()).unwrap(), record);

        fs::write(directory.path().join(FILE), r#"{"pid":7"#).unwrap();

        assert!(Record::read(directory.path()).is_err());
    }
}
