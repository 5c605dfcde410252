//! Creating a sandbox: by forking a template, or something that was saved, or by booting.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bhatti_agent::CallError;
use bhatti_engine::{BootError, RestoreError, Vm, VmSpec, VmmError};
use bhatti_image::{BootFiles, DEFAULT_IMAGE};
use bhatti_proto::{Applied, IdentityReport};
use bhatti_store::{InsertError, NewSandbox, SandboxRow, StoreError};
use bhatti_types::{
    CpuCount, Environment, MemoryMib, ParseNameError, Report, SandboxId, SandboxName, SandboxSpec,
    SandboxState, UserId,
};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};
use tracing::{error, info, warn};

use crate::access::Running;
use crate::admission::Busy;
use crate::driver::{Driver, directory};
use crate::identity::{self, random, random_hex};
use crate::spares::{self, Spare, Stage};
use crate::steps::Step;
use crate::templates::{Recipe, Template, TemplateError};
use crate::{Shared, Supervisor};

/// How long a guest that runs may take to be told who it is.
const CONFIGURE_LIMIT: Duration = Duration::from_secs(10);

/// The error of a new sandbox's clock that is put up with.
const CLOCK_EXACT: Duration = Duration::from_millis(10);

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
    /// Whether it stays hot.
    pub keep_hot: bool,
    /// Whether it boots, rather than being forked from a template.
    pub cold_boot: bool,
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
    /// Its template could not be made.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// What it was to be forked from cannot be used.
    #[error("failed to fork the sandbox")]
    Restore(#[from] RestoreError),
    /// Its VM could not be started.
    #[error("failed to start the sandbox's virtual machine")]
    Vmm(#[from] VmmError),
    /// There is no memory for it.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// Its guest did not take its configuration.
    #[error("failed to configure the sandbox's guest")]
    Unconfigured(#[source] CallError),
    /// What its guest reported cannot be kept.
    #[error("failed to keep the guest's report")]
    Report(#[from] serde_json::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// This host gives no random bytes.
    #[error("failed to draw an id")]
    Entropy(#[from] getrandom::Error),
    /// A name could not be made up.
    #[error(transparent)]
    Name(#[from] ParseNameError),
    /// Its environment is too long.
    #[error("the environment is too long together with the parent's")]
    TooMuchEnvironment,
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

/// What a sandbox begins as.
pub(crate) enum Beginning {
    /// Nothing: it boots.
    Boot(BootFiles),
    /// A template.
    Template { recipe: Recipe, template: Template, spare: Option<Spare> },
    /// Something that was saved: its directory, and what its agent wants every connection to begin with.
    Saved { snapshot: PathBuf, token: String, origin: String },
}

impl Beginning {
    fn origin(&self) -> String {
        match self {
            Self::Boot(_) => "boot".to_owned(),
            Self::Template { template, .. } => format!("template {}", template.key),
            Self::Saved { origin, .. } => origin.clone(),
        }
    }

    /// A spare lies where its sandbox will lie.
    fn id(&self) -> Option<SandboxId> {
        match self {
            Self::Template { spare: Some(spare), .. } => Some(spare.id),
            _ => None,
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
        let spec = SandboxSpec {
            name: request.name.map_or_else(made_up_name, Ok)?,
            cpus: request.cpus.unwrap_or(CpuCount::ONE),
            memory: request.memory.unwrap_or(MemoryMib::DEFAULT),
            environment: request.environment,
            keep_hot: request.keep_hot,
        };
        let beginning = if request.cold_boot {
            Beginning::Boot(files)
        } else {
            let recipe = Recipe { files, cpus: spec.cpus, memory: spec.memory };
            let template = shared.templates.get(shared, &recipe).await?;
            let spare = shared.spares.take(&template);
            Beginning::Template { recipe, template, spare }
        };
        self.create_from(owner, spec, beginning).await
    }

    /// Makes the template of sandboxes that ask for nothing in particular, unless it is there.
    ///
    /// # Errors
    ///
    /// Returns the step that failed.
    pub async fn warm_up(&self) -> Result<(), CreateError> {
        let shared = &self.shared;
        let files = boot_files(shared).await?;
        let recipe = Recipe { files, cpus: CpuCount::ONE, memory: MemoryMib::DEFAULT };
        let template = shared.templates.get(shared, &recipe).await?;
        shared.spares.fill(shared, &template, recipe.memory).await;
        Ok(())
    }

    /// Starts what is kept ready, if there is a template to start it from.
    pub async fn get_ready(&self) {
        let shared = &self.shared;
        let Ok(files) = boot_files(shared).await else { return };
        let recipe = Recipe { files, cpus: CpuCount::ONE, memory: MemoryMib::DEFAULT };
        if let Some(template) = shared.templates.find(shared, &recipe) {
            shared.spares.fill(shared, &template, recipe.memory).await;
        }
    }

    pub(crate) async fn create_from(
        &self,
        owner: UserId,
        spec: SandboxSpec,
        beginning: Beginning,
    ) -> Result<SandboxRow, CreateError> {
        let shared = &self.shared;
        let id = match beginning.id() {
            Some(id) => id,
            None => SandboxId::from_entropy(random()?),
        };
        let (origin, agent_token) = (beginning.origin(), random_hex()?);
        let new = NewSandbox { id, owner, spec, origin, agent_token };
        let row = match shared.store.insert_sandbox(new) {
            Ok(row) => row,
            Err(error) => {
                if let Beginning::Template { spare: Some(spare), .. } = beginning {
                    shared.spares.put_back(spare);
                }
                return Err(error.into());
            }
        };
        let driver = Driver::register(shared, &row, SandboxState::Creating);
        driver.reached(Step::Inserted).await;
        let (reply, created) = oneshot::channel();
        let shared = Arc::clone(shared);
        // In a task of its own: the caller may go away, the sandbox is to be up or gone all the same.
        tokio::spawn(async move {
            match bring_up(&shared, &driver, &row, beginning).await {
                Ok(identity) => {
                    let row = SandboxRow { state: SandboxState::Running, identity, ..row };
                    drop(reply.send(Ok(row)));
                    driver.run().await;
                }
                Err(error) => {
                    drop(reply.send(Err(undo(&shared, driver, error).await)));
                }
            }
        });
        created.await.map_err(|_| CreateError::Interrupted)?
    }
}

pub(crate) fn made_up_name() -> Result<SandboxName, CreateError> {
    let [a, b, c] = random()?;
    Ok(format!("sandbox-{a:02x}{b:02x}{c:02x}").parse()?)
}

pub(crate) async fn boot_files(shared: &Arc<Shared>) -> Result<BootFiles, CreateError> {
    let shared = Arc::clone(shared);
    let found = tokio::task::spawn_blocking(move || {
        shared.config.images.boot_files(DEFAULT_IMAGE, &shared.config.lohar)
    });
    Ok(found.await.map_err(|_| CreateError::Interrupted)??)
}

/// Takes away what there is of a sandbox that did not come up.
async fn undo(shared: &Shared, driver: Driver, error: CreateError) -> CreateError {
    let id = driver.id;
    if let Err(left) = shared.engine.remove(id, &driver.directory()).await {
        error!(sandbox = %id, error = %Report(&left), "Failed to remove a sandbox that did not come up");
    }
    if let Err(error) = driver.abandon() {
        error!(sandbox = %id, error = %Report(&error), "Failed to forget a sandbox that did not come up");
    }
    error
}

/// Brings a sandbox's VM up, and makes it this sandbox's own. Returns what its guest did for that.
async fn bring_up(
    shared: &Arc<Shared>,
    driver: &Driver,
    row: &SandboxRow,
    beginning: Beginning,
) -> Result<Option<String>, CreateError> {
    let began = Instant::now();
    let report = match beginning {
        Beginning::Boot(files) => {
            boot(shared, driver, row, files).await?;
            None
        }
        Beginning::Template { recipe, template, spare } => {
            let running = fork_template(shared, row, &recipe, &template, spare).await?;
            let report = settle(driver, row, running).await?;
            let shared = Arc::clone(shared);
            tokio::spawn(
                async move { shared.spares.fill(&shared, &template, recipe.memory).await },
            );
            Some(report)
        }
        Beginning::Saved { snapshot, token, .. } => {
            let admitted = shared.admit(row.spec.memory).await?;
            let vm = spares::stage(shared, row.id, &snapshot).await?.load().await?;
            Some(settle(driver, row, Running::new(vm, &token, admitted)).await?)
        }
    };
    let create_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    info!(sandbox = %row.id, name = %row.spec.name, origin = row.origin, create_ms, "Sandbox created");
    Ok(report)
}

/// Makes a paused VM from a template. One that cannot be used, however that came, is made anew once.
async fn fork_template(
    shared: &Arc<Shared>,
    row: &SandboxRow,
    recipe: &Recipe,
    template: &Template,
    spare: Option<Spare>,
) -> Result<Running, CreateError> {
    if let Some(spare) = spare {
        let (stage, admitted) = spare.claim(shared).map_err(|source| RestoreError::File {
            step: "claim a VM that was started ahead",
            source,
        })?;
        match stage.load().await {
            Ok(vm) => return Ok(Running::new(vm, "", admitted)),
            Err(error) => {
                warn!(error = %Report(&error), "A VM that was started ahead cannot be used");
                spares::remove(shared, row.id).await;
            }
        }
    }
    let admitted = shared.admit(row.spec.memory).await?;
    let vm = match restore(shared, row.id, &template.directory).await {
        Ok(vm) => vm,
        Err(error @ (RestoreError::Damaged { .. } | RestoreError::Mismatch { .. })) => {
            warn!(error = %Report(&error), "A template cannot be used");
            spares::remove(shared, row.id).await;
            shared.templates.discard(template).await;
            let template = shared.templates.get(shared, recipe).await?;
            restore(shared, row.id, &template.directory).await?
        }
        Err(error) => return Err(error.into()),
    };
    Ok(Running::new(vm, "", admitted))
}

async fn restore(
    shared: &Shared,
    id: SandboxId,
    snapshot: &Path,
) -> Result<Arc<dyn Vm>, RestoreError> {
    Stage::Waiting(spares::stage(shared, id, snapshot).await?).load().await
}

/// Lets a VM run that was another one, and makes its guest this sandbox's own. Returns its report.
async fn settle(
    driver: &Driver,
    row: &SandboxRow,
    running: Running,
) -> Result<String, CreateError> {
    running.vm.resume().await?;
    driver.reached(Step::Running).await;
    let began = Instant::now();
    let assumed = timeout(CONFIGURE_LIMIT, async {
        running.agent.reach().await?;
        // Only now: the time in it is the time when it arrives.
        let identity = identity::identity(row).map_err(|_| CallError::Entropy)?;
        running.agent.assume_identity(&identity).await
    });
    let report = assumed
        .await
        .unwrap_or(Err(CallError::Silent { limit: CONFIGURE_LIMIT }))
        .map_err(CreateError::Unconfigured)?;
    warn_of_failures(row, &report);
    let text = serde_json::to_string(&report)?;
    driver.shared.store.set_sandbox_identity(row.id, &text)?;
    let running = running.with_token(&row.agent_token);
    if began.elapsed() > CLOCK_EXACT {
        // What took so long made the clock late; this does not.
        driver.tell_woken(&running).await;
    }
    driver.running(running)?;
    Ok(text)
}

fn warn_of_failures(row: &SandboxRow, report: &IdentityReport) {
    let IdentityReport {
        rng,
        wall_clock,
        hostname,
        machine_id,
        token,
        environment,
        files,
        first_setup,
        addresses,
        connections,
    } = report;
    let parts = [
        rng,
        wall_clock,
        hostname,
        machine_id,
        token,
        environment,
        files,
        first_setup,
        addresses,
        connections,
    ];
    for part in parts {
        if let Applied::Failed { message } = part {
            warn!(sandbox = %row.id, message, "Guest did not become itself in every part");
        }
    }
}

async fn boot(
    shared: &Arc<Shared>,
    driver: &Driver,
    row: &SandboxRow,
    files: BootFiles,
) -> Result<(), CreateError> {
    let admitted = shared.admit(row.spec.memory).await?;
    let vm_spec = VmSpec {
        id: row.id,
        hostname: row.spec.name.clone(),
        cpus: row.spec.cpus,
        memory: row.spec.memory,
        directory: directory(shared, row.id),
        kernel: files.kernel,
        initramfs: files.initramfs,
        root_base: files.root,
        keep_disk: false,
        boot_limit: shared.config.boot_limit,
    };
    let vm = shared.engine.boot(&vm_spec).await?;
    let running = Running::new(vm, "", admitted);
    let configured =
        timeout(CONFIGURE_LIMIT, running.agent.configure(&identity::config(row))).await;
    configured
        .unwrap_or(Err(CallError::Silent { limit: CONFIGURE_LIMIT }))
        .map_err(CreateError::Unconfigured)?;
    Ok(driver.running(running.with_token(&row.agent_token))?)
}
