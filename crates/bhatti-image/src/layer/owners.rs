//! Owners of files where this process is not root: they are recorded for fakeroot.

use std::fs::File;
use std::io::Write;

use rustix::fs::Stat;

use super::LayerError;
use super::reader::Entry;

/// Bits that let this process read and write every file, whatever its mode.
const OWN_FILE: u32 = 0o600;
const OWN_DIRECTORY: u32 = 0o700;

/// Where owners and modes are kept.
pub(crate) enum Owners {
    /// In the files. This process is root.
    Real,
    /// In this file, with a line for each change. Later lines replace earlier ones.
    Recorded(File),
}

impl Owners {
    /// Records an entry's owner and mode in the form of `fakeroot -s`.
    pub(super) fn record(
        mut file: &File,
        stat: &Stat,
        entry: &Entry,
        mode: u32,
    ) -> Result<(), LayerError> {
        let (device, inode, links) = (stat.st_dev, stat.st_ino, stat.st_nlink);
        let mode = (stat.st_mode & !0o7777) | mode;
        let (user, group) = (entry.user, entry.group);
        writeln!(
            file,
            "dev={device:x},ino={inode},mode={mode:o},uid={user},gid={group},nlink={links},rdev=0"
        )
        .map_err(LayerError::Host)
    }

    /// Returns the mode that a file has on this host.
    pub(super) fn mode_here(&self, mode: u32, is_directory: bool) -> u32 {
        match self {
            Self::Real => mode,
            Self::Recorded(_) if is_directory => mode | OWN_DIRECTORY,
            Self::Recorded(_) => mode | OWN_FILE,
        }
    }
}
