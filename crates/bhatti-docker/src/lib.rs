//! The Docker engine: each sandbox is a container instead of a VM, for hosts with Docker where
//! emulation is not wanted.
//!
//! ```text
//!  <sandbox directory>/
//!    agent/          shared with the container: the agent's two sockets
//!    mounts/<n>/     the volume in place <n>, mounted here while the container runs
//!  container `bhatti-<id>`, with its root disk, which Docker keeps
//!  image `bhatti-root:<hash>`, imported from an image's root file system
//! ```
//!
//! **The isolation is weaker than a VM's**: sandboxes share the host's kernel, and a guest that
//! breaks the kernel controls the host. The engine takes from containers: all capabilities except
//! those in `container.rs`, new privileges by setuid programs, the host's network (a container has
//! only the card that this engine gives it), swap, and more processes than a sandbox needs.
//! Docker's seccomp filter applies. A sandbox in which an image is built has a wider filter,
//! because Buildah needs user namespaces.
//!
//! A container can be paused, but its memory cannot be saved: it has no snapshots and no forks, and
//! a stop ends its processes.

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

/// The default path of Docker's socket.
pub const SOCKET: &str = "/var/run/docker.sock";

/// Time limit of Docker's responses, in seconds: Docker imports whole root file systems.
const ANSWER_LIMIT_SEC: u64 = 300;

/// Docker cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// Docker does not listen on the socket.
    #[error("Docker does not listen at `{}`", socket.display())]
    NotThere {
        /// The path of the socket.
        socket: PathBuf,
    },
    /// Docker does not answer.
    #[error("Docker at `{}` does not answer", socket.display())]
    Silent {
        /// The path of the socket.
        socket: PathBuf,
        /// The error of the request.
        #[source]
        source: bollard::errors::Error,
    },
}

/// The Docker daemon of this host.
#[derive(Clone, Debug)]
pub struct Found {
    docker: Docker,
    /// Docker's version.
    pub version: String,
}

/// Connects to Docker at `socket`.
///
/// # Errors
///
/// Returns why Docker cannot be used.
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
    /// The guest agent's program, which containers run.
    lohar: PathBuf,
    roots: root::Roots,
}

impl DockerEngine {
    /// Returns an engine on the Docker daemon `found`. `lohar` is the absolute path of the guest
    /// agent's program.
    #[must_use]
    pub fn new(found: Found, lohar: PathBuf) -> Self {
        Self { docker: found.docker, lohar, roots: root::Roots::default() }
    }

    /// Removes Docker images of root file systems that no longer exist.
    pub fn prepare(&self) -> impl Future<Output = ()> + Send + use<> {
        root::remove_orphans(self.docker.clone())
    }
}

/// Converts Docker's error.
pub(crate) fn io_error(error: bollard::errors::Error) -> io::Error {
    io::Error::other(error)
}

pub(crate) fn vmm_error(error: bollard::errors::Error) -> VmmError {
    match error {
        bollard::errors::Error::DockerResponseServerError { message, .. } => {
            VmmError::Refused(message)
        }
        error => VmmError::Unreachable(io_error(error)),
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
            replaces_root: false,
            saves_memory: false,
            shares_kernel: true,
            vmm_mib: 48,
        }
    }

    async fn boot(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>, BootError> {
        match vm::boot(spec, &self.docker, &self.lohar, &self.roots).await {
            Ok(vm) => Ok(Arc::new(vm)),
            Err(error) => {
                let cleaned = if spec.root_base.is_none() {
                    self.kill(spec.id, &spec.directory).await
                } else {
                    self.remove(spec.id, &spec.directory).await
                };
                cleaned.unwrap_or_else(|left| {
                    tracing::error!(sandbox = %spec.id, error = %left, "Failed to clean up after a failed boot of a container");
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

/// Why this engine has no snapshots.
pub(crate) const NO_SNAPSHOTS: &str = "the memory of a container cannot be saved";
