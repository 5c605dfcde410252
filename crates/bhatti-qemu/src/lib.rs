//! QEMU's `microvm` machine, for the engine of [`bhatti_vmm`].
//!
//! ```text
//!  <sandbox directory>/
//!    disk-*.qcow2    the root disk's layers, the lowest over the image
//!    memory-*.img    the file that the guest's memory is a private mapping of
//!    snapshot/       the snapshot of a cold VM
//!    device.state    QEMU's device state, until it is copied into the snapshot
//!    agent.sock      the agent channel, multiplexed (bhatti_proto::mux)
//!    console.sock    the guest's console
//!    qmp.sock        QEMU's monitor
//!    vm.json         the record of QEMU's process and machine
//!    vmm.log         QEMU's own output
//! ```
//!
//! The sockets exist before QEMU starts, and QEMU inherits them, so the engine only waits for the
//! guest's first answer. QEMU runs in its own session, can access only its VM's files (see
//! `confine`), and outlives the daemon. The guest's console goes to a socket, not to a file,
//! because a hostile guest could fill the disk.

mod channel;
mod command_line;
mod confine;
mod layers;
mod load;
mod merge;
mod overlay;
mod pages;
mod qmp;
mod save;
mod start;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{
    Accelerator, Capabilities, NewRoot, RestoreError, RestoreSpec, SnapshotError, SnapshotRequest,
    VmSpec, VmmError,
};
use bhatti_host::process::{self, Followed};
use bhatti_host::{clock, kvm, processor};
use bhatti_types::SandboxId;
use bhatti_vmm::cgroup::{self, Groups};
use bhatti_vmm::{
    Connections, Launch, Manifest, Origin, ProcessEngine, Running, Saved, VmState, Vmm, vm_name,
};
use serde_json::json;

use channel::QemuChannel;
use qmp::Qmp;

/// QEMU's program for this architecture.
pub const PROGRAM: &str =
    if cfg!(target_arch = "aarch64") { "qemu-system-aarch64" } else { "qemu-system-x86_64" };

/// Runs VMs with QEMU.
pub type QemuEngine = ProcessEngine<Qemu>;

/// How long QEMU may take to stop the vCPUs: it waits for pending disk writes.
const PAUSE_LIMIT: Duration = Duration::from_secs(60);

/// QEMU, as the engine starts it.
#[derive(Debug)]
pub struct Qemu {
    pub(crate) program: PathBuf,
    pub(crate) accelerator: Accelerator,
    pub(crate) groups: Groups,
    pub(crate) depends_on: String,
    tsc_khz: OnceLock<Option<u64>>,
}

impl Qemu {
    /// Creates an engine on `program`, a path or a name to look up, with the best accelerator
    /// that works on this host.
    #[must_use]
    pub fn engine(program: PathBuf) -> ProcessEngine<Self> {
        let accelerator = if kvm::check().is_ok() { Accelerator::Kvm } else { Accelerator::Tcg };
        // Under KVM a guest sees this host's own processor; TCG's is the same on every host.
        let processor = match accelerator {
            Accelerator::Kvm => format!(" processor {}", processor::identity()),
            Accelerator::Tcg => String::new(),
        };
        let depends_on = format!(
            "{} {} {} layout {}{processor}",
            std::env::consts::ARCH,
            accelerator.as_str(),
            locate(&program)
                .map_or_else(|| "unknown".to_owned(), |path| bhatti_vmm::kind_of_program(&path)),
            command_line::LAYOUT
        );
        let groups = if process::is_root() { Groups::of_host() } else { Groups::Unusable };
        let qemu = Self { program, accelerator, groups, depends_on, tsc_khz: OnceLock::new() };
        if process::is_root() && confine::user(&qemu, process::USERS.start).is_none() {
            tracing::warn!(
                "QEMU runs as the daemon's user: the daemon lacks capabilities or user ids in its namespace, or only root may open /dev/kvm"
            );
        }
        ProcessEngine::of(qemu)
    }

    /// Returns the TSC's frequency, if it is known. The first call measures it, which blocks for
    /// some milliseconds.
    pub fn tsc_khz(&self) -> Option<u64> {
        *self.tsc_khz.get_or_init(clock::tsc_khz)
    }
}

#[async_trait]
impl Vmm for Qemu {
    type Control = Qmp;
    type Channel = QemuChannel;

