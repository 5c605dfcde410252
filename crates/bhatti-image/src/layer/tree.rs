//! A tree of files that is written by names of unknown origin.
//!
//! The kernel looks up each directory as if the tree's root were `/` (`RESOLVE_IN_ROOT` in
//! openat2(2)), so a link in the tree that an earlier entry made leads to a place in the tree. The
//! last component is never followed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;

use super::LayerError;
use super::name::split;

/// Mode of a directory that the archive only implies.
const IMPLIED: Mode = Mode::from_raw_mode(0o755);

/// How often a lookup is repeated that the kernel asks to repeat.
const TRIES: usize = 64;

/// The tree. Remembers the directory of the last entry, because the next one is usually there,
/// too.
pub(super) struct Tree {
    root: OwnedFd,
    last: Option<(Vec<u8>, Directory)>,
}

/// A directory of the tree.
pub(super) struct Directory {
    file: OwnedFd,
    pub(super) inode: u64,
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Directory {
    fn new(file: OwnedFd) -> Result<Self, LayerError> {
        let inode = rustix::fs::fstat(&file)?.st_ino;
        Ok(Self { file, inode })
    }

    /// Opens a directory in this one, without following a link.
    pub(super) fn open(&self, base: &[u8]) -> Result<Self, LayerError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Self::new(rustix::fs::openat(&self.file, base, flags, Mode::empty())?)
    }

    /// Returns what is known of a file in this directory; `None` if there is none.
    pub(super) fn stat(&self, base: &[u8]) -> Result<Option<Stat>, LayerError> {
        match rustix::fs::statat(&self.file, base, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Runs `change`, which changes this directory's entries, and restores its time.
    pub(super) fn keeping_time<T>(
        &self,
        change: impl FnOnce(&Self) -> Result<T, LayerError>,
    ) -> Result<T, LayerError> {
        let before = rustix::fs::fstat(&self.file)?;
        let result = change(self)?;
        self.set_time(before.st_mtime)?;
        Ok(result)
    }

    fn set_time(&self, seconds: i64) -> Result<(), LayerError> {
        Ok(rustix::fs::futimens(&self.file, &times(seconds))?)
    }
}

/// Returns both times of a file. File systems that `mke2fs` 1.47.0 fills have 32 bits for them.
pub(super) fn times(seconds: i64) -> Timestamps {
    let time = Timespec { tv_sec: seconds.clamp(i32::MIN.into(), i32::MAX.into()), tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

impl Tree {
    pub(super) fn new(root: OwnedFd) -> Self {
        Self { root, last: None }
    }

    /// Opens the directory at a normalized path, and makes it if it does not exist.
    pub(super) fn directory(&mut self, path: &[u8]) -> Result<&Directory, LayerError> {
        let is_last = self.last.as_ref().is_some_and(|(last, _)| last == path);
        if !is_last {
            let directory = self.open_or_make(path)?;
            self.last = Some((path.to_vec(), directory));
        }
        match &self.last {
            Some((_, directory)) => Ok(directory),
            None => Err(LayerError::Format("the directory is missing")),
        }
    }

    /// Opens the directory at a normalized path. Returns an error if it does not exist.
    pub(super) fn existing_directory(&self, path: &[u8]) -> Result<Directory, LayerError> {
        self.open(path)?.ok_or(LayerError::Format("the link's target does not exist"))
    }

    /// Forgets the last directory, because it may have been removed.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }

    fn open_or_make(&self, path: &[u8]) -> Result<Directory, LayerError> {
        if let Some(directory) = self.open(path)? {
            return Ok(directory);
        }
        let (parent, base) = split(path);
        let parent = self.open_or_make(parent)?;
        parent.keeping_time(|parent| match rustix::fs::mkdirat(parent, base, IMPLIED) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => Err(LayerError::Format("its directory is a link to nothing")),
            Err(error) => Err(error.into()),
        })?;
        let made = parent.open(base)?;
        made.set_time(0)?;
        Ok(made)
    }

    fn open(&self, path: &[u8]) -> Result<Option<Directory>, LayerError> {
        let path = if path.is_empty() { b"." } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        for _ in 0..TRIES {
            match rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve) {
                Ok(file) => return Directory::new(file).map(Some),
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::AGAIN) => {}
                Err(Errno::LOOP) => return Err(LayerError::Format("its links form a loop")),
                Err(Errno::NOTDIR) => {
                    return Err(LayerError::Format("a file is where its directory should be"));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Errno::AGAIN.into())
    }
}
