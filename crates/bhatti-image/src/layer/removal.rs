//! Removes files of lower layers.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

use rustix::fs::{AtFlags, Dir, FileType};
use rustix::io::Errno;

use super::LayerError;
use super::tree::Directory;

/// The names that the current layer has made or changed. Whiteouts do not concern them. A hash of
/// 64 bits stands for a name, because a layer may have a million names.
#[derive(Default)]
pub(super) struct Touched {
    hasher: RandomState,
    names: HashSet<u64>,
}

impl Touched {
    pub(super) fn add(&mut self, directory: &Directory, base: &[u8]) {
        self.names.insert(self.hash(directory, base));
    }

    fn has(&self, directory: &Directory, base: &[u8]) -> bool {
        self.names.contains(&self.hash(directory, base))
    }

    /// A directory has several paths if links lead to it, so its inode stands for it.
    fn hash(&self, directory: &Directory, base: &[u8]) -> u64 {
        self.hasher.hash_one((directory.inode, base))
    }
}

/// Removes a file, or a directory with all that is in it, unless `keeps` has it. A directory with
/// something that stays, stays.
pub(super) fn remove(
    directory: &Directory,
    base: &[u8],
    keeps: Option<&Touched>,
) -> Result<(), LayerError> {
    let Some(stat) = directory.stat(base)? else { return Ok(()) };
    let is_kept = keeps.is_some_and(|touched| touched.has(directory, base));
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        if !is_kept {
            rustix::fs::unlinkat(directory, base, AtFlags::empty())?;
        }
        return Ok(());
    }
    remove_content(&directory.open(base)?, keeps)?;
    if is_kept {
        return Ok(());
    }
    match rustix::fs::unlinkat(directory, base, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes all that is in a directory, unless `keeps` has it. Its time stays.
pub(super) fn remove_content(
    directory: &Directory,
    keeps: Option<&Touched>,
) -> Result<(), LayerError> {
    directory.keeping_time(|directory| {
        for name in names(directory)? {
            remove(directory, &name, keeps)?;
        }
        Ok(())
    })
}

/// Names of the files in a directory.
pub(super) fn names(directory: &Directory) -> Result<Vec<Vec<u8>>, LayerError> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if !matches!(&name[..], b"." | b"..") {
            names.push(name);
        }
    }
    Ok(names)
}
