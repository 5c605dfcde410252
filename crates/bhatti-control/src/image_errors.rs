//! Errors of images.

use std::sync::Arc;

use bhatti_agent::CallError;
use bhatti_node::{
    CollectError, ImageFilesError, ImportError, PullError, RegistryError, RemoveError, UseError,
};
use bhatti_store::{ImageInsertError, StoreError};
use bhatti_types::{BUILDER_IMAGE, DEFAULT_IMAGE, ImageName, ParseNameError, QuotaExceeded};

use crate::disk_quota::DiskQuotaError;

/// An image could not be pulled or pushed.
#[derive(Debug, thiserror::Error)]
pub enum PullFailure {
    /// The name is not that of an image in a registry.
    #[error("{0}")]
    Reference(String),
    /// The reference is too long for a name.
    #[error(transparent)]
    Name(#[from] ParseNameError),
    /// The registry, the image or this host is at fault.
    #[error("failed to pull `{image}`")]
    Pull {
        /// The reference of the image.
        image: String,
        /// What failed.
        #[source]
        error: PullError,
    },
    /// It could not be pushed.
    #[error("failed to push `{image}`")]
    Push {
        /// The reference.
        image: String,
        /// What failed.
        #[source]
        error: PullError,
    },
    /// It is larger than the disk space that its owner has left.
    #[error("{0}")]
    NoRoom(String),
    /// The owner's quota does not allow it.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A sandbox could not be saved as an image.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The sandbox cannot be used.
    #[error(transparent)]
    Use(#[from] UseError),
    /// The guest's files could not be read.
    #[error("failed to read the sandbox's files")]
    Read(#[from] CallError),
    /// They could not be written to this host's disk.
    #[error("failed to write the sandbox's files")]
    Write(#[from] std::io::Error),
    /// They are larger than the disk space that the owner has left.
    #[error(
        "the sandbox's files have more than the {0} MiB of disk space that their owner has left"
    )]
    TooLarge(u64),
    /// The image could not be made.
    #[error(transparent)]
    Image(Box<ImageError>),
}

impl SaveError {
    pub(crate) fn of(error: ImageError) -> Self {
        Self::Image(Box::new(error))
    }
}

/// Returns what is wrong with an image that is larger than the disk space that its owner has left.
pub(crate) fn no_room(error: &ImportError, left: Option<u64>) -> Option<String> {
    let (ImportError::TooLarge(complaint), Some(left)) = (error, left) else { return None };
    Some(format!("{complaint}; its owner has {} MiB of disk space left", left >> 20))
}

/// A Dockerfile that cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DockerfileError {
    /// It is not a valid Dockerfile.
    #[error("invalid Dockerfile: {0}")]
    Invalid(String),
    /// It has no stage of the wanted name.
    #[error("the Dockerfile has no stage `{0}`")]
    NoStage(String),
    /// An argument or a secret has no valid name, or a value that is too long.
    #[error("invalid {what} `{name}`: {rule}")]
    Input {
        /// What it is.
        what: &'static str,
        /// Its name.
        name: String,
        /// What is allowed.
        rule: String,
    },
}

/// An operation on an image failed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// `bhatti setup` has not been run.
    #[error("no image `{DEFAULT_IMAGE}` has been built")]
    NotSetUp,
    /// The user has no such image, and it was not to be pulled.
    #[error("image `{0}` not found")]
    NotFound(String),
    /// The image is another user's.
    #[error("image `{0}` belongs to another user")]
    NotOwned(ImageName),
    /// Something uses the image.
    #[error("image `{image}` is in use by {user}")]
    InUse {
        /// The image.
        image: ImageName,
        /// What uses it.
        user: String,
    },
    /// The owner has an image of that name.
    #[error("image `{0}` already exists")]
    NameTaken(ImageName),
    /// There is no such sandbox.
    #[error(transparent)]
    Sandbox(#[from] UseError),
    /// There is no such user, or the image is not shared with the user.
    #[error("{0}")]
    Share(String),
    /// It could not be pulled.
    #[error(transparent)]
    Pull(#[from] Arc<PullFailure>),
    /// The pull was canceled.
    #[error("the pull of `{0}` was canceled")]
    Canceled(String),
    /// The archive could not be imported.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// It is larger than the disk space that its owner has left.
    #[error("{0}")]
    NoRoom(String),
    /// The Dockerfile, or what it is to be built with, is not valid.
    #[error(transparent)]
    Dockerfile(#[from] DockerfileError),
    /// There is no image to build with.
    #[error("no image `{BUILDER_IMAGE}` has been built")]
    NoBuilder,
    /// The image was built on this host, without layers.
    #[error("image `{0}` was built on this host and has no layers")]
    NoLayers(String),
    /// The image's layers could not be read or kept.
    #[error(transparent)]
    Layers(#[from] RegistryError),
    /// An image of this host could not be removed.
    #[error(transparent)]
    Remove(#[from] RemoveError),
    /// The files of images could not be read or removed.
    #[error(transparent)]
    Files(#[from] ImageFilesError),
    /// The files of unused images could not be removed.
    #[error(transparent)]
    Collect(#[from] CollectError),
    /// The owner's quota does not allow it.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The free space of the images' disk could not be read.
    #[error("failed to read the free space of the images' disk")]
    FreeSpace(#[from] std::io::Error),
    /// The host gives no random bytes.
    #[error("failed to draw an id")]
    Entropy(#[from] getrandom::Error),
}

/// An image cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ImageCommandError {
    /// It has no command.
    #[error("image `{0}` has no command of its own")]
    None(ImageName),
    /// There is no such sandbox.
    #[error(transparent)]
    Sandbox(#[from] UseError),
}

impl From<ImageInsertError> for ImageError {
    fn from(error: ImageInsertError) -> Self {
        match error {
            ImageInsertError::NameTaken(name) => Self::NameTaken(name),
            ImageInsertError::Quota(quota) => Self::Quota(quota),
            ImageInsertError::Store(error) => Self::Store(error),
        }
    }
}

impl From<DiskQuotaError> for ImageError {
    fn from(error: DiskQuotaError) -> Self {
        match error {
            DiskQuotaError::Quota(quota) => Self::Quota(quota),
            DiskQuotaError::Store(error) => Self::Store(error),
        }
    }
}

impl From<DiskQuotaError> for PullFailure {
    fn from(error: DiskQuotaError) -> Self {
        match error {
            DiskQuotaError::Quota(quota) => Self::Quota(quota),
            DiskQuotaError::Store(error) => Self::Store(error),
        }
    }
}
