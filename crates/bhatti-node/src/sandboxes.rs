//! A node's operations on a sandbox that exists.

use std::sync::Arc;
use std::time::Duration;

use bhatti_agent::{AgentClient, CallError, ExecInput, ExecOutput};
use bhatti_engine::{Usage, Vm};
use bhatti_proto::{ExecRequest, LoadInfo};
use bhatti_store::StoreError;
use bhatti_types::{Denied, Report, SandboxId, Thermal, TimeLimitChange, UserId};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::warn;

use crate::Node;
use crate::driver::access::Lease;
use crate::driver::{self, DestroyError, Handle, Request, TransitionError};

/// How long a silent guest may take to start a command.
const START_LIMIT: Duration = Duration::from_secs(15);

/// How long an agent may take to tell the load.
const LOAD_LIMIT: Duration = Duration::from_secs(2);

/// The number of sandboxes that are saved at the same time when the daemon stops.
const SAVING_AT_ONCE: usize = 10;
/// The time limit of each save.
const SAVE_LIMIT: Duration = Duration::from_secs(60);
/// How long a stopping daemon waits for work on volumes.
const VOLUME_WORK_LIMIT: Duration = Duration::from_secs(30);

/// A lease of a sandbox: the sandbox stays hot until this is dropped.
pub struct SandboxUse {
    /// The client of the sandbox's agent.
    pub agent: AgentClient,
    /// The sandbox's id.
    pub id: SandboxId,
    _lease: Lease,
}

