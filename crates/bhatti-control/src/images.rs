//! Images: whose they are and who may use them.
//!
//! An image is a name, an owner and a root file system. Images that were built on this host have no
//! owner and can be used by everybody, as those of the admin.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use bhatti_node::{BlobAccess, ImageAccess, ImageSummary, Leftovers, Reference, UsedImages};
use bhatti_store::{CountError, ImageRow, Replace, StoreError};
use bhatti_types::{DEFAULT_IMAGE, ImageConfig, ImageName, Report, RootName, UserId};
use serde_json::json;
use tracing::{info, warn};

use crate::Control;
use crate::image_errors::ImageError;

/// When an image is pulled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// If the caller has no image of that name.
    #[default]
    Missing,
    /// Whether the caller has it or not. Its registry may have a newer one of that name.
    Always,
    /// Never.
    Never,
}

/// An image that a user can use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsableImage {
    /// It was built on this host.
    Host(ImageSummary),
    /// It is the user's own, or the admin's.
    Owned(ImageRow),
    /// Another user shares it.
    Shared {
        /// What the user calls it: its name, `@` and its owner.
        name: String,
        /// The image.
        row: ImageRow,
    },
}

impl UsableImage {
    /// Returns its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Host(image) => &image.name,
            Self::Owned(image) => image.name.as_str(),
            Self::Shared { name, .. } => name,
        }
    }
}

/// The image of a new sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FoundImage {
    pub(crate) name: ImageName,
    pub(crate) root: RootName,
    pub(crate) config: ImageConfig,
}

/// The names by which an image may be stored: as it was given, and as a whole reference.
fn names(image: &str) -> Vec<String> {
    let whole = image.parse::<Reference>().map(|reference| reference.to_string());
    [Some(image.to_owned()), whole.ok()].into_iter().flatten().collect()
}

impl Control {
    /// Returns the images that a user can use, by name: the own ones, the admin's, those that were
    /// built on this host, and those that are shared with the user. Of several images of one name,
    /// it returns the one that the name stands for.
    ///
    /// # Errors
    ///
    /// Returns an error if the store or the index of images cannot be read.
    pub fn list_images(&self, user: UserId) -> Result<Vec<UsableImage>, ImageError> {
        let store = &self.inner.store;
        let own = store.list_images(user)?.into_iter().map(UsableImage::Owned);
        let admins = store.list_images(UserId::ADMIN)?.into_iter().map(UsableImage::Owned);
        let host = self.inner.node.host_images()?.into_iter().map(UsableImage::Host);
        let shared = store
            .list_shared_images(user)?
            .into_iter()
            .map(|(owner, row)| UsableImage::Shared { name: format!("{}@{owner}", row.name), row });
        let mut images: Vec<_> = own.chain(admins).chain(host).chain(shared).collect();
        images.sort_by(|one, other| one.name().cmp(other.name()));
        images.dedup_by(|other, one| one.name() == other.name());
        Ok(images)
    }

    /// Returns the image that a user means by a name or a reference.
    ///
    /// # Errors
    ///
    /// Returns [`ImageError::NotFound`] if the user can use no such image.
    pub fn usable_image(&self, user: UserId, image: &str) -> Result<UsableImage, ImageError> {
        match self.image_row(user, image)? {
            Some((name, row)) if name == row.name.as_str() => return Ok(UsableImage::Owned(row)),
            Some((name, row)) => return Ok(UsableImage::Shared { name, row }),
            None => {}
        }
        let names = names(image);
        let mut host = self.inner.node.host_images()?.into_iter();
        let found = host.find(|image| names.contains(&image.name));
        found.map(UsableImage::Host).ok_or_else(|| ImageError::NotFound(image.to_owned()))
    }

    /// Returns the image of a new sandbox. Pulls it if the policy says so.
    pub(crate) async fn image_of_new(
        &self,
        user: UserId,
        image: Option<ImageName>,
        policy: PullPolicy,
    ) -> Result<FoundImage, ImageError> {
        let Some(image) = image else { return self.default_image() };
        if policy != PullPolicy::Always
            && let Some(found) = self.find_image(user, image.as_str())?
        {
            return Ok(found);
        }
        if policy == PullPolicy::Never {
            return Err(ImageError::NotFound(image.to_string()));
        }
        let row = self.pulled(user, image.as_str()).await?;
        Ok(FoundImage {
            name: row.name.clone(),
            root: row.root.clone(),
            config: row.config.clone(),
        })
    }

    fn default_image(&self) -> Result<FoundImage, ImageError> {
        let root = self.inner.node.host_root(DEFAULT_IMAGE)?.ok_or(ImageError::NotSetUp)?;
        let name = DEFAULT_IMAGE.parse().map_err(|_| ImageError::NotSetUp)?;
        Ok(FoundImage { name, root, config: ImageConfig::default() })
    }

    /// Finds the image that a user means, and notes that it is used.
    fn find_image(&self, user: UserId, image: &str) -> Result<Option<FoundImage>, ImageError> {
        let Some((called, row)) = self.image_row(user, image)? else {
            return self.host_image(image);
        };
        let name = called.parse().map_err(|_| ImageError::NotFound(image.to_owned()))?;
        self.inner.store.touch_image(row.owner, &row.name, unix_seconds())?;
        Ok(Some(FoundImage { name, root: row.root, config: row.config }))
    }

