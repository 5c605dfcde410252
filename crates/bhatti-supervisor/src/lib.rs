//! Policy: what happens to sandboxes, and when.
//!
//! Each sandbox has one driver task, which alone changes its state; everybody else sends it requests and watches what it publishes.
//! The row in the store is written before the effect that it announces, so a daemon that dies at any point leaves a row from which the
//! next one knows what to do: see [`Supervisor::recover`].

mod access;
mod admission;
mod breaker;
mod bring_up;
mod create;
mod disk_quota;
mod driver;
mod events;
mod fork;
mod guest_events;
mod half_booted;
mod identity;
mod metrics;
mod networks;
mod reboot;
mod recover;
mod registry;
mod saved;
mod secrets;
mod snapshots;
mod spares;
mod steps;
mod templates;
mod transition;
mod turns;
mod volumes;
mod wake;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use bhatti_agent::{AgentClient, CallError, ExecInput, ExecOutput};
use bhatti_engine::{Capabilities, Engine, Usage, Vm};
use bhatti_image::ImageStore;
use bhatti_proto::ExecRequest;
use bhatti_secret::SecretKey;
use bhatti_store::{ChangeError, SandboxChange, SandboxFilter, SandboxRow, Store, StoreError};
use bhatti_types::{
    Denied, MemoryMib, NetworkMode, Report, SandboxId, SandboxName, Thermal, UserId,
};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::warn;

pub use admission::Busy;
pub use create::{CreateError, FileRequest, SandboxRequest};
pub use driver::{DestroyError, TransitionError};
pub use fork::{FORKS_MAX, ForkError, ForkRequest, Forked};
pub use networks::{NetworkConfig, NetworkError};
pub use recover::{RecoverError, Recovery};
pub use secrets::SecretError;
pub use snapshots::{ResumeRequest, SnapshotOpError};
pub use steps::{Fault, Step, UnknownStep};
pub use templates::TemplateError;
pub use volumes::{VolumeFileError, VolumeInfo, VolumeOpError, VolumeUseError};

use access::Lease;
use admission::{Admission, Admitted};
use driver::{Handle, Request};
use events::Events;
use metrics::Metrics;
use registry::Registry;
use spares::Spares;
use templates::Templates;

/// How long a guest that says nothing to anybody may take to start a command.
const START_LIMIT: Duration = Duration::from_secs(15);

/// Sandboxes that are saved at once when the daemon stops, and how long each of them may take.
const SLEEPING_AT_ONCE: usize = 10;
/// How long the end of the daemon waits for work on volumes.
const VOLUME_WORK_LIMIT: Duration = Duration::from_secs(30);
const SLEEP_LIMIT: Duration = Duration::from_secs(60);

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
    /// Where the snapshots are that do not belong to one sandbox.
    pub snapshots_dir: PathBuf,
    /// Where the templates are, what they may take of the disk, and what their guests are called.
    pub templates_dir: PathBuf,
    /// See [`templates_dir`](Self::templates_dir).
    pub templates_bytes: u64,
    /// See [`templates_dir`](Self::templates_dir).
    pub template_hostname: SandboxName,
    /// VMMs that are kept waiting for a state, and VMs that have it and are kept paused.
    pub ready_vmms: usize,
    /// See [`ready_vmms`](Self::ready_vmms).
    pub ready_forks: usize,
    /// The memory of all sandboxes that have a process, in MiB.
    pub memory_budget_mib: usize,
    /// What secrets are unreadable without.
    pub secret_key: SecretKey,
    /// When sandboxes cool.
    pub thermal: ThermalConfig,
    /// Where the volumes are.
    pub volumes_dir: PathBuf,
    /// Where sandboxes' networks are.
    pub network: NetworkConfig,
    /// For tests: what goes wrong, and when.
    pub fault: Option<Fault>,
}

