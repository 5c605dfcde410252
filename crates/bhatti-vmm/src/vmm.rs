//! What each VMM does in its own way.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{
    AgentChannel, Capabilities, Disks, MemoryKind, NewRoot, RestoreError, RestoreSpec,
    SnapshotError, SnapshotRequest, VmSpec, VmmError,
};
use bhatti_host::process::Followed;
use bhatti_types::SandboxId;

use crate::machine::Machine;
use crate::manifest::{Manifest, SavedMemory};
use crate::record::Record;
use crate::{Console, log_tail};

/// One VMM program. [`ProcessEngine`](crate::ProcessEngine) makes an engine of it.
///
/// Methods that are not `async` may block: the engine calls them on threads for blocking work.
/// `async` methods must not block. The engine calls them to the end, or ends the VMM.
///
/// # Errors
///
/// A method returns the error of the file or of the VMM's answer that it met first. A method that
/// makes files in a VM's directory leaves them, and the engine removes them.
#[async_trait]
#[expect(clippy::missing_errors_doc, reason = "the trait's documentation names the errors")]
pub trait Vmm: Sized + Send + Sync + 'static {
    /// The connection to a VMM's control interface. Connects when it is used.
    type Control: Send + Sync;
    /// The channel to the guest agent. Connects when it is used.
    type Channel: AgentChannel + 'static;

    /// The VMM's name, for people.
    const NAME: &'static str;
    /// Version of the layout of snapshots.
    const FORMAT: u32;
    /// The earliest version that can still be read.
    const EARLIER_FORMAT: u32;
    /// The file of a snapshot with the state of devices and vCPUs.
    const STATE: &'static str;

    /// See [`Engine::capabilities`](bhatti_engine::Engine::capabilities).
    fn capabilities(&self) -> Capabilities;

    /// The programs that a VM's process may run. The last is the VMM itself.
    fn programs(&self) -> Vec<PathBuf>;

    /// Creates the root disk of a VM to boot, or finds the kept one. Returns its name.
    fn boot_disk(&self, spec: &VmSpec) -> io::Result<String>;

    /// Creates the memory file of a VM to boot, if the VMM needs one. Returns its name.
    fn boot_memory(&self, _spec: &VmSpec) -> io::Result<Option<String>> {
        Ok(None)
    }

    /// Starts the VMM's process. The error's kind is [`io::ErrorKind::NotFound`] only if the
    /// program is missing.
    fn start(&self, launch: &Launch<'_>) -> io::Result<Followed>;

    /// Opens the connections to the VMM of the VM in `directory`. Called inside a runtime.
    fn connect(&self, directory: &Path) -> io::Result<Connections<Self>>;

    /// Configures a started VMM and boots its guest.
    async fn configure(&self, _vm: &Running<Self>, _spec: &VmSpec) -> Result<(), VmmError> {
        Ok(())
    }

    /// Removes what the host keeps for a VMM that has ended, besides the files of its VM.
    /// Idempotent.
    async fn clean_up(&self, id: SandboxId, directory: &Path) -> io::Result<()>;

    /// Returns the VMM's version.
    async fn version(&self, vm: &Running<Self>) -> Result<String, VmmError>;

    /// Returns what the VM does now.
    async fn state(&self, vm: &Running<Self>) -> Result<VmState, VmmError>;

    /// See [`Vm::pause`](bhatti_engine::Vm::pause).
    async fn pause(&self, vm: &Running<Self>) -> Result<(), VmmError>;

    /// See [`Vm::resume`](bhatti_engine::Vm::resume).
    async fn resume(&self, vm: &Running<Self>) -> Result<(), VmmError>;

    /// See [`Vm::merge_disk`](bhatti_engine::Vm::merge_disk).
    async fn merge_disk(&self, _vm: &Running<Self>, _save_space: bool) -> Result<bool, VmmError> {
        Ok(false)
    }

    /// Ends what the VMM does with the disk besides serving the guest.
    async fn settle_disk(&self, _vm: &Running<Self>) -> Result<(), VmmError> {
        Ok(())
    }

    /// Saves devices and memory of the paused VM to files in `draft`.
    async fn save(
        &self,
        vm: &Running<Self>,
        request: &SnapshotRequest,
        draft: &Path,
    ) -> Result<Saved, SnapshotError>;

    /// Freezes the paused VM's disk `disk` and adds it to the snapshot in `draft`. After an error
    /// the VM's disk is unchanged.
    async fn freeze_disk(
        &self,
        vm: &Running<Self>,
        draft: &Path,
        disk: &str,
    ) -> Result<(), SnapshotError>;

    /// Gives the saved memory its final form, while the VM may already run again.
    fn settle_memory(&self, _saved: &mut Saved, _unfinished: &Unfinished<'_>) -> io::Result<()> {
        Ok(())
    }

    /// Checks what only this VMM requires of a VM to restore.
    fn check(&self, _saved: &Machine, _spec: &RestoreSpec) -> Result<(), RestoreError> {
        Ok(())
    }

    /// Checks that all files of a disk that stayed in place exist. The error's kind is
    /// [`io::ErrorKind::NotFound`] if one is missing, here and for the files of a snapshot below.
    fn check_disk(&self, _directory: &Path, _disk: &str) -> io::Result<()> {
        Ok(())
    }

    /// Creates a VM's own disk in `directory` from the disk `disk` of a snapshot. Returns its
    /// name.
    fn fork_disk(&self, snapshot: &Path, disk: &str, directory: &Path) -> io::Result<String>;

    /// Creates the root disk of a VM whose [root is replaced](Capabilities::replaces_root). Returns
    /// its name.
    fn new_disk(&self, _directory: &Path, _root: &NewRoot) -> io::Result<String> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Creates or shares the file that a restored VM's memory is a private mapping of. Returns
    /// its name. After an error no new file is left.
    fn restore_memory(&self, spec: &RestoreSpec, saved: &Manifest) -> Result<String, RestoreError>;

    /// Loads the memory and the state of a snapshot into the VMM. Its state file is the one whose
    /// hash the manifest has.
    async fn load(&self, vm: &Running<Self>, from: &Origin<'_>) -> Result<(), RestoreError>;
}

/// A VMM's process and the connections to it. Its VM is running or paused, or waits for its
/// snapshot.
pub struct Running<V: Vmm> {
    /// The VMM.
    pub vmm: Arc<V>,
    /// The sandbox that the VM belongs to.
    pub id: SandboxId,
    /// The process.
    pub process: Followed,
    /// The VM's record.
    pub record: Arc<Record>,
    /// See [`Vmm::Control`].
    pub control: V::Control,
    /// See [`Vmm::Channel`].
    pub channel: Arc<V::Channel>,
    pub(crate) console: Console,
}

impl<V: Vmm> Running<V> {
    /// Returns the VM's directory.
    pub fn directory(&self) -> &Path {
        self.record.directory()
    }
}

/// A VMM to start.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The sandbox that the VM belongs to.
    pub id: SandboxId,
    /// The VM's directory.
    pub directory: &'a Path,
    /// The machine, whose files exist.
    pub machine: &'a Machine,
    /// See [`VmSpec::tap`].
    pub tap: Option<&'a str>,
    /// What the VM starts from.
    pub source: Source<'a>,
}

