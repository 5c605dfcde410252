//! Saving a VM and starting it again.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_types::SandboxId;

use crate::{Vm, VolumeFile};

/// Which pages of memory a snapshot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// All that are not zero: it needs no other memory.
    Full,
    /// Those that differ from the memory that the VM was restored from, which is kept beside it.
    Diff,
}

/// What becomes of the disks that a snapshot needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disks {
    /// They stay the VM's own: for a VM that ends now and goes on from here, once.
    InPlace,
    /// They are frozen and part of the snapshot; the VM goes on with another layer on top. Any number of VMs may start from it.
    Frozen,
}

/// A snapshot to be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// Its directory, which must not exist. It comes to be whole or not at all.
    pub directory: PathBuf,
    /// Its memory; the engine's choice if `None`.
    pub memory: Option<MemoryKind>,
    /// Its disks.
    pub disks: Disks,
    /// Files that are copied into it while the VM is paused.
    pub copies: Vec<FileCopy>,
}

/// A file that is copied into a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileCopy {
    /// The file.
    pub from: PathBuf,
    /// Its name in the snapshot.
    pub name: String,
}

/// A snapshot that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Which pages it holds.
    pub memory: MemoryKind,
    /// Pages of memory written, in bytes.
    pub memory_bytes: u64,
    /// The state of the devices, in bytes.
    pub device_bytes: u64,
}

/// The part of a snapshot that cannot wait has been taken: the VM may run again. Dropping it gives the snapshot up.
#[async_trait]
pub trait Captured: Send {
    /// Makes the snapshot durable and puts it in place.
    ///
    /// # Errors
    ///
    /// Returns the step that failed; nothing of the snapshot is left then, and the VM is not touched.
    async fn finish(self: Box<Self>) -> Result<SnapshotInfo, SnapshotError>;
}

/// A VM to be made from a snapshot.
#[derive(Clone, Debug)]
pub struct RestoreSpec {
    /// The sandbox that it is for.
    pub id: SandboxId,
    /// Where everything of it is kept.
    pub directory: PathBuf,
    /// The snapshot's directory. Never written.
    pub snapshot: PathBuf,
    /// Where its disks come from: [`Disks::InPlace`] takes up those that are in `directory`, [`Disks::Frozen`] makes the directory,
    /// with layers over the snapshot's.
    pub disks: Disks,
    /// See [`VmSpec::tap`](crate::VmSpec::tap): there is to be one if the VM that was saved had one, and none if it had none.
    pub tap: Option<String>,
    /// See [`VmSpec::volumes`](crate::VmSpec::volumes): as many places as the VM that was saved had.
    pub volumes: Vec<Option<VolumeFile>>,
    /// How long the VMM may take.
    pub limit: Duration,
}

/// A VMM that runs and waits for its snapshot.
#[async_trait]
pub trait Staged: Send + Sync {
    /// Loads the snapshot. The VM is paused then, and its agent has not been asked.
    ///
    /// # Errors
    ///
    /// Returns why the snapshot cannot be used; the VMM has ended then, and the directory is left to [`Engine::remove`](crate::Engine::remove).
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the VMM stays.
    async fn load(self: Box<Self>) -> Result<Arc<dyn Vm>, RestoreError>;
}

/// A VM could not be saved. It is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It runs: only a paused VM can be saved.
    #[error("the virtual machine is not paused")]
    NotPaused,
    /// It cannot be saved as asked.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The VMM did not answer, or refused.
    #[error("the VMM failed to {step}")]
    Vmm {
        /// What it was asked to do.
        step: &'static str,
        /// What it said.
        #[source]
        source: VmmError,
    },
    /// A file could not be written.
    #[error("failed to {step}")]
    File {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A snapshot could not be used. It is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// This engine restores nothing.
    #[error("{0}")]
    Unsupported(&'static str),
    /// It is not there, not whole, or not what was written.
    #[error("the snapshot is damaged: {what}")]
    Damaged {
        /// What is wrong with it.
        what: String,
    },
    /// It was taken on something else.
    #[error("the snapshot does not fit: it needs {what} `{needed}`, and this is `{found}`")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// What it was taken on.
        needed: String,
        /// What is here.
        found: String,
    },
    /// The disk has been written since: going back to this memory would damage it.
    #[error("the snapshot is older than the disk")]
    Stale,
    /// The VMM did not answer, or refused.
    #[error("the VMM failed to {step}")]
    Vmm {
        /// What it was asked to do.
        step: &'static str,
        /// What it said.
        #[source]
        source: VmmError,
    },
    /// A file could not be read or made.
    #[error("failed to {step}")]
    File {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The VMM did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// It cannot be reached, or broke off.
    #[error("the VMM cannot be reached")]
    Unreachable(#[from] io::Error),
    /// It answered nothing in time.
    #[error("the VMM did not answer within {} s", limit.as_secs())]
    Silent {
        /// The time that it had.
        limit: Duration,
    },
    /// It refused.
    #[error("the VMM said: {0}")]
    Refused(String),
    /// It answered something that is no answer.
    #[error("the VMM answered nonsense")]
    Garbled,
}
