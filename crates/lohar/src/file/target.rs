//! The target of a file write: where its path leads, which file is there, and how to write it
//! without losing the file's metadata.
//!
//! - No file: a new file is created beside the target and renamed.
//! - A file of this user with one name: the same. The new file takes over owner, group,
//!   permission bits and extended attributes.
//! - A file that can only be written to (another user's file, one with several names, one in a
//!   directory that cannot be changed): the content goes to a nameless file, which is copied into
//!   the target when it is complete.
//! - A link: followed.
//! - Anything else: refused.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bhatti_proto::{AgentError, ErrorKind};
use rustix::fs::{
    Access, AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, Stat, Uid, accessat,
    fallocate, fchmod, fchown, fstat, openat, readlinkat, renameat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid, getgroups};

use super::change::make_one;
use super::{DIRECTORY_MODE, FILE_MODE, is_a_directory, is_not_regular, parent, xattrs};
use crate::refusal::{io_refused, refused};

/// The most links that are followed in a row: the kernel's own limit, `MAXSYMLINKS`.
const LINKS_MAX: usize = 40;

/// Directories for nameless files, in order of preference: the first is on a disk, if there is
/// one.
const STAGING: [&str; 2] = ["/var/tmp", "/tmp"];

/// Bytes that are copied at once.
const COPY_BYTES: usize = 64 << 10;

/// The owner of new files and directories, if not the user that creates them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: Uid,
    pub(super) gid: Gid,
}

/// Whether a finished file must survive a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durable {
    Yes,
    /// The caller syncs many files at once.
    Later,
}

/// A file that is being written. The file that it replaces is unchanged until
/// [`finish`](Self::finish). If the new file is dropped before that, nothing of it is left.
pub(super) struct NewFile {
    path: PathBuf,
    directory: OwnedFd,
    name: OsString,
    existing: Option<Existing>,
    place: Staging,
    file: File,
    owner: Option<Owner>,
    /// Directories that were created for the file, from the top down.
    made: Vec<PathBuf>,
    finished: bool,
}

/// A regular file that is there already.
struct Existing {
    handle: OwnedFd,
    stat: Stat,
}

/// Where the content is until the file is complete.
enum Staging {
    /// Beside the target, under this name.
    Beside(OsString),
    /// In a file without a name.
    Nameless,
}

impl NewFile {
    /// Finds the target of `path`, and creates missing directories on the way.
    ///
    /// # Errors
    ///
    /// Refused if this thread's user cannot write the file. Directories that were created are
    /// removed then.
    pub(super) fn create(path: &Path, owner: Option<Owner>) -> Result<Self, AgentError> {
        let mut made = Vec::new();
        let created = Self::try_create(path, owner, &mut made);
        if created.is_err() {
            remove_made(&made);
        }
        created
    }

