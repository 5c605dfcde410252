//! Errors of operations.

use std::sync::Arc;

use bhatti_types::QuotaExceeded;

use crate::build_errors::{BuildError, TemplateBuildError};
use crate::image_errors::{PullFailure, SaveError};

/// An operation failed.
#[derive(Debug, thiserror::Error)]
pub enum OperationFailure {
    /// An image could not be pulled or pushed.
    #[error(transparent)]
    Pull(#[from] Arc<PullFailure>),
    /// A sandbox could not be saved.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// An image could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A template could not be built.
    #[error(transparent)]
    Template(#[from] TemplateBuildError),
    /// The owner's quota does not allow it.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
}

impl From<PullFailure> for OperationFailure {
    fn from(error: PullFailure) -> Self {
        Self::Pull(Arc::new(error))
    }
}