    const NAME: &'static str = "QEMU";
    const FORMAT: u32 = 3;
    const EARLIER_FORMAT: u32 = 2;
    const STATE: &'static str = "device.state";

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "qemu",
            accelerator: Some(self.accelerator),
            machine: self.depends_on.clone(),
            exchanges_disks: true,
            replaces_root: true,
            saves_memory: true,
            shares_kernel: false,
            vmm_mib: command_line::vmm_mib(self.accelerator),
        }
    }

    fn programs(&self) -> Vec<PathBuf> {
        vec![self.program.clone()]
    }

    fn boot_disk(&self, spec: &VmSpec) -> io::Result<String> {
        layers::boot_disk(spec)
    }

    fn boot_memory(&self, spec: &VmSpec) -> io::Result<Option<String>> {
        layers::create_empty_memory(&spec.directory, spec.memory).map(Some)
    }

    fn start(&self, launch: &Launch<'_>) -> io::Result<Followed> {
        start::start(self, launch)
    }

    fn connect(&self, directory: &Path) -> io::Result<Connections<Self>> {
        start::connect(directory)
    }

    async fn clean_up(&self, id: SandboxId, _directory: &Path) -> io::Result<()> {
        if let Err(error) = cgroup::remove(&vm_name(id)).await {
            tracing::warn!(sandbox = %id, %error, "Failed to remove the control group of a VM that has ended");
        }
        Ok(())
    }

    async fn version(&self, vm: &Running<Self>) -> Result<String, VmmError> {
        vm.control.version().await
    }

    async fn state(&self, vm: &Running<Self>) -> Result<VmState, VmmError> {
        let status = vm.control.ask("query-status", json!({})).await?;
        match (status["running"].as_bool(), status["status"].as_str()) {
            (Some(true), _) => Ok(VmState::Running),
            (Some(false), Some("inmigrate")) => Ok(VmState::Waiting),
            (Some(false), _) => Ok(VmState::Paused),
            (None, _) => Err(VmmError::Garbled),
        }
    }

    async fn pause(&self, vm: &Running<Self>) -> Result<(), VmmError> {
        vm.control.execute("stop", json!({}), PAUSE_LIMIT).await.map(drop)
    }

    async fn resume(&self, vm: &Running<Self>) -> Result<(), VmmError> {
        vm.control.ask("cont", json!({})).await.map(drop)
    }

    async fn merge_disk(&self, vm: &Running<Self>, save_space: bool) -> Result<bool, VmmError> {
        merge::merge_disk(vm, save_space).await
    }

    async fn settle_disk(&self, vm: &Running<Self>) -> Result<(), VmmError> {
        merge::settle_jobs(vm).await
    }

    async fn save(
        &self,
        vm: &Running<Self>,
        request: &SnapshotRequest,
        draft: &Path,
    ) -> Result<Saved, SnapshotError> {
        save::save_devices(vm, &draft.join(Self::STATE)).await?;
        save::save_memory(vm, request, draft).await
    }

    async fn freeze_disk(
        &self,
        vm: &Running<Self>,
        draft: &Path,
        disk: &str,
    ) -> Result<(), SnapshotError> {
        save::freeze_disk(vm, draft, disk).await
    }

    fn check_disk(&self, directory: &Path, disk: &str) -> io::Result<()> {
        overlay::chain(directory, disk).map(drop)
    }

    fn fork_disk(&self, snapshot: &Path, disk: &str, directory: &Path) -> io::Result<String> {
        layers::share_layers(snapshot, disk, directory)?;
        layers::add_layer(directory, disk)
    }

    fn new_disk(&self, directory: &Path, root: &NewRoot) -> io::Result<String> {
        layers::new_disk(directory, root)
    }

    fn restore_memory(&self, spec: &RestoreSpec, saved: &Manifest) -> Result<String, RestoreError> {
        load::restore_memory(spec, saved)
    }

    async fn load(&self, vm: &Running<Self>, from: &Origin<'_>) -> Result<(), RestoreError> {
        load::load(vm, from).await
    }
}

/// Returns the path of a program, with all links resolved.
fn locate(program: &Path) -> Option<PathBuf> {
    const PLACES: [&str; 6] =
        ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let places = PLACES.iter().map(|place| Path::new(place).join(program));
    places.filter_map(|path| fs::canonicalize(path).ok()).find(|path| path.is_file())
}
