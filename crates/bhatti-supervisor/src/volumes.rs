//! Volumes: file systems that outlive sandboxes.
//!
//! ```text
//!  <volumes>/<id>/volume.ext4      one that has a name
//!  <volumes>/.make-<id>/           one that is being made: it is in a row, or goes at the next start
//!  <volumes>/.gone-<id>/           one that is being deleted: it is in no row, or comes back at the next start
//!  <sandbox>/volume-<n>.ext4       one of the sandbox's own
//! ```
//!
//! Which sandbox has which is the store's to say, in the transaction that makes the sandbox's row. Nothing but [`Supervisor::delete_volume`] ever
//! takes a volume's files away; a directory that no row knows is left alone and reported.

mod file;
mod places;
mod trust;

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use bhatti_host::durable;
use bhatti_store::{StoreError, VolumeError, VolumeRow, VolumeWork};
use bhatti_types::{Report, UserId, VolumeId, VolumeMib, VolumeName};
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use crate::Supervisor;
use crate::identity::random;
use file::create_private;

pub use file::VolumeFileError;
pub use places::VolumeUseError;
pub(crate) use places::{MadeFrom, OwnVolumes, copies, files, of_fork, of_guest, places};

const MAKING: &str = ".make-";
const GONE: &str = ".gone-";

/// A volume's file in its directory.
const FILE: &str = "volume.ext4";

