//! Creating a sandbox: by forking a template, or something that was saved, or by booting.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bhatti_agent::CallError;
use bhatti_engine::{BootError, RestoreError, VmmError};
use bhatti_image::{BootFiles, DEFAULT_IMAGE};
use bhatti_store::{Attach, AttachError, InsertError, NewSandbox, SandboxRow, StoreError};
use bhatti_types::{
    Allowance, CpuCount, DiskMib, Environment, ImageName, Labels, MemoryMib, NEW_FILES_BYTES_MAX,
    NetworkMode, NetworkSpec, ParseNameError, QuotaExceeded, Report, SandboxId, SandboxName,
    SandboxSpec, SandboxState, SecretName, UserId, VOLUMES_MAX,
};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{error, info};

use crate::admission::Busy;
use crate::bring_up::{GUEST_CONFIG_BYTES_MAX, bring_up};
use crate::disk_quota::DiskQuotaError;
use crate::driver::Driver;
use crate::identity::{Extras, GuestFile, random, random_hex};
use crate::networks::NetworkError;
use crate::secrets::{self, SecretError};
use crate::spares::Spare;
use crate::steps::Step;
use crate::templates::{Recipe, Template, TemplateError};
use crate::volumes::{self, VolumeUseError};
use crate::{Shared, Supervisor};

/// What a sandbox is asked to be. What is left out is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxRequest {
    /// Its name; `sandbox-` and six hex digits if absent.
    pub name: Option<SandboxName>,
    /// Its vCPUs; one if absent.
    pub cpus: Option<CpuCount>,
    /// Its memory; 512 MiB if absent.
    pub memory: Option<MemoryMib>,
    /// The size of its root disk; that of its image if absent.
    pub disk: Option<DiskMib>,
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
    /// How it is connected; as this host can if absent.
    pub network: Option<NetworkMode>,
    /// What it may reach beyond what everybody may.
    pub allow: Allowance,
    /// Its volumes, in the order in which they are mounted.
    pub volumes: Vec<Attach>,
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
    pub(crate) files: BTreeMap<String, GuestFile>,
    pub(crate) expires_at: Option<u64>,
    pub(crate) volumes: Vec<Attach>,
}

impl New {
    /// One without files that lives for ever, if `owner` may have it.
    pub(crate) async fn of(
        shared: &Shared,
        owner: UserId,
        spec: SandboxSpec,
        volumes: Vec<Attach>,
    ) -> Result<Self, CreateError> {
        shared.store.admit_sandbox(owner, &spec)?;
        shared.admit_network(owner, &spec.network).await?;
        let secrets = secrets::read(shared, owner, &spec.secrets)?;
        Ok(Self { owner, spec, secrets, files: BTreeMap::new(), expires_at: None, volumes })
    }

