//! The engine for VMMs that are processes.

use std::io;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bhatti_engine::{
    AdoptError, BootError, Capabilities, Disks, Engine, RemoveError, RestoreError, RestoreSpec,
    Staged, Vm, VmSpec,
};
use bhatti_host::process::Followed;
use bhatti_types::SandboxId;
use tokio::task::spawn_blocking;

use crate::record::{Record, recorded_machine};
use crate::vmm::{Running, VmState, Vmm};
use crate::{boot, process, restore};

/// Runs VMs with one VMM, each in a process of its own that outlives the daemon.
pub struct ProcessEngine<V> {
    vmm: Arc<V>,
}

impl<V: Vmm> ProcessEngine<V> {
    /// Creates an engine.
    pub fn of(vmm: V) -> Self {
        Self { vmm: Arc::new(vmm) }
    }

    /// Returns the VMM.
    pub const fn vmm(&self) -> &Arc<V> {
        &self.vmm
    }

    /// Finds the VMM process of a sandbox.
    async fn find_process(&self, id: SandboxId, directory: &Path) -> io::Result<Followed> {
        let name = process::vm_name(id);
        let mut found = Err(io::ErrorKind::NotFound.into());
        for program in self.vmm.programs() {
            found = process::find(directory, &program, &name).await;
            if !matches!(&found, Err(error) if error.kind() == io::ErrorKind::NotFound) {
                break;
            }
        }
        found
    }

    /// Ends a VM that did not start, and removes it unless its files were there before.
    async fn undo(&self, id: SandboxId, directory: &Path, keeps_files: bool) {
        let undone = if keeps_files {
            self.kill(id, directory).await
        } else {
            self.remove(id, directory).await
        };
        if let Err(left) = undone {
            tracing::error!(sandbox = %id, error = %left, "Failed to clean up after a VM that did not start");
        }
    }
}

#[async_trait]
impl<V: Vmm> Engine for ProcessEngine<V> {
    fn capabilities(&self) -> Capabilities {
        self.vmm.capabilities()
    }

    async fn boot(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, BootError> {
        match boot::boot(&self.vmm, spec).await {
            Ok(vm) => Ok(Arc::new(vm)),
            Err(error) => {
                self.undo(spec.id, &spec.directory, spec.root_base.is_none()).await;
                Err(error)
            }
        }
    }

    async fn stage(&self, spec: &RestoreSpec) -> Result<Box<dyn Staged>, RestoreError> {
        match restore::stage(&self.vmm, spec).await {
            Ok(staged) => Ok(Box::new(staged)),
            Err(error) => {
                self.undo(spec.id, &spec.directory, spec.disks == Disks::InPlace).await;
                Err(error)
            }
        }
    }

    async fn adopt(&self, id: SandboxId, directory: &Path) -> Result<Arc<dyn Vm>, AdoptError> {
        let broken = |step| move |source| AdoptError::Broken { step, source };
        let process =
            self.find_process(id, directory).await.map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => AdoptError::Gone,
                _ => broken("search for the VM's process")(source),
            })?;
        let (vmm, own) = (Arc::clone(&self.vmm), directory.to_owned());
        let attached = spawn_blocking(move || {
            let record = Record::new(&own, process.id(), recorded_machine(&own)?);
            Running::attach(vmm, id, process, record)
        });
        let attached = attached.await.map_err(io::Error::other).and_then(|attached| attached);
        let vm = attached.map_err(broken("open the VM's console"))?;
        if self.vmm.state(&vm).await.is_ok_and(|state| state == VmState::Waiting) {
            // The snapshot is still in its place; this process has not loaded it.
            let ended = self.kill(id, directory).await.map_err(io::Error::other);
            ended.map_err(broken("end a VM that was being restored"))?;
            return Err(AdoptError::Gone);
        }
        Ok(Arc::new(vm))
    }

    async fn kill(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError> {
        process::kill(self.find_process(id, directory).await).await?;
        let failed = |source| RemoveError::Files { path: directory.to_owned(), source };
        self.vmm.clean_up(id, directory).await.map_err(failed)
    }

    async fn remove(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError> {
        self.kill(id, directory).await?;
        process::remove(directory).await
    }
}
