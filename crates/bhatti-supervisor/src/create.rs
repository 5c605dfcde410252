//! Creating a sandbox: by forking a template, or something that was saved, or by booting.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bhatti_agent::CallError;
use bhatti_engine::{BootError, RestoreError, Vm, VmSpec, VmmError};
use bhatti_image::{BootFiles, DEFAULT_IMAGE};
use bhatti_proto::{Applied, ConfigFile, IdentityReport, PAYLOAD_BYTES_MAX};
use bhatti_store::{InsertError, NewSandbox, SandboxRow, StoreError};
use bhatti_types::{
    CpuCount, Environment, ImageName, Labels, MemoryMib, ParseNameError, QuotaExceeded, Report,
    SandboxId, SandboxName, SandboxSpec, SandboxState, SecretName, UserId,
};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};
use tracing::{error, info, warn};

use crate::access::Running;
use crate::admission::Busy;
use crate::driver::{Driver, directory};
use crate::identity::{self, Extras, random, random_hex};
use crate::secrets::{self, SecretError};
use crate::spares::{self, Spare, Stage};
use crate::steps::Step;
use crate::templates::{Recipe, Template, TemplateError};
use crate::{Shared, Supervisor};

/// How long a guest that runs may take to be told who it is.
const CONFIGURE_LIMIT: Duration = Duration::from_secs(10);

/// The most that a guest is told at once, in bytes: one frame, and what else its identity has in it.
const GUEST_CONFIG_BYTES_MAX: usize = PAYLOAD_BYTES_MAX - 1024;

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
    /// Its labels.
    pub labels: Labels,
    /// The secrets that are variables of its environment.
    pub secrets: Vec<SecretName>,
    /// A script that runs when it is up; none if empty.
    pub init: String,
    /// The image that its disk begins as; the usual one if absent.
    pub image: Option<ImageName>,
    /// Files that are put into it.
    pub files: Vec<FileRequest>,
    /// How long it lives; for ever if absent.
    pub lifetime: Option<Duration>,
}

/// A file that is put into a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileRequest {
    /// Where: an absolute path.
    pub path: String,
    /// What.
    pub content: Vec<u8>,
    /// Its permission bits in octal; 0644 if empty.
    pub mode: String,
}

/// A sandbox that is to be.
pub(crate) struct New {
    pub(crate) owner: UserId,
    pub(crate) spec: SandboxSpec,
    /// The values of its secrets.
    pub(crate) secrets: BTreeMap<String, String>,
    pub(crate) files: BTreeMap<String, ConfigFile>,
    pub(crate) expires_at: Option<u64>,
}

impl New {
    /// One without files that lives for ever, if `owner` may have it.
    pub(crate) fn of(
        shared: &Shared,
        owner: UserId,
        spec: SandboxSpec,
    ) -> Result<Self, CreateError> {
        shared.store.admit_sandbox(owner, &spec)?;
        let secrets = secrets::read(shared, owner, &spec.secrets)?;
        Ok(Self { owner, spec, secrets, files: BTreeMap::new(), expires_at: None })
    }
}