/// Something could not be done with a volume. It is what it was.
#[derive(Debug, thiserror::Error)]
pub enum VolumeOpError {
    /// Its owner has no such volume.
    #[error("volume `{0}` not found")]
    NotFound(String),
    /// It cannot be, as things are.
    #[error(transparent)]
    Refused(#[from] VolumeError),
    /// Its file could not be made or changed.
    #[error(transparent)]
    File(#[from] VolumeFileError),
    /// Its directory could not be made, moved or removed.
    #[error("failed to {step}")]
    Place {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// This host gives no random bytes.
    #[error("failed to draw an id")]
    Entropy(#[from] getrandom::Error),
    /// The daemon is going down.
    #[error("the daemon stopped before that was done")]
    Interrupted,
}

impl From<StoreError> for VolumeOpError {
    fn from(error: StoreError) -> Self {
        Self::Refused(error.into())
    }
}

/// A volume, and who has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// The volume.
    pub row: VolumeRow,
    /// The names of the sandboxes that have it, and whether they only read it.
    pub sandboxes: Vec<(String, bool)>,
    /// What it takes of this host's disk, in bytes.
    pub disk_bytes: u64,
}

impl Supervisor {
    /// Makes an empty volume.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be; nothing of it is left then.
    ///
    /// # Cancel safety
    ///
    /// One that has begun to be made is finished.
    pub async fn create_volume(
        &self,
        owner: UserId,
        name: VolumeName,
        size: VolumeMib,
    ) -> Result<VolumeInfo, VolumeOpError> {
        let supervisor = self.clone();
        finished(async move {
            let _working = supervisor.shared.volume_work.read().await;
            supervisor.shared.store.admit_volume(owner, &name, size)?;
            let make = async |file: PathBuf| file::make(&file, size).await;
            let row = supervisor.make_volume(owner, name, size, make).await?;
            supervisor.volume_info(row)
        })
        .await
    }

    /// Copies a volume that nobody writes.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be; nothing of the copy is left then.
    ///
    /// # Cancel safety
    ///
    /// A copy that has begun is finished.
    pub async fn clone_volume(
        &self,
        owner: UserId,
        name: &str,
        copy: VolumeName,
    ) -> Result<VolumeInfo, VolumeOpError> {
        let original = self.volume_row(owner, name)?;
        let supervisor = self.clone();
        finished(async move {
            let _working = supervisor.shared.volume_work.read().await;
            let store = &supervisor.shared.store;
            store.admit_volume(owner, &copy, original.size)?;
            let original = store.begin_volume_work(original.id, VolumeWork::Clone, None)?;
            let from = supervisor.volume_file(original.id);
            let make = async |file: PathBuf| file::clone(&from, &file).await;
            let made = supervisor.make_volume(owner, copy, original.size, make).await;
            store.end_volume_work(original.id, original.size)?;
            supervisor.volume_info(made?)
        })
        .await
    }

    async fn make_volume(
        &self,
        owner: UserId,
        name: VolumeName,
        size: VolumeMib,
        make: impl AsyncFnOnce(PathBuf) -> Result<(), VolumeFileError>,
    ) -> Result<VolumeRow, VolumeOpError> {
        let id = VolumeId::from_entropy(random()?);
        let making = self.shared.config.volumes_dir.join(format!("{MAKING}{id}"));
        let place = |step| move |source| VolumeOpError::Place { step, source };
        create_private(&making).map_err(place("make a volume's directory"))?;
        let row = VolumeRow { id, owner, name, size, work: None, created_at: String::new() };
        let made = match make(making.join(FILE)).await {
            Ok(()) => self.shared.store.insert_volume(row).map_err(VolumeOpError::from),
            Err(error) => Err(error.into()),
        };
        let row = match made {
            Ok(row) => row,
            Err(error) => {
                remove(&making).await;
                return Err(error);
            }
        };
        let directory = self.volume_directory(id);
        if let Err(source) = durable::rename(&making, &directory) {
            // Its row first: without it the next daemon removes what is left of the files.
            self.shared.store.delete_volume::<VolumeError>(id, || Ok(()))?;
            remove(&making).await;
            return Err(place("put a volume in place")(source));
        }
        info!(volume = %row.id, name = %row.name, size_mib = size.get(), "Volume made");
        self.record(
            "volume.created",
            owner,
            None,
            serde_json::json!({ "volume": row.name.as_str() }),
        );
        Ok(row)
    }

    /// The volumes of `owner`, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_volumes(&self, owner: UserId) -> Result<Vec<VolumeInfo>, VolumeOpError> {
        let rows = self.shared.store.list_volumes(Some(owner))?;
        rows.into_iter().map(|row| self.volume_info(row)).collect()
    }

    /// The volume that `owner` calls so.
    ///
    /// # Errors
    ///
    /// Returns [`VolumeOpError::NotFound`] if there is none.
    pub fn find_volume(&self, owner: UserId, name: &str) -> Result<VolumeInfo, VolumeOpError> {
        self.volume_info(self.volume_row(owner, name)?)
    }

    /// Makes a volume larger that no sandbox has.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be.
    ///
    /// # Cancel safety
    ///
    /// What has begun is finished.
    pub async fn resize_volume(
        &self,
        owner: UserId,
        name: &str,
        size: VolumeMib,
    ) -> Result<VolumeInfo, VolumeOpError> {
        let row = self.volume_row(owner, name)?;
        let supervisor = self.clone();
        finished(async move {
            let _working = supervisor.shared.volume_work.read().await;
            let store = &supervisor.shared.store;
            let row = store.begin_volume_work(row.id, VolumeWork::Resize, Some(size))?;
            let file = supervisor.volume_file(row.id);
            let grown = file::grow(&file, size).await;
            // What its file has, whatever came of it.
            let size = file::size(&file).unwrap_or(row.size);
            store.end_volume_work(row.id, size)?;
            grown?;
            let detail = serde_json::json!({ "volume": row.name.as_str(), "size_mib": size.get() });
            supervisor.record("volume.resized", row.owner, None, detail);
            supervisor.volume_info(VolumeRow { size, ..row })
        })
        .await
    }

    /// Deletes a volume that no sandbox has, with all that is in it.
    ///
    /// # Errors
    ///
    /// Returns why it stays.
    pub async fn delete_volume(&self, owner: UserId, name: &str) -> Result<(), VolumeOpError> {
        let row = self.volume_row(owner, name)?;
        let (directory, gone) = (self.volume_directory(row.id), self.gone(row.id));
        let mut taken = false;
        let deleted = self.shared.store.delete_volume(row.id, || {
            taken = true;
            match durable::rename(&directory, &gone) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    Err(VolumeOpError::Place { step: "take a volume away", source })
                }
                _ => Ok(()),
            }
        });
        if deleted.is_err() && taken && gone.exists() {
            // Its row stays, and so does it.
            durable::rename(&gone, &directory)
                .map_err(|source| VolumeOpError::Place { step: "put a volume back", source })?;
        }
        deleted?;
        remove(&gone).await;
        info!(volume = %row.id, name = %row.name, "Volume deleted");
        self.record(
            "volume.deleted",
            owner,
            None,
            serde_json::json!({ "volume": row.name.as_str() }),
        );
        Ok(())
    }

