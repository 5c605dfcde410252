//! Errors of builds.

use bhatti_agent::CallError;
use bhatti_node::UseError;
use bhatti_store::{StoreError, TemplateInsertError};

use bhatti_types::InvalidEnvironment;

use crate::create::CreateError;
use crate::image_errors::ImageError;
use crate::snapshots::SnapshotOpError;
use crate::volumes::VolumeOpError;

/// Maximum number of a template's steps.
pub(crate) const STEPS_MAX: usize = 100;

/// An image could not be built. The owner's images are unchanged.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A step failed.
    #[error("line {line} of the Dockerfile failed with exit code {code}: {step}")]
    Step {
        /// The line.
        line: usize,
        /// The step.
        step: String,
        /// The exit code of the builder.
        code: i32,
    },
    /// The builder failed outside of a step.
    #[error("the build failed: {0}")]
    Builder(String),
    /// The sandbox could not be created.
    #[error("failed to create the sandbox of the build")]
    Create(#[source] Box<CreateError>),
    /// The volume of the cache could not be made.
    #[error("failed to make the volume of the build's cache")]
    Cache(#[from] VolumeOpError),
    /// The sandbox was stopped, destroyed, or cannot be used.
    #[error(transparent)]
    Use(#[from] UseError),
    /// The sandbox did not answer.
    #[error("failed to reach the sandbox of the build")]
    Guest(#[from] CallError),
    /// The image could not be written to this host's disk.
    #[error("failed to write the image")]
    Write(#[from] std::io::Error),
    /// It is larger than the disk space that its owner has left.
    #[error("the image has more than the {0} MiB of disk space that its owner has left")]
    TooLarge(u64),
    /// The image could not be kept.
    #[error(transparent)]
    Image(Box<ImageError>),
}

impl From<CreateError> for BuildError {
    fn from(error: CreateError) -> Self {
        Self::Create(Box::new(error))
    }
}

impl From<ImageError> for BuildError {
    fn from(error: ImageError) -> Self {
        Self::Image(Box::new(error))
    }
}

/// A template could not be built. The owner's templates are unchanged.
#[derive(Debug, thiserror::Error)]
pub enum TemplateBuildError {
    /// The engine cannot save sandboxes.
    #[error("sandboxes of this engine cannot be saved, so templates cannot be built")]
    CannotSave,
    /// There are too many steps.
    #[error("{0} steps are too many: a template has at most {STEPS_MAX}")]
    TooMany(usize),
    /// A step or a command is too long, or has a zero byte.
    #[error("step {0} is longer than 64 KiB, or has a zero byte")]
    Step(usize),
    /// The variables of the steps are not valid, or too long together.
    #[error(transparent)]
    Environment(#[from] InvalidEnvironment),
    /// The start or the ready command is too long, or has a zero byte.
    #[error("the start or the ready command is longer than 64 KiB, or has a zero byte")]
    Command,
    /// A step copies files, and none were sent.
    #[error("a step copies files, and the request has none")]
    NoFiles,
    /// A path of a copy is not valid.
    #[error("`{0}` is not a path within the files: it is absolute or leads upward")]
    Path(String),
    /// The target of a copy is not absolute.
    #[error("`{0}` is not an absolute path")]
    Target(String),
    /// The files have nothing at that path.
    #[error("the files have no `{0}`")]
    Missing(String),
    /// The archive of the files is not valid.
    #[error("the archive of the files is not valid: {0}")]
    Archive(String),
    /// A step failed.
    #[error("step {number} failed with exit code {code}: {step}")]
    Failed {
        /// Its number, from 1 on.
        number: usize,
        /// The step.
        step: String,
        /// The exit code.
        code: i32,
    },
    /// The start command ended before it was ready.
    #[error("the start command ended with exit code {0} before it was ready")]
    Ended(i32),
    /// The start command was not ready in time.
    #[error("the start command was not ready after {0} seconds")]
    NotReady(u64),
    /// The sandbox could not be created.
    #[error("failed to create the sandbox of the build")]
    Create(#[from] CreateError),
    /// The sandbox was stopped, destroyed, or cannot be used.
    #[error(transparent)]
    Use(#[from] UseError),
    /// The sandbox did not answer.
    #[error("failed to reach the sandbox of the build")]
    Guest(#[from] CallError),
    /// The sandbox could not be saved.
    #[error("failed to save the sandbox of the build")]
    Save(#[from] SnapshotOpError),
    /// The files could not be written to this host's disk.
    #[error("failed to write the files")]
    Write(#[from] std::io::Error),
    /// The template could not be kept.
    #[error(transparent)]
    Keep(#[from] TemplateInsertError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
