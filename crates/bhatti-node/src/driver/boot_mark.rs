//! The mark of a sandbox whose VM boots again, in its directory.
//!
//! A guest has no settings until the daemon sends them. If the daemon ends before that, its
//! successor cannot see this in the VM. If the successor finds the mark, it ends the VM and boots
//! the sandbox again, unless the sandbox is stopped or failed. No caller got an answer to the
//! interrupted boot.
//!
//! Nothing but [`BootMark::clear`] removes the mark: a boot that is dropped leaves it, because its
//! VM lives on. The mark need not survive a power cut, because no VM does.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tracing::warn;

use super::saved::Saved;

const MARK: &str = "booting";

/// The mark of one sandbox. Calls block on disk for a moment.
#[must_use = "the mark stays until it is cleared"]
pub(crate) struct BootMark(PathBuf);

impl BootMark {
    /// Marks the sandbox of this directory.
    ///
    /// # Errors
    ///
    /// Returns the error of creating a file.
    pub(crate) fn mark(directory: &Path) -> io::Result<Self> {
        let path = directory.join(MARK);
        File::create(&path)?;
        Ok(Self(path))
    }

    /// Finds the mark of a sandbox whose boot an earlier daemon did not finish.
    pub(crate) fn find(directory: &Path) -> Option<Self> {
        let mark = Self(directory.join(MARK));
        if !mark.0.exists() {
            return None;
        }
        if Saved::new(directory.to_owned()).is_there() {
            // No VM has run since the snapshot was taken: a boot gives the snapshot up before its
            // VM runs. Either that boot had not come so far, or an older mark could not be
            // removed.
            mark.clear();
            return None;
        }
        Some(mark)
    }

    /// Removes the mark: the guest has its settings, or its VM is gone.
    pub(crate) fn clear(self) {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!(path = %self.0.display(), %error, "Failed to remove the mark of a boot");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mark_lasts_until_it_is_cleared() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        assert!(BootMark::find(directory).is_none());

        drop(BootMark::mark(directory).unwrap());

        BootMark::find(directory).expect("its daemon ended").clear();
        assert!(BootMark::find(directory).is_none());
    }

    #[test]
    fn mark_beside_a_snapshot_is_a_left_over() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        drop(BootMark::mark(directory).unwrap());
        fs::create_dir(directory.join(crate::driver::saved::SNAPSHOT)).unwrap();

        assert!(BootMark::find(directory).is_none());
        assert!(!directory.join(MARK).exists());
    }
}
