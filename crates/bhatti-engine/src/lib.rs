//! The interface of an engine.
//!
//! An [`Engine`] runs VMs with one VMM; a [`Vm`] is a running VM. Code above this crate never
//! asks which engine it uses; it asks for the engine's [`Capabilities`]. An engine owns
//! everything of a VM that is outside the VM's directory, above all its processes.
//!
//! A VM outlives the daemon: dropping a [`Vm`] releases it, and [`Engine::adopt`] adopts it
//! again. Only [`Engine::kill`] and [`Engine::remove`] end it.

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
    Captured, Disks, FileCopy, MemoryKind, NewRoot, RestoreError, RestoreSpec, SnapshotError,
    SnapshotInfo, SnapshotRequest, Staged, VmmError,
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
    /// Returns the accelerator's name in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// The abilities of an engine on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The engine's name in the API.
    pub name: &'static str,
    /// What executes the guest's instructions; `None` for containers.
    pub accelerator: Option<Accelerator>,
    /// What saved VMs depend on besides their files: if this value changes, they cannot be
    /// restored.
    pub machine: String,
    /// Whether a restored VM can have other disks in its volume slots than the saved VM had.
    pub exchanges_disks: bool,
    /// Whether a restored VM can have another root disk than the saved VM had, see
    /// [`VmSpec::awaits_root`].
    pub replaces_root: bool,
    /// Whether VMs can be saved, restored and forked. If not, the content of a VM's memory is
    /// lost when the VM ends.
    pub saves_memory: bool,
    /// Whether sandboxes run on this host's kernel, and so are less isolated.
    pub shares_kernel: bool,
    /// The maximum host memory that a VMM takes in addition to its guest's memory, in MiB.
    pub vmm_mib: u32,
}

impl Capabilities {
    /// The accelerator's name in the API.
    #[must_use]
    pub fn accelerator_name(&self) -> &'static str {
        self.accelerator.map_or("none", Accelerator::as_str)
    }
}

/// A file that is attached to a VM as a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeFile {
    /// The file, a raw disk.
    pub path: PathBuf,
    /// Whether the VM only reads the file. Any number of VMs may read it at once; a writer is
    /// alone.
    pub read_only: bool,
    /// Mount point in the guest. The guest agent gets it, too; an engine whose guest agent mounts
    /// the volumes ignores it.
    pub mount: String,
}

/// A VM to boot.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// The sandbox that the VM belongs to.
    pub id: SandboxId,
    /// The guest's host name.
    pub hostname: SandboxName,
    /// Number of vCPUs.
    pub cpus: CpuCount,
    /// Size of the memory.
    pub memory: MemoryMib,
    /// Size of the root disk, at least that of `root_base`; that of `root_base` if absent. The
    /// guest grows its file system to this size.
    pub disk: Option<DiskMib>,
    /// Directory of the VM's files. The engine creates it.
    pub directory: PathBuf,
    /// The kernel, as an uncompressed ELF `vmlinux`. Never written.
    pub kernel: PathBuf,
    /// The initramfs with the guest agent. Never written.
    pub initramfs: PathBuf,
    /// The root file system of the image, which is never written. If absent, the VM keeps the root
    /// disk that is already in `directory`, with its content.
    pub root_base: Option<PathBuf>,
    /// Name of the tap interface on this host for the VM's network card; the VM has no card if
    /// absent. The engine creates the tap, down and in no bridge. The tap disappears with the VM,
    /// or when an ended VM is killed or removed.
    pub tap: Option<String>,
    /// The files in the VM's volume slots; `None` is an empty slot. The guest agent finds them by
    /// the names `volume0` and so on: as serials, or, if the engine gives disks no serials, in
    /// this order.
    pub volumes: Vec<Option<VolumeFile>>,
    /// Whether the guest is to stop before it mounts its root disk, and to wait until the disk has
    /// an ext4 file system. The boot then ends when the guest waits; its agent does not answer.
    /// Only for engines that [replace the root disk](Capabilities::replaces_root).
    pub awaits_root: bool,
    /// Whether an image is built in the VM. Buildah needs its own user and mount namespaces, which
    /// an engine that [shares its kernel](Capabilities::shares_kernel) does not give every sandbox.
    pub is_builder: bool,
    /// How long the boot may take until the agent answers.
    pub boot_limit: Duration,
}

