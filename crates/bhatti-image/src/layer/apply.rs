//! Makes what an entry describes.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use super::name::{Meaning, meaning, normalize, split};
use super::owners::Owners;
use super::reader::{Entry, Kind};
use super::removal::{Touched, remove, remove_content};
use super::tree::{Directory, Tree};
use super::{LayerError, content, metadata};

/// Mode of a file until it has its own.
const PRIVATE: Mode = Mode::from_raw_mode(0o600);

/// Maximum length of a link's target, in bytes.
const TARGET_BYTES_MAX: usize = 4095;

/// What an entry had that an image cannot have.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LeftOut {
    pub(super) is_device: bool,
    pub(super) attributes: u64,
}

/// A tree that one layer is applied to.
pub(super) struct Target {
    tree: Tree,
    touched: Touched,
    owners: Owners,
}

impl Target {
    pub(super) fn new(root: OwnedFd, owners: Owners) -> Self {
        Self { tree: Tree::new(root), touched: Touched::default(), owners }
    }

    /// Makes what an entry describes, with its content.
    pub(super) fn apply(
        &mut self,
        entry: &Entry,
        content: &mut impl Read,
    ) -> Result<LeftOut, LayerError> {
        let path = normalize(&entry.name)?;
        if path.is_empty() {
            return self.apply_root(entry);
        }
        let (parent, base) = split(&path);
        match meaning(base)? {
            Meaning::Ignored => Ok(LeftOut::default()),
            Meaning::Opaque => self.remove_lower(parent, None),
            Meaning::Whiteout(removed) => self.remove_lower(parent, Some(removed)),
            Meaning::Plain => {
                let attributes = self.make(parent, base, entry, content)?;
                Ok(LeftOut { is_device: entry.kind == Kind::Device, attributes })
            }
        }
    }

    fn apply_root(&mut self, entry: &Entry) -> Result<LeftOut, LayerError> {
        if entry.kind != Kind::Directory {
            return Err(LayerError::Format("the root is not a directory"));
        }
        let root = self.tree.directory(b"")?;
        metadata::clear_attributes(root)?;
        let attributes = metadata::set(root, entry, &self.owners)?;
        Ok(LeftOut { is_device: false, attributes })
    }

    /// Removes what lower layers have in a directory: one name, or all names.
    fn remove_lower(&mut self, parent: &[u8], base: Option<&[u8]>) -> Result<LeftOut, LayerError> {
        let directory = self.tree.directory(parent)?;
        match base {
            Some(base) => directory.keeping_time(|it| remove(it, base, Some(&self.touched)))?,
            None => remove_content(directory, Some(&self.touched))?,
        }
        self.tree.forget();
        Ok(LeftOut::default())
    }

    /// Makes the file, in place of one that has its name. Returns the number of attributes left
    /// out.
    fn make(
        &mut self,
        parent: &[u8],
        base: &[u8],
        entry: &Entry,
        content: &mut impl Read,
    ) -> Result<u64, LayerError> {
        let link = match &entry.kind {
            Kind::HardLink { target } => Some(self.link_target(target)?),
            _ => None,
        };
        let owners = &self.owners;
        let directory = self.tree.directory(parent)?;
        let existing = directory.stat(base)?;
        let is_directory = existing
            .as_ref()
            .is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        let is_same = |link: &Link| existing.as_ref().is_some_and(|it| it.st_ino == link.inode);
        let left_out = directory.keeping_time(|directory| {
            if link.as_ref().is_some_and(is_same) {
                return Ok(0);
            }
            if entry.kind == Kind::Directory {
                if !is_directory {
                    remove(directory, base, None)?;
                    rustix::fs::mkdirat(directory, base, PRIVATE | Mode::XUSR)?;
                }
                let made = directory.open(base)?;
                metadata::clear_attributes(&made)?;
                return metadata::set(&made, entry, owners);
            }
            remove(directory, base, None)?;
            make_file(directory, base, entry, link.as_ref(), content, owners)
        })?;
        self.touched.add(directory, base);
        if is_directory && entry.kind != Kind::Directory {
            self.tree.forget();
        }
        Ok(left_out)
    }

    /// Finds the target of a hard link, which may be a link itself.
    fn link_target(&self, target: &[u8]) -> Result<Link, LayerError> {
        let path = normalize(target)?;
        let (parent, base) = split(&path);
        let directory = self.tree.existing_directory(parent)?;
        let missing = LayerError::Format("the link's target does not exist");
        let stat = directory.stat(base)?.ok_or(missing)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Err(LayerError::Format("it is a hard link to a directory"));
        }
        Ok(Link { directory, base: base.to_vec(), inode: stat.st_ino })
    }
}

/// The target of a hard link.
struct Link {
    directory: Directory,
    base: Vec<u8>,
    inode: u64,
}

/// Makes anything but a directory. Returns the number of attributes left out.
fn make_file(
    directory: &Directory,
    base: &[u8],
    entry: &Entry,
    link: Option<&Link>,
    content: &mut impl Read,
    owners: &Owners,
) -> Result<u64, LayerError> {
    match (&entry.kind, link) {
        (Kind::HardLink { .. }, Some(link)) => {
            let from = link.base.as_slice();
            rustix::fs::linkat(&link.directory, from, directory, base, AtFlags::empty())?;
            Ok(0)
        }
        (Kind::Symlink { target }, _) => {
            if target.is_empty() || target.len() > TARGET_BYTES_MAX {
                return Err(LayerError::Format("the link's target has no or too many bytes"));
            }
            rustix::fs::symlinkat(target.as_slice(), directory, base)?;
            metadata::set_unopened(directory, base, entry, owners)
        }
        (Kind::Fifo, _) => {
            rustix::fs::mknodat(directory, base, FileType::Fifo, PRIVATE, 0)?;
            metadata::set_unopened(directory, base, entry, owners)
        }
        (Kind::File { map, size }, _) => {
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::openat(directory, base, flags, PRIVATE)?);
            content::write(&file, content, *size, map.as_ref())?;
            metadata::set(&file, entry, owners)
        }
        // A device is left out, but hides what lower layers have in its place.
        (Kind::Directory | Kind::Device | Kind::HardLink { .. }, _) => Ok(0),
    }
}
