//! Pulls images from registries: downloads layers side by side, and unpacks each as soon as the
//! ones below it are unpacked.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bhatti_host::{blocking, disk};
use bhatti_image::{ImageStore, ImageSummary, ImportError, StoreError};
use bhatti_registry::{
    Blob, Blobs, Credentials, Progress, Reference, Registries, RegistryError, RemoteImage,
};
use bhatti_types::{ImageName, ParseNameError};
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, spawn_blocking};

/// Number of layers of one image that are downloaded at once.
const DOWNLOADS: usize = 3;

/// An image could not be pulled. The images are unchanged; layers that have arrived stay.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The reference is too long for a name.
    #[error(transparent)]
    Name(#[from] ParseNameError),
    /// The registry refused, failed, or cannot be reached.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The image's configuration is not one.
    #[error("the configuration of `{reference}` {problem}")]
    Config {
        /// The image.
        reference: String,
        /// What is wrong with it.
        problem: &'static str,
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

/// Pulls images into the store of one host.
#[derive(Clone)]
pub struct ImagePuller {
    images: ImageStore,
    registries: Registries,
    blobs: Blobs,
}

/// The part of an image's configuration that names the layers.
#[derive(Deserialize)]
struct Configuration {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
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
    /// Returns a puller into `images`, whose directory also gets the blobs.
    #[must_use]
    pub fn new(images: ImageStore, registries: Registries) -> Self {
        let blobs = Blobs::new(&images.directory().join("blobs"));
        Self { images, registries, blobs }
    }

    /// Pulls the image of a reference. The image has the whole reference as its name.
    ///
    /// # Errors
    ///
    /// Returns an error that names the registry, or the entry of a layer at fault.
    ///
    /// # Cancel safety
    ///
    /// Layers that have arrived stay, and the next pull continues them. Nothing else stays.
    pub async fn pull(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
        progress: Arc<dyn PullProgress>,
    ) -> Result<ImageSummary, PullError> {
        let name: ImageName = reference.to_string().parse()?;
        let image = self.registries.find(reference, credentials).await?;
        progress.begin(&image.layers);
        let source = format!("{} {}", reference.registry(), image.digest);
        if let Some(known) = self.known(&name, &image, &source).await? {
            for (number, layer) in image.layers.iter().enumerate() {
                progress.arrived(number, layer.bytes.cast_signed());
                progress.unpacked(number);
            }
            return Ok(known);
        }
        let config = self.registries.config(reference, credentials, &image.config).await?;
        let diff_ids = diff_ids(reference, &config, image.layers.len())?;
        self.check_space(reference, &image.layers)?;
        let downloads = self.start_downloads(reference, credentials, &image.layers, &progress);
        let mut build = blocking(|| self.images.begin_layers())?;
        for (number, (mut download, layer)) in downloads.into_iter().zip(&image.layers).enumerate()
        {
            (&mut download.0).await.map_err(|_| PullError::Interrupted)??;
            let file = open(&self.blobs.path(layer))?;
            build.apply(file, &diff_ids[number]).await?;
            progress.unpacked(number);
        }
        Ok(build.finish(&name, &image.config.sha256, &source).await?)
    }

    /// Names an image that has been built before.
    async fn known(
        &self,
        name: &ImageName,
        image: &RemoteImage,
        source: &str,
    ) -> Result<Option<ImageSummary>, PullError> {
        let (images, name, source) = (self.images.clone(), name.clone(), source.to_owned());
        let config = image.config.sha256.clone();
        let found = spawn_blocking(move || images.name_layers(&name, &config, &source));
        Ok(found.await.map_err(|_| PullError::Interrupted)??)
    }

    /// Refuses layers that do not fit on the disk. Each takes its own size, and unpacked at least
    /// as much again.
    fn check_space(&self, reference: &Reference, layers: &[Blob]) -> Result<(), PullError> {
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
        let needed_bytes = layers.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.bytes));
        if needed_bytes.saturating_mul(2) > free_bytes {
            let reference = reference.to_string();
            return Err(PullError::DiskFull { reference, needed_bytes, free_bytes });
        }
        Ok(())
    }

    fn start_downloads(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
        layers: &[Blob],
        progress: &Arc<dyn PullProgress>,
    ) -> Vec<Download> {
        let turns = Arc::new(Semaphore::new(DOWNLOADS));
        let start = |(number, blob): (usize, &Blob)| {
            let (puller, turns) = (self.clone(), Arc::clone(&turns));
            let (reference, credentials) = (reference.clone(), credentials.cloned());
            let (blob, layer) = (blob.clone(), Layer { number, progress: Arc::clone(progress) });
            Download(tokio::spawn(async move {
                // The semaphore is never closed, and its turns are in the order of the layers.
                let _turn = turns.acquire().await;
                let (blobs, registries) = (&puller.blobs, &puller.registries);
                blobs.download(registries, &reference, credentials.as_ref(), &blob, &layer).await
            }))
        };
        layers.iter().enumerate().map(start).collect()
    }
}

/// Returns the digests of the uncompressed layers, in hexadecimal.
fn diff_ids(reference: &Reference, config: &[u8], layers: usize) -> Result<Vec<String>, PullError> {
    let wrong = |problem| PullError::Config { reference: reference.to_string(), problem };
    let config: Configuration =
        serde_json::from_slice(config).map_err(|_| wrong("is malformed"))?;
    let ids: Option<Vec<String>> = (config.rootfs.diff_ids.iter())
        .map(|id| id.strip_prefix("sha256:").map(str::to_owned))
        .collect();
    let ids = ids.ok_or_else(|| wrong("has digests that are not SHA-256"))?;
    if ids.len() != layers {
        return Err(wrong("has another number of layers than its manifest"));
    }
    Ok(ids)
}

fn open(path: &Path) -> Result<File, PullError> {
    let opened = blocking(|| File::open(path));
    opened.map_err(|source: io::Error| {
        RegistryError::File { step: "open", path: path.to_owned(), source }.into()
    })
}
