//! Pulls images from registries: downloads layers side by side, and unpacks each as soon as the
//! ones below it are unpacked.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bhatti_host::{blocking, disk};
use bhatti_image::{ConfigError, Configuration, ImageStore, ImportError, RootFile, StoreError};
use bhatti_registry::{
    Blob, BlobAccess, Blobs, Credentials, Progress, Reference, Registries, RegistryError,
    RemoteImage,
};
use bhatti_types::{ImageConfig, RootName};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::turns::Turns;

/// Number of layers of one image that are downloaded at once.
const DOWNLOADS: usize = 3;

/// An image could not be pulled. The images are unchanged; layers that have arrived stay.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry refused, failed, or cannot be reached.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The image's configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The image's manifest and its configuration contradict each other.
    #[error(
        "the manifest of `{reference}` has {layers} layers, and its configuration names {named}"
    )]
    Layers {
        /// The image.
        reference: String,
        /// The layers of the manifest.
        layers: usize,
        /// The layers that the configuration names.
        named: usize,
    },
    /// This machine cannot make TLS connections.
    #[error("failed to prepare connections to registries")]
    Prepare(#[source] io::Error),
    /// The layers are larger than the image may be.
    #[error(
        "`{reference}` has layers of {} MiB, and its owner has disk space of {} MiB left",
        needed_bytes.div_ceil(1 << 20), left_bytes >> 20
    )]
    OverQuota {
        /// The image.
        reference: String,
        /// Size of the layers as the registry has them, in bytes.
        needed_bytes: u64,
        /// What the owner's images may take yet, in bytes.
        left_bytes: u64,
    },
    /// The layers do not fit on the disk.
    #[error(
        "`{reference}` has layers of {} MiB, and the host's disk has {} MiB free; pulling it takes twice its layers",
        needed_bytes >> 20, free_bytes >> 20
    )]
    DiskFull {
        /// The image.
        reference: String,
        /// Size of the layers as the registry has them, in bytes.
        needed_bytes: u64,
        /// Free space, in bytes.
        free_bytes: u64,
    },
    /// A layer could not be unpacked, or the image not be built.
    #[error(transparent)]
    Build(#[from] ImportError),
    /// The images of this host could not be read or changed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The process is ending.
    #[error("the pull was interrupted")]
    Interrupted,
}

/// Receives the progress of a pull.
pub trait PullProgress: Send + Sync {
    /// The image has these layers, lowest first.
    fn begin(&self, layers: &[Blob]);
    /// Bytes of a layer arrived, or were on disk. Negative if they turned out to be wrong.
    fn arrived(&self, layer: usize, bytes: i64);
    /// A layer has been unpacked.
    fn unpacked(&self, layer: usize);
}

/// Pulls images into the store of one host. Clones share their locks.
#[derive(Clone)]
pub(crate) struct ImagePuller {
    images: ImageStore,
    registries: Registries,
    blobs: Blobs,
    /// One task at a time builds the image of a configuration.
    building: Arc<Turns<String>>,
}

/// What a user may take from this host when pulling, and how much room the user has.
#[derive(Clone, Debug, Default)]
pub struct ImageAccess {
    /// The blobs that the user may take.
    pub blobs: BlobAccess,
    /// The root file systems of the images that the user can use.
    pub roots: BTreeSet<RootName>,
    /// Maximum of the image's bytes; no limit if absent.
    pub bytes_max: Option<u64>,
}

/// A pulled image, which is not in use yet.
pub struct Pulled {
    /// Size of its layers as the registry has them, in bytes.
    pub layer_bytes: u64,
    /// Its root file system.
    pub root: RootFile,
    /// Its settings.
    pub config: ImageConfig,
    /// SHA-256 of its manifest, in hexadecimal.
    pub manifest: String,
    /// SHA-256 of its manifest, its configuration and its layers as the registry has them.
    pub blobs: Vec<String>,
    /// The registry and the digest of the manifest.
    pub source: String,
}

/// A download that ends with its pull.
struct Download(JoinHandle<Result<(), RegistryError>>);

impl Drop for Download {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Reports the bytes of one layer.
struct Layer {
    number: usize,
    progress: Arc<dyn PullProgress>,
}

impl Progress for Layer {
    fn add(&self, bytes: u64) {
        self.progress.arrived(self.number, bytes.cast_signed());
    }

    fn remove(&self, bytes: u64) {
        self.progress.arrived(self.number, -bytes.cast_signed());
    }
}

impl ImagePuller {
    pub(crate) fn new(images: ImageStore, registries: Registries, blobs: Blobs) -> Self {
        Self { images, registries, blobs, building: Arc::default() }
    }

    pub(crate) fn registries(&self) -> &Registries {
        &self.registries
    }

