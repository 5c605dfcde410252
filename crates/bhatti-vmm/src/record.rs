//! The record of a VM, from which a later daemon adopts it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bhatti_host::durable;
use bhatti_host::process::ProcessId;
use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

use crate::machine::Machine;

const FILE: &str = "vm.json";

/// The content of a record.
#[derive(Serialize, Deserialize)]
struct Content<M> {
    pid: u32,
    started_ticks: u64,
    machine: M,
}

fn read<M: for<'a> Deserialize<'a>>(directory: &Path) -> io::Result<Content<M>> {
    Ok(serde_json::from_slice(&fs::read(directory.join(FILE))?)?)
}

/// Returns the recorded process of the VM in `directory`, whichever engine wrote the record.
pub(crate) fn recorded_process(directory: &Path) -> io::Result<ProcessId> {
    let Content { pid, started_ticks, .. } = read::<serde::de::IgnoredAny>(directory)?;
    Ok(ProcessId { pid, started_ticks })
}

/// Returns the recorded machine of the VM in `directory`.
///
/// # Errors
///
/// Returns an error if the record is missing or malformed.
pub fn recorded_machine(directory: &Path) -> io::Result<Machine> {
    Ok(read(directory)?.machine)
}

/// A running VM's record, and the machine in it.
#[derive(Debug)]
pub struct Record {
    directory: PathBuf,
    process: ProcessId,
    known: Mutex<RecordedVm>,
}

/// The daemon's knowledge of a running VM.
#[derive(Debug)]
pub struct RecordedVm {
    /// The machine.
    pub machine: Machine,
    /// Number of captures so far. Each capture makes earlier knowledge of the memory obsolete.
    pub captures: u64,
}

impl Record {
    /// The record of the VM in `directory`, whose process and machine are recorded already.
    pub(crate) fn new(directory: &Path, process: ProcessId, machine: Machine) -> Self {
        let known = Mutex::new(RecordedVm { machine, captures: 0 });
        Self { directory: directory.to_owned(), process, known }
    }

    /// Returns the VM's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the machine.
    pub fn machine(&self) -> Machine {
        self.known.lock().machine.clone()
    }

    /// Begins a capture. Returns its number.
    pub(crate) fn begin_capture(&self) -> u64 {
        let mut known = self.known.lock();
        known.captures += 1;
        known.captures
    }

    /// Locks the record for a change with [`write`](Self::write).
    pub fn lock(&self) -> MutexGuard<'_, RecordedVm> {
        self.known.lock()
    }

    /// Records a new state of the machine durably: the process does not outlive the host, but the
    /// disk does, and the record identifies the disk. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// Returns the error of writing. The machine is then as before.
    pub fn write(&self, known: &mut RecordedVm, machine: Machine) -> io::Result<()> {
        let ProcessId { pid, started_ticks } = self.process;
        let content = Content { pid, started_ticks, machine: &machine };
        // Sealed, because the VMM may write to the same directory and must not change its own
        // record.
        durable::write_sealed(&self.directory.join(FILE), &serde_json::to_vec(&content)?)?;
        known.machine = machine;
        Ok(())
    }

    /// Changes the recorded machine. Returns the machine as it was before. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// See [`write`](Self::write).
    pub fn change(&self, change: impl FnOnce(&mut Machine)) -> io::Result<Machine> {
        let mut known = self.lock();
        let before = known.machine.clone();
        let mut machine = before.clone();
        change(&mut machine);
        self.write(&mut known, machine)?;
        Ok(before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = r#"{"pid":7,"started_ticks":8,"machine":{"cpus":1,"memory_mib":64,
        "memory":null,"has_network":true,"volumes":[null,{"path":"/v.ext4","read_only":true}]}}"#;

    #[test]
    fn record_is_stored_and_a_truncated_record_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let (directory, process) = (directory.path(), ProcessId { pid: 7, started_ticks: 8 });
        fs::write(directory.join(FILE), RECORD).unwrap();
        let machine = recorded_machine(directory).unwrap();
        assert_eq!((machine.disk.as_str(), machine.volumes.len()), ("disk.ext4", 2));

        let record = Record::new(directory, process, machine.clone());
        let before = record.change(|machine| machine.disk = "other".to_owned()).unwrap();

        assert_eq!(before, machine);
        assert_eq!(recorded_machine(directory).unwrap(), record.machine());
        assert_eq!(record.machine().disk, "other");
        assert_eq!(recorded_process(directory).unwrap(), process);

        fs::remove_file(directory.join(FILE)).unwrap();
        fs::write(directory.join(FILE), &RECORD[..40]).unwrap();

        assert!(recorded_machine(directory).is_err() && recorded_process(directory).is_err());
    }
}
