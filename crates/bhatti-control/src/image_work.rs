//! How images come to this host and leave it: pulls, imports, saves, pushes and exports.

use std::fs::File;
use std::sync::Arc;

use bhatti_node::{Credentials, ImageArchive, Leftovers, PullError, PullProgress, Reference};
use bhatti_store::{ImageRow, Replace, SandboxRow};
use bhatti_types::{ImageConfig, ImageName, Report, SandboxId, SandboxState, UserId};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;
use tracing::{info, warn};

use crate::Control;
use crate::disk_quota::DiskReservation;
use crate::image_errors::{ImageCommandError, ImageError, PullFailure, SaveError, no_room};
use crate::images::{UsableImage, unix_seconds};
use crate::operation_errors::OperationFailure;
use crate::operations::{Made, Operation, OperationKind, OperationState};

/// Removes the files of images that are in no row, after the work on an image and however it ends.
struct Collection {
    control: Control,
    leftovers: Leftovers,
}

impl Drop for Collection {
    fn drop(&mut self) {
        let (control, leftovers) = (self.control.clone(), self.leftovers);
        // Without a runtime, the daemon is ending.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn_blocking(move || control.collect_images(leftovers));
        }
    }
}

/// How the image of an archive is kept.
pub(crate) struct Keeping {
    /// The bytes that the owner's quota leaves; `None` if it has no limit.
    pub(crate) left: Option<u64>,
    /// The settings of an image that comes without settings.
    pub(crate) settings: Option<ImageConfig>,
    /// What the image was made from.
    pub(crate) source: String,
    /// Whether an image of that name is replaced.
    pub(crate) replace: Replace,
}

/// Stops a sandbox that was started to be saved.
struct StopAgain {
    control: Control,
    owner: UserId,
    sandbox: SandboxId,
}

impl Drop for StopAgain {
    fn drop(&mut self) {
        let (control, owner, sandbox) = (self.control.clone(), self.owner, self.sandbox);
        let Ok(runtime) = Handle::try_current() else { return };
        runtime.spawn(async move {
            if let Err(error) = control.stop(owner, &sandbox.to_string()).await {
                warn!(%sandbox, error = %Report(&error), "Failed to stop a saved sandbox again");
            }
        });
    }
}

impl Control {
    /// Pulls an image, and waits for it.
    pub(crate) async fn pulled(
        &self,
        user: UserId,
        image: &str,
    ) -> Result<Arc<ImageRow>, ImageError> {
        let operation = self.pull_image(user, image, None)?;
        match operation.ended().await {
            OperationState::Done(Made::Image(row)) => Ok(row),
            OperationState::Failed(error) => match &*error {
                OperationFailure::Pull(error) => Err(Arc::clone(error).into()),
                _ => Err(ImageError::Canceled(image.to_owned())),
            },
            OperationState::Canceled | OperationState::Running | OperationState::Done(_) => {
                Err(ImageError::Canceled(image.to_owned()))
            }
        }
    }

    /// Begins to pull an image for a user, or joins the user's operation that pulls it. The image
    /// gets its whole reference as its name.
    ///
    /// # Errors
    ///
    /// Returns an error if the name is not that of an image in a registry, or if the user has too
    /// many running operations.
    pub fn pull_image(
        &self,
        user: UserId,
        image: &str,
        credentials: Option<Credentials>,
    ) -> Result<Operation, ImageError> {
        let reference: Reference = image.parse().map_err(|error| {
            Arc::new(PullFailure::Reference(format!("invalid image `{image}`: {error}")))
        })?;
        let control = self.clone();
        let whole = reference.to_string();
        let id = bhatti_node::random()?;
        let credentials = credentials.or_else(|| self.login_of(user, reference.registry()));
        let work = |operation: Operation| async move {
            let mut after = Collection { control: control.clone(), leftovers: Leftovers::Stay };
            let progress: Arc<dyn PullProgress> = Arc::new(operation);
            let pulled = control.pull(user, &reference, credentials.as_ref(), progress).await;
            let evicted = pulled.as_ref().map(|image| control.evict_images(image));
            match evicted {
                Ok(Ok(false)) | Err(PullFailure::Pull { .. }) => {}
                // The user has no room for what has arrived, or its place was needed.
                Ok(Ok(true)) | Err(_) => after.leftovers = Leftovers::Go,
                Ok(Err(error)) => {
                    warn!(error = %Report(&error), "Failed to evict unused images");
                }
            }
            pulled
        };
        Ok(self.inner.operations.join_or_begin(user, id, (OperationKind::Pull, &whole), work)?)
    }