    fn volume_row(&self, owner: UserId, name: &str) -> Result<VolumeRow, VolumeOpError> {
        let found = self.shared.store.find_volume(owner, name)?;
        found.ok_or_else(|| VolumeOpError::NotFound(name.to_owned()))
    }

    fn volume_info(&self, row: VolumeRow) -> Result<VolumeInfo, VolumeOpError> {
        let sandboxes = self.shared.store.sandboxes_with_volume(row.id)?;
        let disk_bytes = file::disk_bytes(&self.volume_file(row.id));
        Ok(VolumeInfo { row, sandboxes, disk_bytes })
    }

    fn volume_directory(&self, id: VolumeId) -> PathBuf {
        self.shared.config.volumes_dir.join(id.to_string())
    }

    fn volume_file(&self, id: VolumeId) -> PathBuf {
        places::named_file(&self.shared, id)
    }

    fn gone(&self, id: VolumeId) -> PathBuf {
        self.shared.config.volumes_dir.join(format!("{GONE}{id}"))
    }

    /// Finishes what an earlier daemon had begun with volumes.
    pub(crate) async fn settle_volumes(&self) -> io::Result<()> {
        self.shared.store.end_volume_copies().map_err(io::Error::other)?;
        let rows = self.shared.store.list_volumes(None).map_err(io::Error::other)?;
        let known: HashSet<VolumeId> =
            self.shared.store.volume_ids().map_err(io::Error::other)?.into_iter().collect();
        for entry in std::fs::read_dir(&self.shared.config.volumes_dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let unsettled = name.strip_prefix(MAKING).or_else(|| name.strip_prefix(GONE));
            let id: Option<VolumeId> = unsettled.unwrap_or(&name).parse().ok();
            match id {
                Some(id) if known.contains(&id) && unsettled.is_some() => {
                    durable::rename(&entry.path(), &self.volume_directory(id))?;
                }
                Some(_) if unsettled.is_some() => remove(&entry.path()).await,
                Some(id) if known.contains(&id) => {}
                _ => {
                    warn!(path = %entry.path().display(), "Found a volume that the store does not know; it is left alone");
                }
            }
        }
        for row in rows.into_iter().filter(|row| row.work == Some(VolumeWork::Resize)) {
            // Nobody waits for it: what is in it may make that take long.
            tokio::spawn(self.clone().finish_resize(row));
        }
        Ok(())
    }

    async fn finish_resize(self, row: VolumeRow) {
        let _working = self.shared.volume_work.read().await;
        let file = self.volume_file(row.id);
        let grown = file::grow(&file, row.size).await;
        if let Err(error) = &grown {
            warn!(volume = %row.id, name = %row.name, error = %Report(error), "Failed to finish making a volume larger");
        }
        // As above.
        let size = file::size(&file).unwrap_or(row.size);
        if let Err(error) = self.shared.store.end_volume_work(row.id, size) {
            warn!(volume = %row.id, error = %Report(&error), "Failed to give a volume back");
        }
    }
}

/// Does something to its end, whether or not the caller stays.
async fn finished<T: Send + 'static>(
    work: impl Future<Output = Result<T, VolumeOpError>> + Send + 'static,
) -> Result<T, VolumeOpError> {
    tokio::spawn(work).await.map_err(|_| VolumeOpError::Interrupted)?
}

async fn remove(directory: &Path) {
    if let Err(error) = tokio::fs::remove_dir_all(directory).await {
        warn!(path = %directory.display(), error = %Report(&error), "Failed to remove a volume's files");
    }
}

/// Runs what blocks on a disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}
