//! Unpacks an archive into a directory.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

use bhatti_proto::{AgentError, ErrorKind};
use rustix::fs::{AtFlags, CWD, linkat, syncfs};
use tar::{Archive, Entry, EntryType};

use super::super::change::make_one;
use super::super::target::{Durable, NewFile, make_directories, too_large};
use super::super::{DIRECTORY_MODE, parent};
use super::{Input, Skipped};
use crate::refusal::{io_refused, refused};

/// The most bytes that may precede the content of an entry: its header and its extensions (a long
/// name, for example). All of them are in memory.
const HEADER_BYTES_MAX: u64 = 1 << 20;

/// Bytes that are copied at once.
const COPY_BYTES: usize = 64 << 10;

/// Unpacks into a directory, which is created if it does not exist. Files replace files and
/// links; existing directories stay unchanged.
///
/// # Errors
///
/// Entries that were unpacked before the error stay.
pub(super) fn unpack(root: &Path, input: Input, file_bytes: u64) -> Result<Skipped, AgentError> {
    let failed = |error: io::Error| io_refused("unpack into", root, &error);
    make_directories(root, None, &mut Vec::new()).map_err(failed)?;
    let progress = Rc::new(Progress::default());
    let bad = |error: io::Error| bad_archive(&progress, &error);
    let mut archive = Archive::new(Budgeted { input, progress: Rc::clone(&progress) });
    let mut skipped = Skipped::default();
    for entry in archive.entries().map_err(bad)? {
        let mut entry = entry.map_err(bad)?;
        progress.left.set(u64::MAX);
        unpack_entry(root, &mut entry, &progress, file_bytes, &mut skipped)?;
        // Read the rest of the entry, so that the next read begins with a header.
        io::copy(&mut entry, &mut io::sink()).map_err(bad)?;
        progress.left.set(HEADER_BYTES_MAX);
    }
    let directory = File::open(root).map_err(failed)?;
    syncfs(&directory).map_err(|error| failed(error.into()))?;
    Ok(skipped)
}

/// Returns the error of a bad archive. If the input has ended, the error says so instead.
fn bad_archive(progress: &Progress, error: &io::Error) -> AgentError {
    if progress.has_ended.get() {
        return refused(ErrorKind::BadRequest, "the archive broke off before its end");
    }
    refused(ErrorKind::BadRequest, format!("not a tar archive: {error}"))
}

type ArchiveEntry<'a> = Entry<'a, Budgeted>;

fn unpack_entry(
    root: &Path,
    entry: &mut ArchiveEntry<'_>,
    progress: &Progress,
    file_bytes: u64,
    skipped: &mut Skipped,
) -> Result<(), AgentError> {
    let bad = |error: io::Error| bad_archive(progress, &error);
    let no_link = || refused(ErrorKind::BadRequest, "not a tar archive: a link has no target");
    let name = entry.path().map_err(bad)?.into_owned();
    let Some(target) = below(root, &name)? else { return Ok(()) };
    let failed = |error: io::Error| io_refused("unpack", &target, &error);
    let mode = entry.header().mode().ok().map(|mode| mode & 0o7777);
    match entry.header().entry_type() {
        EntryType::Directory => unpack_directory(&target, mode).map_err(failed),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            unpack_file(&target, entry, progress, mode, file_bytes)
        }
        EntryType::Symlink => {
            let link = entry.link_name().map_err(bad)?.ok_or_else(no_link)?;
            clear(&target).and_then(|()| std::os::unix::fs::symlink(link, &target)).map_err(failed)
        }
        EntryType::Link => {
            let link = entry.link_name().map_err(bad)?.ok_or_else(no_link)?;
            let first = below(root, &link)?.unwrap_or_else(|| root.to_owned());
            unpack_link(&first, &target).map_err(failed)
        }
        EntryType::XGlobalHeader => Ok(()),
        _ => {
            skipped.note(&name);
            Ok(())
        }
    }
}

fn unpack_directory(target: &Path, mode: Option<u32>) -> io::Result<()> {
    make_directories(parent(target), None, &mut Vec::new())?;
    match make_one(target, mode.unwrap_or(DIRECTORY_MODE)) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && target.is_dir() => Ok(()),
        made => made,
    }
}

fn unpack_file(
    target: &Path,
    entry: &mut ArchiveEntry<'_>,
    progress: &Progress,
    mode: Option<u32>,
    file_bytes: u64,
) -> Result<(), AgentError> {
    let bad = |error: io::Error| bad_archive(progress, &error);
    let size = entry.size();
    if size > file_bytes {
        return Err(too_large(size, file_bytes));
    }
    let is_link = target.symlink_metadata().is_ok_and(|found| found.is_symlink());
    if is_link {
        // If an archive has a link and then a file of the same name, the file counts.
        fs::remove_file(target).map_err(|error| io_refused("unpack", target, &error))?;
    }
    let mut new = NewFile::create(target, None)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut left = size;
    while left > 0 {
        match entry.read(&mut buffer).map_err(bad)? {
            0 => return Err(bad(io::ErrorKind::UnexpectedEof.into())),
            length => {
                new.write(&buffer[..length])?;
                left = left.saturating_sub(length as u64);
            }
        }
    }
    if let Ok(seconds) = entry.header().mtime() {
        new.set_modified(UNIX_EPOCH + Duration::from_secs(seconds.min(u32::MAX.into())))?;
    }
    new.finish(mode, Durable::Later)
}

fn unpack_link(first: &Path, target: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let file = |path: &Path| path.symlink_metadata().map(|found| (found.dev(), found.ino()));
    // The link exists already: the archive is unpacked a second time.
    if file(target).is_ok_and(|there| file(first).is_ok_and(|wanted| there == wanted)) {
        return Ok(());
    }
    clear(target)?;
    Ok(linkat(CWD, first, CWD, target, AtFlags::empty())?)
}

/// Makes room for a link: removes an existing file, but not a directory, and creates missing
/// directories on the way.
fn clear(target: &Path) -> io::Result<()> {
    make_directories(parent(target), None, &mut Vec::new())?;
    match fs::remove_file(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Returns the path of an entry below the directory, or `None` for the directory itself. Leading
/// slashes are left out, as `tar` does.
fn below(root: &Path, name: &Path) -> Result<Option<PathBuf>, AgentError> {
    let mut place = root.to_owned();
    for component in name.components() {
        match component {
            Component::Normal(part) => place.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                let message = format!("archive entry outside of its directory: {}", name.display());
                return Err(refused(ErrorKind::BadRequest, message));
            }
        }
    }
    Ok((place != root).then_some(place))
}

/// The progress of reading an archive.
struct Progress {
    /// Bytes that may be read before this is reset.
    left: Cell<u64>,
    /// Whether the host has sent the whole archive.
    has_ended: Cell<bool>,
}

impl Default for Progress {
    fn default() -> Self {
        Self { left: Cell::new(HEADER_BYTES_MAX), has_ended: Cell::new(false) }
    }
}

/// A reader of an archive that stops at the limit in its progress.
struct Budgeted {
    input: Input,
    progress: Rc<Progress>,
}

impl Read for Budgeted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.progress.left.get();
        if left == 0 {
            let message = format!("the header of an entry is longer than {HEADER_BYTES_MAX} bytes");
            return Err(io::Error::other(message));
        }
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let length = self.input.read(&mut buffer[..most])?;
        self.progress.left.set(left - length as u64);
        self.progress.has_ended.set(self.progress.has_ended.get() || length == 0);
        Ok(length)
    }
}