    /// Finds an image that was built on this host.
    fn host_image(&self, image: &str) -> Result<Option<FoundImage>, ImageError> {
        for name in names(image) {
            if let (Some(root), Ok(name)) = (self.inner.node.host_root(&name)?, name.parse()) {
                return Ok(Some(FoundImage { name, root, config: ImageConfig::default() }));
            }
        }
        Ok(None)
    }

    /// Finds the row that a user means, and what the user calls it.
    fn image_row(
        &self,
        user: UserId,
        image: &str,
    ) -> Result<Option<(String, ImageRow)>, ImageError> {
        for name in names(image) {
            if let Some(row) = self.inner.store.find_image(user, &name)? {
                return Ok(Some((row.name.to_string(), row)));
            }
        }
        // No image of the host has a name of this form.
        let Some((name, owner)) = image.rsplit_once('@') else { return Ok(None) };
        let shared = self.inner.store.find_shared_image(user, owner, name)?;
        Ok(shared.map(|row| (image.to_owned(), row)))
    }

    /// Returns the manifests of the images that a user can use.
    pub(crate) fn usable_manifests(&self, user: UserId) -> Result<Vec<String>, StoreError> {
        let rows = self.usable_rows(user)?;
        Ok(rows.into_iter().filter_map(|row| row.manifest).collect())
    }

    fn usable_rows(&self, user: UserId) -> Result<Vec<ImageRow>, StoreError> {
        let store = &self.inner.store;
        let mut rows = store.list_images(user)?;
        rows.extend(store.list_images(UserId::ADMIN)?);
        rows.extend(store.list_shared_images(user)?.into_iter().map(|(_, row)| row));
        Ok(rows)
    }

    /// Returns what a user may take from this host when pulling: the files of images that the user
    /// can use.
    pub(crate) fn image_access(
        &self,
        user: UserId,
        bytes_max: Option<u64>,
    ) -> Result<ImageAccess, StoreError> {
        let (mut roots, mut blobs) = (BTreeSet::new(), BTreeSet::new());
        for row in self.usable_rows(user)? {
            roots.insert(row.root);
            blobs.extend(row.blobs);
        }
        Ok(ImageAccess { blobs: BlobAccess { user: user.to_string(), blobs }, roots, bytes_max })
    }

    /// Gives an image that a user can use another name of that user.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such image, or if the user has one of the new name.
    pub async fn tag_image(
        &self,
        owner: UserId,
        image: &str,
        name: ImageName,
    ) -> Result<ImageRow, ImageError> {
        let _held = self.inner.node.hold_images().await;
        if self.inner.node.host_root(name.as_str())?.is_some() {
            return Err(ImageError::NameTaken(name));
        }
        let row = match self.usable_image(owner, image)? {
            UsableImage::Owned(row) | UsableImage::Shared { row, .. } => {
                ImageRow { owner, name, used_at: unix_seconds(), ..row }
            }
            UsableImage::Host(image) => {
                return Err(ImageError::NotOwned(image.name.parse().unwrap_or(name)));
            }
        };
        self.keep_image(row, Replace::No).await
    }

    /// Deletes an image of `owner` that nothing uses.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such image, if it is another user's, or if it is in use.
    pub async fn delete_image(&self, owner: UserId, image: &str) -> Result<(), ImageError> {
        let is_admin = owner == UserId::ADMIN;
        let found = match self.usable_image(owner, image)? {
            UsableImage::Owned(row) if row.owner == owner => row.name,
            UsableImage::Owned(row) | UsableImage::Shared { row, .. } => {
                return Err(ImageError::NotOwned(row.name));
            }
            UsableImage::Host(host) => {
                let name = host.name.parse().map_err(|_| ImageError::NotFound(image.to_owned()))?;
                if !is_admin {
                    return Err(ImageError::NotOwned(name));
                }
                self.refuse_used(owner, &name)?;
                self.inner.node.remove_host_image(&name).await?;
                self.record_deletion(owner, &name);
                return Ok(());
            }
        };
        self.refuse_used(owner, &found)?;
        self.inner.store.delete_image(owner, &found)?;
        self.record_deletion(owner, &found);
        self.collect_images(Leftovers::Go);
        Ok(())
    }

    fn refuse_used(&self, owner: UserId, image: &ImageName) -> Result<(), ImageError> {
        match self.inner.store.image_user(owner, image)? {
            Some(user) => Err(ImageError::InUse { image: image.clone(), user }),
            None => Ok(()),
        }
    }

    fn record_deletion(&self, owner: UserId, image: &ImageName) {
        self.record("image.deleted", owner, None, json!({ "image": image.as_str() }));
    }

