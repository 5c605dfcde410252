//! Creating a sandbox's VM: from a base snapshot, from a saved sandbox, or by booting.
//!
//! Control prepares a creation first, inserts the row with the prepared id, and then creates. A
//! prepared creation that gets no row is given back.

use std::sync::Arc;

use bhatti_host::blocking;
use bhatti_image::BootFiles;
use bhatti_store::SandboxRow;
use bhatti_types::{
    CpuCount, DiskMib, ImageName, MemoryMib, NetworkMode, Report, RootName, SandboxState, UserId,
};
use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::bases::Recipe;
use crate::boot_source::{BootSource, CreateError, Prepared, boot_files, default_boot_files};
use crate::bring_up::bring_up;
use crate::driver::Driver;
use crate::driver::state::State;
use crate::driver::steps::Step;
use crate::identity::Extras;
use crate::volumes::slots;
use crate::{Node, Shared};

/// Reason why a sandbox boots if its memory or disk has an unusual size.
const UNUSUAL_SIZE: &str =
    "its memory is not a multiple of 64 MiB, or its disk size is not a multiple of 1024 MiB";

/// The machine that a new sandbox gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The image to start from, for errors.
    pub image: ImageName,
    /// The root file system of the image.
    pub root: RootName,
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
        let files = boot_files(shared, shape.root.clone()).await?;
        blocking(|| check_disk(&shape, &files))?;
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
        let claim = shared.store.first_claim(row.id);
        let driver = Driver::register(shared, &row, claim, State::Creating);
        driver.sandbox.reached(Step::Inserted).await;
        let (reply, created) = oneshot::channel();
        let shared = Arc::clone(shared);
        // In a task: if the caller is canceled, the sandbox must still end up running or removed.
        tokio::spawn(async move {
            match bring_up_guarded(&shared, driver, &row, extras, prepared.source).await {
                (driver, Ok(identity)) => {
                    driver.sandbox.announced();
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
        let files = default_boot_files(shared).await?;
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
        let Ok(files) = default_boot_files(shared).await else { return };
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
    let claim = driver.sandbox.claim;
    let (task_shared, task_row) = (Arc::clone(shared), row.clone());
    let brought_up = tokio::spawn(async move {
        let result = bring_up(&task_shared, &driver.sandbox, &task_row, &extras, source).await;
        (driver, result)
    });
    match brought_up.await {
        Ok(result) => result,
        Err(_) => {
            let driver = Driver::register(shared, row, claim, State::Creating);
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
        if let Err(error) = shared.store.set_sandbox_state(&sandbox.claim, SandboxState::Destroyed)
        {
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
