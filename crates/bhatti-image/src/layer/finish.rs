//! Completes and measures a tree.

use std::collections::HashSet;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::reader::{Entry, Kind};
use super::removal::names;
use super::tree::{Directory, Tree};
use super::{LayerError, Owners, TreeSize, complaint, metadata};

/// Block size of the file systems, in bytes.
const BLOCK: u64 = 4096;
/// What a directory entry takes beside its name, in bytes.
const ENTRY_OVERHEAD: u64 = 12;

/// Maximum number of entries of one directory. The time that `mke2fs` takes for a directory grows
/// with the square of them: 10 s for this many.
const DIRECTORY_ENTRIES_MAX: usize = 20_000;

/// The directory for users' work, and its owner.
const WORKSPACE: &[u8] = b"workspace";
const OWNER: u32 = 1000;

/// Adds the directory for users' work if that is asked for and the tree has nothing of its name.
/// Returns the size of the tree.
///
/// # Errors
///
/// Returns an error that names a directory with too many entries. Blocks on disk.
pub(crate) fn finish(
    root: OwnedFd,
    owners: &Owners,
    with_workspace: bool,
) -> Result<TreeSize, LayerError> {
    let mut tree = Tree::new(root);
    let root = tree.directory(b"")?;
    if names(root)?.is_empty() {
        return Err(LayerError::Format("the archive is empty"));
    }
    if with_workspace {
        add_workspace(root, owners)?;
    }
    let mut measure = Measure { size: TreeSize { bytes: 0, inodes: 1 }, linked: HashSet::new() };
    measure.add_content(root, b"/")?;
    Ok(measure.size)
}

fn add_workspace(root: &Directory, owners: &Owners) -> Result<(), LayerError> {
    let workspace = Entry {
        name: WORKSPACE.to_vec(),
        kind: Kind::Directory,
        mode: 0o755,
        user: OWNER,
        group: OWNER,
        time: 0,
        attributes: Vec::new(),
    };
    root.keeping_time(|root| match rustix::fs::mkdirat(root, WORKSPACE, Mode::RWXU) {
        Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(()) => metadata::set(root.open(WORKSPACE)?, &workspace, owners).map(drop),
    })
}

struct Measure {
    size: TreeSize,
    /// Inodes with several names that have been counted.
    linked: HashSet<u64>,
}

impl Measure {
    fn add_content(&mut self, directory: &Directory, path: &[u8]) -> Result<(), LayerError> {
        let names = names(directory)?;
        if names.len() > DIRECTORY_ENTRIES_MAX {
            let error = LayerError::Format("the directory has more than 20,000 entries");
            return Err(complaint(path)(error));
        }
        let bytes: u64 = names.iter().map(|name| name.len() as u64 + ENTRY_OVERHEAD).sum();
        self.size.bytes += bytes.max(1).next_multiple_of(BLOCK);
        for name in &names {
            let Some(stat) = directory.stat(name)? else { continue };
            if stat.st_nlink > 1
                && FileType::from_raw_mode(stat.st_mode) != FileType::Directory
                && !self.linked.insert(stat.st_ino)
            {
                continue;
            }
            self.size.inodes += 1;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    let path = [path, name, b"/"].concat();
                    self.add_content(&directory.open(name)?, &path)?;
                }
                FileType::RegularFile => self.size.bytes += data_bytes(directory, name, &stat)?,
                _ => self.size.bytes += BLOCK,
            }
        }
        Ok(())
    }
}

/// Returns the size of a file's data in whole blocks, without its holes. What a file takes on this
/// host may be less, if the host's file system compresses.
fn data_bytes(directory: &Directory, name: &[u8], stat: &Stat) -> Result<u64, LayerError> {
    let size = stat.st_size.cast_unsigned();
    if stat.st_blocks.cast_unsigned() * 512 >= size {
        return Ok(size.next_multiple_of(BLOCK));
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    let (mut bytes, mut at) = (0, 0);
    loop {
        let start = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(bytes),
            Err(error) => return Err(error.into()),
        };
        at = rustix::fs::seek(&file, SeekFrom::Hole(start))?;
        bytes += (at - start).next_multiple_of(BLOCK);
    }
}