    async fn pull(
        &self,
        owner: UserId,
        reference: &Reference,
        credentials: Option<&Credentials>,
        progress: Arc<dyn PullProgress>,
    ) -> Result<ImageRow, PullFailure> {
        let name: ImageName = reference.to_string().parse()?;
        let node = &self.inner.node;
        let _held = node.hold_images().await;
        let left = self.disk_left(owner).await?;
        let access = self.image_access(owner, left)?;
        let pulled = node.pull_image(reference, credentials, access, progress).await;
        let pulled = pulled.map_err(|error| {
            match &error {
                PullError::Build(build) => no_room(build, left).map(PullFailure::NoRoom),
                _ => None,
            }
            .unwrap_or_else(|| PullFailure::Pull { image: reference.to_string(), error })
        })?;
        let row = ImageRow {
            owner,
            name,
            root: pulled.root.name,
            source: pulled.source,
            config: pulled.config,
            manifest: Some(pulled.manifest),
            blobs: pulled.blobs,
            size_bytes: pulled.root.size_bytes,
            disk_bytes: pulled.root.disk_bytes + pulled.layer_bytes,
            created_at: String::new(),
            used_at: unix_seconds(),
        };
        let row = self.keep_image(row, Replace::Yes).await.map_err(|error| match error {
            ImageError::Quota(quota) => PullFailure::Quota(quota),
            ImageError::Store(error) => PullFailure::Store(error),
            error => PullFailure::Reference(error.to_string()),
        })?;
        info!(image = %row.name, source = row.source, bytes = row.disk_bytes, "Pulled an image");
        let detail = json!({ "image": row.name.as_str(), "source": row.source });
        self.record("image.pulled", owner, None, detail);
        Ok(row)
    }

    /// Stores an image whose files are in place, if the owner's quota has room for it.
    pub(crate) async fn keep_image(
        &self,
        row: ImageRow,
        replace: Replace,
    ) -> Result<ImageRow, ImageError> {
        let store = &self.inner.store;
        let has_root = store.list_images(row.owner)?.iter().any(|image| image.root == row.root);
        let needed = if has_root { 0 } else { row.disk_bytes };
        let _disk = self.admit_disk(row.owner, needed).await?;
        Ok(store.insert_image(row, replace)?)
    }

    /// Returns the command that runs the image of a sandbox with these arguments, or with the
    /// image's own if there are none.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such sandbox, or nothing to run.
    pub fn image_command(
        &self,
        owner: UserId,
        id_or_name: &str,
        arguments: Vec<String>,
    ) -> Result<Vec<String>, ImageCommandError> {
        let row = self.find(owner, id_or_name)?;
        let command = row.spec.image_config.command(arguments);
        if command.is_empty() {
            return Err(ImageCommandError::None(row.spec.image));
        }
        Ok(command)
    }

    /// Returns a user's operations, newest first.
    #[must_use]
    pub fn list_operations(&self, user: UserId) -> Vec<Operation> {
        self.inner.operations.list(user)
    }

    /// Returns the operation of a user with this id.
    #[must_use]
    pub fn find_operation(&self, user: UserId, id: &str) -> Option<Operation> {
        self.inner.operations.find(user, id)
    }

    /// Makes an unnamed file for an archive that is being uploaded.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be made.
    pub fn image_upload(&self) -> Result<File, ImageError> {
        Ok(self.inner.node.image_upload()?)
    }

    /// Refuses an import that would fail when the archive has been received. Returns the bytes
    /// that the owner's quota leaves; `None` if it has no limit.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner has an image of that name, or no disk space left.
    pub async fn admit_import(
        &self,
        owner: UserId,
        name: &ImageName,
    ) -> Result<Option<u64>, ImageError> {
        if self.inner.store.find_own_image(owner, name.as_str())?.is_some()
            || self.inner.node.host_root(name.as_str())?.is_some()
        {
            return Err(ImageError::NameTaken(name.clone()));
        }
        Ok(self.disk_left(owner).await?)
    }

