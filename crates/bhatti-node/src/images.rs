//! The images of this host: those that `bhatti setup` and `bhatti image build` made, by name, and
//! the root file systems of users' images.
//!
//! The store's rows say which files are in use. What a pull or an import makes is in no row yet, so
//! nothing is removed while one of them is at work ([`Held`]).

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;

use bhatti_host::{blocking, disk};
use bhatti_image::{ImageSummary, ImportError, Imported, RemoveError, StoreError};
use bhatti_registry::{Blobs, Credentials, Reference, Registries, RegistryError};
use bhatti_types::{ImageConfig, ImageName, Report, RootName};
use tokio::sync::OwnedRwLockReadGuard;
use tokio::task::spawn_blocking;
use tracing::warn;

use crate::pull::{ImageAccess, ImagePuller, PullError, PullProgress, Pulled};
use crate::{Node, Shared};

/// Keeps files of users' images from being removed until it is dropped.
#[derive(Debug)]
pub struct Held {
    _guard: OwnedRwLockReadGuard<()>,
}

/// The files of users' images that are in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsedImages {
    /// The root file systems.
    pub roots: BTreeSet<RootName>,
    /// SHA-256 of manifests, configurations and layers, in hexadecimal.
    pub blobs: BTreeSet<String>,
}

/// What stays of the layers that no image has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leftovers {
    /// Nothing.
    Go,
    /// The newest ones, for the next pull, within a limit of 2 GiB.
    Stay,
}

/// The disk space that layers may take which no image has, in bytes.
const LEFTOVER_BYTES_MAX: u64 = 2 << 30;

/// Files of images could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A root file system could not be removed.
    #[error(transparent)]
    Root(#[from] StoreError),
    /// A layer could not be removed.
    #[error(transparent)]
    Layer(#[from] RegistryError),
}

impl Node {
    /// Returns the root file system of an image that was built on this host.
    ///
    /// # Errors
    ///
    /// Returns an error if the index of images cannot be read.
    pub fn host_root(&self, image: &str) -> Result<Option<RootName>, StoreError> {
        blocking(|| self.shared.config.images.root_of(image))
    }

    /// Returns the images that were built on this host, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the index of images or a file cannot be read.
    pub fn host_images(&self) -> Result<Vec<ImageSummary>, StoreError> {
        blocking(|| self.shared.config.images.summaries())
    }

    /// Removes an image that was built on this host.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such image, or if it is the default image.
    pub async fn remove_host_image(&self, image: &ImageName) -> Result<(), RemoveError> {
        let (images, image) = (self.shared.config.images.clone(), image.clone());
        let removed = spawn_blocking(move || images.remove(&image)).await;
        removed.unwrap_or(Err(RemoveError::Interrupted))
    }

    /// Returns the bytes that an archive may have: half of the disk's free space.
    ///
    /// # Errors
    ///
    /// Returns an error if the free space cannot be read.
    pub fn archive_room(&self) -> std::io::Result<u64> {
        blocking(|| disk::free_bytes(self.shared.config.images.directory())).map(|free| free / 2)
    }

    /// Makes an unnamed file for an archive that is being uploaded.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be made.
    pub fn image_upload(&self) -> Result<File, StoreError> {
        blocking(|| self.shared.config.images.upload())
    }

    /// Makes the root file system of an image from an archive. Its files have at most `bytes_max`
    /// bytes. An image that comes without settings gets `settings`. The caller holds the images
    /// until the store has a row of it: see [`hold_images`](Self::hold_images).
    ///
    /// # Errors
    ///
    /// Returns an error that names what is wrong with the archive.
    pub async fn import_image(
        &self,
        archive: File,
        bytes_max: Option<u64>,
        settings: Option<ImageConfig>,
    ) -> Result<Imported, ImportError> {
        self.shared.config.images.import(archive, bytes_max, settings).await
    }

    /// Pulls the image of a reference for the user whose access this is. The caller holds
    /// the images until the store has a row of it: see [`hold_images`](Self::hold_images).
    ///
    /// # Errors
    ///
    /// Returns an error that names the registry, or the entry of a layer at fault.
    ///
    /// # Cancel safety
    ///
    /// Layers that have arrived stay, and the next pull continues them. Nothing else stays.
    pub async fn pull_image(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
        access: ImageAccess,
        progress: Arc<dyn PullProgress>,
    ) -> Result<Pulled, PullError> {
        puller(&self.shared)?.pull(reference, credentials, access, progress).await
    }

    /// Asks a registry whether it accepts credentials.
    ///
    /// # Errors
    ///
    /// Returns an error that names the registry.
    pub async fn check_login(
        &self,
        registry: &str,
        credentials: &Credentials,
    ) -> Result<(), PullError> {
        Ok(registries(&self.shared)?.check_login(registry, credentials).await?)
    }

    /// Keeps files of users' images from being removed until the result is dropped. Waits while
    /// they are being removed.
    pub async fn hold_images(&self) -> Held {
        Held { _guard: Arc::clone(&self.shared.images_hold).read_owned().await }
    }

    /// Removes what an earlier daemon left of images that it was building.
    pub(crate) fn settle_images(&self) {
        let removed = blocking(|| self.shared.config.images.remove_abandoned_builds());
        if let Err(error) = removed {
            warn!(error = %Report(&error), "Failed to remove what an earlier daemon left of an image");
        }
    }

    /// Removes the files of users' images that are not in use. Returns the bytes that this frees.
    /// While images are held, nothing is removed.
    ///
    /// # Errors
    ///
    /// Returns an error if a file cannot be removed, or that of `used`.
    pub fn collect_images<E: From<CollectError>>(
        &self,
        leftovers: Leftovers,
        used: impl FnOnce() -> Result<UsedImages, E>,
    ) -> Result<u64, E> {
        let shared = &self.shared;
        // One after the other: the later one sees newer rows.
        let _turn = blocking(|| shared.collecting_images.lock());
        let Ok(_alone) = shared.images_hold.try_write() else { return Ok(0) };
        let abandoned = blocking(|| shared.config.images.remove_abandoned_builds());
        abandoned.map_err(CollectError::from)?;
        let UsedImages { roots, blobs: used } = used()?;
        let roots =
            blocking(|| shared.config.images.collect(&roots)).map_err(CollectError::from)?;
        let blobs = blobs(shared);
        let left = match leftovers {
            Leftovers::Go => 0,
            Leftovers::Stay => LEFTOVER_BYTES_MAX,
        };
        let layers = blocking(|| blobs.collect(&used, left)).map_err(CollectError::from)?;
        Ok(roots + layers)
    }
}

/// Returns the puller. The first call reads this machine's certificate authorities.
fn puller(shared: &Shared) -> Result<ImagePuller, PullError> {
    let mut puller = shared.puller.lock();
    if let Some(puller) = &*puller {
        return Ok(puller.clone());
    }
    let registries = blocking(|| Registries::new(shared.config.registries.clone()));
    let registries = registries.map_err(PullError::Prepare)?;
    let made = ImagePuller::new(shared.config.images.clone(), registries, blobs(shared));
    *puller = Some(made.clone());
    Ok(made)
}

/// Returns the client of registries.
pub(crate) fn registries(shared: &Shared) -> Result<Registries, PullError> {
    puller(shared).map(|puller| puller.registries().clone())
}

/// Returns the layers of this host, as registries have them.
pub(crate) fn blobs(shared: &Shared) -> Blobs {
    Blobs::new(&shared.config.images.directory().join("blobs"))
}
