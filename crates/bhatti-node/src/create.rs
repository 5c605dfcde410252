//! Creating a sandbox's VM: from a base snapshot, from a saved sandbox, or by booting.
//!
//! Control prepares a creation first, inserts the row with the prepared id, and then creates. A
//! prepared creation that gets no row is given back.

use std::path::PathBuf;
use std::sync::Arc;

use bhatti_agent::CallError;
use bhatti_engine::{BootError, RestoreError, VmmError};
use bhatti_image::BootFiles;
use bhatti_store::{SandboxRow, StoreError};
use bhatti_types::{
    CpuCount, DEFAULT_IMAGE, DiskMib, ImageName, MemoryMib, NetworkMode, ParseNameError, Report,
    SandboxId, SandboxState, UserId,
};
use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::admission::Busy;
use crate::bases::{Base, BaseError, Recipe};
use crate::bring_up::bring_up;
use crate::driver::Driver;
use crate::driver::state::State;
use crate::driver::steps::Step;
use crate::identity::{Extras, GUEST_CONFIG_BYTES_MAX, random};
use crate::networks::NetworkError;
use crate::pool::Spare;
use crate::volumes::{VolumeUseError, slots};
use crate::{Node, Shared};

/// Reason why a sandbox boots if its memory or disk has an unusual size.
const UNUSUAL_SIZE: &str =
    "its memory is not a multiple of 64 MiB, or its disk size is not a multiple of 1024 MiB";

/// The machine that a new sandbox gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The image to start from.
    pub image: ImageName,
    /// The number of vCPUs.
    pub cpus: CpuCount,
    /// The memory.
    pub memory: MemoryMib,
    /// The size of the root disk; that of the image if absent.
    pub disk: Option<DiskMib>,
    /// Whether the machine has a network card.
    pub has_network: bool,
    /// The number of volumes.
    pub volumes: usize,
    /// Whether it boots instead of being forked from a base snapshot.
    pub cold_boot: bool,
}

/// A prepared creation: the sandbox's id and the source of its VM.
pub struct Prepared {
    id: SandboxId,
    source: BootSource,
}

impl Prepared {
    /// A creation with a random id.
    pub(crate) fn with_new_id(source: BootSource) -> Result<Self, getrandom::Error> {
        Ok(Self { id: SandboxId::from_entropy(random()?), source })
    }

    /// Returns the id that the sandbox must get.
    #[must_use]
    pub const fn id(&self) -> SandboxId {
        self.id
    }

    /// Returns the origin for the sandbox's row: `boot` and a reason, or `template`, `sandbox` or
    /// `snapshot` and an id.
    #[must_use]
    pub fn origin(&self) -> String {
        match &self.source {
            BootSource::Boot(_, None) => "boot".to_owned(),
            BootSource::Boot(_, Some(why)) => format!("boot, because {why}"),
            BootSource::Base { base, .. } => format!("template {}", base.key),
            BootSource::Saved { origin, .. } => origin.clone(),
        }
    }
}