    /// Pulls the image of a reference. What others have pulled is used only if the user has
    /// access to it: a manifest can name any digest.
    ///
    /// # Errors
    ///
    /// Returns an error that names the registry, or the entry of a layer at fault.
    ///
    /// # Cancel safety
    ///
    /// Layers that have arrived stay, and the next pull continues them. Nothing else stays.
    pub(crate) async fn pull(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
        access: ImageAccess,
        progress: Arc<dyn PullProgress>,
    ) -> Result<Pulled, PullError> {
        let ImageAccess { blobs: access, roots, bytes_max } = access;
        let image = self.registries.find(reference, credentials).await?;
        progress.begin(&image.layers);
        let written = self.registries.config(reference, credentials, &image.config).await?;
        let Configuration { image: config, diff_ids } = Configuration::parse(&written)?;
        if diff_ids.len() != image.layers.len() {
            let (layers, named) = (image.layers.len(), diff_ids.len());
            return Err(PullError::Layers { reference: reference.to_string(), layers, named });
        }
        // Another pull of this image may be at work. What it builds is used.
        let _turn = self.building.take(image.config.sha256.clone()).await;
        self.check_space(reference, &image.layers, bytes_max)?;
        // Also for an image that is built already: its layers may be missing.
        let downloads =
            self.start_downloads((reference, credentials), access, &image.layers, &progress);
        let known = self.known(&image).await?.filter(|root| roots.contains(&root.name));
        let root = match known {
            Some(root) => {
                for (number, mut download) in downloads.into_iter().enumerate() {
                    (&mut download.0).await.map_err(|_| PullError::Interrupted)??;
                    progress.unpacked(number);
                }
                root
            }
            None => {
                let mut build = blocking(|| self.images.begin_layers(bytes_max))?;
                let layers = downloads.into_iter().zip(&image.layers).zip(&diff_ids);
                for (number, ((mut download, layer), diff_id)) in layers.enumerate() {
                    (&mut download.0).await.map_err(|_| PullError::Interrupted)??;
                    build.apply(open(&self.blobs.path(layer))?, diff_id).await?;
                    progress.unpacked(number);
                }
                build.finish(Some(&image.config.sha256), false).await?
            }
        };
        let kept = blocking(|| Ok([self.blobs.keep(&image.manifest)?, self.blobs.keep(&written)?]));
        let [manifest, written] = kept.map_err(|error: RegistryError| error)?;
        let source = format!("{} {}", reference.registry(), image.digest);
        let layer_bytes = image.layers.iter().map(|layer| layer.bytes).sum();
        let layers = image.layers.into_iter().map(|layer| layer.sha256);
        let blobs = [manifest.clone(), written].into_iter().chain(layers).collect();
        Ok(Pulled { layer_bytes, root, config, manifest, blobs, source })
    }

    /// Returns the root file system of an image that has been built before.
    async fn known(&self, image: &RemoteImage) -> Result<Option<RootFile>, PullError> {
        let (images, config) = (self.images.clone(), image.config.sha256.clone());
        let found = spawn_blocking(move || images.built(&config));
        Ok(found.await.map_err(|_| PullError::Interrupted)??)
    }

    /// Refuses layers that do not fit on the disk. Each takes its own size, and unpacked at least
    /// as much again.
    fn check_space(
        &self,
        reference: &Reference,
        layers: &[Blob],
        bytes_max: Option<u64>,
    ) -> Result<(), PullError> {
        let needed_bytes = layers.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.bytes));
        if let Some(left_bytes) = bytes_max.filter(|left| needed_bytes > *left) {
            let reference = reference.to_string();
            return Err(PullError::OverQuota { reference, needed_bytes, left_bytes });
        }
        let directory = self.images.directory();
        let failed = |source| RegistryError::File {
            step: "read the free space of",
            path: directory.into(),
            source,
        };
        let free_bytes = blocking(|| {
            std::fs::create_dir_all(directory)?;
            disk::free_bytes(directory)
        });
        let free_bytes = free_bytes.map_err(failed)?;
        if needed_bytes.saturating_mul(2) > free_bytes {
            let reference = reference.to_string();
            return Err(PullError::DiskFull { reference, needed_bytes, free_bytes });
        }
        Ok(())
    }

    fn start_downloads(
        &self,
        (reference, credentials): (&Reference, Option<&Credentials>),
        access: BlobAccess,
        layers: &[Blob],
        progress: &Arc<dyn PullProgress>,
    ) -> Vec<Download> {
        let (turns, access) = (Arc::new(Semaphore::new(DOWNLOADS)), Arc::new(access));
        let start = |(number, blob): (usize, &Blob)| {
            let (puller, turns) = (self.clone(), Arc::clone(&turns));
            let access = Arc::clone(&access);
            let (reference, credentials) = (reference.clone(), credentials.cloned());
            let (blob, layer) = (blob.clone(), Layer { number, progress: Arc::clone(progress) });
            Download(tokio::spawn(async move {
                // The semaphore is never closed, and its turns are in the order of the layers.
                let _turn = turns.acquire().await;
                let (blobs, registries) = (&puller.blobs, &puller.registries);
                let wanted = (&*access, &blob);
                blobs.download(registries, &reference, credentials.as_ref(), wanted, &layer).await
            }))
        };
        layers.iter().enumerate().map(start).collect()
    }
}

fn open(path: &Path) -> Result<File, PullError> {
    let opened = blocking(|| File::open(path));
    opened.map_err(|source: io::Error| {
        RegistryError::File { step: "open", path: path.to_owned(), source }.into()
    })
}
