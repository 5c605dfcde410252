//! Creating a sandbox.

use std::sync::Arc;
use std::time::Duration;

use bhatti_agent::{AgentClient, CallError};
use bhatti_engine::{BootError, Vm, VmSpec};
use bhatti_image::{BootFiles, DEFAULT_IMAGE};
use bhatti_proto::GuestConfig;
use bhatti_store::{InsertError, SandboxRow, StoreError};
use bhatti_types::{
    CpuCount, Environment, MemoryMib, ParseNameError, Report, SandboxId, SandboxName, SandboxSpec,
    SandboxState, UserId,
};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};
use tracing::{error, info};

use crate::driver::{Driver, directory};
use crate::{Shared, Supervisor};

/// How long a guest that has booted may take to be configured.
const CONFIGURE_LIMIT: Duration = Duration::from_secs(10);

/// What a sandbox is asked to be. What is left out is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxRequest {
    /// Its name; `sandbox-` and six hex digits if absent.
    pub name: Option<SandboxName>,
    /// Its vCPUs; one if absent.
    pub cpus: Option<CpuCount>,
    /// Its memory; 512 MiB if absent.
    pub memory: Option<MemoryMib>,
    /// The environment of its processes.
    pub environment: Environment,
}

/// A sandbox could not be created. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Its owner has one of that name.
    #[error("sandbox `{0}` already exists")]
    NameTaken(SandboxName),
    /// What it boots from is not there.
    #[error(transparent)]
    Images(#[from] bhatti_image::StoreError),
    /// Its VM did not boot.
    #[error("failed to boot the sandbox")]
    Boot(#[from] BootError),
    /// Its guest did not take its configuration.
    #[error("failed to configure the sandbox's guest")]
    Unconfigured(#[source] CallError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// This host gives no random bytes.
    #[error("failed to draw an id")]
    Entropy,
    /// A name could not be made up.
    #[error(transparent)]
    Name(#[from] ParseNameError),
    /// The daemon is going down.
    #[error("the daemon stopped before the sandbox was up")]
    Interrupted,
}

impl From<InsertError> for CreateError {
    fn from(error: InsertError) -> Self {
        match error {
            InsertError::NameTaken(name) => Self::NameTaken(name),
            InsertError::Store(error) => Self::Store(error),
        }
    }
}

impl Supervisor {
    /// Creates a sandbox and waits until commands can be run in it.
    ///
    /// # Errors
    ///
    /// Returns the step that failed; nothing of the sandbox is left then.
    ///
    /// # Cancel safety
    ///
    /// A creation that has begun goes on.
    pub async fn create(
        &self,
        owner: UserId,
        request: SandboxRequest,
    ) -> Result<SandboxRow, CreateError> {
        let shared = &self.shared;
        // Before there is a row: what is not set up at all needs none.
        let files = boot_files(shared).await?;
        let entropy = entropy()?;
        let id = SandboxId::from_entropy(entropy);
        let name = match request.name {
            Some(name) => name,
            None => {
                format!("sandbox-{:02x}{:02x}{:02x}", entropy[0], entropy[1], entropy[2]).parse()?
            }
        };
        let spec = SandboxSpec {
            name,
            cpus: request.cpus.unwrap_or(CpuCount::ONE),
            memory: request.memory.unwrap_or(MemoryMib::DEFAULT),
            environment: request.environment,
        };
        let row = shared.store.insert_sandbox(id, owner, spec)?;
        let driver = Driver::register(shared, id, SandboxState::Creating, None);
        let (reply, created) = oneshot::channel();
        let shared = Arc::clone(shared);
        // In a task of its own: the caller may go away, the sandbox is to be up or gone all the same.
        tokio::spawn(async move {
            match boot(&shared, &driver, &row, &files).await {
                Ok(()) => {
                    drop(reply.send(Ok(SandboxRow { state: SandboxState::Running, ..row })));
                    driver.run().await;
                }
                Err(error) => {
                    if let Err(error) = driver.abandon() {
                        error!(sandbox = %id, error = %Report(&error), "Failed to forget a sandbox that did not boot");
                    }
                    drop(reply.send(Err(error)));
                }
            }
        });
        created.await.map_err(|_| CreateError::Interrupted)?
    }
}

async fn boot_files(shared: &Arc<Shared>) -> Result<BootFiles, CreateError> {
    let shared = Arc::clone(shared);
    let found = tokio::task::spawn_blocking(move || {
        shared.config.images.boot_files(DEFAULT_IMAGE, &shared.config.lohar)
    });
    Ok(found.await.map_err(|_| CreateError::Interrupted)??)
}

async fn boot(
    shared: &Arc<Shared>,
    driver: &Driver,
    row: &SandboxRow,
    files: &BootFiles,
) -> Result<(), CreateError> {
    let began = Instant::now();
    let vm_spec = VmSpec {
        id: row.id,
        hostname: row.spec.name.clone(),
        cpus: row.spec.cpus,
        memory: row.spec.memory,
        directory: directory(shared, row.id),
        kernel: files.kernel.clone(),
        initramfs: files.initramfs.clone(),
        root_base: files.root.clone(),
        boot_limit: shared.config.boot_limit,
    };
    let vm = shared.engine.boot(&vm_spec).await?;
    if let Err(error) = settle(driver, row, vm).await {
        shared.engine.remove(row.id, &vm_spec.directory).await.unwrap_or_else(|left| {
            error!(sandbox = %row.id, error = %Report(&left), "Failed to remove a sandbox that could not be recorded");
        });
        return Err(error);
    }
    let boot_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    info!(sandbox = %row.id, name = %row.spec.name, boot_ms, "Sandbox booted");
    Ok(())
}

/// Makes a guest that has booted this sandbox's own.
async fn settle(driver: &Driver, row: &SandboxRow, vm: Arc<dyn Vm>) -> Result<(), CreateError> {
    let config = GuestConfig {
        sandbox_id: row.id.to_string(),
        hostname: row.spec.name.to_string(),
        env: row.spec.environment.as_map().clone(),
        ..GuestConfig::default()
    };
    let agent = AgentClient::new(vm.channel());
    let configured = timeout(CONFIGURE_LIMIT, agent.configure(&config)).await;
    configured
        .map_err(|_| CreateError::Unconfigured(CallError::Lost))?
        .map_err(CreateError::Unconfigured)?;
    Ok(driver.running(vm)?)
}

fn entropy() -> Result<[u8; 8], CreateError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|_| CreateError::Entropy)?;
    Ok(bytes)
}