/// The source of a sandbox's VM.
pub(crate) enum BootSource {
    /// The files to boot, and why the sandbox boots if the request did not ask for that.
    Boot(BootFiles, Option<&'static str>),
    /// A base snapshot, and a spare that was made from it.
    Base { recipe: Recipe, base: Base, spare: Option<Spare> },
    /// A saved sandbox: its directory, and the token that its agent asks for.
    Saved { snapshot: PathBuf, token: String, origin: String },
}

/// A sandbox's VM could not be created. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The network could not be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A volume cannot be used.
    #[error(transparent)]
    VolumeUse(#[from] VolumeUseError),
    /// The guest could not mount the volumes.
    #[error("the sandbox's guest could not mount its volumes: {0}")]
    Mount(String),
    /// There is no such image.
    #[error("image `{0}` not found")]
    NoSuchImage(ImageName),
    /// The guest could not write a file.
    #[error("the sandbox's guest could not write its files: {0}")]
    Files(String),
    /// The image does not fit the disk.
    #[error("disk_mb must be at least {image_mib} for image `{image}`, not {}", disk.get())]
    DiskTooSmall {
        /// The requested size of the disk.
        disk: DiskMib,
        /// The image.
        image: ImageName,
        /// The image's size.
        image_mib: u64,
    },
    /// The guest's configuration does not fit one message.
    #[error(
        "environment, secrets, files and init script have {bytes} bytes together; at most {GUEST_CONFIG_BYTES_MAX} fit"
    )]
    TooMuch {
        /// Their length, encoded.
        bytes: usize,
    },
    /// The files to boot are missing.
    #[error(transparent)]
    Images(#[from] bhatti_image::StoreError),
    /// The VM did not boot.
    #[error("failed to boot the sandbox")]
    Boot(#[from] BootError),
    /// The base snapshot could not be made.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The snapshot cannot be used.
    #[error("failed to fork the sandbox")]
    Restore(#[from] RestoreError),
    /// The VMM failed.
    #[error("failed to start the sandbox's virtual machine")]
    Vmm(#[from] VmmError),
    /// No memory is free.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// The guest did not accept its configuration.
    #[error("failed to configure the sandbox's guest")]
    Unconfigured(#[source] CallError),
    /// The guest's report cannot be encoded.
    #[error("failed to encode the guest's report")]
    Report(#[from] serde_json::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The host gives no random bytes.
    #[error("failed to draw an id")]
    Entropy(#[from] getrandom::Error),
    /// The default image has an invalid name.
    #[error(transparent)]
    Name(#[from] ParseNameError),
    /// The daemon is stopping.
    #[error("the daemon stopped before the sandbox was ready")]
    Interrupted,
}

impl Node {
    /// Prepares a creation: finds the image, and makes the base snapshot of this shape for `owner`
    /// if there is none.
    ///
    /// # Errors
    ///
    /// Returns the step that failed.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a base snapshot that is being made is finished.
    pub async fn prepare(&self, owner: UserId, shape: Shape) -> Result<Prepared, CreateError> {
        let shared = &self.shared;
        let files = boot_files(shared, &shape.image).await?;
        check_disk(&shape, &files)?;
        if let Some(why) = boot_reason(shared, &shape) {
            return Ok(Prepared::with_new_id(BootSource::Boot(files, why))?);
        }
        let recipe = Recipe {
            files,
            cpus: shape.cpus,
            memory: shape.memory,
            disk: shape.disk,
            has_network: shape.has_network,
            slots: slots(shape.volumes),
        };
        if !recipe.is_usual() && shared.bases.find(shared, &recipe).is_none() {
            let source = BootSource::Boot(recipe.files, Some(UNUSUAL_SIZE));
            return Ok(Prepared::with_new_id(source)?);
        }
        let base = shared.bases.get(shared, owner, &recipe).await?;
        // A spare's directory is the sandbox's directory, so the sandbox gets its id.
        let spare = shared.spares.take(&base);
        let id = spare.as_ref().map(|spare| spare.id);
        let source = BootSource::Base { recipe, base, spare };
        Ok(match id {
            Some(id) => Prepared { id, source },
            None => Prepared::with_new_id(source)?,
        })
    }

    /// Gives back the spare of a prepared creation that does not take place.
    pub fn give_back(&self, prepared: Prepared) {
        if let BootSource::Base { spare: Some(spare), .. } = prepared.source {
            self.shared.spares.put_back(spare);
        }
    }

    /// Creates the VM of a sandbox whose row was inserted with the prepared id, and waits until
    /// commands can be run in it.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. The row and the sandbox's files are gone then.
    ///
    /// # Cancel safety
    ///
    /// A creation that has begun continues.
    pub async fn create(
        &self,
        prepared: Prepared,
        row: SandboxRow,
        extras: Extras,
    ) -> Result<SandboxRow, CreateError> {
        let shared = &self.shared;
        let began = Instant::now();
        let driver = Driver::register(shared, &row, State::Creating);
        driver.sandbox.reached(Step::Inserted).await;
        let (reply, created) = oneshot::channel();
        let shared = Arc::clone(shared);
        // In a task: if the caller is canceled, the sandbox must still end up running or removed.
        tokio::spawn(async move {
            match bring_up_guarded(&shared, driver, &row, extras, prepared.source).await {
                (driver, Ok(identity)) => {
                    announce(&shared, &row, began);
                    let row = SandboxRow { state: SandboxState::Running, identity, ..row };
                    drop(reply.send(Ok(row)));
                    driver.run().await;
                }
                (driver, Err(error)) => {
                    let (driver, error) = undo(&shared, driver, error).await;
                    drop(reply.send(Err(error)));
                    if let Some(driver) = driver {
                        driver.run().await;
                    }
                }
            }
        });
        created.await.map_err(|_| CreateError::Interrupted)?
    }

    /// Makes the base snapshot of the default image and shape if there is none, and starts spares.
    /// An engine without snapshots prepares the image's root file system instead.
    ///
    /// # Errors
    ///
    /// Returns the step that failed.
    pub async fn warm_up(&self) -> Result<(), CreateError> {
        let shared = &self.shared;
        let files = boot_files(shared, &DEFAULT_IMAGE.parse()?).await?;
        if !shared.engine.capabilities().saves_memory {
            return Ok(shared.engine.prepare_root(&files.root).await?);
        }
        let recipe = default_recipe(shared, files);
        let base = shared.bases.get(shared, UserId::ADMIN, &recipe).await?;
        shared.spares.fill(shared, &base, recipe.memory).await;
        Ok(())
    }

    /// Starts spares if there is a base snapshot to start them from.
    pub async fn start_spares(&self) {
        let shared = &self.shared;
        let Ok(image) = DEFAULT_IMAGE.parse() else { return };
        let Ok(files) = boot_files(shared, &image).await else { return };
        let recipe = default_recipe(shared, files);
        if let Some(base) = shared.bases.find(shared, &recipe) {
            shared.spares.fill(shared, &base, recipe.memory).await;
        }
    }
}

/// Returns `Some` if a sandbox of this shape boots, with the reason unless the request asks for it.
fn boot_reason(shared: &Shared, shape: &Shape) -> Option<Option<&'static str>> {
    let engine = shared.engine.capabilities();
    if shape.cold_boot {
        Some(None)
    } else if !engine.saves_memory {
        Some(Some("this engine cannot save memory to fork"))
    } else if shape.volumes > 0 && !engine.exchanges_disks {
        // The base snapshot was made before the volumes were known.
        Some(Some("this engine cannot give a fork volumes of its own"))
    } else {
        None
    }
}

/// Returns the recipe of sandboxes whose requests name no image, size or volume.
fn default_recipe(shared: &Shared, files: BootFiles) -> Recipe {
    let has_network = shared.default_network() == NetworkMode::Nat;
    Recipe {
        files,
        cpus: CpuCount::ONE,
        memory: MemoryMib::DEFAULT,
        disk: None,
        has_network,
        slots: 0,
    }
}

/// Returns the files that an image boots from.
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

/// Refuses a disk that is too small for its image.
fn check_disk(shape: &Shape, files: &BootFiles) -> Result<(), CreateError> {
    let Some(disk) = shape.disk else { return Ok(()) };
    let image = std::fs::metadata(&files.root);
    let image_bytes = image
        .map_err(|source| bhatti_image::StoreError::File {
            step: "read the size of",
            path: files.root.clone(),
            source,
        })?
        .len();
    if disk.bytes() >= image_bytes {
        return Ok(());
    }
    let image_mib = image_bytes.div_ceil(1 << 20);
    Err(CreateError::DiskTooSmall { disk, image: shape.image.clone(), image_mib })
}

fn announce(shared: &Shared, row: &SandboxRow, began: Instant) {
    let took = began.elapsed();
    shared.metrics.created(&row.origin, took);
    let create_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    info!(
        sandbox = %row.id,
        name = %row.spec.name,
        origin = row.origin,
        create_ms,
        "Sandbox created"
    );
    let detail = json!({ "origin": row.origin, "create_ms": create_ms });
    shared.control.record("sandbox.created", row.owner, row.id, detail);
}

/// Brings a sandbox's VM up in a task of its own, so that a panic there leaves a driver that can
/// destroy the sandbox.
async fn bring_up_guarded(
    shared: &Arc<Shared>,
    driver: Driver,
    row: &SandboxRow,
    extras: Extras,
    source: BootSource,
) -> (Driver, Result<Option<String>, CreateError>) {
    let (task_shared, task_row) = (Arc::clone(shared), row.clone());
    let brought_up = tokio::spawn(async move {
        let result = bring_up(&task_shared, &driver.sandbox, &task_row, &extras, source).await;
        (driver, result)
    });
    match brought_up.await {
        Ok(result) => result,
        Err(_) => {
            let driver = Driver::register(shared, row, State::Creating);
            (driver, Err(CreateError::Interrupted))
        }
    }
}

/// Removes all that is left of a sandbox whose creation failed. If that fails, returns its driver,
/// which tries again.
async fn undo(
    shared: &Shared,
    driver: Driver,
    error: CreateError,
) -> (Option<Driver>, CreateError) {
    let sandbox = &driver.sandbox;
    let id = sandbox.id;
    if let Err(left) = shared.engine.remove(id, &sandbox.directory()).await {
        error!(
            sandbox = %id,
            error = %Report(&left),
            "Failed to remove a sandbox that was not created; the daemon tries again"
        );
        if let Err(error) = shared.store.set_sandbox_state(id, SandboxState::Destroyed) {
            warn!(sandbox = %id, error = %Report(&error), "Failed to note that a sandbox is removed");
        }
        // The VM may be alive, so its memory stays reserved.
        let memory = Arc::new(shared.admission.count(sandbox.memory));
        sandbox.access.set(State::Destroying(Some(memory)));
        return (Some(driver), error);
    }
    let had_network = sandbox.address.is_some();
    if let Err(error) = driver.abandon() {
        error!(
            sandbox = %id,
            error = %Report(&error),
            "Failed to delete the row of a sandbox that was not created"
        );
    }
    if had_network {
        shared.settle_networks().await;
    }
    (None, error)
}
