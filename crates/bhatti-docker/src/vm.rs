//! A running container in place of a VM.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bhatti_engine::{
    AgentChannel, BootError, Captured, SnapshotError, SnapshotRequest, Vm, VmSpec, VmmError,
};
use bhatti_host::blocking;
use bhatti_host::process::{Followed, Usage};
use bhatti_proto::CONTROL_PORT;
use bhatti_types::SandboxId;
use bhatti_vmm::{Console, create_private};
use bollard::Docker;
use bollard::query_parameters::LogsOptionsBuilder;
use futures_util::TryStreamExt;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::io::StreamReader;

use crate::channel::{self, SharedChannel};
use crate::root::{self, Roots};
use crate::{NO_SNAPSHOTS, cgroup, container, io_error, link, mounts, vmm_error};

/// The pause between attempts to connect to the agent of a starting container.
const LOOK_PAUSE: Duration = Duration::from_millis(2);

/// A running container.
pub(crate) struct DockerVm {
    docker: Docker,
    id: SandboxId,
    process: Followed,
    channel: Arc<SharedChannel>,
    console: Console,
}

/// Creates or starts a container, and waits until its agent listens. If that fails, everything that
/// was made stays, and the caller removes it.
pub(crate) async fn boot(
    spec: &VmSpec,
    docker: &Docker,
    lohar: &Path,
    roots: &Roots,
) -> Result<DockerVm, BootError> {
    let failed = |step| move |source| BootError::Prepare { step, source };
    let directory = &spec.directory;
    create_private(directory).map_err(failed("create the sandbox's directory"))?;
    let shared = directory.join(channel::DIRECTORY);
    let made = blocking(|| create_private(&shared));
    made.map_err(failed("create the agent's directory"))?;
    mounts::make(directory, &spec.volumes).await.map_err(failed("mount the volumes"))?;
    if let Some(root_base) = &spec.root_base {
        let image = roots.image(docker, root_base).await;
        let image = image.map_err(failed(root::IMPORT))?;
        container::create(docker, spec, root_base, image, lohar).await?;
    } else if container::find(docker, spec.id)
        .await
        .map_err(failed("look for the container"))?
        .is_none()
    {
        return Err(BootError::NoDisk);
    }
    container::start(docker, spec.id).await.map_err(failed("start the container"))?;
    let process = container::follow(docker, spec.id).await;
    let Some(process) = process.map_err(failed("follow the container's process"))? else {
        let console = read_console(docker, spec.id);
        console.complete().await;
        return Err(BootError::Ended { console: console.tail() });
    };
    let vm = DockerVm::attach(docker, spec.id, process, directory);
    if let Some(tap) = &spec.tap {
        let made = link::make(tap, vm.process.id().pid).await;
        made.map_err(failed("make the network card"))?;
    }
    vm.wait_for_agent(spec.boot_limit).await?;
    Ok(vm)
}

impl DockerVm {
    /// Adopts the container whose first process is `process`.
    pub(crate) fn attach(
        docker: &Docker,
        id: SandboxId,
        process: Followed,
        directory: &Path,
    ) -> Self {
        Self {
            docker: docker.clone(),
            id,
            process,
            channel: Arc::new(SharedChannel { directory: directory.join(channel::DIRECTORY) }),
            console: read_console(docker, id),
        }
    }

    async fn wait_for_agent(&self, limit: Duration) -> Result<(), BootError> {
        let began = Instant::now();
        loop {
            let left = limit.saturating_sub(began.elapsed());
            let opened = tokio::select! {
                opened = timeout(left, self.channel.open(CONTROL_PORT)) => opened,
                () = self.process.ended() => {
                    self.console.complete().await;
                    return Err(BootError::Ended { console: self.console.tail() });
                }
            };
            match opened {
                Ok(Ok(_stream)) => return Ok(()),
                // The agent does not listen yet.
                Ok(Err(_)) if !left.is_zero() => sleep(LOOK_PAUSE).await,
                _ => return Err(BootError::TimedOut { limit, console: self.console.tail() }),
            }
        }
    }

    async fn is_paused(&self) -> Result<bool, VmmError> {
        let container = container::find(&self.docker, self.id).await?;
        let gone = || VmmError::Refused("the container no longer runs".to_owned());
        let running = container.filter(|container| container.runs).ok_or_else(gone)?;
        Ok(running.is_paused)
    }
}

fn read_console(docker: &Docker, id: SandboxId) -> Console {
    let all = LogsOptionsBuilder::new().follow(true).stdout(true).stderr(true).build();
    let logs = docker.logs(&container::name(id), Some(all));
    let logs = logs.map_ok(bollard::container::LogOutput::into_bytes).map_err(io_error);
    Console::read(StreamReader::new(Box::pin(logs)))
}

#[async_trait]
impl Vm for DockerVm {
    fn channel(&self) -> Arc<dyn AgentChannel> {
        Arc::clone(&self.channel) as Arc<dyn AgentChannel>
    }

    async fn is_running(&self) -> Result<bool, VmmError> {
        Ok(!self.is_paused().await?)
    }

    async fn pause(&self) -> Result<(), VmmError> {
        if self.is_paused().await? {
            return Ok(());
        }
        self.docker.pause_container(&container::name(self.id)).await.map_err(vmm_error)
    }

    async fn resume(&self) -> Result<(), VmmError> {
        if !self.is_paused().await? {
            return Ok(());
        }
        self.docker.unpause_container(&container::name(self.id)).await.map_err(vmm_error)
    }

    async fn capture(
        &self,
        _request: &SnapshotRequest,
    ) -> Result<Box<dyn Captured>, SnapshotError> {
        Err(SnapshotError::Unsupported(NO_SNAPSHOTS))
    }

    async fn ended(&self) {
        self.process.ended().await;
    }

    fn usage(&self) -> io::Result<Usage> {
        cgroup::usage(self.process.id().pid)
    }

    fn console_tail(&self) -> String {
        self.console.tail()
    }
}
