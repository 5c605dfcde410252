//! The mark of a sandbox whose VM boots again, in its directory.
//!
//! A guest that has booted has no settings until its daemon has sent them. A daemon that finds the
//! VM of a daemon that died in between cannot tell by the VM whether it has them. With the mark it
//! boots the sandbox anew; the caller of the earlier boot got no answer.
//!
//! The mark need not survive a power cut, for no VM does.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tracing::warn;

const MARK: &str = "booting";

/// A sandbox is marked until this is dropped.
pub(crate) struct HalfBooted(PathBuf);

impl HalfBooted {
    /// Marks the sandbox of this directory. Blocks on disk for a moment.
    ///
    /// # Errors
    ///
    /// Returns the error of creating a file.
    pub(crate) fn mark(directory: &Path) -> io::Result<Self> {
        let path = directory.join(MARK);
        File::create(&path)?;
        Ok(Self(path))
    }

    /// Whether the daemon died while it booted the sandbox of this directory. Takes the mark away.
    pub(crate) fn was(directory: &Path) -> bool {
        let path = directory.join(MARK);
        let is_there = path.exists();
        drop(Self(path));
        is_there
    }
}

impl Drop for HalfBooted {
    fn drop(&mut self) {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                // A daemon that finds the mark boots the sandbox, which then loses its memory.
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
    fn mark_is_there_from_the_boot_until_the_guest_has_its_settings() {
        let directory = tempfile::tempdir().unwrap();
        let mark = HalfBooted::mark(directory.path()).unwrap();
        drop(mark);
        assert!(!HalfBooted::was(directory.path()));

        std::mem::forget(HalfBooted::mark(directory.path()).unwrap());

        assert!(HalfBooted::was(directory.path()), "its daemon died");
        assert!(!HalfBooted::was(directory.path()), "and the next one knows");
    }
}
