//! Policy: what happens to sandboxes, and when.
//!
//! Each sandbox has one driver task, which alone changes its state; everybody else sends it requests and watches what it publishes.
//! The row in the store is written before the effect that it announces, so a daemon that dies at any point leaves a row from which the
//! next one knows what to do: see [`Supervisor::recover`].

mod create;
mod driver;
mod recover;
mod registry;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bhatti_agent::{AgentClient, CallError, ExecInput, ExecOutput};
use bhatti_engine::{Capabilities, Engine};
use bhatti_image::ImageStore;
use bhatti_proto::ExecRequest;
use bhatti_store::{SandboxRow, Store, StoreError};
use bhatti_types::{Denied, SandboxId, UserId};

pub use create::{CreateError, SandboxRequest};
pub use driver::DestroyError;
pub use recover::RecoverError;

use registry::Registry;

/// How long a guest may take to start a command.
const START_LIMIT: Duration = Duration::from_secs(15);

/// What a supervisor works with.
pub struct Config {
    /// Where the sandboxes' directories are.
    pub sandboxes_dir: PathBuf,
    /// The artefacts that VMs boot from.
    pub images: ImageStore,
    /// The guest agent's program.
    pub lohar: PathBuf,
    /// How long a VM may take to boot.
    pub boot_limit: Duration,
}

/// Creates, runs and destroys sandboxes.
#[derive(Clone)]
pub struct Supervisor {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) store: Arc<Store>,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) registry: Registry,
}

/// A sandbox could not be used.
#[derive(Debug, thiserror::Error)]
pub enum UseError {
    /// Its owner has no such sandbox.
    #[error("sandbox `{0}` not found")]
    NotFound(String),
    /// It is in no state for that.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The command failed.
    #[error(transparent)]
    Exec(#[from] CallError),
    /// It could not be destroyed.
    #[error(transparent)]
    Destroy(#[from] DestroyError),
}

impl Supervisor {
    /// A supervisor that knows no sandbox yet: see [`recover`](Self::recover).
    #[must_use]
    pub fn new(config: Config, store: Arc<Store>, engine: Arc<dyn Engine>) -> Self {
        Self { shared: Arc::new(Shared { config, store, engine, registry: Registry::default() }) }
    }

    /// What the engine can do.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.shared.engine.capabilities()
    }

    /// The sandbox that `owner` calls so.
    ///
    /// # Errors
    ///
    /// Returns [`UseError::NotFound`] if there is none.
    pub fn find(&self, owner: UserId, id_or_name: &str) -> Result<SandboxRow, UseError> {
        let row = self.shared.store.find_sandbox(owner, id_or_name)?;
        row.ok_or_else(|| UseError::NotFound(id_or_name.to_owned()))
    }

    /// The sandboxes of `owner`, newest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list(&self, owner: UserId) -> Result<Vec<SandboxRow>, StoreError> {
        self.shared.store.list_sandboxes(Some(owner))
    }

    /// How many sandboxes all users have.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn count(&self) -> Result<u64, StoreError> {
        self.shared.store.count_sandboxes()
    }

    /// Starts a command in a sandbox, and waits until it runs.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such sandbox, it cannot be used, its agent does not answer, or the command cannot be started.
    pub async fn exec(
        &self,
        owner: UserId,
        id_or_name: &str,
        request: ExecRequest,
    ) -> Result<(ExecInput, ExecOutput), UseError> {
        let row = self.find(owner, id_or_name)?;
        let (input, mut output) = self.agent(row.id)?.exec(request).await?;
        output.started(START_LIMIT).await?;
        Ok((input, output))
    }

    /// Destroys a sandbox, whatever its state, and waits until nothing of it is left.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such sandbox or something of it stays.
    ///
    /// # Cancel safety
    ///
    /// A destruction that has begun goes on.
    pub async fn destroy(&self, owner: UserId, id_or_name: &str) -> Result<(), UseError> {
        let id = self.find(owner, id_or_name)?.id;
        let handle = self
            .shared
            .registry
            .get(id)
            .ok_or_else(|| UseError::NotFound(id_or_name.to_owned()))?;
        Ok(handle.destroy().await?)
    }

    fn agent(&self, id: SandboxId) -> Result<AgentClient, Denied> {
        let handle = self.shared.registry.get(id).ok_or(Denied::Destroyed)?;
        let vm = handle.vm()?;
        Ok(AgentClient::new(vm.channel()))
    }
}