/// What a VM starts from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// It boots.
    Boot(&'a VmSpec),
    /// It waits for this snapshot to be loaded.
    Snapshot(&'a Path),
}

/// The connections to a VMM.
pub struct Connections<V: Vmm> {
    /// See [`Vmm::Control`].
    pub control: V::Control,
    /// See [`Vmm::Channel`].
    pub channel: Arc<V::Channel>,
    /// The guest's console.
    pub console: Console,
}

/// What a VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmState {
    /// The VMM has not booted a guest or loaded a snapshot.
    Waiting,
    /// The vCPUs run.
    Running,
    /// The vCPUs are stopped.
    Paused,
}

/// Devices and memory that a VMM saved.
#[derive(Clone, Debug)]
pub struct Saved {
    /// The machine. Its memory is the base of a diff, or the file with all pages.
    pub machine: Machine,
    /// The pages.
    pub memory: SavedMemory,
    /// The kind of snapshot that was made.
    pub kind: MemoryKind,
    /// Size of the pages, in bytes.
    pub memory_bytes: u64,
}

/// A snapshot that is not complete yet.
#[derive(Clone, Copy, Debug)]
pub struct Unfinished<'a> {
    /// The snapshot's directory for now.
    pub draft: &'a Path,
    /// What it does with the disks.
    pub disks: Disks,
    /// The record of the VM, which runs on.
    pub record: &'a Record,
    /// The number of this capture.
    pub capture: u64,
}

/// A snapshot to load.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// The snapshot's directory.
    pub snapshot: &'a Path,
    /// The snapshot's manifest.
    pub manifest: &'a Manifest,
    /// See [`VmSpec::tap`].
    pub tap: Option<&'a str>,
    /// How long the VMM may take.
    pub limit: Duration,
}

/// The VMM's own log, in the VM's directory.
pub const LOG: &str = "vmm.log";

/// Logs what the VMM of the VM in `directory` wrote about itself. This output names files of the
/// host, so it goes only to the daemon's log. Blocks for a moment.
pub(crate) fn report_log<V: Vmm>(directory: &Path) {
    let log = log_tail(&directory.join(LOG));
    if !log.trim().is_empty() {
        tracing::warn!(vmm = V::NAME, log, "The VMM wrote to its log");
    }
}
