//! What a sandbox's VM starts from, and why it may not start.

use std::path::PathBuf;
use std::sync::Arc;

use bhatti_agent::CallError;
use bhatti_engine::{BootError, RestoreError, VmmError};
use bhatti_image::BootFiles;
use bhatti_store::StoreError;
use bhatti_types::{DEFAULT_IMAGE, DiskMib, ImageName, RootName, SandboxId};
use tokio::task::spawn_blocking;

use crate::Shared;
use crate::admission::Busy;
use crate::bases::{Base, BaseError, Recipe};
use crate::identity::{GUEST_CONFIG_BYTES_MAX, random};
use crate::networks::NetworkError;
use crate::pool::Spare;
use crate::volumes::VolumeUseError;

/// A prepared creation: the sandbox's id and the source of its VM.
pub struct Prepared {
    pub(crate) id: SandboxId,
    pub(crate) source: BootSource,
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
    /// The daemon is stopping.
    #[error("the daemon stopped before the sandbox was ready")]
    Interrupted,
}

/// Returns the files of a VM with this root file system.
pub(crate) async fn boot_files(
    shared: &Arc<Shared>,
    root: RootName,
) -> Result<BootFiles, CreateError> {
    let shared = Arc::clone(shared);
    let found =
        spawn_blocking(move || shared.config.images.boot_files_of(&root, &shared.config.lohar));
    Ok(found.await.map_err(|_| CreateError::Interrupted)??)
}

/// Returns the files of a VM of the default image.
pub(crate) async fn default_boot_files(shared: &Arc<Shared>) -> Result<BootFiles, CreateError> {
    let shared = Arc::clone(shared);
    let found = spawn_blocking(move || {
        shared.config.images.boot_files(DEFAULT_IMAGE, &shared.config.lohar)
    });
    Ok(found.await.map_err(|_| CreateError::Interrupted)??)
}