    /// Makes an image from an archive.
    ///
    /// # Errors
    ///
    /// Returns an error that names what is wrong with the archive, or the owner's quota.
    pub async fn import_image(
        &self,
        owner: UserId,
        name: ImageName,
        archive: File,
    ) -> Result<ImageRow, ImageError> {
        let left = self.admit_import(owner, &name).await?;
        let source = "imported archive".to_owned();
        let keeping = Keeping { left, settings: None, source, replace: Replace::No };
        let row = self.keep_archive(owner, name, archive, keeping).await?;
        self.record("image.imported", owner, None, json!({ "image": row.name.as_str() }));
        Ok(row)
    }

    /// Makes an image from an archive.
    pub(crate) async fn keep_archive(
        &self,
        owner: UserId,
        name: ImageName,
        archive: File,
        Keeping { left, settings, source, replace }: Keeping,
    ) -> Result<ImageRow, ImageError> {
        // Dropped last: what is made and then refused goes.
        let _after = Collection { control: self.clone(), leftovers: Leftovers::Stay };
        let _held = self.inner.node.hold_images().await;
        let imported = self.inner.node.import_image(archive, left, settings).await;
        let imported = imported.map_err(|error| {
            no_room(&error, left).map_or(ImageError::Import(error), ImageError::NoRoom)
        })?;
        let (root, config) = (imported.root.clone(), imported.config.clone());
        let source = format!("{source}, {} bytes", imported.archive_bytes);
        let kept = self.inner.node.keep_layers(imported, self.usable_manifests(owner)?).await?;
        let row = ImageRow {
            owner,
            name,
            root: root.name,
            source,
            config,
            manifest: Some(kept.manifest),
            blobs: kept.blobs,
            size_bytes: root.size_bytes,
            disk_bytes: root.disk_bytes + kept.bytes,
            created_at: String::new(),
            used_at: unix_seconds(),
        };
        self.keep_image(row, replace).await
    }

    /// Counts bytes against a user's quota until the reservation is dropped. There is none if the
    /// user has no limit.
    ///
    /// # Errors
    ///
    /// Returns an error if the quota does not allow it.
    pub async fn reserve_disk(
        &self,
        owner: UserId,
        bytes: u64,
    ) -> Result<Option<DiskReservation>, ImageError> {
        Ok(self.admit_disk(owner, bytes).await?)
    }

    /// Returns the bytes that an archive of a user may have: what the quota leaves, and half of the
    /// free space of this host's disk.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner has no disk space left.
    pub async fn archive_room(&self, owner: UserId) -> Result<u64, ImageError> {
        let left = self.disk_left(owner).await?.unwrap_or(u64::MAX);
        Ok(left.min(self.inner.node.archive_room()?))
    }

    /// Begins to save a sandbox's root file system as an image, or joins the user's operation that
    /// does so. The sandbox may run or be stopped, and is as before afterwards. What its processes
    /// write meanwhile may be in the image or not.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such sandbox, or if the user has an image of that name.
    pub async fn save_image(
        &self,
        owner: UserId,
        sandbox: &str,
        name: ImageName,
    ) -> Result<Operation, ImageError> {
        let row = self.find(owner, sandbox)?;
        let left = self.admit_import(owner, &name).await?;
        let id = bhatti_node::random()?;
        let (control, text) = (self.clone(), name.to_string());
        let work = |_| async move {
            // Also if the operation is canceled.
            let _stop = (row.state == SandboxState::Stopped).then(|| StopAgain {
                control: control.clone(),
                owner,
                sandbox: row.id,
            });
            if row.state == SandboxState::Stopped {
                let started = control.start(owner, &row.id.to_string(), false).await;
                started.map_err(SaveError::Use)?;
            }
            control.save(owner, &row, name, left).await
        };
        Ok(self.inner.operations.join_or_begin(owner, id, (OperationKind::Save, &text), work)?)
    }

