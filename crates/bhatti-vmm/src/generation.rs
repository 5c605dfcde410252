//! Checks that the disk and the volumes of a snapshot are unchanged since it was taken.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bhatti_engine::{RestoreError, VolumeFile};
use serde::{Deserialize, Serialize};

use crate::machine::Volume;

/// Size and modification time of a file, which change when the file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    bytes: u64,
    modified_sec: i64,
    modified_nsec: i64,
}

impl Generation {
    /// Reads the current generation of a file.
    ///
    /// # Errors
    ///
    /// Returns the error of stat(2).
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let file = fs::metadata(path)?;
        Ok(Self { bytes: file.len(), modified_sec: file.mtime(), modified_nsec: file.mtime_nsec() })
    }
}

/// Makes the volumes that a guest writes durable, and returns their generations.
///
/// # Errors
///
/// Returns an error if a volume cannot be made durable.
pub(crate) fn volume_generations(
    volumes: &[Option<Volume>],
) -> io::Result<Vec<Option<Generation>>> {
    let generation = |volume: &Option<Volume>| match volume {
        Some(volume) if !volume.read_only => {
            File::open(&volume.path)?.sync_all()?;
            Generation::of(&volume.path).map(Some)
        }
        _ => Ok(None),
    };
    volumes.iter().map(generation).collect()
}

/// Checks that the volumes that the guest writes are unchanged since it was saved: the guest's
/// caches must match their content.
///
/// # Errors
///
/// Returns [`RestoreError::Stale`] if a volume was written since.
pub(crate) fn check_volumes(
    volumes: &[Option<VolumeFile>],
    generations: &[Option<Generation>],
) -> Result<(), RestoreError> {
    for (volume, then) in volumes.iter().zip(generations) {
        let (Some(volume), Some(then)) = (volume, then) else { continue };
        let now = Generation::of(&volume.path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => damaged("a volume's file is missing"),
            _ => RestoreError::File { step: "inspect a volume's file", source },
        })?;
        if now != *then {
            return Err(RestoreError::Stale);
        }
    }
    Ok(())
}

/// Returns the error of a damaged snapshot.
#[must_use]
pub fn damaged(what: &str) -> RestoreError {
    RestoreError::Damaged { what: what.to_owned() }
}

/// Checks that a property is the same as in the snapshot.
///
/// # Errors
///
/// Returns [`RestoreError::Mismatch`] if it differs.
pub fn same(what: &'static str, needed: &str, found: &str) -> Result<(), RestoreError> {
    if needed == found {
        return Ok(());
    }
    Err(RestoreError::Mismatch { what, needed: needed.to_owned(), found: found.to_owned() })
}