    fn try_create(
        path: &Path,
        owner: Option<Owner>,
        made: &mut Vec<PathBuf>,
    ) -> Result<Self, AgentError> {
        let failed = |error: io::Error| io_refused("open", path, &error);
        let (directory, name, existing) = find(path, owner, made)?;
        let writable = |handle: &Existing| handle.check_writable(&directory, &name);
        existing.as_ref().map_or(Ok(()), writable).map_err(failed)?;
        let can_replace = existing.as_ref().is_none_or(Existing::can_be_replaced);
        let beside = if can_replace { create_beside(&directory) } else { Err(Errno::ACCESS) };
        let (place, file) = match beside {
            Ok((name, file)) => (Staging::Beside(name), file),
            Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) if existing.is_some() => {
                (Staging::Nameless, create_nameless().map_err(failed)?)
            }
            Err(error) => return Err(failed(error.into())),
        };
        let made = std::mem::take(made);
        let path = path.to_owned();
        Ok(Self { path, directory, name, existing, place, file, owner, made, finished: false })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        self.file.write_all(bytes).map_err(|error| io_refused("write", &self.path, &error))
    }

    /// Sets the modification time, which would otherwise be the time of the last write.
    pub(super) fn set_modified(&mut self, time: SystemTime) -> Result<(), AgentError> {
        self.file.set_modified(time).map_err(|error| io_refused("write", &self.path, &error))
    }

    /// Moves the file to its target. Sets these permission bits, or else those of the replaced
    /// file, or else the default.
    pub(super) fn finish(mut self, mode: Option<u32>, durable: Durable) -> Result<(), AgentError> {
        let done = self.try_finish(mode, durable);
        done.map_err(|error| io_refused("write", &self.path, &error))?;
        self.finished = true;
        Ok(())
    }

    fn try_finish(&mut self, mode: Option<u32>, durable: Durable) -> io::Result<()> {
        match &self.place {
            Staging::Beside(temporary) => {
                let temporary = temporary.clone();
                self.take_over(mode)?;
                if durable == Durable::Yes {
                    self.file.sync_all()?;
                }
                match renameat(&self.directory, &temporary, &self.directory, &self.name) {
                    Ok(()) => {}
                    // The target is a mount point, which a rename cannot replace.
                    Err(Errno::BUSY) if self.existing.is_some() => {
                        self.copy_in(mode, durable)?;
                        unlinkat(&self.directory, &temporary, AtFlags::empty())?;
                    }
                    Err(error) => return Err(error.into()),
                }
                if durable == Durable::Yes { self.sync_directories() } else { Ok(()) }
            }
            Staging::Nameless => self.copy_in(mode, durable),
        }
    }

    /// Sets the owner, attributes and permission bits of the new file, from the file that it
    /// replaces or from the request.
    fn take_over(&self, mode: Option<u32>) -> io::Result<()> {
        let file = self.file.as_fd();
        match (&self.existing, self.owner) {
            (Some(Existing { handle, stat }), _) => {
                fchown(file, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
                xattrs::copy(handle.as_fd(), file)?;
            }
            (None, Some(Owner { uid, gid })) => fchown(file, Some(uid), Some(gid))?,
            (None, None) => {}
        }
        let kept = self.existing.as_ref().map(|existing| existing.stat.st_mode & 0o7777);
        // Last: a change of owner clears some permission bits.
        Ok(fchmod(file, Mode::from_raw_mode(mode.or(kept).unwrap_or(FILE_MODE)))?)
    }

    /// Copies the content into the existing file.
    fn copy_in(&mut self, mode: Option<u32>, durable: Durable) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let target = openat(&self.directory, &self.name, flags, Mode::empty())?;
        let stat = fstat(&target)?;
        let is_same = self.existing.as_ref().is_some_and(|existing| {
            (existing.stat.st_dev, existing.stat.st_ino) == (stat.st_dev, stat.st_ino)
        });
        if !is_same {
            return Err(io::Error::other("another file has replaced it meanwhile"));
        }
        let length = self.file.stream_position()?;
        if length > 0 {
            // Allocate the space first, so that a full disk is noticed before the first byte is
            // overwritten.
            match fallocate(&target, FallocateFlags::KEEP_SIZE, 0, length) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(mode) = mode.filter(|mode| *mode != stat.st_mode & 0o7777) {
            fchmod(&target, Mode::from_raw_mode(mode))?;
        }
        let mut target = File::from(target);
        self.file.rewind()?;
        copy(&mut self.file, &mut target)?;
        target.set_len(length)?;
        if durable == Durable::Yes { target.sync_all() } else { Ok(()) }
    }

    /// Makes the names survive a power cut: that of the file, and those of the directories that
    /// were created for it.
    fn sync_directories(&self) -> io::Result<()> {
        sync_directory(format!("/proc/self/fd/{}", self.directory.as_raw_fd()))?;
        self.made.iter().try_for_each(|made| sync_directory(parent(made)))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Staging::Beside(temporary) = &self.place {
            // If the rename has happened, no file has this name.
            let _gone: Result<(), Errno> = unlinkat(&self.directory, temporary, AtFlags::empty());
        }
        remove_made(&self.made);
    }
}

impl Existing {
    /// Checks that this thread's user may write to the file. Does not open the file for that: a
    /// program that runs cannot be opened for writing, but can be replaced.
    fn check_writable(&self, directory: &OwnedFd, name: &OsStr) -> io::Result<()> {
        Ok(accessat(directory, name, Access::WRITE_OK, AtFlags::EACCESS)?)
    }

    /// Whether a new file can replace this one and differ only in content. Other names of this
    /// file would still lead to the old content, and only root may give a file to another user. A
    /// file with no name left was replaced just now.
    fn can_be_replaced(&self) -> bool {
        let (uid, gid) = (Uid::from_raw(self.stat.st_uid), Gid::from_raw(self.stat.st_gid));
        let is_in_group = || gid == getegid() || getgroups().is_ok_and(|all| all.contains(&gid));
        self.stat.st_nlink <= 1 && (geteuid().is_root() || (geteuid() == uid && is_in_group()))
    }
}

