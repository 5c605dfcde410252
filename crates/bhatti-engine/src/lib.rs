//! What an engine is.
//!
//! An [`Engine`] runs VMs with one VMM; a [`Vm`] is one that runs. Nothing above this crate asks which engine it is; it asks what the
//! engine can do. An engine owns everything of a VM that is not in its directory: processes above all.
//!
//! A VM outlives the daemon: dropping a [`Vm`] lets go of it, and [`Engine::adopt`] takes it up again. Only [`Engine::remove`] ends it.

mod boot;
mod channel;
pub mod conformance;
mod snapshot;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
pub use bhatti_host::process::Usage;
use bhatti_types::{CpuCount, DiskMib, MemoryMib, SandboxId, SandboxName};

pub use boot::{AdoptError, BootError, RemoveError};
pub use channel::{AgentChannel, AgentStream, ChannelError};
pub use snapshot::{
    Captured, Disks, FileCopy, MemoryKind, RestoreError, RestoreSpec, SnapshotError, SnapshotInfo,
    SnapshotRequest, Staged, VmmError,
};

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor's virtualization.
    Kvm,
    /// Software emulation: works everywhere, several times slower.
    Tcg,
}

impl Accelerator {
    /// Its name in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What an engine can do, and with what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The engine's name in the API.
    pub name: &'static str,
    /// What executes the guest's instructions; nothing does for a container.
    pub accelerator: Option<Accelerator>,
    /// What saved VMs depend on beside their files: another value, and none of them can be restored.
    pub machine: String,
    /// Whether a VM that is restored can have other disks in its places than the one that was saved.
    pub exchanges_disks: bool,
    /// Whether a VM can be saved, restored and forked. If not, what it has in its memory ends with it.
    pub saves_memory: bool,
    /// Whether sandboxes run on this host's kernel: they are less isolated then.
    pub shares_kernel: bool,
    /// What a VMM takes of the host's memory at most, beside its guest's, in MiB.
    pub vmm_mib: u32,
}

impl Capabilities {
    /// The accelerator's name in the API.
    #[must_use]
    pub fn accelerator_name(&self) -> &'static str {
        self.accelerator.map_or("none", Accelerator::as_str)
    }
}

/// A file that a VM has as a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeFile {
    /// The file: a disk as it is.
    pub path: PathBuf,
    /// Whether the VM only reads it, as any number may at once; who writes it is alone.
    pub read_only: bool,
    /// Where the guest has it mounted. Its agent is told so, too, and where it does the mounting the engine need not care.
    pub mount: String,
}

/// A VM to be made.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// The sandbox that it is for.
    pub id: SandboxId,
    /// The guest's host name.
    pub hostname: SandboxName,
    /// Its vCPUs.
    pub cpus: CpuCount,
    /// Its memory.
    pub memory: MemoryMib,
    /// The size of its root disk, at least that of `root_base`; the same if absent. The guest makes
    /// its file system as large.
    pub disk: Option<DiskMib>,
    /// Where everything of it is kept. The engine makes it.
    pub directory: PathBuf,
    /// The kernel, as an uncompressed ELF `vmlinux`. Never written.
    pub kernel: PathBuf,
    /// The initramfs with the guest agent. Never written.
    pub initramfs: PathBuf,
    /// The root file system that the root disk begins as. Never written.
    pub root_base: PathBuf,
    /// Whether the disk that is in `directory` already is the root disk, with all that is on it.
    pub keep_disk: bool,
    /// The interface of this host that its network card is to end at; it has no card if absent. The engine makes it, it is down and
    /// belongs to no bridge, and it ends with the VM, or when what has ended is killed or removed.
    pub tap: Option<String>,
    /// What is in its places for volumes; `None` is an empty place. Its guest knows them as disks with the serials `volume0` and so on.
    pub volumes: Vec<Option<VolumeFile>>,
    /// How long it may take until the agent answers.
    pub boot_limit: Duration,
}