/// When a sandbox that nobody uses cools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThermalConfig {
    /// From hot to warm.
    pub warm_after: Duration,
    /// From warm to cold.
    pub cold_after: Duration,
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
    pub(crate) admission: Admission,
    pub(crate) templates: Templates,
    pub(crate) spares: Spares,
    pub(crate) events: Arc<Events>,
    pub(crate) metrics: Metrics,
    /// Held by work on volumes, which the end of the daemon waits for.
    pub(crate) volume_work: tokio::sync::RwLock<()>,
    /// Sandboxes of an earlier daemon that have not been taken up yet.
    pub(crate) taking_up: AtomicUsize,
    /// Disk space that operations under way may still take.
    pub(crate) disk_reserved: disk_quota::Reserved,
}

impl Shared {
    /// Sets memory aside for a VM. Sandboxes that nobody uses give theirs first.
    pub(crate) async fn admit(&self, memory: MemoryMib) -> Result<Admitted, Busy> {
        if let Some(admitted) = self.admission.admit_now(memory) {
            return Ok(admitted);
        }
        self.admission.check(memory)?;
        let _waiting = self.spares.hold_back();
        self.spares.clear(self).await;
        // The one that was used least recently gives its memory first; only then, if there is still too little, the next.
        let mut asked = HashSet::new();
        let make_room = || {
            let next = self.registry.longest_idle(&asked);
            asked.extend(next.iter().map(|(id, _)| *id));
            async move {
                let Some((_, handle)) = next else { return false };
                // One that cannot give its memory has logged why; the next is asked.
                drop(handle.ask(Request::GiveMemory).await);
                true
            }
        };
        self.admission.admit(memory, make_room).await
    }
}

/// Somebody uses a sandbox, for as long as this lives.
pub struct SandboxUse {
    /// Asks its agent.
    pub agent: AgentClient,
    /// Its id.
    pub id: bhatti_types::SandboxId,
    _lease: Lease,
}

