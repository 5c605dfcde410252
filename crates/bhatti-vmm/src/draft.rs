//! An unfinished snapshot: a directory beside its final place, which is renamed once it is
//! complete.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bhatti_engine::{FileCopy, SnapshotError};
use bhatti_host::{blocking, disk, durable};
use tokio::task::spawn_blocking;

use crate::files::create_private;

/// A directory that is removed unless it is put in place.
#[derive(Debug)]
pub(crate) struct Draft {
    path: PathBuf,
    place: PathBuf,
    is_kept: bool,
}

impl Draft {
    /// Creates an empty draft for `place`, which must not exist. Removes an earlier draft.
    ///
    /// # Errors
    ///
    /// Returns an error if the place is taken or the directory cannot be made.
    pub(crate) async fn create(place: &Path) -> Result<Self, SnapshotError> {
        let place = place.to_owned();
        let created = spawn_blocking(move || Self::create_now(&place)).await;
        created.map_err(|error| SnapshotError::File {
            step: "create the snapshot's directory",
            source: io::Error::other(error),
        })?
    }

    fn create_now(place: &Path) -> Result<Self, SnapshotError> {
        let failed = |step| move |source| SnapshotError::File { step, source };
        if place.exists() {
            return Err(failed("make room for the snapshot")(io::ErrorKind::AlreadyExists.into()));
        }
        let mut name = place.file_name().unwrap_or_default().to_owned();
        name.push(".tmp");
        let path = place.with_file_name(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove an unfinished snapshot")(error));
            }
            _ => {}
        }
        create_private(&path).map_err(failed("create the snapshot's directory"))?;
        Ok(Self { path, place: place.to_owned(), is_kept: false })
    }

    /// Returns the draft's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Renames the draft to its place, durably. The files in it must already be durable.
    ///
    /// # Errors
    ///
    /// Returns an error if the place was taken meanwhile, or if the new name cannot be made
    /// durable. Nothing of the draft is then left.
    pub(crate) fn put_in_place(mut self) -> io::Result<()> {
        fs::rename(&self.path, &self.place)?;
        // The directory has this name from here on, also if it is removed on drop.
        self.path.clone_from(&self.place);
        durable::sync_parent(&self.place)?;
        self.is_kept = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = blocking(|| fs::remove_dir_all(&self.path))
        {
            tracing::warn!(path = %self.path.display(), %error, "Failed to remove an unfinished snapshot");
        }
    }
}

/// Copies files into a snapshot beside the files that the VMM writes.
///
/// # Errors
///
/// Returns an error if a file cannot be copied.
pub(crate) async fn copy_files(copies: &[FileCopy], draft: &Path) -> Result<(), SnapshotError> {
    let (copies, draft) = (copies.to_vec(), draft.to_owned());
    on_thread("copy a volume", move || {
        copies.iter().try_for_each(|copy| disk::copy(&copy.from, &draft.join(&copy.name)))
    })
    .await
}

/// Does the `step` of a snapshot that waits for a disk, on a thread for blocking work.
///
/// # Errors
///
/// Returns the error of the work, with the step.
pub async fn on_thread<T: Send + 'static>(
    step: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, SnapshotError> {
    let done = spawn_blocking(work).await.map_err(io::Error::other).and_then(|done| done);
    done.map_err(|source| SnapshotError::File { step, source })
}
