//! The catalog of volumes: file systems that outlive sandboxes.
//!
//! Which sandboxes a volume is attached to is written in the transaction that inserts the sandbox's
//! row. The files are the node's ([`bhatti_node::VolumeFiles`]). Nothing but
//! [`Control::delete_volume`] removes a volume's files.

use std::io;

use bhatti_node::{RecoverError, VolumeFileError, random};
use bhatti_store::{StoreError, VolumeError, VolumeRow, VolumeWork};
use bhatti_types::{Report, UserId, VolumeId, VolumeMib, VolumeName};
use serde_json::json;
use tracing::{info, warn};

use crate::Control;

/// An operation on a volume failed. The volume is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum VolumeOpError {
    /// The owner has no such volume.
    #[error("volume `{0}` not found")]
    NotFound(String),
    /// The store refuses the operation.
    #[error(transparent)]
    Refused(#[from] VolumeError),
    /// The file could not be made or changed.
    #[error(transparent)]
    File(#[from] VolumeFileError),
    /// The volume's directory could not be made, moved or removed.
    #[error("failed to {step}")]
    Directory {
        /// The step that failed.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The host gives no random bytes.
    #[error("failed to draw an id")]
    Entropy(#[from] getrandom::Error),
    /// The daemon is stopping.
    #[error("the daemon stopped before the operation was finished")]
    Interrupted,
}

impl From<StoreError> for VolumeOpError {
    fn from(error: StoreError) -> Self {
        Self::Refused(error.into())
    }
}

/// A volume and the sandboxes that it is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// The volume.
    pub row: VolumeRow,
    /// The names of the sandboxes, each with whether the volume is read-only there.
    pub sandboxes: Vec<(String, bool)>,
    /// The host disk space that the file takes, in bytes.
    pub disk_bytes: u64,
}

impl Control {
    /// Creates an empty volume.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be created. Nothing of it is left then.
    ///
    /// # Cancel safety
    ///
    /// A creation that has begun is finished.
    pub async fn create_volume(
        &self,
        owner: UserId,
        name: VolumeName,
        size: VolumeMib,
    ) -> Result<VolumeInfo, VolumeOpError> {
        let control = self.clone();
        finished(async move {
            let files = control.inner.node.volume_files();
            let _working = files.working().await;
            control.inner.store.admit_volume(owner, &name, size)?;
            let id = VolumeId::from_entropy(random()?);
            let made = files.make(id, size).await;
            let row = control.name_volume(owner, id, name, size, made).await?;
            control.volume_info(row)
        })
        .await
    }

    /// Copies a volume that no sandbox writes.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be copied. Nothing of the copy is left then.
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
        let control = self.clone();
        finished(async move {
            let files = control.inner.node.volume_files();
            let _working = files.working().await;
            let store = &control.inner.store;
            store.admit_volume(owner, &copy, original.size)?;
            let id = VolumeId::from_entropy(random()?);
            let original = store.begin_volume_work(original.id, VolumeWork::Clone, None)?;
            let copied = files.copy(original.id, id).await;
            let made = control.name_volume(owner, id, copy, original.size, copied).await;
            store.end_volume_work(original.id, original.size)?;
            control.volume_info(made?)
        })
        .await
    }

    /// Inserts the row of a volume whose files were made, and puts the files in place.
    async fn name_volume(
        &self,
        owner: UserId,
        id: VolumeId,
        name: VolumeName,
        size: VolumeMib,
        made: Result<(), VolumeFileError>,
    ) -> Result<VolumeRow, VolumeOpError> {
        let files = self.inner.node.volume_files();
        let row = VolumeRow { id, owner, name, size, work: None, created_at: String::new() };
        let named = match made {
            Ok(()) => self.inner.store.insert_volume(row).map_err(VolumeOpError::from),
            Err(error) => Err(error.into()),
        };
        let row = match named {
            Ok(row) => row,
            Err(error) => {
                files.discard_unnamed(id).await;
                return Err(error);
            }
        };
        if let Err(source) = files.put_in_place(id) {
            // The row goes first: without it, the next daemon removes the rest of the files.
            self.inner.store.delete_volume::<VolumeError>(id, || Ok(()))?;
            files.discard_unnamed(id).await;
            return Err(VolumeOpError::Directory { step: "put a volume in place", source });
        }
        info!(volume = %row.id, name = %row.name, size_mib = size.get(), "Volume created");
        self.record("volume.created", owner, None, json!({ "volume": row.name.as_str() }));
        Ok(row)
    }

    /// Returns the volumes of `owner`, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_volumes(&self, owner: UserId) -> Result<Vec<VolumeInfo>, VolumeOpError> {
        let rows = self.inner.store.list_volumes(Some(owner))?;
        rows.into_iter().map(|row| self.volume_info(row)).collect()
    }

    /// Returns the volume of `owner` with this name.
    ///
    /// # Errors
    ///
    /// Returns [`VolumeOpError::NotFound`] if the owner has no such volume.
    pub fn find_volume(&self, owner: UserId, name: &str) -> Result<VolumeInfo, VolumeOpError> {
        self.volume_info(self.volume_row(owner, name)?)
    }

    /// Grows a volume that is not attached.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be grown.
    ///
    /// # Cancel safety
    ///
    /// A resize that has begun is finished.
    pub async fn resize_volume(
        &self,
        owner: UserId,
        name: &str,
        size: VolumeMib,
    ) -> Result<VolumeInfo, VolumeOpError> {
        let row = self.volume_row(owner, name)?;
        let control = self.clone();
        finished(async move {
            let files = control.inner.node.volume_files();
            let _working = files.working().await;
            let store = &control.inner.store;
            let row = store.begin_volume_work(row.id, VolumeWork::Resize, Some(size))?;
            let grown = files.grow(row.id, size).await;
            // The row gets the size that the file has, even if growing failed.
            let size = files.size(row.id).unwrap_or(row.size);
            store.end_volume_work(row.id, size)?;
            grown?;
            let detail = json!({ "volume": row.name.as_str(), "size_mib": size.get() });
            control.record("volume.resized", row.owner, None, detail);
            control.volume_info(VolumeRow { size, ..row })
        })
        .await
    }

    /// Deletes a volume that is not attached, with its content.
    ///
    /// # Errors
    ///
    /// Returns why it is not deleted.
    pub async fn delete_volume(&self, owner: UserId, name: &str) -> Result<(), VolumeOpError> {
        let row = self.volume_row(owner, name)?;
        let files = self.inner.node.volume_files();
        let mut taken = false;
        let deleted = self.inner.store.delete_volume(row.id, || {
            taken = true;
            files
                .take_away(row.id)
                .map_err(|source| VolumeOpError::Directory { step: "take a volume away", source })
        });
        if deleted.is_err() && taken {
            files
                .put_back(row.id)
                .map_err(|source| VolumeOpError::Directory { step: "put a volume back", source })?;
        }
        deleted?;
        files.remove_taken(row.id).await;
        info!(volume = %row.id, name = %row.name, "Volume deleted");
        self.record("volume.deleted", owner, None, json!({ "volume": row.name.as_str() }));
        Ok(())
    }

    fn volume_row(&self, owner: UserId, name: &str) -> Result<VolumeRow, VolumeOpError> {
        let found = self.inner.store.find_volume(owner, name)?;
        found.ok_or_else(|| VolumeOpError::NotFound(name.to_owned()))
    }

    fn volume_info(&self, row: VolumeRow) -> Result<VolumeInfo, VolumeOpError> {
        let sandboxes = self.inner.store.sandboxes_with_volume(row.id)?;
        let disk_bytes = self.inner.node.volume_files().disk_bytes(row.id);
        Ok(VolumeInfo { row, sandboxes, disk_bytes })
    }

    /// Finishes the work on volumes that an earlier daemon began.
    pub(crate) async fn settle_volumes(&self) -> Result<(), RecoverError> {
        let store = &self.inner.store;
        store.end_volume_copies()?;
        let rows = store.list_volumes(None)?;
        let known = store.volume_ids()?.into_iter().collect();
        self.inner.node.volume_files().settle(&known).await.map_err(RecoverError::List)?;
        for row in rows.into_iter().filter(|row| row.work == Some(VolumeWork::Resize)) {
            // In the background: the content of a volume may make this slow.
            tokio::spawn(self.clone().finish_resize(row));
        }
        Ok(())
    }

    async fn finish_resize(self, row: VolumeRow) {
        let files = self.inner.node.volume_files();
        let _working = files.working().await;
        let grown = files.grow(row.id, row.size).await;
        if let Err(error) = &grown {
            warn!(
                volume = %row.id,
                name = %row.name,
                error = %Report(error),
                "Failed to finish growing a volume"
            );
        }
        // As in `resize_volume`.
        let size = files.size(row.id).unwrap_or(row.size);
        if let Err(error) = self.inner.store.end_volume_work(row.id, size) {
            warn!(volume = %row.id, error = %Report(&error), "Failed to release a volume");
        }
    }
}

/// Runs work to its end, even if the caller is canceled.
async fn finished<T: Send + 'static>(
    work: impl Future<Output = Result<T, VolumeOpError>> + Send + 'static,
) -> Result<T, VolumeOpError> {
    tokio::spawn(work).await.map_err(|_| VolumeOpError::Interrupted)?
}
