//! The engine on QEMU's `microvm` machine.
//!
//! ```text
//!  <sandbox directory>/
//!    root.qcow2      the root disk: an overlay over the image
//!    agent.sock      the agent channel, multiplexed (bhatti_proto::mux)
//!    console.sock    the guest's console
//!    qmp.sock        QEMU's monitor
//!    vm.json         which process it is, and what it was started with
//!    vmm.log         what QEMU itself has to say
//! ```
//!
//! The sockets are made before QEMU starts and handed to it, so there is nothing to wait for until the guest speaks. QEMU runs in a
//! session of its own and outlives the daemon. The guest's console goes to a socket, not a file: a hostile guest could fill the disk.

mod channel;
mod command_line;
mod console;
mod overlay;
mod record;
mod vm;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{
    Accelerator, AdoptError, BootError, Capabilities, Engine, RemoveError, Vm, VmSpec,
};
use bhatti_host::process::Followed;
use bhatti_host::{clock, kvm};
use bhatti_types::SandboxId;
use tokio::sync::OnceCell;
use tokio::time::timeout;

pub use overlay::{OverlayError, create as create_overlay};

use command_line::Command;
use record::Record;
use vm::QemuVm;

/// QEMU's program for this architecture.
pub const PROGRAM: &str =
    if cfg!(target_arch = "aarch64") { "qemu-system-aarch64" } else { "qemu-system-x86_64" };

/// How long a killed VMM may take to disappear.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Runs VMs with QEMU.
pub struct QemuEngine {
    program: PathBuf,
    accelerator: Accelerator,
    tsc_khz: Arc<OnceCell<Option<u64>>>,
}

impl QemuEngine {
    /// An engine on `program`, a path or a name to look up, with the best accelerator that works here.
    #[must_use]
    pub fn new(program: PathBuf) -> Self {
        let accelerator = if kvm::check().is_ok() { Accelerator::Kvm } else { Accelerator::Tcg };
        Self { program, accelerator, tsc_khz: Arc::default() }
    }

    /// Measures now what the first boot would otherwise wait for.
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
        Capabilities { name: "qemu", accelerator: self.accelerator }
    }

    async fn boot(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, BootError> {
        let tsc_khz = measured(&self.tsc_khz).await;
        let command = Command { program: &self.program, accelerator: self.accelerator, tsc_khz };
        match QemuVm::boot(spec, &command).await {
            Ok(vm) => Ok(Arc::new(vm)),
            Err(error) => {
                if let Err(left) = self.remove(spec.id, &spec.directory).await {
                    tracing::error!(sandbox = %spec.id, error = %left, "Failed to clean up after a failed boot");
                }
                Err(error)
            }
        }
    }

    async fn adopt(&self, id: SandboxId, directory: &Path) -> Result<Arc<dyn Vm>, AdoptError> {
        let process = self.find_process(id, directory).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => AdoptError::Gone,
            _ => AdoptError::Broken { step: "look for the VM's process", source },
        })?;
        let vm = QemuVm::attach(process, directory);
        Ok(Arc::new(vm.map_err(|source| AdoptError::Broken {
            step: "connect to the VM's console",
            source,
        })?))
    }

    async fn remove(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError> {
        if let Ok(process) = self.find_process(id, directory) {
            process.kill();
            let pid = process.id().pid;
            timeout(KILL_LIMIT, process.ended())
                .await
                .map_err(|_| RemoveError::Unkillable { pid })?;
        }
        match tokio::fs::remove_dir_all(directory).await {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(RemoveError::Files { path: directory.to_owned(), source })
            }
            _ => Ok(()),
        }
    }
}

impl QemuEngine {
    /// The VMM process of a sandbox: the one on record, or, if the daemon died before it could write the record, the one that carries
    /// the sandbox's name.
    fn find_process(&self, id: SandboxId, directory: &Path) -> io::Result<Followed> {
        match Record::read(directory) {
            Ok(record) => Followed::adopt(record.process()),
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::InvalidData
                        | io::ErrorKind::UnexpectedEof
                ) =>
            {
                Err(error)
            }
            // Without a directory there never was a process.
            Err(_) if !directory.exists() => Err(io::ErrorKind::NotFound.into()),
            Err(_) => {
                let program = self.program.file_name().unwrap_or_default().to_string_lossy();
                Followed::find_by_argument(&program, &command_line::vm_name(id))
            }
        }
    }
}