    /// Its row as it would be, to see whether there could be one.
    pub(crate) fn sample(&self) -> Result<NewSandbox, CreateError> {
        Ok(NewSandbox {
            id: SandboxId::from_entropy(random().map_err(CreateError::Entropy)?),
            owner: self.owner,
            spec: self.spec.clone(),
            origin: String::new(),
            agent_token: String::new(),
            expires_at: None,
            volumes: self.volumes.clone(),
        })
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
    /// It cannot have its network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// It cannot have one of its volumes.
    #[error(transparent)]
    Attach(AttachError),
    /// Two of its volumes would be at one place, or one of them twice, or there are too many.
    #[error("{0}")]
    Volumes(String),
    /// A volume cannot be used.
    #[error(transparent)]
    VolumeUse(#[from] VolumeUseError),
    /// The guest could not mount its volumes.
    #[error("the sandbox's guest could not mount its volumes: {0}")]
    Mount(String),
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
    /// Its image does not fit its disk.
    #[error("disk_mb must be at least {image_mib} for image `{image}`, not {}", disk.get())]
    DiskTooSmall {
        /// The disk that was asked for.
        disk: DiskMib,
        /// The image.
        image: ImageName,
        /// The image's size.
        image_mib: u64,
    },
    /// Its files are too large together.
    #[error(
        "the files have {bytes} bytes together; at most {NEW_FILES_BYTES_MAX} can be put into a new sandbox. Copy larger ones when it is there: bhatti file cp"
    )]
    FilesTooLarge {
        /// Their length.
        bytes: usize,
    },
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

impl From<DiskQuotaError> for CreateError {
    fn from(error: DiskQuotaError) -> Self {
        match error {
            DiskQuotaError::Quota(quota) => Self::Quota(quota),
            DiskQuotaError::Store(error) => Self::Store(error),
        }
    }
}

impl From<InsertError> for CreateError {
    fn from(error: InsertError) -> Self {
        match error {
            InsertError::NameTaken(name) => Self::NameTaken(name),
            InsertError::Quota(quota) | InsertError::Attach(AttachError::Quota(quota)) => {
                Self::Quota(quota)
            }
            InsertError::Attach(error) => Self::Attach(error),
            InsertError::Store(error) => Self::Store(error),
        }
    }
}

/// What a sandbox begins as.
pub(crate) enum Beginning {
    /// Nothing: it boots, because it was asked to or because of this.
    Boot(BootFiles, Option<&'static str>),
    /// A template.
    Template { recipe: Recipe, template: Template, spare: Option<Spare> },
    /// Something that was saved: its directory, and what its agent wants every connection to begin with.
    Saved { snapshot: PathBuf, token: String, origin: String },
}

impl Beginning {
    fn origin(&self) -> String {
        match self {
            Self::Boot(_, None) => "boot".to_owned(),
            Self::Boot(_, Some(why)) => format!("boot, because {why}"),
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
            disk: request.disk,
            environment: request.environment,
            keep_hot: request.keep_hot,
            labels: request.labels,
            secrets: request.secrets,
            init: request.init,
            image: request.image.map_or_else(usual_image, Ok)?,
            network: NetworkSpec {
                mode: request.network.unwrap_or_else(|| shared.usual_network()),
                allow: request.allow,
            },
        };
        check_volumes(&request.volumes)?;
        if request.network == Some(NetworkMode::None) && !spec.network.allow.ranges().is_empty() {
            return Err(NetworkError::NothingToAllow.into());
        }
        // Before there is a row: what is not allowed, or not set up at all, needs none.
        shared.store.admit_sandbox(owner, &spec)?;
        // Its files are few at first. An owner who is at the limit gets no more.
        let _disk = shared.admit_disk(owner, 0).await?;
        shared.store.admit_attach(owner, &request.volumes).map_err(InsertError::from)?;
        shared.admit_network(owner, &spec.network).await?;
        let secrets = secrets::read(shared, owner, &spec.secrets)?;
        let files = boot_files(shared, &spec.image).await?;
        check_disk(&spec, &files)?;
        let expires_at = request.lifetime.map(unix_seconds_after);
        let guest_files = guest_files(request.files)?;
        let engine = shared.engine.capabilities();
        let has_volumes = !request.volumes.is_empty();
        let beginning = if request.cold_boot {
            Beginning::Boot(files, None)
        } else if !engine.saves_memory {
            Beginning::Boot(files, Some("this engine saves no memory to fork"))
        } else if has_volumes && !engine.exchanges_disks {
            // Which volumes it has is known only now.
            Beginning::Boot(files, Some("with this engine a fork has no volumes of its own"))
        } else {
            let has_network = spec.network.mode == NetworkMode::Nat;
            let places = volumes::places(request.volumes.len());
            let recipe = Recipe {
                files,
                cpus: spec.cpus,
                memory: spec.memory,
                disk: spec.disk,
                has_network,
                places,
            };
            if recipe.is_usual() || shared.templates.find(shared, &recipe).is_some() {
                let template = shared.templates.get(shared, owner, &recipe).await?;
                let spare = shared.spares.take(&template);
                Beginning::Template { recipe, template, spare }
            } else {
                Beginning::Boot(recipe.files, Some(UNUSUAL_SIZE))
            }
        };
        let volumes = request.volumes;
        let new = New { owner, spec, secrets, files: guest_files, expires_at, volumes };
        self.create_from(new, beginning).await
    }

    /// Makes the template of sandboxes that ask for nothing in particular, unless it is there; what they begin as, if there are none.
    ///
    /// # Errors
    ///
    /// Returns the step that failed.
    pub async fn warm_up(&self) -> Result<(), CreateError> {
        let shared = &self.shared;
        let files = boot_files(shared, &usual_image()?).await?;
        if !shared.engine.capabilities().saves_memory {
            return Ok(shared.engine.prepare_root(&files.root).await?);
        }
        let recipe = usual_recipe(shared, files);
        let template = shared.templates.get(shared, UserId::ADMIN, &recipe).await?;
        shared.spares.fill(shared, &template, recipe.memory).await;
        Ok(())
    }

