//! The engine on Docker: a container in the place of a VM, for hosts that have Docker and no wish for emulation.
//!
//! ```text
//!  <sandbox directory>/
//!    agent/          shared with the container: the agent's two sockets
//!    mounts/<n>/     the volume in place <n>, mounted here for as long as the container runs
//!  container `bhatti-<id>`, with its root disk, which Docker keeps
//!  image `bhatti-root:<hash>`, imported from an image's root file system
//! ```
//!
//! **The isolation is weaker than a VM's**: sandboxes share the host's kernel, and whoever breaks that has the host. What can be taken from
//! them is: all capabilities but those that changing users and files takes, new privileges by setuid programs, the host's network (a
//! container has none but the card that this engine gives it), swap, and more processes than a sandbox needs; Docker's seccomp filter holds.
//!
//! A container's memory can be paused and not saved: it has no snapshots and no forks, and its processes end with it.

mod cgroup;
mod channel;
mod container;
mod link;
mod mounts;
mod root;
mod tree;
mod vm;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bhatti_engine::{
    AdoptError, BootError, Capabilities, Engine, RemoveError, RestoreError, RestoreSpec, Staged,
    Vm, VmSpec, VmmError,
};
use bhatti_types::SandboxId;
use bollard::{API_DEFAULT_VERSION, Docker};

use vm::DockerVm;

/// Where Docker listens unless told otherwise.
pub const SOCKET: &str = "/var/run/docker.sock";

/// How long Docker may take to answer, in seconds: it imports whole root file systems.
const ANSWER_LIMIT_SEC: u64 = 300;

/// Docker cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// Nobody listens.
    #[error("Docker does not listen at `{}`", socket.display())]
    NotThere {
        /// Where it was looked for.
        socket: PathBuf,
    },
    /// It does not answer.
    #[error("Docker at `{}` does not answer", socket.display())]
    Silent {
        /// Where it listens.
        socket: PathBuf,
        /// Why.
        #[source]
        source: bollard::errors::Error,
    },
}

/// Docker as it is here.
#[derive(Clone, Debug)]
pub struct Found {
    docker: Docker,
    /// Its version.
    pub version: String,
}

/// Looks for Docker at `socket`.
///
/// # Errors
///
/// Returns why it cannot be used.
pub async fn check(socket: &Path) -> Result<Found, Unusable> {
    let path = socket.to_string_lossy();
    let docker = Docker::connect_with_socket(&path, ANSWER_LIMIT_SEC, API_DEFAULT_VERSION)
        .map_err(|_| Unusable::NotThere { socket: socket.to_owned() })?;
    let silent = |source| Unusable::Silent { socket: socket.to_owned(), source };
    let docker = docker.negotiate_version().await.map_err(silent)?;
    let version = docker.version().await.map_err(silent)?.version.unwrap_or_default();
    Ok(Found { docker, version })
}

/// Runs containers with Docker.
pub struct DockerEngine {
    docker: Docker,
    /// The agent: containers run it from here.
    lohar: PathBuf,
    roots: root::Roots,
}

impl DockerEngine {
    /// An engine on Docker as it was found. `lohar` is the agent's program, absolute.
    #[must_use]
    pub fn new(found: Found, lohar: PathBuf) -> Self {
        Self { docker: found.docker, lohar, roots: root::Roots::default() }
    }

    /// Removes the root file systems whose images are gone.
    pub fn prepare(&self) -> impl Future<Output = ()> + Send + use<> {
        root::remove_orphans(self.docker.clone())
    }
}

/// The error that comes in the place of Docker's.
pub(crate) fn told(error: bollard::errors::Error) -> io::Error {
    io::Error::other(error)
}

pub(crate) fn vmm_error(error: bollard::errors::Error) -> VmmError {
    match error {
        bollard::errors::Error::DockerResponseServerError { message, .. } => {
            VmmError::Refused(message)
        }
        error => VmmError::Unreachable(told(error)),
    }
}

#[async_trait]
impl Engine for DockerEngine {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "docker",
            accelerator: None,
            machine: format!("{} container", std::env::consts::ARCH),
            exchanges_disks: false,
            saves_memory: false,
            shares_kernel: true,
            vmm_mib: 48,
        }
    }

    async fn boot(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, BootError> {
        match vm::boot(spec, &self.docker, &self.lohar, &self.roots).await {
            Ok(vm) => Ok(Arc::new(vm)),
            Err(error) => {
                let cleaned = if spec.keep_disk {
                    self.kill(spec.id, &spec.directory).await
                } else {
                    self.remove(spec.id, &spec.directory).await
                };
                cleaned.unwrap_or_else(|left| {
                    tracing::error!(sandbox = %spec.id, error = %left, "Failed to clean up after a container that did not come up");
                });
                Err(error)
            }
        }
    }

    async fn prepare_root(&self, root_base: &Path) -> Result<(), BootError> {
        let imported = self.roots.image(&self.docker, root_base).await;
        imported.map(drop).map_err(|source| BootError::Prepare { step: root::IMPORT, source })
    }

    async fn stage(&self, _spec: &RestoreSpec) -> Result<Box<dyn Staged>, RestoreError> {
        Err(RestoreError::Unsupported(NO_SNAPSHOTS))
    }

    async fn adopt(&self, id: SandboxId, directory: &Path) -> Result<Arc<dyn Vm>, AdoptError> {
        let process = container::follow(&self.docker, id).await;
        let broken =
            |source| AdoptError::Broken { step: "look for the container's process", source };
        let process = process.map_err(broken)?.ok_or(AdoptError::Gone)?;
        Ok(Arc::new(DockerVm::attach(&self.docker, id, process, directory)))
    }

    async fn kill(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError> {
        let process = |source| RemoveError::Process { source };
        let tap = container::kill(&self.docker, id).await.map_err(process)?;
        if let Some(tap) = tap {
            link::remove(&tap).await.map_err(process)?;
        }
        mounts::remove(directory).await
    }

    async fn remove(&self, id: SandboxId, directory: &Path) -> Result<(), RemoveError> {
        self.kill(id, directory).await?;
        let removed = container::remove(&self.docker, id).await;
        removed.map_err(|source| RemoveError::Process { source })?;
        bhatti_vmm::remove(directory).await
    }
}

/// Why there are none.
pub(crate) const NO_SNAPSHOTS: &str = "the memory of a container cannot be saved";