    /// Deletes the images of `owner` that nothing uses. Returns their names, and the disk space
    /// that this frees, in bytes. Space of files that another user's image has is not free.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails. Some images may be deleted then.
    pub fn prune_images(&self, owner: UserId) -> Result<(Vec<ImageName>, u64), ImageError> {
        let mut deleted = Vec::new();
        for image in self.inner.store.list_images(owner)? {
            if self.inner.store.image_user(owner, &image.name)?.is_some() {
                continue;
            }
            self.inner.store.delete_image(owner, &image.name)?;
            self.record_deletion(owner, &image.name);
            deleted.push(image.name);
        }
        Ok((deleted, self.collect(Leftovers::Go)?))
    }

    /// Lets another user use an image of `owner`.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such image or user.
    pub fn share_image(&self, owner: UserId, image: &str, user: &str) -> Result<(), ImageError> {
        let (name, user) = self.owned_image_and_user(owner, image, user)?;
        self.inner.store.share_image(owner, &name, user).map_err(|error| match error {
            CountError::TooMany(quota) => ImageError::Quota(quota),
            CountError::Store(error) => ImageError::Store(error),
        })
    }

    /// Ends that another user can use an image of `owner`. Sandboxes stay.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such image or user, or if the image is not shared with it.
    pub fn unshare_image(&self, owner: UserId, image: &str, user: &str) -> Result<(), ImageError> {
        let (name, id) = self.owned_image_and_user(owner, image, user)?;
        self.inner.store.unshare_image(owner, &name, id).map_err(|error| match error {
            StoreError::NoSuchRow => {
                ImageError::Share(format!("image `{name}` is not shared with user `{user}`"))
            }
            error => error.into(),
        })
    }

    /// Returns the names of the users with whom an image is shared.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn image_shares(&self, image: &ImageRow) -> Result<Vec<String>, ImageError> {
        Ok(self.inner.store.image_shares(image.owner, &image.name)?)
    }

    fn owned_image_and_user(
        &self,
        owner: UserId,
        image: &str,
        user: &str,
    ) -> Result<(ImageName, UserId), ImageError> {
        let name = match self.usable_image(owner, image)? {
            UsableImage::Owned(row) if row.owner == owner => row.name,
            other => {
                let name = other.name().parse();
                return Err(name.map_or_else(
                    |_| ImageError::NotFound(image.to_owned()),
                    ImageError::NotOwned,
                ));
            }
        };
        let found = self.inner.store.list_users()?.into_iter().find(|row| row.name == user);
        let found = found.ok_or_else(|| ImageError::Share(format!("user `{user}` not found")))?;
        Ok((name, found.id))
    }

    /// Deletes pulled images that nothing uses, those first that were used longest ago, until all
    /// pulled images are within the operator's limit. They can be pulled again, other images
    /// cannot.
    ///
    /// Returns whether it deleted any.
    pub(crate) fn evict_images(&self, newest: &ImageRow) -> Result<bool, ImageError> {
        let Some(limit) = self.inner.pulled_images_bytes else { return Ok(false) };
        let mut evicted = false;
        let mut pulled = self.inner.store.list_all_images()?;
        pulled.retain(is_pulled);
        let bytes = |images: &[ImageRow]| {
            let roots: BTreeMap<_, _> = images.iter().map(|it| (&it.root, it.disk_bytes)).collect();
            roots.into_values().sum::<u64>()
        };
        let mut kept = pulled.clone();
        for image in pulled {
            if bytes(&kept) <= limit {
                break;
            }
            let is_newest = (image.owner, &image.name) == (newest.owner, &newest.name);
            if is_newest || self.inner.store.image_user(image.owner, &image.name)?.is_some() {
                continue;
            }
            self.inner.store.delete_image(image.owner, &image.name)?;
            kept.retain(|it| (it.owner, &it.name) != (image.owner, &image.name));
            evicted = true;
            info!(image = %image.name, "Evicted an unused image");
            let detail = json!({ "image": image.name.as_str() });
            self.record("image.evicted", image.owner, None, detail);
        }
        Ok(evicted)
    }

    /// Removes the files of images that are in no row. Logs a failure, because the next deletion
    /// tries again.
    pub(crate) fn collect_images(&self, leftovers: Leftovers) {
        match self.collect(leftovers) {
            Ok(0) => {}
            Ok(bytes) => info!(bytes, "Removed the files of unused images"),
            Err(error) => {
                warn!(error = %Report(&error), "Failed to remove the files of unused images");
            }
        }
    }

    fn collect(&self, leftovers: Leftovers) -> Result<u64, ImageError> {
        let used = || {
            let mut used = UsedImages { roots: BTreeSet::new(), blobs: BTreeSet::new() };
            for image in self.inner.store.list_all_images()? {
                used.roots.insert(image.root);
                used.blobs.extend(image.blobs);
            }
            Ok(used)
        };
        self.inner.node.collect_images(leftovers, used)
    }
}

/// Whether an image is called by the reference that it was pulled by.
fn is_pulled(image: &ImageRow) -> bool {
    let reference = image.name.as_str().parse::<Reference>();
    reference.is_ok_and(|reference| {
        reference.to_string() == image.name.as_str()
            && image.source.starts_with(&format!("{} sha256:", reference.registry()))
    })
}

/// Returns the seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