    /// Starts what is kept ready, if there is a template to start it from.
    pub async fn get_ready(&self) {
        let shared = &self.shared;
        let Ok(image) = usual_image() else { return };
        let Ok(files) = boot_files(shared, &image).await else { return };
        let recipe = usual_recipe(shared, files);
        if let Some(template) = shared.templates.find(shared, &recipe) {
            shared.spares.fill(shared, &template, recipe.memory).await;
        }
    }

    pub(crate) async fn create_from(
        &self,
        New { owner, spec, secrets, files, expires_at, volumes }: New,
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
        let new = NewSandbox { id, owner, spec, origin, agent_token, expires_at, volumes };
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

/// Why a sandbox boots whose memory or disk has an odd size.
const UNUSUAL_SIZE: &str =
    "its memory is not a multiple of 64 MiB, or its disk size is not a multiple of 1024 MiB";

/// What sandboxes that ask for nothing in particular are forked from.
fn usual_recipe(shared: &Shared, files: BootFiles) -> Recipe {
    let has_network = shared.usual_network() == NetworkMode::Nat;
    Recipe {
        files,
        cpus: CpuCount::ONE,
        memory: MemoryMib::DEFAULT,
        disk: None,
        has_network,
        places: 0,
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

/// Whether these can be the volumes of one sandbox.
fn check_volumes(volumes: &[Attach]) -> Result<(), CreateError> {
    if volumes.len() > VOLUMES_MAX {
        let number = volumes.len();
        return Err(CreateError::Volumes(format!(
            "{number} volumes are too many: a sandbox has at most {VOLUMES_MAX}"
        )));
    }
    for (place, volume) in volumes.iter().enumerate() {
        for other in &volumes[..place] {
            if other.mount == volume.mount {
                let mount = &volume.mount;
                return Err(CreateError::Volumes(format!("two volumes are at `{mount}`")));
            }
            let (above, below) = (volume.mount.as_str(), other.mount.as_str());
            if below.strip_prefix(above).is_some_and(|rest| rest.starts_with('/')) {
                return Err(CreateError::Volumes(format!(
                    "the volume at `{above}` would hide the one at `{below}`: name it first"
                )));
            }
            if other.name == volume.name {
                let name = &volume.name;
                return Err(CreateError::Volumes(format!("two volumes are called `{name}`")));
            }
        }
    }
    Ok(())
}

/// The first second since 1970 that begins when `time` is over.
fn unix_seconds_after(time: Duration) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let then = now.saturating_add(time);
    then.as_secs() + u64::from(then.subsec_nanos() > 0)
}

/// Refuses a disk that is too small for its image.
fn check_disk(spec: &SandboxSpec, files: &BootFiles) -> Result<(), CreateError> {
    let Some(disk) = spec.disk else { return Ok(()) };
    let image = std::fs::metadata(&files.root);
    let image_bytes = image
        .map_err(|source| bhatti_image::StoreError::File {
            step: "look at",
            path: files.root.clone(),
            source,
        })?
        .len();
    if disk.bytes() >= image_bytes {
        return Ok(());
    }
    let image_mib = image_bytes.div_ceil(1 << 20);
    Err(CreateError::DiskTooSmall { disk, image: spec.image.clone(), image_mib })
}

/// The files by their paths, checked.
fn guest_files(files: Vec<FileRequest>) -> Result<BTreeMap<String, GuestFile>, CreateError> {
    let bytes = files.iter().map(|file| file.content.len()).sum();
    if bytes > NEW_FILES_BYTES_MAX {
        return Err(CreateError::FilesTooLarge { bytes });
    }
    let file = |FileRequest { path, content, mode }: FileRequest| {
        let is_file = path.starts_with('/') && !path.ends_with('/') && !path.contains('\0');
        if !is_file || path.split('/').any(|part| part == "..") {
            return Err(CreateError::FilePath(path));
        }
        Ok((path, GuestFile { content, mode }))
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
        // Its row stays, and with it what it has: its VM may still write volumes. The next daemon removes both.
        shared.registry.remove(id);
        return error;
    }
    let had_network = driver.address.is_some();
    if let Err(error) = driver.abandon() {
        error!(sandbox = %id, error = %Report(&error), "Failed to forget a sandbox that did not come up");
    }
    if had_network {
        shared.settle_networks().await;
    }
    error
}
