//! Errors of booting, adopting and removing a VM.

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
    /// A file of the VM could not be created.
    #[error("failed to {step}")]
    Prepare {
        /// The step that failed.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The disk to keep is missing: it was removed from outside.
    #[error("the sandbox's disk is lost: its file was removed outside of bhatti")]
    NoDisk,
    /// The request sets a disk size, but the engine cannot set disk sizes on this host.
    #[error("{0}")]
    NoDiskSize(&'static str),
    /// The VMM ended before the agent answered.
    #[error("the virtual machine ended during boot; end of its console:\n{console}")]
    Ended {
        /// The end of the guest's console output.
        console: String,
    },
    /// The agent did not answer in time.
    #[error("the guest did not answer within {} s; end of its console:\n{console}", limit.as_secs())]
    TimedOut {
        /// The time limit.
        limit: Duration,
        /// The end of the guest's console output.
        console: String,
    },
}

/// A VM could not be adopted.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The VM no longer runs.
    #[error("the virtual machine no longer runs")]
    Gone,
    /// The VM runs, but its record, state or sockets are unusable.
    #[error("failed to {step}")]
    Broken {
        /// The step that failed.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A VM could not be ended or removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// The VMM does not end after SIGKILL.
    #[error("virtual machine process {pid} did not end after it was killed")]
    Unkillable {
        /// The VMM's process id.
        pid: u32,
    },
    /// The search for the VMM's process failed.
    #[error("failed to search for the virtual machine's process")]
    Process {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file could not be removed.
    #[error("failed to remove `{}`", path.display())]
    Files {
        /// The file or directory.
        path: PathBuf,
        /// Why it could not be removed.
        #[source]
        source: io::Error,
    },
}
