//! Images that are built layer by layer, while the next layers still arrive.
//!
//! Such an image is known by the digest of its configuration, which names its layers. The
//! directory of a build is locked for as long as its process lives, so builds run side by side,
//! and the next build removes what a killed one left.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use bhatti_host::{blocking, durable};
use bhatti_types::ImageName;
use tempfile::TempDir;
use tokio::task::spawn_blocking;

use crate::archive::LayerFile;
use crate::ext4::Ext4Builder;
use crate::import::ImportError;
use crate::store::{Artefact, ImageStore, ImageSummary, StoreError, file_error};

/// Prefix of the directories of builds.
const PREFIX: &str = ".layers-";

/// Locked while a build begins.
const LOCK: &str = ".layers.lock";

/// Version of the builder. A change of what it makes from the same layers needs another number.
const FORMAT: u32 = 1;

/// An image under construction. Dropping it removes its files.
pub struct LayeredBuild {
    store: ImageStore,
    directory: TempDir,
    /// Locks the directory.
    _lock: File,
    builder: Ext4Builder,
}

/// Name of the file of an image whose configuration has this SHA-256, in hexadecimal.
fn file_name(config: &str) -> String {
    let short: String = config.chars().take(32).collect();
    format!("rootfs-oci{FORMAT}-{short}.ext4")
}

impl ImageStore {
    /// Begins an image. Removes what killed builds left.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory cannot be made. Blocks on disk.
    pub fn begin_layers(&self) -> Result<LayeredBuild, StoreError> {
        let parent = self.directory();
        fs::create_dir_all(parent).map_err(file_error("create", parent))?;
        // Held until the new directory has a lock of its own.
        let path = parent.join(LOCK);
        let starting = File::create(&path).and_then(|file| file.lock().map(|()| file));
        let _starting = starting.map_err(file_error("lock", &path))?;
        remove_abandoned(parent).map_err(file_error("clean up", parent))?;
        let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent);
        let directory = directory.map_err(file_error("create a directory in", parent))?;
        let begun = File::open(directory.path()).and_then(|lock| {
            lock.lock_shared()?;
            Ok((lock, Ext4Builder::new(self.program(), directory.path())?))
        });
        let (lock, builder) = begun.map_err(file_error("prepare", directory.path()))?;
        Ok(LayeredBuild { store: self.clone(), directory, _lock: lock, builder })
    }

    /// Gives an image that has been built from this configuration another name. Returns `None` if
    /// there is no such image.
    ///
    /// # Errors
    ///
    /// Returns an error if the index cannot be read or written. Blocks on disk, and while a build
    /// holds the lock.
    pub fn name_layers(
        &self,
        name: &ImageName,
        config: &str,
        source: &str,
    ) -> Result<Option<ImageSummary>, StoreError> {
        let _lock = self.lock()?;
        self.name_locked(name, config, source)
    }

    fn name_locked(
        &self,
        name: &ImageName,
        config: &str,
        source: &str,
    ) -> Result<Option<ImageSummary>, StoreError> {
        let file = file_name(config);
        if !self.directory().join(&file).exists() {
            return Ok(None);
        }
        let mut index = self.read_index()?;
        let artefact = Artefact { name: file, source: source.to_owned() };
        index.images.insert(name.as_str().to_owned(), artefact);
        self.write_index(&index)?;
        Ok(self.summaries()?.into_iter().find(|image| image.name == name.as_str()))
    }
}

impl LayeredBuild {
    /// Applies the next layer. `diff_id` is the SHA-256 of its uncompressed form, in hexadecimal.
    ///
    /// # Errors
    ///
    /// Returns an error that names the entry at fault, or the layer if it has another digest.
    pub async fn apply(&mut self, layer: File, diff_id: &str) -> Result<(), ImportError> {
        let layer = blocking(|| LayerFile::whole(layer)).map_err(ImportError::File)?;
        let found = self.builder.apply(&layer).await?;
        if found == diff_id { Ok(()) } else { Err(ImportError::WrongLayer(diff_id.to_owned())) }
    }

    /// Finishes the image: writes its file system, and gives it a name. `config` is the SHA-256 of
    /// its configuration, in hexadecimal.
    ///
    /// # Errors
    ///
    /// Returns an error if the file system cannot be written. The images are then unchanged.
    pub async fn finish(
        self,
        name: &ImageName,
        config: &str,
        source: &str,
    ) -> Result<ImageSummary, ImportError> {
        let made = self.directory.path().join("root.ext4");
        self.builder.write(&made).await?;
        let store = self.store.clone();
        let (name, config, source) = (name.clone(), config.to_owned(), source.to_owned());
        let published = spawn_blocking(move || {
            File::open(&made)
                .and_then(|file| file.sync_all())
                .map_err(file_error("write", &made))?;
            let place = store.directory().join(file_name(&config));
            let _lock = store.lock()?;
            durable::rename(&made, &place).map_err(file_error("put in place", &place))?;
            store.name_locked(&name, &config, &source)
        });
        // Waiting only fails if the runtime shuts down.
        let summary = published.await.map_err(io::Error::other).map_err(ImportError::File)??;
        summary.ok_or_else(|| ImportError::File(io::ErrorKind::NotFound.into()))
    }
}

/// Removes the directories of builds whose process has ended.
fn remove_abandoned(parent: &Path) -> io::Result<()> {
    let entries = fs::read_dir(parent)?.flatten();
    let builds = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX));
    for path in builds.map(|entry| entry.path()).collect::<Vec<PathBuf>>() {
        // Another process may remove it at the same time.
        let Ok(directory) = File::open(&path) else { continue };
        if directory.try_lock().is_ok() {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}