/// A sandbox could not be used.
#[derive(Debug, thiserror::Error)]
pub enum UseError {
    /// There is no such sandbox.
    #[error("sandbox `{0}` not found")]
    NotFound(String),
    /// The sandbox's state does not allow it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The command failed.
    #[error(transparent)]
    Exec(#[from] CallError),
    /// The sandbox could not be destroyed.
    #[error(transparent)]
    Destroy(#[from] DestroyError),
    /// A transition failed, or the sandbox could not be woken.
    #[error(transparent)]
    Transition(#[from] TransitionError),
    /// The host gives no random bytes.
    #[error("failed to draw an id")]
    Entropy(#[source] getrandom::Error),
}

impl Node {
    /// Takes a lease of a sandbox: wakes it if it sleeps, and keeps it hot until the lease is
    /// dropped.
    ///
    /// # Errors
    ///
    /// Returns an error if the sandbox cannot be used.
    pub async fn enter(&self, id: SandboxId) -> Result<SandboxUse, UseError> {
        let (agent, lease) = self.handle(id)?.enter().await?;
        Ok(SandboxUse { agent, id, _lease: lease })
    }

    /// Starts a command and waits until it runs. `whole_input`, if it is short and complete,
    /// travels with the request, and the command's input ends with it.
    ///
    /// # Errors
    ///
    /// Returns an error if the sandbox cannot be used, its agent does not answer, or the command
    /// cannot be started.
    pub async fn exec(
        &self,
        id: SandboxId,
        request: ExecRequest,
        whole_input: Option<&[u8]>,
    ) -> Result<(ExecInput, ExecOutput), UseError> {
        let began = Instant::now();
        let used = self.enter(id).await?;
        let (input, mut output) = used.agent.exec_with_input(request, whole_input).await?;
        output.started(START_LIMIT).await?;
        self.shared.metrics.exec_start.observe(began.elapsed().as_secs_f64());
        Ok((input, output.holding(used)))
    }

    /// Pauses a sandbox until the next use. Does nothing if it sleeps.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be paused. Its state is then unchanged.
    pub async fn pause(&self, id: SandboxId) -> Result<(), UseError> {
        self.ask(id, Request::Pause).await
    }

    /// Makes a sandbox hot, unless it is stopped.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be woken. Its state is then unchanged.
    pub async fn wake(&self, id: SandboxId) -> Result<(), UseError> {
        self.ask(id, Request::Wake).await
    }

    /// Saves a sandbox and ends its VM until it is started.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be stopped. It then runs as before.
    pub async fn stop(&self, id: SandboxId) -> Result<(), UseError> {
        self.ask(id, Request::Stop).await
    }

    /// Starts a stopped sandbox. With `cold_boot` it boots from its disk and loses its memory.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be started. Its state is then unchanged.
    pub async fn start(&self, id: SandboxId, cold_boot: bool) -> Result<(), UseError> {
        self.ask(id, |reply| Request::Start { cold_boot, reply }).await
    }

    /// Sets whether a sandbox stays hot while it is unused.
    ///
    /// # Errors
    ///
    /// Returns an error if it cannot be made hot.
    pub async fn set_keep_hot(&self, id: SandboxId, keep_hot: bool) -> Result<(), UseError> {
        self.ask(id, |reply| Request::KeepHot { keep_hot, reply }).await
    }

    /// Changes a sandbox's time limit.
    ///
    /// # Errors
    ///
    /// Returns an error if the sandbox is being created or destroyed, or if the store fails.
    pub async fn change_time_limit(
        &self,
        id: SandboxId,
        change: TimeLimitChange,
    ) -> Result<(), UseError> {
        self.ask(id, |reply| Request::TimeLimit { change, reply }).await
    }

    /// Merges the layers of a sandbox's disk if that frees space. Returns whether it did.
    ///
    /// # Errors
    ///
    /// Returns an error if the sandbox cannot be used.
    pub async fn merge_disk(&self, id: SandboxId) -> Result<bool, UseError> {
        self.ask(id, Request::MergeDisk).await
    }

    /// Returns the activity of a running sandbox.
    #[must_use]
    pub fn thermal(&self, id: SandboxId) -> Option<Thermal> {
        self.shared.registry.with(id, |handle| handle.access.thermal())?
    }

    /// Returns the host resources used by those sandboxes that have a VM. Does not wake sandboxes,
    /// and does not count as use.
    pub async fn usage(&self, ids: Vec<SandboxId>) -> Vec<(SandboxId, Usage)> {
        let running = |id| Some((id, self.shared.registry.get(id)?.access.running()?.vm));
        let vms: Vec<_> = ids.into_iter().filter_map(running).collect();
        // A VM that has just ended uses nothing.
        let ask = move || {
            let used = |(id, vm): (SandboxId, Arc<dyn Vm>)| Some((id, vm.usage().ok()?));
            vms.into_iter().filter_map(used).collect()
        };
        tokio::task::spawn_blocking(ask).await.unwrap_or_default()
    }

    /// Returns the load in a sandbox that is hot. Does not wake a sandbox, and does not count as
    /// use. Returns `None` if it is not hot or its agent does not answer in time.
    pub async fn load(&self, id: SandboxId) -> Option<LoadInfo> {
        let access = self.shared.registry.get(id)?.access;
        let running = access.running().filter(|_| access.thermal() == Some(Thermal::Hot))?;
        timeout(LOAD_LIMIT, running.agent.load()).await.ok()?.ok()
    }

    /// Destroys a sandbox in any state, and waits until nothing of it is left.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such sandbox or some of its files stay.
    ///
    /// # Cancel safety
    ///
    /// A destruction that has begun continues.
    pub async fn destroy(&self, id: SandboxId, owner: UserId) -> Result<(), UseError> {
        match self.handle(id) {
            Ok(handle) => Ok(handle.destroy().await?),
            Err(UseError::Store(StoreError::Damaged(damage))) => {
                warn!(sandbox = %id, damage, "Destroying a sandbox whose row is damaged");
                let shared = Arc::clone(&self.shared);
                // In a task: a client that hangs up must not stop it halfway.
                let removed =
                    tokio::spawn(async move { driver::remove(&shared, id, Some(owner)).await });
                Ok(removed.await.unwrap_or(Err(DestroyError::AlreadyGone))?)
            }
            Err(error) => Err(error),
        }
    }

    /// Ends spares and waits for work on volumes. Sandboxes run on, unless `save_sandboxes` is set:
    /// then each sandbox is saved, ten at a time.
    pub async fn shut_down(&self, save_sandboxes: bool) {
        self.shared.spares.close(&self.shared).await;
        if timeout(VOLUME_WORK_LIMIT, self.shared.volumes.finished()).await.is_err() {
            warn!("Work on a volume continues without this daemon");
        }
        if !save_sandboxes {
            return;
        }
        let turns = Arc::new(Semaphore::new(SAVING_AT_ONCE));
        let mut saving = JoinSet::new();
        for handle in self.shared.registry.all() {
            let turns = Arc::clone(&turns);
            saving.spawn(async move {
                let _turn = turns.acquire_owned().await;
                let saved = timeout(SAVE_LIMIT, handle.ask(Request::Sleep)).await;
                match saved {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        warn!(error = %Report(&error), "Sandbox was not saved; it stays as it is");
                    }
                    Err(_) => warn!(
                        "Sandbox was not saved in time; the next daemon finds it running or paused"
                    ),
                }
            });
        }
        saving.join_all().await;
    }

    async fn ask<T>(
        &self,
        id: SandboxId,
        request: impl FnOnce(oneshot::Sender<Result<T, TransitionError>>) -> Request,
    ) -> Result<T, UseError> {
        Ok(self.handle(id)?.ask(request).await?)
    }

    /// Returns the handle of a sandbox's driver. A sandbox with a damaged row has no driver.
    pub(crate) fn handle(&self, id: SandboxId) -> Result<Handle, UseError> {
        let Some(handle) = self.shared.registry.get(id) else {
            self.shared.store.get_sandbox(id)?;
            return Err(UseError::NotFound(id.to_string()));
        };
        Ok(handle)
    }
}
