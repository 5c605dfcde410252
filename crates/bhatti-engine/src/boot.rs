//! How making, adopting and removing a VM can fail.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A VM could not be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The engine's program is not installed.
    #[error("`{}` is not installed", program.display())]
    NotInstalled {
        /// The program.
        program: PathBuf,
    },
    /// A file of the VM could not be made.
    #[error("failed to {step}")]
    Prepare {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The disk that was to be kept is not there: others took it away.
    #[error("the sandbox's disk is gone, with all that was on it: somebody else removed it")]
    NoDisk,
    /// The request sets a disk size, and the engine cannot give a disk a size here.
    #[error("{0}")]
    NoDiskSize(&'static str),
    /// The VMM ended before the agent answered.
    #[error("the virtual machine ended while it booted; its last words:\n{console}")]
    Ended {
        /// The end of the console's output and of the VMM's own.
        console: String,
    },
    /// The agent did not answer in time.
    #[error("the guest did not come up within {} s; its last words:\n{console}", limit.as_secs())]
    TimedOut {
        /// The time that it had.
        limit: Duration,
        /// The end of the console's output and of the VMM's own.
        console: String,
    },
}

/// A VM could not be taken up.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// It does not run any more.
    #[error("the virtual machine does not run any more")]
    Gone,
    /// It runs, and its state or sockets are of no use.
    #[error("failed to {step}")]
    Broken {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Something of a VM could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// Its VMM does not die.
    #[error("the virtual machine process {pid} does not end although it was killed")]
    Unkillable {
        /// The process.
        pid: u32,
    },
    /// Its VMM could not be looked for.
    #[error("failed to look for the virtual machine's process")]
    Process {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file stays.
    #[error("failed to remove `{}`", path.display())]
    Files {
        /// The file or directory.
        path: PathBuf,
        /// Why it stays.
        #[source]
        source: io::Error,
    },
}
