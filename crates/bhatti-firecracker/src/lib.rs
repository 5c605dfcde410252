//! The engine on Firecracker.
//!
//! ```text
//!  <sandbox directory>/
//!    disk.ext4       the root disk
//!    memory-*.img    the file that the memory of a restored or forked VM is a private mapping of
//!    snapshot/       the snapshot of a cold VM: see `manifest`
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
mod capture;
mod jail;
mod machine;
mod manifest;
mod memory;
mod operations;
mod restore;
mod version;
mod vm;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bhatti_engine::{
    Accelerator, AdoptError, BootError, Capabilities, Disks, Engine, RemoveError, RestoreError,
    RestoreSpec, Staged, Vm, VmSpec,
};
use bhatti_host::process::Followed;
use bhatti_host::processor;
use bhatti_types::SandboxId;
use bhatti_vmm::cgroup::Groups;

use api::State;
use machine::Record;
use vm::FirecrackerVm;

pub use version::{Found, MINIMUM, Unusable, Version, check};

/// Firecracker's program.
pub const PROGRAM: &str = "firecracker";
/// The program that starts Firecracker as another user.
pub const JAILER: &str = "jailer";

/// Runs VMs with Firecracker.
pub struct FirecrackerEngine {
    setup: Setup,
}

/// The settings that all VMs of an engine are started with.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) program: PathBuf,
    /// The jailer that starts Firecracker, if this daemon is root.
    pub(crate) jailer: Option<PathBuf>,
    pub(crate) groups: Groups,
    /// What saved VMs depend on: if this value changes, they cannot be restored.
    pub(crate) depends_on: String,
}

impl FirecrackerEngine {
    /// Creates an engine on a checked Firecracker.
    #[must_use]
    pub fn new(found: Found) -> Self {
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
            kind_of_program(&program),
            machine::LAYOUT,
            // A guest sees this host's own processor.
            processor::identity()
        );
        Self { setup: Setup { program, jailer, groups, depends_on } }
    }

    /// Finds the VMM process of a sandbox.
    async fn find_process(&self, id: SandboxId, directory: &Path) -> io::Result<Followed> {
        let name = bhatti_vmm::vm_name(id);
        let found = bhatti_vmm::find(directory, &self.setup.program, &name).await;
        match (found, &self.setup.jailer) {
            // The process is the jailer until the jailer starts Firecracker.
            (Err(error), Some(jailer)) if error.kind() == io::ErrorKind::NotFound => {
                bhatti_vmm::find(directory, jailer, &name).await
            }
            (found, _) => found,
        }
    }

    /// Ends a VM that did not start. Its disk and its snapshot stay.
    async fn end(&self, id: SandboxId, directory: &Path) {
        if let Err(left) = self.kill(id, directory).await {
            tracing::error!(sandbox = %id, error = %left, "Failed to end a VM that did not start");
        }
    }

    async fn clean_up(&self, id: SandboxId, directory: &Path) {
        if let Err(left) = self.remove(id, directory).await {
            tracing::error!(sandbox = %id, error = %left, "Failed to clean up after a VM that did not start");
        }
    }
}

#[async_trait]
impl Engine for FirecrackerEngine {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "firecracker",
            accelerator: Some(Accelerator::Kvm),
            machine: self.setup.depends_on.clone(),
            exchanges_disks: false,
            saves_memory: true,
            shares_kernel: false,
            vmm_mib: 48,
        }
    }

    async fn boot(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, BootError> {
        match vm::boot(spec, &self.setup).await {
            Ok(vm) => Ok(Arc::new(vm)),
            Err(error) => {
                if spec.keep_disk {
                    self.end(spec.id, &spec.directory).await;
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
                match spec.disks {
                    Disks::Frozen => self.clean_up(spec.id, &spec.directory).await,
                    Disks::InPlace => self.end(spec.id, &spec.directory).await,
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
            FirecrackerVm::attach(process, directory, machine, self.setup.depends_on.clone())
        };
        let broken = |step| move |source| AdoptError::Broken { step, source };
        let vm = attach().map_err(broken("open the VM's console"))?;
        let instance = vm.api.instance().await;
        if instance.is_ok_and(|instance| instance.state == State::NotStarted) {
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
        let failed = |source| RemoveError::Files { path: jail::root(directory), source };
        jail::clear(id, directory).await.map_err(failed)
    }

    async fn remove(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError> {
        self.kill(id, directory).await?;
        bhatti_vmm::remove(directory).await
    }
}

/// Returns a text that differs between builds of a program, without running it.
fn kind_of_program(program: &Path) -> String {
    fs::metadata(program).map_or_else(
        |_| "unknown".to_owned(),
        |file| format!("{} bytes of {}", file.len(), file.mtime()),
    )
}