/// A sandbox could not be edited. It is what it was.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// There is no such sandbox.
    #[error(transparent)]
    Use(#[from] UseError),
    /// What it would be cannot be.
    #[error(transparent)]
    Change(#[from] ChangeError),
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
    /// It did not become what it was asked to be, or could not be woken.
    #[error(transparent)]
    Transition(#[from] TransitionError),
}

impl Supervisor {
    /// A supervisor that knows no sandbox yet: see [`recover`](Self::recover).
    #[must_use]
    pub fn new(config: Config, store: Arc<Store>, engine: Arc<dyn Engine>) -> Self {
        let admission = Admission::new(config.memory_budget_mib, engine.capabilities().vmm_mib);
        let templates = Templates::new(config.templates_dir.clone(), config.templates_bytes);
        let (registry, spares) = (Registry::default(), Spares::default());
        let events = Arc::new(Events::new(Arc::clone(&store)));
        Self {
            shared: Arc::new(Shared {
                config,
                store,
                engine,
                registry,
                admission,
                templates,
                spares,
                events,
                metrics: Metrics::new(),
                volume_work: tokio::sync::RwLock::default(),
                taking_up: AtomicUsize::new(0),
                disk_reserved: disk_quota::Reserved::default(),
            }),
        }
    }

    /// What the engine can do.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.shared.engine.capabilities()
    }

    /// Looks after networks, for as long as it is polled.
    pub async fn watch_networks(self) {
        self.shared.watch_networks().await;
    }

    /// How sandboxes are connected that ask for nothing in particular, or why they have no network.
    ///
    /// # Errors
    ///
    /// Returns why this host's network cannot be used.
    pub fn network(&self) -> Result<NetworkMode, &str> {
        let host = self.shared.config.network.host.as_ref();
        host.map(|_| self.shared.usual_network()).map_err(String::as_str)
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

    /// The id of the sandbox that `owner` calls so.
    ///
    /// # Errors
    ///
    /// As [`find`](Self::find).
    pub fn find_id(&self, owner: UserId, id_or_name: &str) -> Result<SandboxId, UseError> {
        let id = self.shared.store.find_sandbox_id(owner, id_or_name)?;
        id.ok_or_else(|| UseError::NotFound(id_or_name.to_owned()))
    }

    /// The sandboxes of `owner` that a filter lets through, newest first, without their guests' reports.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list(
        &self,
        owner: UserId,
        filter: &SandboxFilter,
    ) -> Result<Vec<SandboxRow>, StoreError> {
        self.shared.store.list_sandboxes(owner, filter)
    }

    /// Gives a sandbox another name or other labels. Its host name stays.
    ///
    /// # Errors
    ///
    /// Returns what would be wrong with the result.
    pub fn edit(
        &self,
        owner: UserId,
        id_or_name: &str,
        change: SandboxChange,
    ) -> Result<SandboxRow, EditError> {
        let row = self.find(owner, id_or_name)?;
        self.shared.store.change_sandbox(row.id, change)?;
        self.shared.rename_in_networks();
        let row = self.find(owner, &row.id.to_string())?;
        let sandbox = Some((row.id, row.spec.name.to_string()));
        self.record("sandbox.changed", owner, sandbox, serde_json::json!({}));
        Ok(row)
    }

    /// Uses a sandbox: wakes it if it sleeps, and keeps it hot for as long as the use lives.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such sandbox or it cannot be used.
    pub async fn enter(&self, owner: UserId, id_or_name: &str) -> Result<SandboxUse, UseError> {
        let id = self.find_id(owner, id_or_name)?;
        let (agent, lease) = self.handle(id, id_or_name)?.enter().await?;
        Ok(SandboxUse { agent, id, _lease: lease })
    }

    /// How many sandboxes all users have.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn count(&self) -> Result<u64, StoreError> {
        self.shared.store.count_sandboxes()
    }

    /// Starts a command in a sandbox, and waits until it runs. `whole_input`, if it is at hand and short, travels with the request, and
    /// the command's input ends with it.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such sandbox, it cannot be used, its agent does not answer, or the command cannot be started.
    pub async fn exec(
        &self,
        owner: UserId,
        id_or_name: &str,
        request: ExecRequest,
        whole_input: Option<&[u8]>,
    ) -> Result<(ExecInput, ExecOutput), UseError> {
        let began = Instant::now();
        let used = self.enter(owner, id_or_name).await?;
        let (input, mut output) = used.agent.exec_with_input(request, whole_input).await?;
        output.started(START_LIMIT).await?;
        self.shared.metrics.exec_start.observe(began.elapsed().as_secs_f64());
        Ok((input, output.holding(used)))
    }

    /// Pauses a sandbox until somebody uses it. Does nothing to one that sleeps.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be paused; it is then what it was before.
    pub async fn pause(&self, owner: UserId, id_or_name: &str) -> Result<SandboxRow, UseError> {
        self.change(owner, id_or_name, Request::Pause).await
    }

    /// Makes a sandbox hot, unless it was stopped.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be woken; it is then what it was before.
    pub async fn resume(&self, owner: UserId, id_or_name: &str) -> Result<SandboxRow, UseError> {
        self.change(owner, id_or_name, Request::Wake).await
    }

    /// Saves a sandbox and ends its VM, until it is started.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be stopped; it then runs as before.
    pub async fn stop(&self, owner: UserId, id_or_name: &str) -> Result<SandboxRow, UseError> {
        self.change(owner, id_or_name, Request::Stop).await
    }

    /// Starts a sandbox that was stopped; with `cold_boot` without its memory, which is then lost.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be started; it is then what it was before.
    pub async fn start(
        &self,
        owner: UserId,
        id_or_name: &str,
        cold_boot: bool,
    ) -> Result<SandboxRow, UseError> {
        self.change(owner, id_or_name, |reply| Request::Start { cold_boot, reply }).await
    }

    /// Has a sandbox stay hot, or not.
    ///
    /// # Errors
    ///
    /// Returns an error if it cannot be made hot.
    pub async fn set_keep_hot(
        &self,
        owner: UserId,
        id_or_name: &str,
        keep_hot: bool,
    ) -> Result<SandboxRow, UseError> {
        self.change(owner, id_or_name, |reply| Request::KeepHot { keep_hot, reply }).await
    }

    /// What a running sandbox costs right now.
    #[must_use]
    pub fn thermal(&self, id: SandboxId) -> Option<Thermal> {
        self.shared.registry.with(id, |handle| handle.access.thermal())?
    }

    /// What the sandboxes of `owner` that have a VM use of this host. Wakes none, and counts as no use.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub async fn usage(&self, owner: UserId) -> Result<Vec<(SandboxId, Usage)>, StoreError> {
        let rows = self.list(owner, &SandboxFilter::default())?;
        let running = |row: &SandboxRow| {
            let running = self.shared.registry.get(row.id)?.access.running()?;
            Some((row.id, running.vm))
        };
        let vms: Vec<_> = rows.iter().filter_map(running).collect();
        // One whose VM has just ended uses nothing any more.
        let ask = move || {
            let used = |(id, vm): (SandboxId, Arc<dyn Vm>)| Some((id, vm.usage().ok()?));
            vms.into_iter().filter_map(used).collect()
        };
        Ok(tokio::task::spawn_blocking(ask).await.unwrap_or_default())
    }

    /// Ends what nobody asked for. Sandboxes go on, unless `sleep` says that they are to be saved: then some at a time are.
    pub async fn shut_down(&self, sleep: bool) {
        self.shared.spares.close(&self.shared).await;
        if timeout(VOLUME_WORK_LIMIT, self.shared.volume_work.write()).await.is_err() {
            warn!("Work on a volume goes on without this daemon");
        }
        if !sleep {
            return;
        }
        let turns = Arc::new(Semaphore::new(SLEEPING_AT_ONCE));
        let mut sleeping = JoinSet::new();
        for handle in self.shared.registry.all() {
            let turns = Arc::clone(&turns);
            sleeping.spawn(async move {
                let _turn = turns.acquire_owned().await;
                let slept = timeout(SLEEP_LIMIT, handle.ask(Request::Sleep)).await;
                match slept {
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
        sleeping.join_all().await;
    }

    async fn change(
        &self,
        owner: UserId,
        id_or_name: &str,
        request: impl FnOnce(tokio::sync::oneshot::Sender<Result<(), TransitionError>>) -> Request,
    ) -> Result<SandboxRow, UseError> {
        let id = self.find_id(owner, id_or_name)?;
        self.handle(id, id_or_name)?.ask(request).await?;
        self.find(owner, &id.to_string())
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
        let id = self.find_id(owner, id_or_name)?;
        match self.handle(id, id_or_name) {
            Ok(handle) => Ok(handle.destroy().await?),
            Err(UseError::Store(StoreError::Damaged(damage))) => {
                warn!(sandbox = %id, damage, "Destroying a sandbox whose row is damaged");
                let shared = Arc::clone(&self.shared);
                // A task of its own: a client that hangs up must not stop it halfway.
                let removed = tokio::spawn(async move { driver::remove(&shared, id).await });
                removed.await.unwrap_or(Err(DestroyError::AlreadyGone))?;
                let sandbox = Some((id, id_or_name.to_owned()));
                self.record("sandbox.destroyed", owner, sandbox, serde_json::json!({}));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The driver of a sandbox. A sandbox with a damaged row has no driver.
    pub(crate) fn handle(&self, id: SandboxId, called: &str) -> Result<Handle, UseError> {
        let Some(handle) = self.shared.registry.get(id) else {
            self.shared.store.get_sandbox(id)?;
            return Err(UseError::NotFound(called.to_owned()));
        };
        Ok(handle)
    }
}
