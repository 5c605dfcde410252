//! Files that are written in place, with the agent's rights: an existing file keeps its mode and
//! its other names. Programs that watch it see a creation, a change of attributes and
//! writes.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use bhatti_proto::{AgentError, ErrorKind, InPlace};
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid, fchown, fstat, ftruncate, open};
use rustix::io::Errno;

use super::target::{Owner, make_directories};
use super::{is_a_directory, is_not_regular, parent, xattrs};
use crate::refusal::{io_refused, refused};

/// Bytes of content that are collected before they are written, so that a small file is written at
/// once.
const COLLECTED_BYTES: usize = 64 << 10;

/// Permission bits of new files, before the umask.
const NEW_MODE: u32 = 0o666;
const UMASK: u32 = 0o022;

/// A file that is being written in place.
pub(super) struct InPlaceFile {
    path: PathBuf,
    file: File,
    collected: Vec<u8>,
}

impl InPlaceFile {
    /// Opens the file and empties it. Makes missing directories on the way.
    pub(super) fn create(path: &Path, how: &InPlace) -> Result<Self, AgentError> {
        let failed = |error: std::io::Error| io_refused("open", path, &error);
        let owner = parse_owner(&how.owner)?;
        make_directories(parent(path), Some(owner), &mut Vec::new()).map_err(failed)?;
        let file = open_existing_or_new(path, owner).map_err(|error| match error {
            Errno::ISDIR => is_a_directory(path),
            Errno::NXIO => is_not_regular(path),
            error => failed(error.into()),
        })?;
        if let Some(prefix) = &how.prefix {
            xattrs::replace(file.as_fd(), prefix, &how.attributes).map_err(failed)?;
        }
        Ok(Self { path: path.to_owned(), file: file.into(), collected: Vec::new() })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        self.collected.extend_from_slice(bytes);
        if self.collected.len() >= COLLECTED_BYTES { self.flush() } else { Ok(()) }
    }

    pub(super) fn flush(&mut self) -> Result<(), AgentError> {
        let collected = std::mem::take(&mut self.collected);
        if collected.is_empty() {
            return Ok(());
        }
        let written = self.file.write_all(&collected);
        written.map_err(|error| io_refused("write", &self.path, &error))
    }
}

/// Parses `UID:GID`.
pub(super) fn parse_owner(text: &str) -> Result<Owner, AgentError> {
    let parse = || {
        let (uid, gid) = text.split_once(':')?;
        let number = |text: &str| text.parse().ok().filter(|number| *number < u32::MAX);
        Some(Owner { uid: Uid::from_raw(number(uid)?), gid: Gid::from_raw(number(gid)?) })
    };
    parse().ok_or_else(|| refused(ErrorKind::BadRequest, format!("`{text}` is not UID:GID")))
}

/// Opens a regular file for writing, and empties it. A new file gets its owner.
fn open_existing_or_new(path: &Path, owner: Owner) -> Result<OwnedFd, Errno> {
    // Without blocking, because the path may lead to a pipe.
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(NEW_MODE & !UMASK);
    let file = match open(path, flags, mode) {
        Err(Errno::NOENT) => {
            let flags = flags | OFlags::CREATE;
            open(path, flags, mode)?
        }
        opened => opened?,
    };
    let stat = fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Errno::NXIO);
    }
    fchown(&file, Some(owner.uid), Some(owner.gid))?;
    if stat.st_size > 0 {
        ftruncate(&file, 0)?;
    }
    Ok(file)
}
