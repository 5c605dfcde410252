//! Firecracker, for the engine of [`bhatti_vmm`].
//!
//! ```text
//!  <sandbox directory>/
//!    disk.ext4       the root disk
//!    memory-*.img    the file that the memory of a restored or forked VM is a private mapping of
//!    snapshot/       the snapshot of a cold VM
//!    console.fifo    the guest's console
//!    vm.json         the record of Firecracker's process and machine
//!    vmm.log         Firecracker's own output
//!    vmm/            all files that Firecracker sees of this host: see `jail`
//!      …             links to the files above that Firecracker uses
//!      vsock.sock    the agent channel: one connection per operation
//!      api.sock      Firecracker's API
//! ```
//!
//! The engine gives Firecracker names, not paths, so a snapshot of one sandbox can be restored
//! for another. Firecracker runs in its own session and outlives the daemon. Its disks are raw
//! files: a fork has a copy, which shares blocks if the file system supports that.

mod api;
mod jail;
mod load;
mod machine;
mod memory;
mod save;
mod start;
mod version;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{
    Accelerator, Capabilities, RestoreError, RestoreSpec, SnapshotError, SnapshotRequest, VmSpec,
    VmmError,
};
use bhatti_host::process::Followed;
use bhatti_host::{disk, processor};
use bhatti_types::SandboxId;
use bhatti_vmm::cgroup::{self, Groups};
use bhatti_vmm::{
    Connections, Launch, Machine, Manifest, Origin, ProcessEngine, Running, Saved, Unfinished,
    VmState, Vmm, VsockChannel, on_thread, vm_name,
};
use serde_json::json;

use api::{Api, CALL_LIMIT, State};
use machine::DISK;

pub use version::{Found, MINIMUM, Unusable, Version, check};

/// Firecracker's program.
pub const PROGRAM: &str = "firecracker";
/// The program that starts Firecracker as another user.
pub const JAILER: &str = "jailer";

/// How long Firecracker may take to start the guest, and to pause or resume its vCPUs.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Runs VMs with Firecracker.
pub type FirecrackerEngine = ProcessEngine<Firecracker>;

/// Firecracker, as the engine starts it.
#[derive(Clone, Debug)]
pub struct Firecracker {
    program: PathBuf,
    /// The jailer that starts Firecracker, if this daemon is root.
    jailer: Option<PathBuf>,
    groups: Groups,
    depends_on: String,
}

impl Firecracker {
    /// Creates an engine on a checked Firecracker.
    #[must_use]
    pub fn engine(found: Found) -> FirecrackerEngine {
        let Found { program, jailer, .. } = found;
        let groups = Groups::of_host();
        if jailer.is_some() && groups == Groups::Unusable {
            tracing::warn!(
                "This host has no control groups for memory and processes: VMMs run without limits"
            );
        }
        let depends_on = format!(
            "{} kvm {} layout {} processor {}",
            std::env::consts::ARCH,
            bhatti_vmm::kind_of_program(&program),
            machine::LAYOUT,
            // A guest sees this host's own processor.
            processor::identity()
        );
        ProcessEngine::of(Self { program, jailer, groups, depends_on })
    }

    async fn change_state(
        &self,
        vm: &Running<Self>,
        from: State,
        to: &str,
    ) -> Result<(), VmmError> {
        if vm.control.instance().await?.state != from {
            return Ok(());
        }
        vm.control.patch("/vm", &json!({ "state": to }), START_LIMIT).await
    }
}

#[async_trait]
impl Vmm for Firecracker {
    type Control = Api;
    type Channel = VsockChannel;

    const NAME: &'static str = "Firecracker";
    const FORMAT: u32 = 2;
    const EARLIER_FORMAT: u32 = 1;
    const STATE: &'static str = "vm.state";

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "firecracker",
            accelerator: Some(Accelerator::Kvm),
            machine: self.depends_on.clone(),
            exchanges_disks: false,
            replaces_root: false,
            saves_memory: true,
            shares_kernel: false,
            vmm_mib: 48,
        }
    }

    fn programs(&self) -> Vec<PathBuf> {
        // The process is the jailer until the jailer starts Firecracker.
        self.jailer.iter().chain([&self.program]).cloned().collect()
    }

    /// Copies the image, and extends the copy to the size of the disk.
    fn boot_disk(&self, spec: &VmSpec) -> io::Result<String> {
        let path = spec.directory.join(DISK);
        if let Some(root_base) = &spec.root_base {
            disk::copy(root_base, &path)?;
            let file = File::options().write(true).open(&path)?;
            let bytes = spec.disk.map_or(0, |size| size.bytes());
            if bytes > file.metadata()?.len() {
                file.set_len(bytes)?;
            }
        }
        Ok(DISK.to_owned())
    }

    fn start(&self, launch: &Launch<'_>) -> io::Result<Followed> {
        start::start(self, launch)
    }

    fn connect(&self, directory: &Path) -> io::Result<Connections<Self>> {
        start::connect(directory)
    }

    async fn configure(&self, vm: &Running<Self>, spec: &VmSpec) -> Result<(), VmmError> {
        start::boot_guest(vm, spec).await
    }

    async fn clean_up(&self, id: SandboxId, directory: &Path) -> io::Result<()> {
        if self.jailer.is_some() {
            cgroup::remove(&vm_name(id)).await?;
        }
        jail::clear(directory).await
    }

    async fn version(&self, vm: &Running<Self>) -> Result<String, VmmError> {
        vm.control.listening(CALL_LIMIT).await?;
        Ok(vm.control.instance().await?.vmm_version)
    }

    async fn state(&self, vm: &Running<Self>) -> Result<VmState, VmmError> {
        Ok(match vm.control.instance().await?.state {
            State::NotStarted => VmState::Waiting,
            State::Running => VmState::Running,
            State::Paused => VmState::Paused,
        })
    }

    async fn pause(&self, vm: &Running<Self>) -> Result<(), VmmError> {
        self.change_state(vm, State::Running, "Paused").await
    }

    async fn resume(&self, vm: &Running<Self>) -> Result<(), VmmError> {
        self.change_state(vm, State::Paused, "Resumed").await
    }

    async fn save(
        &self,
        vm: &Running<Self>,
        request: &SnapshotRequest,
        draft: &Path,
    ) -> Result<Saved, SnapshotError> {
        save::save(vm, request, draft).await
    }

    async fn freeze_disk(
        &self,
        vm: &Running<Self>,
        draft: &Path,
        disk: &str,
    ) -> Result<(), SnapshotError> {
        let (from, to) = (vm.directory().join(disk), draft.join(disk));
        on_thread("copy the disk", move || disk::copy(&from, &to)).await
    }

    fn settle_memory(&self, saved: &mut Saved, unfinished: &Unfinished<'_>) -> io::Result<()> {
        save::settle_memory(saved, unfinished)
    }

    fn check(&self, saved: &Machine, spec: &RestoreSpec) -> Result<(), RestoreError> {
        load::check_volumes(saved, spec)
    }

    fn fork_disk(&self, snapshot: &Path, disk: &str, directory: &Path) -> io::Result<String> {
        disk::copy(&snapshot.join(disk), &directory.join(DISK))?;
        Ok(DISK.to_owned())
    }

    fn restore_memory(&self, spec: &RestoreSpec, saved: &Manifest) -> Result<String, RestoreError> {
        load::restore_memory(spec, saved)
    }

    async fn load(&self, vm: &Running<Self>, from: &Origin<'_>) -> Result<(), RestoreError> {
        load::load(vm, from).await
    }
}
