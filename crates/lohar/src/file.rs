//! File operations. Each acts as one user: the user that its request names, or else the usual
//! user of a guest. The kernel checks that user's rights, and new files belong to that user.

mod archive;
mod change;
mod entry;
mod in_place;
mod info;
mod read;
mod remove;
mod target;
mod watch;
mod watch_tree;
mod worker;
mod write;
mod xattrs;

use std::path::{Path, PathBuf};

use bhatti_proto::{AgentError, ErrorKind};

use crate::limits::PATH_BYTES_MAX;
use crate::refusal::refused;

pub(crate) use archive::{read as read_archive, write as write_archive};
pub(crate) use change::{mkdir, remove, rename};
pub(crate) use entry::{entries, place};
pub(crate) use info::{list, stat};
pub(crate) use read::read;
pub(crate) use watch::watch;
pub(crate) use watch_tree::watch_tree;
pub(crate) use worker::{Workers, begin_as_agent};
pub(crate) use write::{write, write_whole};

/// Permission bits of a new file whose request names none.
const FILE_MODE: u32 = 0o644;
/// Permission bits of a new directory whose request names none.
const DIRECTORY_MODE: u32 = 0o755;

/// Checks a path.
fn checked(path: &str) -> Result<PathBuf, AgentError> {
    if path.is_empty() || path.len() > PATH_BYTES_MAX || path.contains('\0') {
        let message =
            format!("path of {} bytes: it must have 1 to {PATH_BYTES_MAX} and no NUL", path.len());
        return Err(refused(ErrorKind::BadRequest, message));
    }
    Ok(PathBuf::from(path))
}

/// Parses permission bits in octal, as in requests. Returns `None` for an empty text.
pub(crate) fn parse_mode(text: &str) -> Result<Option<u32>, AgentError> {
    if text.is_empty() {
        return Ok(None);
    }
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
    mode.map(Some).ok_or_else(|| {
        refused(ErrorKind::BadRequest, format!("`{text}` is not a file mode in octal"))
    })
}

/// Returns the directory of a file.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The permission bits as four octal digits, with the setuid, setgid and sticky bits.
fn octal(mode: u32) -> String {
    format!("{:04o}", mode & 0o7777)
}

fn is_a_directory(path: &Path) -> AgentError {
    refused(ErrorKind::IsDirectory, format!("{} is a directory", path.display()))
}

fn is_not_regular(path: &Path) -> AgentError {
    refused(ErrorKind::NotRegular, format!("{} is not a regular file", path.display()))
}
