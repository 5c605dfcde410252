//! Saving a VM and restoring it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_types::{DiskMib, SandboxId};

use crate::{Vm, VolumeFile};

/// The pages that a snapshot's memory contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// All pages that are not zero: the snapshot needs no other memory file.
    Full,
    /// The pages that differ from the memory file that the VM was restored from, which is kept
    /// beside the snapshot.
    Diff,
}

/// What a snapshot does with the VM's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disks {
    /// The disks stay the VM's own: for a VM that ends now and is restored once.
    InPlace,
    /// The disks are frozen and become part of the snapshot; the VM continues with its own layer
    /// or copy. Any number of VMs may start from the snapshot.
    Frozen,
}

/// A snapshot to take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// Directory of the snapshot, which must not exist. It appears complete or not at all.
    pub directory: PathBuf,
    /// Kind of the memory; the engine's choice if `None`.
    pub memory: Option<MemoryKind>,
    /// What to do with the disks.
    pub disks: Disks,
    /// Files to copy into the snapshot while the VM is paused.
    pub copies: Vec<FileCopy>,
}

/// A file to copy into a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileCopy {
    /// The file.
    pub from: PathBuf,
    /// Name of the copy in the snapshot.
    pub name: String,
}

/// A snapshot that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Kind of the memory.
    pub memory: MemoryKind,
    /// Size of the written memory pages, in bytes.
    pub memory_bytes: u64,
    /// Size of the devices' state, in bytes.
    pub device_bytes: u64,
}

/// A snapshot whose state is captured: the VM may run again. Dropping it discards the snapshot.
#[async_trait]
pub trait Captured: Send {
    /// Makes the snapshot durable and puts it in place.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. Nothing of the snapshot is then left, and the VM is
    /// unaffected.
    async fn finish(self: Box<Self>) -> Result<SnapshotInfo, SnapshotError>;
}

/// A VM to restore from a snapshot.
#[derive(Clone, Debug)]
pub struct RestoreSpec {
    /// The sandbox that the VM belongs to.
    pub id: SandboxId,
    /// Directory of the VM's files.
    pub directory: PathBuf,
    /// The snapshot's directory. Never written.
    pub snapshot: PathBuf,
    /// Origin of the disks: [`Disks::InPlace`] uses those in `directory`; [`Disks::Frozen`]
    /// creates the directory, with layers over the snapshot's disks or copies of them.
    pub disks: Disks,
    /// See [`VmSpec::tap`](crate::VmSpec::tap). Present if and only if the saved VM had a tap.
    pub tap: Option<String>,
    /// See [`VmSpec::volumes`](crate::VmSpec::volumes). As many slots as the saved VM had.
    pub volumes: Vec<Option<VolumeFile>>,
    /// A new root disk in place of the frozen one. The guest must not have used that one: see
    /// [`VmSpec::awaits_root`](crate::VmSpec::awaits_root).
    pub root: Option<NewRoot>,
    /// How long the VMM may take.
    pub limit: Duration,
}

/// The root disk that a restored VM gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewRoot {
    /// The root file system of the image. Never written.
    pub base: PathBuf,
    /// Size of the disk; that of `base` if absent.
    pub disk: Option<DiskMib>,
}

/// A VMM that runs and waits for its snapshot.
#[async_trait]
pub trait Staged: Send + Sync {
    /// Loads the snapshot. Afterwards the VM is paused, and its agent has not been contacted.
    ///
    /// # Errors
    ///
    /// Returns why the snapshot cannot be used. The VMM has then ended; the caller removes the
    /// directory with [`Engine::remove`](crate::Engine::remove).
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the VMM keeps running.
    async fn load(self: Box<Self>) -> Result<Arc<dyn Vm>, RestoreError>;
}

/// A VM could not be saved. The VM is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The VM runs: only a paused VM can be saved.
    #[error("the virtual machine is not paused")]
    NotPaused,
    /// The engine does not support the request.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The VMM did not answer, or refused.
    #[error("the VMM failed to {step}")]
    Vmm {
        /// The requested step.
        step: &'static str,
        /// The VMM's response.
        #[source]
        source: VmmError,
    },
    /// A file could not be written.
    #[error("failed to {step}")]
    File {
        /// The step that failed.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A snapshot could not be restored. The snapshot is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The engine cannot restore.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The snapshot is missing, incomplete or altered.
    #[error("the snapshot is damaged: {what}")]
    Damaged {
        /// The damage.
        what: String,
    },
    /// The snapshot was taken on a different machine.
    #[error("the snapshot needs {what} `{needed}`, but found `{found}`")]
    Mismatch {
        /// The property that differs.
        what: &'static str,
        /// The value that the snapshot was taken on.
        needed: String,
        /// The value found here.
        found: String,
    },
    /// The disk was written after the snapshot: restoring this memory would damage it.
    #[error("the snapshot is older than the disk")]
    Stale,
    /// The VMM did not answer, or refused.
    #[error("the VMM failed to {step}")]
    Vmm {
        /// The requested step.
        step: &'static str,
        /// The VMM's response.
        #[source]
        source: VmmError,
    },
    /// A file could not be read or created.
    #[error("failed to {step}")]
    File {
        /// The step that failed.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A request to the VMM failed.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The VMM cannot be reached, or closed the connection.
    #[error("the VMM cannot be reached")]
    Unreachable(#[from] io::Error),
    /// The VMM did not answer in time.
    #[error("the VMM did not answer within {} s", limit.as_secs())]
    Silent {
        /// The time limit.
        limit: Duration,
    },
    /// The VMM refused the request.
    #[error("the VMM refused: {0}")]
    Refused(String),
    /// The VMM's response is malformed.
    #[error("the VMM sent a malformed response")]
    Garbled,
}
