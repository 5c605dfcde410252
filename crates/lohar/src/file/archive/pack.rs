//! Packs a directory into an archive.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, ReadDir};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bhatti_proto::{AgentError, ErrorKind};
use rustix::fs::{Access, AtFlags, CWD, accessat};
use tar::{Builder, EntryType, Header};

use super::{DEPTH_MAX, Output, Skipped, too_deep};
use crate::file::xattrs;
use crate::refusal::{io_refused, refused};
use crate::surroundings::STATE_DIR;

/// The most memory for names of files with several names, in bytes. Beyond this, each further
/// name is packed as a separate file.
const LINK_NAMES_BYTES_MAX: usize = 2 << 20;

/// What an archive is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Files for a user.
    Files,
    /// The root file system of an image: with attributes and pipes, without other file systems and
    /// the agent's state.
    Image,
}

/// Sends the directory's content. Names in the archive are relative to the directory.
///
/// # Errors
///
/// Returns an error before the first byte is sent if an entry cannot be read. An entry that
/// becomes unreadable later is an error, too.
pub(super) fn pack(root: &Path, content: Content, output: Output) -> Result<Skipped, AgentError> {
    let failed = |error: io::Error| io_refused("read", root, &error);
    let metadata = fs::metadata(root).map_err(failed)?;
    if !metadata.is_dir() {
        let message = format!("{} is not a directory", root.display());
        return Err(refused(ErrorKind::NotDirectory, message));
    }
    let device = (content == Content::Image).then_some(metadata.dev());
    walk(root, device, |entry| entry.check_readable())?;
    let mut packing = Packing {
        archive: Builder::new(output),
        content,
        links: HashMap::new(),
        link_names_bytes: 0,
        skipped: Skipped::default(),
    };
    walk(root, device, |entry| packing.append(entry))?;
    let Packing { archive, skipped, .. } = packing;
    archive.into_inner().and_then(|mut output| output.flush()).map_err(failed)?;
    Ok(skipped)
}

/// An entry of the tree, or its root.
struct Entry<'a> {
    path: &'a Path,
    /// Relative to the directory; `.` is the directory itself.
    name: &'a Path,
    metadata: Metadata,
}

impl Entry<'_> {
    /// Checks that this thread's user may read the entry.
    fn check_readable(&self) -> Result<(), AgentError> {
        let wanted = match self.metadata.file_type() {
            kind if kind.is_file() => Access::READ_OK,
            kind if kind.is_dir() => Access::READ_OK | Access::EXEC_OK,
            _ => return Ok(()),
        };
        let checked = accessat(CWD, self.path, wanted, AtFlags::EACCESS);
        checked.map_err(|error| io_refused("read", self.path, &error.into()))
    }
}

/// Visits a directory, then everything below it. Skips entries that are removed meanwhile. With a
/// device, skips the content of other file systems, and the agent's state.
fn walk(
    root: &Path,
    device: Option<u64>,
    mut visit: impl FnMut(&Entry<'_>) -> Result<(), AgentError>,
) -> Result<(), AgentError> {
    let failed = |path: &Path, error: &io::Error| io_refused("read", path, error);
    let open = |path: &Path| fs::read_dir(path).map_err(|error| failed(path, &error));
    let metadata = fs::metadata(root).map_err(|error| failed(root, &error))?;
    visit(&Entry { path: root, name: Path::new("."), metadata })?;
    let mut levels: Vec<ReadDir> = vec![open(root)?];
    while let Some(level) = levels.last_mut() {
        let Some(found) = level.next() else {
            levels.pop();
            continue;
        };
        let path: PathBuf = found.map_err(|error| failed(root, &error))?.path();
        let Ok(metadata) = path.symlink_metadata() else { continue };
        let is_directory = metadata.is_dir();
        let is_other = device.is_some_and(|device| device != metadata.dev());
        let is_ours = device.is_some() && path == Path::new(STATE_DIR);
        if is_ours || (is_other && !is_directory) {
            continue;
        }
        visit(&Entry { path: &path, name: path.strip_prefix(root).unwrap_or(&path), metadata })?;
        if is_directory && !is_other {
            if levels.len() >= DEPTH_MAX {
                return Err(too_deep(&path));
            }
            match fs::read_dir(&path) {
                Ok(below) => levels.push(below),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&path, &error)),
            }
        }
    }
    Ok(())
}

struct Packing {
    archive: Builder<Output>,
    content: Content,
    /// The first name of each file that has several.
    links: HashMap<(u64, u64), PathBuf>,
    link_names_bytes: usize,
    skipped: Skipped,
}

impl Packing {
    fn append(&mut self, entry: &Entry<'_>) -> Result<(), AgentError> {
        match self.try_append(entry) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            appended => appended.map_err(|error| io_refused("read", entry.path, &error)),
        }
    }

    fn try_append(&mut self, Entry { path, name, metadata }: &Entry<'_>) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_metadata(metadata);
        let kind = metadata.file_type();
        if self.content == Content::Image && (kind.is_file() || kind.is_dir()) {
            self.append_attributes(path)?;
        }
        if self.content == Content::Image && kind.is_fifo() {
            header.set_entry_type(EntryType::Fifo);
            header.set_size(0);
            return self.archive.append_data(&mut header, name, io::empty());
        }
        if kind.is_dir() {
            header.set_size(0);
            return self.archive.append_data(&mut header, name, io::empty());
        }
        if kind.is_symlink() {
            header.set_size(0);
            return self.archive.append_link(&mut header, name, fs::read_link(path)?);
        }
        if !kind.is_file() {
            // An archive cannot hold a socket, an ordinary user cannot create a device from one,
            // and a pipe is of no use without its processes.
            self.skipped.note(path);
            return Ok(());
        }
        if let Some(first) = self.first_name(name, metadata) {
            header.set_size(0);
            header.set_entry_type(EntryType::Link);
            return self.archive.append_link(&mut header, name, first);
        }
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        // Exactly as many bytes as the header says, even if the file changes meanwhile.
        let size = metadata.size();
        header.set_size(size);
        self.archive.append_data(&mut header, name, file.chain(io::repeat(0)).take(size))
    }

    /// Appends the extended attributes of the next entry, as PAX records.
    fn append_attributes(&mut self, path: &Path) -> io::Result<()> {
        let attributes = xattrs::all(path)?;
        if attributes.is_empty() {
            return Ok(());
        }
        let named: Vec<_> = attributes
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.as_slice()))
            .collect();
        let records = named.iter().map(|(name, value)| (name.as_str(), *value));
        self.archive.append_pax_extensions(records)
    }

    /// Returns the name under which the archive already has a file.
    fn first_name(&mut self, name: &Path, metadata: &Metadata) -> Option<PathBuf> {
        if metadata.nlink() < 2 {
            return None;
        }
        let file = (metadata.dev(), metadata.ino());
        if let Some(first) = self.links.get(&file) {
            return Some(first.clone());
        }
        let bytes = name.as_os_str().len();
        if self.link_names_bytes + bytes <= LINK_NAMES_BYTES_MAX {
            self.link_names_bytes += bytes;
            self.links.insert(file, name.to_owned());
        }
        None
    }
}
