//! Whether what a snapshot belongs to is still what it was.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bhatti_engine::{RestoreError, VolumeFile};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::files::read_at_most;
use crate::record::Volume;

/// The most that a manifest may be, in bytes.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// Tells whether a file has been written since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    bytes: u64,
    modified_sec: i64,
    modified_nsec: i64,
}

impl Generation {
    /// When a file was written last.
    ///
    /// # Errors
    ///
    /// Returns the error of stat(2).
    pub fn of(path: &Path) -> io::Result<Self> {
        let file = fs::metadata(path)?;
        Ok(Self { bytes: file.len(), modified_sec: file.mtime(), modified_nsec: file.mtime_nsec() })
    }
}

/// When the volumes that a guest writes were written last; they are durable then.
///
/// # Errors
///
/// Returns an error if one cannot be made durable.
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

/// Volumes that the guest writes hold what they held when it was saved: what it knows of them has to be true.
///
/// # Errors
///
/// Returns [`RestoreError::Stale`] if one was written since.
pub fn check_volumes(
    volumes: &[Option<VolumeFile>],
    generations: &[Option<Generation>],
) -> Result<(), RestoreError> {
    for (volume, then) in volumes.iter().zip(generations) {
        let (Some(volume), Some(then)) = (volume, then) else { continue };
        let now = Generation::of(&volume.path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => damaged("a volume's file is gone"),
            _ => RestoreError::File { step: "look at a volume's file", source },
        })?;
        if now != *then {
            return Err(RestoreError::Stale);
        }
    }
    Ok(())
}

/// The error of a snapshot that is not what was written.
#[must_use]
pub fn damaged(what: &str) -> RestoreError {
    RestoreError::Damaged { what: what.to_owned() }
}

/// Checks something that must be the same.
///
/// # Errors
///
/// Returns [`RestoreError::Mismatch`] if it is not.
pub fn same(what: &'static str, needed: &str, found: &str) -> Result<(), RestoreError> {
    if needed == found {
        return Ok(());
    }
    Err(RestoreError::Mismatch { what, needed: needed.to_owned(), found: found.to_owned() })
}

/// What a manifest says before anything else.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// Reads the manifest of a snapshot, which has a field `format`.
///
/// # Errors
///
/// Returns [`RestoreError::Damaged`] if it is not there or cannot be read, and [`RestoreError::Mismatch`] if it has another format.
pub fn read_manifest<M: DeserializeOwned>(path: &Path, format: u32) -> Result<M, RestoreError> {
    let text = read_at_most(path, MANIFEST_BYTES_MAX).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => damaged("it has no manifest"),
        _ => RestoreError::File { step: "read the snapshot's manifest", source },
    })?;
    let unreadable =
        |error: serde_json::Error| damaged(&format!("its manifest cannot be read: {error}"));
    let found: Format = serde_json::from_slice(&text).map_err(unreadable)?;
    same("format", &found.format.to_string(), &format.to_string())?;
    serde_json::from_slice(&text).map_err(unreadable)
}
