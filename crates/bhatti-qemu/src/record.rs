//! What a later daemon must know of a VM.

use std::fs;
use std::io;
use std::path::Path;

use bhatti_host::process::ProcessId;
use serde::{Deserialize, Serialize};

const FILE: &str = "vm.json";

/// The VMM process of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pid: u32,
    started_ticks: u64,
}

impl Record {
    pub(crate) const fn new(process: ProcessId) -> Self {
        let ProcessId { pid, started_ticks } = process;
        Self { pid, started_ticks }
    }

    pub(crate) const fn process(self) -> ProcessId {
        ProcessId { pid: self.pid, started_ticks: self.started_ticks }
    }

    pub(crate) fn read(directory: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(directory.join(FILE))?)?)
    }

    /// Not made durable: the process does not outlive the machine either. A torn record is as good as none.
    pub(crate) fn write(self, directory: &Path) -> io::Result<()> {
        fs::write(directory.join(FILE), serde_json::to_vec(&self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_survives_and_a_torn_one_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let record = Record::new(ProcessId { pid: 7, started_ticks: 8 });
        record.write(directory.path()).unwrap();
        assert_eq!(Record::read(directory.path()).unwrap(), record);

        fs::write(directory.path().join(FILE), r#"{"pid":7"#).unwrap();

        assert!(Record::read(directory.path()).is_err());
    }
}
