//! The engine on QEMU's `microvm` machine.
//!
//! ```text
//!  <sandbox directory>/
//!    disk-*.qcow2    the root disk's layers, the lowest over the image
//!    memory-*.img    the file that the guest's memory is a private mapping of
//!    snapshot/       the snapshot of a cold VM: see `manifest`
//!    device.state    QEMU's device state, until it is copied into the snapshot
//!    agent.sock      the agent channel, multiplexed (bhatti_proto::mux)
//!    console.sock    the guest's console
//!    qmp.sock        QEMU's monitor
//!    vm.json         the record of QEMU's process and machine
//!    vmm.log         QEMU's own output
//! ```
//!
//! The engine creates the sockets before QEMU starts and passes them to it, so it only waits for
//! the guest's first answer. QEMU runs in its own session, can access only its VM's files (see
//! `confine`), and outlives the daemon. The guest's console goes to a socket, not to a file,
//! because a hostile guest could fill the disk.

mod capture;
mod channel;
mod command_line;
mod confine;
mod files;
mod manifest;
mod merge;
mod operations;
mod overlay;
mod pages;
mod qmp;
mod record;
mod restore;
mod vm;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bhatti_engine::{
    Accelerator, AdoptError, BootError, Capabilities, Engine, RemoveError, RestoreError,
    RestoreSpec, Staged, Vm, VmSpec,
};
use bhatti_host::process::{self, Followed};
use bhatti_host::{clock, kvm, processor};
use bhatti_types::SandboxId;
use bhatti_vmm::cgroup::{self, Groups};
use tokio::sync::OnceCell;

use qmp::Qmp;
use record::Record;
use vm::QemuVm;

/// QEMU's program for this architecture.
pub const PROGRAM: &str =
    if cfg!(target_arch = "aarch64") { "qemu-system-aarch64" } else { "qemu-system-x86_64" };

/// Runs VMs with QEMU.
pub struct QemuEngine {
    setup: Setup,
    tsc_khz: Arc<OnceCell<Option<u64>>>,
}

/// The settings that all VMs of an engine are started with.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) program: PathBuf,
    pub(crate) accelerator: Accelerator,
    pub(crate) groups: Groups,
    /// What saved VMs depend on: if this value changes, they cannot be restored.
    pub(crate) depends_on: String,
}

impl QemuEngine {
    /// Creates an engine on `program`, a path or a name to look up, with the best accelerator
    /// that works on this host.
    #[must_use]
    pub fn new(program: PathBuf) -> Self {
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
            kind_of_program(&program),
            command_line::LAYOUT
        );
        let groups = if process::is_root() { Groups::of_host() } else { Groups::Unusable };
        let setup = Setup { program, accelerator, groups, depends_on };
        if process::is_root() && confine::user(&setup, process::USERS.start).is_none() {
            tracing::warn!(
                "QEMU runs as the daemon's user: the daemon lacks capabilities or user ids in its namespace, or only root may open /dev/kvm"
            );
        }
        Self { setup, tsc_khz: Arc::default() }
    }

    /// Measures the TSC's frequency now, so that the first boot need not wait for it.
    pub fn prepare(&self) -> impl Future<Output = ()> + Send + 'static {
        let tsc_khz = Arc::clone(&self.tsc_khz);
        async move {
            measured(&tsc_khz).await;
        }
    }
}

async fn measured(tsc_khz: &OnceCell<Option<u64>>) -> Option<u64> {
    let measure =
        || async { tokio::task::spawn_blocking(clock::tsc_khz).await.unwrap_or_default() };
    *tsc_khz.get_or_init(measure).await
}

#[async_trait]
impl Engine for QemuEngine {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "qemu",
            accelerator: Some(self.setup.accelerator),
            machine: self.setup.depends_on.clone(),
            exchanges_disks: true,
            saves_memory: true,
            shares_kernel: false,
            vmm_mib: command_line::vmm_mib(self.setup.accelerator),
        }
    }

    async fn boot(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, BootError> {
        let tsc_khz = measured(&self.tsc_khz).await;
        match vm::boot(spec, &self.setup, tsc_khz).await {
            Ok(vm) => Ok(Arc::new(vm)),
            Err(error) => {
                if spec.keep_disk {
                    self.kill(spec.id, &spec.directory).await.unwrap_or_else(|left| {
                        tracing::error!(sandbox = %spec.id, error = %left, "Failed to end a VM that did not boot");
                    });
                } else {
                    self.clean_up(spec.id, &spec.directory).await;
                }
                Err(error)
            }
        }
    }

    async fn stage(&self, spec: &RestoreSpec) -> Result<Box<dyn Staged>, RestoreError> {
        match restore::stage(spec, &self.setup).await {
            Ok(waiting) => Ok(Box::new(waiting)),
            Err(error) => {
                if spec.disks == bhatti_engine::Disks::Frozen {
                    self.clean_up(spec.id, &spec.directory).await;
                }
                Err(error)
            }
        }
    }

    async fn adopt(&self, id: SandboxId, directory: &Path) -> Result<Arc<dyn Vm>, AdoptError> {
        let process =
            self.find_process(id, directory).await.map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => AdoptError::Gone,
                _ => AdoptError::Broken { step: "search for the VM's process", source },
            })?;
        let attach = || {
            let machine = Record::read(directory)?.machine;
            QemuVm::attach(process, directory, machine, Qmp::new(), self.setup.depends_on.clone())
        };
        let vm = attach()
            .map_err(|source| AdoptError::Broken { step: "connect to the VM's console", source })?;
        if vm.waits_for_state().await {
            // The snapshot is still in its place; this process has not loaded it.
            self.kill(id, directory).await.map_err(|left| AdoptError::Broken {
                step: "end a VM that was being restored",
                source: io::Error::other(left),
            })?;
            return Err(AdoptError::Gone);
        }
        Ok(Arc::new(vm))
    }

    async fn kill(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError> {
        bhatti_vmm::kill(self.find_process(id, directory).await).await?;
        let name = bhatti_vmm::vm_name(id);
        if let Err(error) = cgroup::remove(&name).await {
            tracing::warn!(sandbox = %id, %error, "Failed to remove the control group of a VM that has ended");
        }
        Ok(())
    }

    async fn remove(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError> {
        self.kill(id, directory).await?;
        bhatti_vmm::remove(directory).await
    }
}

impl QemuEngine {
    async fn clean_up(&self, id: SandboxId, directory: &Path) {
        if let Err(left) = self.remove(id, directory).await {
            tracing::error!(sandbox = %id, error = %left, "Failed to clean up after a VM that did not start");
        }
    }

    /// Finds the VMM process of a sandbox.
    async fn find_process(&self, id: SandboxId, directory: &Path) -> io::Result<Followed> {
        bhatti_vmm::find(directory, &self.setup.program, &bhatti_vmm::vm_name(id)).await
    }
}

/// Returns the path of a program, with all links resolved.
fn locate(program: &Path) -> Option<PathBuf> {
    const PLACES: [&str; 6] =
        ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let places = PLACES.iter().map(|place| Path::new(place).join(program));
    places.filter_map(|path| fs::canonicalize(path).ok()).find(|path| path.is_file())
}

/// Returns a text that differs between builds of a program, without running it.
fn kind_of_program(program: &Path) -> String {
    locate(program).and_then(|path| fs::metadata(path).ok()).map_or_else(
        || "unknown".to_owned(),
        |file| format!("{} bytes of {}", file.len(), file.mtime()),
    )
}