/// Runs VMs with one VMM.
#[async_trait]
pub trait Engine: Send + Sync {
    /// What it can do here.
    fn capabilities(&self) -> Capabilities;

    /// Boots a VM and waits until its agent answers.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. Nothing of the VM is then left, its directory included.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: what was made stays until [`remove`](Self::remove).
    async fn boot(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, BootError>;

    /// Starts a VMM that waits for a snapshot: most of the time that a restore takes.
    ///
    /// # Errors
    ///
    /// Returns why the snapshot cannot be used. Nothing of the VM is then left that was not there before.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: what was made stays until [`remove`](Self::remove).
    async fn stage(&self, spec: &RestoreSpec) -> Result<Box<dyn Staged>, RestoreError>;

    /// Makes ready whatever all VMs need that begin as this root file system, so that the first of them need not wait for it.
    ///
    /// # Errors
    ///
    /// Returns the step that failed.
    async fn prepare_root(&self, _root_base: &Path) -> Result<(), BootError> {
        Ok(())
    }

    /// Takes up the VM in `directory` that an earlier daemon booted.
    ///
    /// # Errors
    ///
    /// Returns [`AdoptError::Gone`] if it does not run any more.
    async fn adopt(&self, id: SandboxId, directory: &Path) -> Result<Arc<dyn Vm>, AdoptError>;

    /// Ends the VM of `id`, if it runs, and keeps its files. May be called in any state, and again.
    ///
    /// # Errors
    ///
    /// Returns an error if it does not end.
    async fn kill(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError>;

    /// Ends the VM of `id`, if it runs, and removes everything of it. May be called in any state, and again.
    ///
    /// # Errors
    ///
    /// Returns what could not be removed.
    async fn remove(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError>;
}

/// A VM that runs.
#[async_trait]
pub trait Vm: Send + Sync {
    /// The way to its agent.
    fn channel(&self) -> Arc<dyn AgentChannel>;

    /// Whether its vCPUs run.
    ///
    /// # Errors
    ///
    /// Returns an error if the VMM does not answer.
    async fn is_running(&self) -> Result<bool, VmmError>;

    /// Stops its vCPUs. Does nothing to a paused VM.
    ///
    /// # Errors
    ///
    /// Returns an error if the VMM does not answer.
    async fn pause(&self) -> Result<(), VmmError>;

    /// Lets its vCPUs run. Does nothing to a running VM.
    ///
    /// # Errors
    ///
    /// Returns an error if the VMM does not answer.
    async fn resume(&self) -> Result<(), VmmError>;

    /// Merges the layers of its disk, if snapshots that froze it have made them many or large. With
    /// `_to_save_space`, merges them whenever that frees disk space. It takes as long as copying
    /// what the layers hold, at most 20 s, while the VM runs; the VM stands still for a moment at
    /// the end. Returns whether there was anything to do: engines whose disks are one file have
    /// nothing.
    ///
    /// # Errors
    ///
    /// Returns why it was not done: the disk is what it was, on as many files.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the VM may stand still. The VMM goes on by itself; the next call, or the next snapshot, ends that.
    async fn merge_disk(&self, _to_save_space: bool) -> Result<bool, VmmError> {
        Ok(false)
    }

    /// Takes what a snapshot needs of the paused VM.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. The VM is paused as before, and nothing of the snapshot is left.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: a directory beside the snapshot's, with a name that ends in `.tmp`, may stay.
    async fn capture(&self, request: &SnapshotRequest) -> Result<Box<dyn Captured>, SnapshotError>;

    /// Waits until its VMM has ended.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    async fn ended(&self);

    /// What it has used of this host so far. Blocks for about a millisecond.
    ///
    /// # Errors
    ///
    /// Returns an error if its VMM has ended.
    fn usage(&self) -> io::Result<Usage>;

    /// The end of its console's output, for a person.
    fn console_tail(&self) -> String;

    /// The same, once all of it is there: for a VMM that has ended. It takes a moment at most.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    async fn last_console(&self) -> String {
        self.console_tail()
    }
}
