//! File operations. They run as the agent, root in a guest.

mod change;
mod info;
mod read;
mod watch;
mod write;

use std::path::{Path, PathBuf};

use bhatti_proto::{AgentError, ErrorKind};

use crate::limits::PATH_BYTES_MAX;
use crate::refusal::refused;

pub(crate) use change::{mkdir, remove, rename};
pub(crate) use info::{list, stat};
pub(crate) use read::read;
pub(crate) use watch::watch;
pub(crate) use write::{Owner, write, write_whole};

/// Permission bits of a new file whose request names none.
const FILE_MODE: u32 = 0o644;

/// Checks a path.
fn checked(path: &str) -> Result<PathBuf, AgentError> {
    if path.is_empty() || path.len() > PATH_BYTES_MAX || path.contains('\0') {
        let message =
            format!("a path has 1 to {PATH_BYTES_MAX} bytes and no NUL, not {} bytes", path.len());
        return Err(refused(ErrorKind::BadRequest, message));
    }
    Ok(PathBuf::from(path))
}

/// Permission bits in octal, as requests have them.
pub(crate) fn parse_mode(text: &str, default: u32) -> Result<u32, AgentError> {
    if text.is_empty() {
        return Ok(default);
    }
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
    mode.ok_or_else(|| {
        refused(ErrorKind::BadRequest, format!("`{text}` are no permission bits in octal"))
    })
}

/// The directory that a file lies in.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
