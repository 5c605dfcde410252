//! Images that are built layer by layer, while the next layers still arrive.
//!
//! Such an image is known by the digest of its configuration, which names its layers. The
//! directory of a build is locked for as long as its process lives, so builds run side by side,
//! and the next build removes what a killed one left.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use bhatti_host::{blocking, disk, durable};
use bhatti_types::RootName;
use tempfile::TempDir;
use tokio::task::spawn_blocking;

use crate::archive::LayerFile;
use crate::content_hash;
use crate::ext4::Ext4Builder;
use crate::import_error::ImportError;
use crate::store::{ImageStore, RootFile, StoreError, file_error};

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

/// Returns the name of the root file system of an image whose configuration has this SHA-256, in
/// hexadecimal.
fn root_of(config: &str) -> Result<RootName, StoreError> {
    let short: String = config.chars().take(32).collect();
    Ok(format!("rootfs-oci{FORMAT}-{short}.ext4").parse()?)
}

impl ImageStore {
    /// Begins an image whose files have at most `bytes_max` bytes. Removes what killed builds left.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory cannot be made. Blocks on disk.
    pub fn begin_layers(&self, bytes_max: Option<u64>) -> Result<LayeredBuild, StoreError> {
        let parent = self.directory();
        fs::create_dir_all(parent).map_err(file_error("create", parent))?;
        // Held until the new directory has a lock of its own.
        let _starting = lock_builds(parent)?;
        remove_abandoned(parent).map_err(file_error("clean up", parent))?;
        // A build makes thousands of files and deletes them, and so does the next one.
        disk::spread_directories(parent).map_err(file_error("set the flags of", parent))?;
        let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent);
        let directory = directory.map_err(file_error("create a directory in", parent))?;
        let begun = File::open(directory.path()).and_then(|lock| {
            lock.lock_shared()?;
            Ok((lock, Ext4Builder::new(self.program(), directory.path(), bytes_max)?))
        });
        let (lock, builder) = begun.map_err(file_error("prepare", directory.path()))?;
        Ok(LayeredBuild { store: self.clone(), directory, _lock: lock, builder })
    }

    /// Removes what killed builds left.
    ///
    /// # Errors
    ///
    /// Returns an error if a directory cannot be removed. Blocks on disk.
    pub fn remove_abandoned_builds(&self) -> Result<(), StoreError> {
        let directory = self.directory();
        if !directory.exists() {
            return Ok(());
        }
        let _starting = lock_builds(directory)?;
        remove_abandoned(directory).map_err(file_error("clean up", directory))
    }

    /// Returns the root file system that has been built for a configuration with this SHA-256, in
    /// hexadecimal. Returns `None` if there is none.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be examined. Blocks on disk.
    pub fn built(&self, config: &str) -> Result<Option<RootFile>, StoreError> {
        let name = root_of(config)?;
        if self.directory().join(name.as_str()).exists() {
            self.root(&name).map(Some)
        } else {
            Ok(None)
        }
    }
}

impl LayeredBuild {
    /// Returns the directory of the build.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Applies the next layer. `diff_id` is the SHA-256 of its uncompressed form, in hexadecimal.
    ///
    /// # Errors
    ///
    /// Returns an error that names the entry at fault, or the layer if it has another digest.
    pub async fn apply(&mut self, layer: File, diff_id: &str) -> Result<(), ImportError> {
        let layer = blocking(|| LayerFile::whole(layer)).map_err(ImportError::File)?;
        self.apply_part(&layer, Some(diff_id)).await.map(drop)
    }

    /// Applies a layer that is a part of a file. Returns the SHA-256 of its uncompressed form, in
    /// hexadecimal, which is not checked if `diff_id` is absent.
    pub(crate) async fn apply_part(
        &mut self,
        layer: &LayerFile,
        diff_id: Option<&str>,
    ) -> Result<String, ImportError> {
        let found = self.builder.apply(layer).await?;
        match diff_id {
            Some(diff_id) if found != diff_id => Err(ImportError::WrongLayer(diff_id.to_owned())),
            _ => Ok(found),
        }
    }

    /// Writes the root file system, and puts it into the store. `config` is the SHA-256 of the
    /// image's configuration in hexadecimal; without one, the content names the file. With
    /// `add_workspace`, the image gets a directory for users' work.
    ///
    /// # Errors
    ///
    /// Returns an error if the file system cannot be written. The store is then unchanged.
    pub async fn finish(
        self,
        config: Option<&str>,
        add_workspace: bool,
    ) -> Result<RootFile, ImportError> {
        let made = self.directory.path().join("root.ext4");
        self.builder.write(&made, add_workspace).await?;
        let (store, config) = (self.store.clone(), config.map(str::to_owned));
        let published = spawn_blocking(move || {
            let name = match config {
                Some(config) => root_of(&config)?,
                None => {
                    let hash = content_hash::of_file(&made).map_err(file_error("read", &made))?;
                    format!("rootfs-tar{FORMAT}-{hash}.ext4").parse()?
                }
            };
            File::open(&made)
                .and_then(|file| file.sync_all())
                .map_err(file_error("write", &made))?;
            let place = store.directory().join(name.as_str());
            // A file that another build has put there has the same content.
            if !place.exists() {
                durable::rename(&made, &place).map_err(file_error("put in place", &place))?;
            }
            store.root(&name)
        });
        // Waiting only fails if the runtime shuts down.
        Ok(published.await.map_err(io::Error::other).map_err(ImportError::File)??)
    }
}

/// Takes the lock under which builds begin.
fn lock_builds(parent: &Path) -> Result<File, StoreError> {
    let path = parent.join(LOCK);
    let locked = File::create(&path).and_then(|file| file.lock().map(|()| file));
    locked.map_err(file_error("lock", &path))
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
