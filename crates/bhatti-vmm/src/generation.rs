//! Checks that the disk and the volumes of a snapshot are unchanged since it was taken.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bhatti_engine::{RestoreError, VolumeFile};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::files::read_at_most;
use crate::record::Volume;

/// The maximum size of a manifest, in bytes.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

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
    pub fn of(path: &Path) -> io::Result<Self> {
        let file = fs::metadata(path)?;
        Ok(Self { bytes: file.len(), modified_sec: file.mtime(), modified_nsec: file.mtime_nsec() })
    }
}

/// Makes the volumes that a guest writes durable, and returns their generations.
///
/// # Errors
///
/// Returns an error if a volume cannot be made durable.
pub fn volume_generations(volumes: &[Option<Volume>]) -> io::Result<Vec<Option<Generation>>> {
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
pub fn check_volumes(
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

/// The part of a manifest that is read first.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// Reads the manifest of a snapshot, which has a field `format`.
///
/// # Errors
///
/// Returns [`RestoreError::Damaged`] if the manifest is missing or unreadable, and
/// [`RestoreError::Mismatch`] if its format differs.
pub fn read_manifest<M: DeserializeOwned>(path: &Path, format: u32) -> Result<M, RestoreError> {
    let text = read_at_most(path, MANIFEST_BYTES_MAX).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => damaged("the manifest is missing"),
        _ => RestoreError::File { step: "read the snapshot's manifest", source },
    })?;
    let unreadable =
        |error: serde_json::Error| damaged(&format!("the manifest is unreadable: {error}"));
    let found: Format = serde_json::from_slice(&text).map_err(unreadable)?;
    same("format", &found.format.to_string(), &format.to_string())?;
    serde_json::from_slice(&text).map_err(unreadable)
}