    async fn save(
        &self,
        owner: UserId,
        row: &SandboxRow,
        name: ImageName,
        left: Option<u64>,
    ) -> Result<ImageRow, SaveError> {
        let left = left.unwrap_or(u64::MAX).min(self.inner.node.archive_room()?);
        let used = self.enter(owner, &row.id.to_string()).await?;
        let mut content = used.agent.read_root().await?;
        let file = self.image_upload().map_err(SaveError::of)?;
        let mut file = tokio::fs::File::from_std(file);
        let mut received = 0;
        while let Some(piece) = content.next().await? {
            received += piece.len() as u64;
            if received > left {
                return Err(SaveError::TooLarge(left >> 20));
            }
            file.write_all(&piece).await?;
        }
        file.flush().await?;
        drop(used);
        let source = format!("saved sandbox {}", row.spec.name);
        let settings = Some(row.spec.image_config.clone());
        let keeping = Keeping { left: Some(left), settings, source, replace: Replace::No };
        let archive = file.into_std().await;
        let made = self.keep_archive(owner, name, archive, keeping).await;
        let made = made.map_err(SaveError::of)?;
        let detail = json!({ "image": made.name.as_str() });
        let sandbox = Some((row.id, row.spec.name.to_string()));
        self.record("image.saved", owner, sandbox, detail);
        Ok(made)
    }

    /// Begins to push an image that a user can use, as `reference`, or joins the user's operation
    /// that pushes it there.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such image, if it has no layers, or if `reference` is not
    /// that of an image in a registry with a tag.
    pub fn push_image(
        &self,
        user: UserId,
        image: &str,
        reference: &str,
        credentials: Option<Credentials>,
    ) -> Result<Operation, ImageError> {
        let (row, manifest) = self.image_with_layers(user, image)?;
        let refused = |why: String| Arc::new(PullFailure::Reference(why));
        let reference: Reference = reference
            .parse()
            .map_err(|error| refused(format!("invalid image `{reference}`: {error}")))?;
        if reference.version().starts_with("sha256:") {
            return Err(refused(format!("`{reference}` has a digest in place of a tag")).into());
        }
        let whole = reference.to_string();
        let control = self.clone();
        let credentials = credentials.or_else(|| self.login_of(user, reference.registry()));
        let work = |operation: Operation| async move {
            let node = &control.inner.node;
            let _held = node.hold_images().await;
            let pushed =
                node.push_image(&manifest, &reference, credentials.as_ref(), Arc::new(operation));
            let failed = |error| PullFailure::Push { image: reference.to_string(), error };
            pushed.await.map_err(failed)?;
            let detail = json!({ "image": row.name.as_str(), "to": reference.to_string() });
            control.record("image.pushed", user, None, detail);
            Ok::<_, PullFailure>(row)
        };
        let id = bhatti_node::random()?;
        Ok(self.inner.operations.join_or_begin(user, id, (OperationKind::Push, &whole), work)?)
    }

    /// Returns an image that a user can use, and its manifest.
    fn image_with_layers(
        &self,
        user: UserId,
        image: &str,
    ) -> Result<(ImageRow, String), ImageError> {
        let no_layers = || ImageError::NoLayers(image.to_owned());
        match self.usable_image(user, image)? {
            UsableImage::Owned(row) | UsableImage::Shared { row, .. } => {
                let manifest = row.manifest.clone().ok_or_else(no_layers)?;
                Ok((row, manifest))
            }
            UsableImage::Host(_) => Err(no_layers()),
        }
    }

    /// Writes an image that a user can use as an OCI layout, which Docker can load, too. Returns
    /// the archive's reader.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such image, or if it has no layers.
    pub async fn export_image(
        &self,
        user: UserId,
        image: &str,
    ) -> Result<ImageArchive, ImageError> {
        let (row, _) = self.image_with_layers(user, image)?;
        self.export_row(&row).await
    }

    /// Writes an image as an OCI layout.
    pub(crate) async fn export_row(&self, row: &ImageRow) -> Result<ImageArchive, ImageError> {
        let no_layers = || ImageError::NoLayers(row.name.to_string());
        let manifest = row.manifest.as_deref().ok_or_else(no_layers)?;
        Ok(self.inner.node.export_image(manifest, row.name.as_str()).await?)
    }
}