/// A sandbox could not be created. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Its owner has one of that name.
    #[error("sandbox `{0}` already exists")]
    NameTaken(SandboxName),
    /// Its owner may have no more, or none so large.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// There is no such image.
    #[error("image `{0}` not found")]
    NoSuchImage(ImageName),
    /// It cannot have one of its secrets.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A file that is put into it has no absolute path.
    #[error("`{0}` is no absolute path of a file")]
    FilePath(String),
    /// The guest could not write a file.
    #[error("the sandbox's guest could not write its files: {0}")]
    Files(String),
    /// What its guest is told does not fit one message.
    #[error(
        "environment, secrets, files and init script have {bytes} bytes together; at most {GUEST_CONFIG_BYTES_MAX} fit"
    )]
    TooMuch {
        /// Their length, encoded.
        bytes: usize,
    },
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
            InsertError::Quota(quota) => Self::Quota(quota),
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
        let spec = SandboxSpec {
            name: request.name.map_or_else(made_up_name, Ok)?,
            cpus: request.cpus.unwrap_or(CpuCount::ONE),
            memory: request.memory.unwrap_or(MemoryMib::DEFAULT),
            environment: request.environment,
            keep_hot: request.keep_hot,
            labels: request.labels,
            secrets: request.secrets,
            init: request.init,
            image: request.image.map_or_else(usual_image, Ok)?,
        };
        // Before there is a row: what is not allowed, or not set up at all, needs none.
        shared.store.admit_sandbox(owner, &spec)?;
        let secrets = secrets::read(shared, owner, &spec.secrets)?;
        let files = boot_files(shared, &spec.image).await?;
        let expires_at = request.lifetime.map(unix_seconds_after);
        let guest_files = guest_files(request.files)?;
        let beginning = if request.cold_boot {
            Beginning::Boot(files)
        } else {
            let recipe = Recipe { files, cpus: spec.cpus, memory: spec.memory };
            let template = shared.templates.get(shared, &recipe).await?;
            let spare = shared.spares.take(&template);
            Beginning::Template { recipe, template, spare }
        };
        self.create_from(New { owner, spec, secrets, files: guest_files, expires_at }, beginning)
            .await
    }

    /// Makes the template of sandboxes that ask for nothing in particular, unless it is there.
    ///
    /// # Errors
    ///
    /// Returns the step that failed.
    pub async fn warm_up(&self) -> Result<(), CreateError> {
        let shared = &self.shared;
        let files = boot_files(shared, &usual_image()?).await?;
        let recipe = Recipe { files, cpus: CpuCount::ONE, memory: MemoryMib::DEFAULT };
        let template = shared.templates.get(shared, &recipe).await?;
        shared.spares.fill(shared, &template, recipe.memory).await;
        Ok(())
    }

    /// Starts what is kept ready, if there is a template to start it from.
    pub async fn get_ready(&self) {
        let shared = &self.shared;
        let Ok(image) = usual_image() else { return };
        let Ok(files) = boot_files(shared, &image).await else { return };
        let recipe = Recipe { files, cpus: CpuCount::ONE, memory: MemoryMib::DEFAULT };
        if let Some(template) = shared.templates.find(shared, &recipe) {
            shared.spares.fill(shared, &template, recipe.memory).await;
        }
    }

    pub(crate) async fn create_from(
        &self,
        New { owner, spec, secrets, files, expires_at }: New,
        beginning: Beginning,
    ) -> Result<SandboxRow, CreateError> {
        let shared = &self.shared;
        let began = Instant::now();
        let extras = Extras { secrets, files };
        let id = match beginning.id() {
            Some(id) => id,
            None => SandboxId::from_entropy(random()?),
        };
        let (origin, agent_token) = (beginning.origin(), random_hex()?);
        let new = NewSandbox { id, owner, spec, origin, agent_token, expires_at };
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
            match bring_up(&shared, &driver, &row, &extras, beginning).await {
                Ok(identity) => {
                    announce(&shared, &row, began);
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

/// The image of sandboxes that ask for none.
pub(crate) fn usual_image() -> Result<ImageName, CreateError> {
    Ok(DEFAULT_IMAGE.parse()?)
}

pub(crate) async fn boot_files(
    shared: &Arc<Shared>,
    image: &ImageName,
) -> Result<BootFiles, CreateError> {
    let (shared, name) = (Arc::clone(shared), image.clone());
    let found = tokio::task::spawn_blocking(move || {
        let images = &shared.config.images;
        if name.as_str() != DEFAULT_IMAGE
            && !images.images()?.iter().any(|image| image == name.as_str())
        {
            return Ok(None);
        }
        images.boot_files(name.as_str(), &shared.config.lohar).map(Some)
    });
    let files = found.await.map_err(|_| CreateError::Interrupted)??;
    files.ok_or_else(|| CreateError::NoSuchImage(image.clone()))
}

/// The first second since 1970 that begins when `time` is over.
fn unix_seconds_after(time: Duration) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let then = now.saturating_add(time);
    then.as_secs() + u64::from(then.subsec_nanos() > 0)
}

/// Files as the guest is told them.
fn guest_files(files: Vec<FileRequest>) -> Result<BTreeMap<String, ConfigFile>, CreateError> {
    let file = |FileRequest { path, content, mode }: FileRequest| {
        let is_file = path.starts_with('/') && !path.ends_with('/') && !path.contains('\0');
        if !is_file || path.split('/').any(|part| part == "..") {
            return Err(CreateError::FilePath(path));
        }
        Ok((path, ConfigFile { content: STANDARD.encode(content), mode }))
    };
    files.into_iter().map(file).collect()
}

fn announce(shared: &Shared, row: &SandboxRow, began: Instant) {
    let took = began.elapsed();
    shared.metrics.created(&row.origin, took);
    let create_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    info!(sandbox = %row.id, name = %row.spec.name, origin = row.origin, create_ms, "Sandbox created");
    let sandbox = Some((row.id, row.spec.name.to_string()));
    let detail = serde_json::json!({ "origin": row.origin, "create_ms": create_ms });
    shared.events.record("sandbox.created", row.owner, sandbox, detail);
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
    extras: &Extras,
    beginning: Beginning,
) -> Result<Option<String>, CreateError> {
    let bytes = serde_json::to_vec(&identity::config(row, extras))?.len();
    if bytes > GUEST_CONFIG_BYTES_MAX {
        return Err(CreateError::TooMuch { bytes });
    }
    Ok(match beginning {
        Beginning::Boot(files) => {
            boot(shared, driver, row, extras, files).await?;
            None
        }
        Beginning::Template { recipe, template, spare } => {
            let running = fork_template(shared, row, &recipe, &template, spare).await?;
            let report = settle(driver, row, extras, running).await?;
            let shared = Arc::clone(shared);
            tokio::spawn(
                async move { shared.spares.fill(&shared, &template, recipe.memory).await },
            );
            Some(report)
        }
        Beginning::Saved { snapshot, token, .. } => {
            let admitted = shared.admit(row.spec.memory).await?;
            let vm = spares::stage(shared, row.id, &snapshot).await?.load().await?;
            Some(settle(driver, row, extras, Running::new(vm, &token, admitted)).await?)
        }
    })
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
    extras: &Extras,
    running: Running,
) -> Result<String, CreateError> {
    running.vm.resume().await?;
    driver.reached(Step::Running).await;
    let began = Instant::now();
    let assumed = timeout(CONFIGURE_LIMIT, async {
        running.agent.reach().await?;
        // Only now: the time in it is the time when it arrives.
        let identity = identity::identity(row, extras).map_err(|_| CallError::Entropy)?;
        running.agent.assume_identity(&identity).await
    });
    let report = assumed
        .await
        .unwrap_or(Err(CallError::Silent { limit: CONFIGURE_LIMIT }))
        .map_err(CreateError::Unconfigured)?;
    warn_of_failures(row, &report);
    if let Applied::Failed { message } = &report.files
        && !extras.files.is_empty()
    {
        return Err(CreateError::Files(message.clone()));
    }
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
    extras: &Extras,
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
        timeout(CONFIGURE_LIMIT, running.agent.configure(&identity::config(row, extras))).await;
    let configured = configured.unwrap_or(Err(CallError::Silent { limit: CONFIGURE_LIMIT }));
    configured.map_err(|error| match error {
        CallError::Agent(refused) if !extras.files.is_empty() => {
            CreateError::Files(refused.message)
        }
        CallError::Refused(message) if !extras.files.is_empty() => CreateError::Files(message),
        error => CreateError::Unconfigured(error),
    })?;
    Ok(driver.running(running.with_token(&row.agent_token))?)
}