/// Returns the directory and the name that a path leads to, and the existing file, if any.
fn find(
    path: &Path,
    owner: Option<Owner>,
    made: &mut Vec<PathBuf>,
) -> Result<(OwnedFd, OsString, Option<Existing>), AgentError> {
    let failed = |error: io::Error| io_refused("open", path, &error);
    let mut at = path.to_owned();
    for _ in 0..LINKS_MAX {
        let name = at.file_name().ok_or_else(|| is_a_directory(path))?.to_owned();
        make_directories(parent(&at), owner, made).map_err(failed)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, parent(&at), flags, Mode::empty());
        let directory = directory.map_err(|error| failed(error.into()))?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let handle = match openat(&directory, &name, flags, Mode::empty()) {
            Ok(handle) => handle,
            Err(Errno::NOENT) => return Ok((directory, name, None)),
            Err(error) => return Err(failed(error.into())),
        };
        let stat = fstat(&handle).map_err(|error| failed(error.into()))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                return Ok((directory, name, Some(Existing { handle, stat })));
            }
            FileType::Symlink => {
                let link = readlinkat(&handle, "", Vec::new());
                let link = link.map_err(|error| failed(error.into()))?.into_bytes();
                at = parent(&at).join(OsString::from_vec(link));
            }
            FileType::Directory => return Err(is_a_directory(path)),
            _ => return Err(is_not_regular(path)),
        }
    }
    Err(failed(Errno::LOOP.into()))
}

/// Creates the missing directories of a path, and adds them to `made`.
pub(super) fn make_directories(
    path: &Path,
    owner: Option<Owner>,
    made: &mut Vec<PathBuf>,
) -> io::Result<()> {
    let mut missing = Vec::new();
    for ancestor in path.ancestors().filter(|ancestor| !ancestor.as_os_str().is_empty()) {
        match fs::metadata(ancestor) {
            Ok(found) if found.is_dir() => break,
            Ok(_) => return Err(Errno::NOTDIR.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(ancestor),
            Err(error) => return Err(error),
        }
    }
    for directory in missing.into_iter().rev() {
        match make_one(directory, DIRECTORY_MODE) {
            Ok(()) => {}
            // Another operation has created the directory meanwhile.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => {
                continue;
            }
            Err(error) => return Err(error),
        }
        made.push(directory.to_owned());
        if let Some(Owner { uid, gid }) = owner {
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(CWD, directory, Some(uid), Some(gid), flags)?;
        }
    }
    Ok(())
}

/// Removes the directories that were created, from the bottom up, until one is not empty.
fn remove_made(made: &[PathBuf]) {
    for directory in made.iter().rev() {
        if fs::remove_dir(directory).is_err() {
            return;
        }
    }
}

/// Creates a file with a random name that no other writer draws.
fn create_beside(directory: &OwnedFd) -> Result<(OsString, File), Errno> {
    // Open for reading, too: if the file cannot be renamed, it is copied.
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    loop {
        let name = OsString::from(format!(".lohar-{:016x}", random()));
        match openat(directory, &name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => return Ok((name, file.into())),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
    }
}

fn create_nameless() -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mut last = Errno::NOENT;
    for directory in STAGING {
        match openat(CWD, directory, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => return Ok(file.into()),
            Err(error) => last = error,
        }
    }
    Err(last.into())
}

fn copy(from: &mut File, to: &mut File) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            length => to.write_all(&buffer[..length])?,
        }
    }
}

/// Makes the entries of a directory survive a power cut. Skips a directory that its user cannot
/// read, because that user cannot sync it either.
fn sync_directory(path: impl AsRef<Path>) -> io::Result<()> {
    match File::open(path) {
        Ok(directory) => directory.sync_all(),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(error),
    }
}

/// Returns a random number, which no other writer draws.
fn random() -> u64 {
    let mut bytes = [0; 8];
    // A taken name is noticed, so repeated numbers only cost a few attempts.
    let _filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}

/// A refusal of a file that is larger than the limit.
pub(super) fn too_large(size: u64, limit: u64) -> AgentError {
    refused(ErrorKind::TooLarge, format!("file too large: {size} > {limit} bytes"))
}
