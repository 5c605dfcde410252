//! The files of volumes: file systems that outlive sandboxes.
//!
//! ```text
//!  <volumes>/<id>/volume.ext4      a named volume
//!  <volumes>/.make-<id>/           being made: put in place if the store has its row, else removed
//!  <volumes>/.gone-<id>/           being deleted: put back if the store has its row, else removed
//!  <sandbox>/volume-<n>.ext4       a volume of the sandbox's own
//! ```
//!
//! A directory that the store does not know is left alone and reported.

mod file;
mod slots;
mod trust;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::PathBuf;

use bhatti_host::blocking;
use bhatti_host::durable;
use bhatti_types::{VolumeId, VolumeMib};
use tokio::sync::{RwLock, RwLockReadGuard};
use tokio::task::spawn_blocking;
use tracing::warn;

use crate::files::remove_or_warn;
use file::create_private;

pub use file::VolumeFileError;
pub use slots::{MadeFrom, VolumeUseError, volumes_of_fork};
pub(crate) use slots::{OwnVolumes, copies, files, of_guest, slots};

const MAKING: &str = ".make-";
const GONE: &str = ".gone-";

/// The name of a volume's file in its directory.
const FILE: &str = "volume.ext4";

/// The directory of named volumes.
#[derive(Debug)]
pub struct VolumeFiles {
    directory: PathBuf,
    /// Read-locked by work on volumes. The end of the daemon waits for the write lock.
    work: RwLock<()>,
}

impl VolumeFiles {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory, work: RwLock::default() }
    }

    fn directory_of(&self, id: VolumeId) -> PathBuf {
        self.directory.join(id.to_string())
    }

    fn making(&self, id: VolumeId) -> PathBuf {
        self.directory.join(format!("{MAKING}{id}"))
    }

    fn gone(&self, id: VolumeId) -> PathBuf {
        self.directory.join(format!("{GONE}{id}"))
    }

    fn file(&self, id: VolumeId) -> PathBuf {
        self.directory_of(id).join(FILE)
    }

    /// Keeps the daemon from stopping, for a limited time, while the guard lives.
    pub async fn working(&self) -> RwLockReadGuard<'_, ()> {
        self.work.read().await
    }

    /// Waits until no work is in progress.
    pub(crate) async fn finished(&self) {
        drop(self.work.write().await);
    }

    /// Makes an empty volume, which is not in place yet.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. [`discard_unnamed`](Self::discard_unnamed) removes the
    /// remains.
    pub async fn make(&self, id: VolumeId, size: VolumeMib) -> Result<(), VolumeFileError> {
        file::make(&blocking(|| self.begin(id))?, size).await
    }

    /// Copies a volume that no sandbox writes. The copy is not in place yet.
    ///
    /// # Errors
    ///
    /// As [`make`](Self::make).
    pub async fn copy(&self, from: VolumeId, id: VolumeId) -> Result<(), VolumeFileError> {
        file::clone(&self.file(from), &blocking(|| self.begin(id))?).await
    }

    /// Creates the directory of a volume that is being made. Returns the path of its file.
    fn begin(&self, id: VolumeId) -> Result<PathBuf, VolumeFileError> {
        let making = self.making(id);
        create_private(&making).map_err(file::failed("make the volume's directory"))?;
        Ok(making.join(FILE))
    }

    /// Puts a volume that was made in place, after its row was inserted. Blocks on disk for a
    /// moment.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory cannot be renamed.
    pub fn put_in_place(&self, id: VolumeId) -> io::Result<()> {
        durable::rename(&self.making(id), &self.directory_of(id))
    }

    /// Removes the files of a volume that got no row. Failures are logged.
    pub async fn discard_unnamed(&self, id: VolumeId) {
        remove_or_warn(&self.making(id), "a volume").await;
    }

    /// Grows a volume that no VM uses.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. The volume is sound in any case.
    pub async fn grow(&self, id: VolumeId, size: VolumeMib) -> Result<(), VolumeFileError> {
        file::grow(&self.file(id), size).await
    }

    /// Returns the size of a volume's file, if it can be read.
    #[must_use]
    pub fn size(&self, id: VolumeId) -> Option<VolumeMib> {
        file::size(&self.file(id))
    }

    /// Returns the disk space of this host that a volume's file takes, in bytes.
    #[must_use]
    pub fn disk_bytes(&self, id: VolumeId) -> u64 {
        file::disk_bytes(&self.file(id))
    }

    /// Takes a volume's files out of use, in the transaction that deletes its row. Missing files
    /// are no error. Blocks on disk for a moment.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory cannot be renamed.
    pub fn take_away(&self, id: VolumeId) -> io::Result<()> {
        match durable::rename(&self.directory_of(id), &self.gone(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Puts files back that were taken away, if there are any. Blocks on disk for a moment.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory cannot be renamed.
    pub fn put_back(&self, id: VolumeId) -> io::Result<()> {
        let gone = self.gone(id);
        if !gone.exists() {
            return Ok(());
        }
        durable::rename(&gone, &self.directory_of(id))
    }

    /// Removes files that were taken away. Failures are logged; the next daemon repeats it.
    pub async fn remove_taken(&self, id: VolumeId) {
        remove_or_warn(&self.gone(id), "a volume").await;
    }

    /// Settles the files that an earlier daemon left. `known` are the volumes that are in the
    /// store.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory cannot be read or a volume cannot be put in place.
    pub async fn settle(&self, known: &HashSet<VolumeId>) -> io::Result<()> {
        for entry in blocking(|| fs::read_dir(&self.directory))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let unsettled = name.strip_prefix(MAKING).or_else(|| name.strip_prefix(GONE));
            let id: Option<VolumeId> = unsettled.unwrap_or(&name).parse().ok();
            match id {
                Some(id) if known.contains(&id) && unsettled.is_some() => {
                    blocking(|| durable::rename(&entry.path(), &self.directory_of(id)))?;
                }
                Some(_) if unsettled.is_some() => remove_or_warn(&entry.path(), "a volume").await,
                Some(id) if known.contains(&id) => {}
                _ => {
                    warn!(
                        path = %entry.path().display(),
                        "Found a volume that the store does not know; it is left alone"
                    );
                }
            }
        }
        Ok(())
    }
}

/// Runs blocking disk work on a thread for blocking work.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}