/// Runs VMs with one VMM.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Returns the engine's abilities on this host.
    fn capabilities(&self) -> Capabilities;

    /// Boots a VM and waits until its agent answers.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. Nothing of the VM is then left, including its directory,
    /// unless it keeps its root disk.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: created files and processes stay until [`remove`](Self::remove).
    async fn boot(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, BootError>;

    /// Starts a VMM that waits for a snapshot. This takes most of the time of a restore.
    ///
    /// # Errors
    ///
    /// Returns why the snapshot cannot be used. Nothing of the VM is then left that did not exist
    /// before.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: created files and processes stay until [`remove`](Self::remove).
    async fn stage(&self, spec: &RestoreSpec) -> Result<Box<dyn Staged>, RestoreError>;

    /// Prepares what all VMs with this root file system need, so that the first of them need not
    /// wait for it.
    ///
    /// # Errors
    ///
    /// Returns the step that failed.
    async fn prepare_root(&self, _root_base: &Path) -> Result<(), BootError> {
        Ok(())
    }

    /// Adopts the VM in `directory` that an earlier daemon booted or restored.
    ///
    /// # Errors
    ///
    /// Returns [`AdoptError::Gone`] if the VM no longer runs.
    async fn adopt(&self, id: SandboxId, directory: &Path) -> Result<Arc<dyn Vm>, AdoptError>;

    /// Ends the VM of `id`, if it runs, and keeps its files. Idempotent; callable in any state.
    ///
    /// # Errors
    ///
    /// Returns an error if the VM does not end.
    async fn kill(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError>;

    /// Ends the VM of `id`, if it runs, and removes all of its files. Idempotent; callable in any
    /// state.
    ///
    /// # Errors
    ///
    /// Returns the file or process that could not be removed.
    async fn remove(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError>;
}

/// A running VM.
#[async_trait]
pub trait Vm: Send + Sync {
    /// Returns the channel to the guest agent.
    fn channel(&self) -> Arc<dyn AgentChannel>;

    /// Whether the VM's vCPUs run.
    ///
    /// # Errors
    ///
    /// Returns an error if the VMM does not answer.
    async fn is_running(&self) -> Result<bool, VmmError>;

    /// Stops the VM's vCPUs. Does nothing to a paused VM.
    ///
    /// # Errors
    ///
    /// Returns an error if the VMM does not answer.
    async fn pause(&self) -> Result<(), VmmError>;

    /// Resumes the VM's vCPUs. Does nothing to a running VM.
    ///
    /// # Errors
    ///
    /// Returns an error if the VMM does not answer.
    async fn resume(&self) -> Result<(), VmmError>;

    /// Merges the layers of the VM's disk, if frozen layers have become many or large. With
    /// `_to_save_space`, merges them whenever that frees disk space. The merge takes as long as
    /// copying the layers' content, and fails if nothing is copied for 20 s. The VM runs
    /// meanwhile, and is paused for a moment at the end. Returns whether there was anything to
    /// merge: engines with single-file disks have nothing.
    ///
    /// # Errors
    ///
    /// Returns why the merge failed. The disk's content is unchanged, on as many layers as
    /// before.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the VM may stay paused. The VMM continues by itself; the next call, or
    /// the next snapshot, ends the merge.
    async fn merge_disk(&self, _to_save_space: bool) -> Result<bool, VmmError> {
        Ok(false)
    }

    /// Captures the state of the paused VM for a snapshot.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. The VM is paused as before, and nothing of the snapshot is
    /// left.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: a directory beside the snapshot's, with a name that ends in `.tmp`, may
    /// stay.
    async fn capture(&self, request: &SnapshotRequest) -> Result<Box<dyn Captured>, SnapshotError>;

    /// Waits until the VM's VMM has ended.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    async fn ended(&self);

    /// Returns the host resources that the VM has used so far. Blocks for about a millisecond.
    ///
    /// # Errors
    ///
    /// Returns an error if the VMM has ended.
    fn usage(&self) -> io::Result<Usage>;

    /// Returns the end of the console's output, for a human reader.
    fn console_tail(&self) -> String;

    /// Like [`console_tail`](Self::console_tail), but of a VMM that has ended: waits, for a
    /// moment at most, until the output is complete.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    async fn last_console(&self) -> String {
        self.console_tail()
    }
}
