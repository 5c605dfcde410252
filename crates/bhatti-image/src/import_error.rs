//! Why an image cannot be built from layers.

use std::io;

use crate::archive::ArchiveError;
use crate::config::ConfigError;
use crate::ext4::Ext4Error;
use crate::store::StoreError;
use crate::unpack::UnpackError;

/// An archive could not be imported. The images are unchanged.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The archive cannot be unpacked.
    #[error("the archive cannot be unpacked: {complaint}")]
    Archive {
        /// What is wrong with it.
        complaint: String,
    },
    /// The archive's content exceeds a limit, or half of the free space of the host's disk.
    #[error("{0}")]
    TooLarge(String),
    /// A layer's uncompressed content is not what the image's configuration says.
    #[error("a layer's content is not `{0}`, as the image's configuration says")]
    WrongLayer(String),
    /// The image's configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host's disk has too little space.
    #[error(
        "an archive of {} MiB needs twice its size, and the host's disk has {} MiB free",
        archive_bytes >> 20, free_bytes >> 20
    )]
    DiskFull {
        /// Length of the archive.
        archive_bytes: u64,
        /// Free space, in bytes.
        free_bytes: u64,
    },
    /// The host failed.
    #[error("failed to unpack the archive")]
    Host(#[source] Ext4Error),
    /// A file of this host could not be read or written.
    #[error("failed to unpack the archive")]
    File(#[source] io::Error),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ImportError {
    /// Whether the host's disk had no space.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::DiskFull { .. } => true,
            Self::Host(Ext4Error::Unpack(UnpackError::Failed { source, .. }))
            | Self::File(source) => source.kind() == io::ErrorKind::StorageFull,
            _ => false,
        }
    }
}

impl From<ArchiveError> for ImportError {
    fn from(error: ArchiveError) -> Self {
        match error {
            ArchiveError::Bad(complaint) => Self::Archive { complaint },
            ArchiveError::File(error) => Self::File(error),
        }
    }
}

impl From<Ext4Error> for ImportError {
    fn from(error: Ext4Error) -> Self {
        match error {
            Ext4Error::Unpack(error) => error.into(),
            error => Self::Host(error),
        }
    }
}

impl From<UnpackError> for ImportError {
    fn from(error: UnpackError) -> Self {
        match error {
            UnpackError::Refused(complaint) => Self::Archive { complaint },
            UnpackError::TooLarge(complaint) => Self::TooLarge(complaint),
            error => Self::Host(error.into()),
        }
    }
}
