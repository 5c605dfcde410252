//! A snapshot on its way: a directory beside its place, which is renamed when all of it is there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bhatti_engine::{FileCopy, SnapshotError};
use bhatti_host::{disk, durable};
use tokio::task::spawn_blocking;

use crate::create_private;

/// A directory that is removed unless it is put in its place.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    place: PathBuf,
    is_kept: bool,
}

impl Draft {
    /// Makes an empty one for `place`, which must not exist. What an earlier one left is removed.
    ///
    /// # Errors
    ///
    /// Returns an error if the place is taken or the directory cannot be made.
    pub fn create(place: &Path) -> Result<Self, SnapshotError> {
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

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts it in its place, durably; what is in it is durable already.
    ///
    /// # Errors
    ///
    /// Returns an error if the place was taken meanwhile, or the new name cannot be made durable; nothing of the draft is left then.
    pub fn put_in_place(mut self) -> io::Result<()> {
        fs::rename(&self.path, &self.place)?;
        // It goes by that name from here on, also if it is to go.
        self.path.clone_from(&self.place);
        durable::sync_parent(&self.place)?;
        self.is_kept = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "Failed to remove an unfinished snapshot");
        }
    }
}

/// Copies what belongs into a snapshot beside what the VMM writes.
///
/// # Errors
///
/// Returns an error if one cannot be copied.
pub async fn copy_files(copies: &[FileCopy], draft: &Path) -> Result<(), SnapshotError> {
    let (copies, draft) = (copies.to_vec(), draft.to_owned());
    let copied = spawn_blocking(move || {
        copies.iter().try_for_each(|copy| disk::copy(&copy.from, &draft.join(&copy.name)))
    });
    let failed = |source| SnapshotError::File { step: "copy a volume", source };
    copied.await.map_err(io::Error::other).and_then(|copied| copied).map_err(failed)
}
