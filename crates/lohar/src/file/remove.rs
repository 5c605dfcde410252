//! Removing a tree without recursion: a guest may nest directories so deeply that a recursive
//! removal would overflow the agent's stack, and with PID 1 the whole guest would end.

use std::ffi::CString;
use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;

use super::parent;

/// The most levels of nested directories. Each holds a descriptor while its content is removed.
const DEPTH_MAX: usize = 512;

/// A directory whose content is being removed.
struct Level {
    /// Its name in the level above.
    name: CString,
    directory: Dir,
}

/// Removes a directory and its content. Links are not followed.
///
/// # Errors
///
/// Entries that were removed before the error stay removed. Returns `InvalidInput` if directories
/// are nested deeper than `DEPTH_MAX`.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let above = openat(CWD, parent(path), flags, Mode::empty())?;
    let name = CString::new(std::os::unix::ffi::OsStrExt::as_bytes(name))?;
    let mut levels = vec![Level { directory: open_level(&above, &name)?, name }];
    while let Some(level) = levels.last_mut() {
        if let Some(entry) = next_entry(&mut level.directory)? {
            let (entry_name, is_directory) = entry;
            if is_directory {
                let directory = open_level(level.directory.fd()?, &entry_name)?;
                if levels.len() >= DEPTH_MAX {
                    let message = format!("directories are nested deeper than {DEPTH_MAX} levels");
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
                }
                levels.push(Level { name: entry_name, directory });
            } else {
                unlink(level.directory.fd()?, &entry_name, AtFlags::empty())?;
            }
            continue;
        }
        let Some(done) = levels.pop() else { break };
        match levels.last() {
            Some(level) => unlink(level.directory.fd()?, &done.name, AtFlags::REMOVEDIR)?,
            None => unlinkat(&above, &*done.name, AtFlags::REMOVEDIR)?,
        }
    }
    Ok(())
}

fn open_level(above: impl std::os::fd::AsFd, name: &CString) -> io::Result<Dir> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(Dir::new(openat(above, &**name, flags, Mode::empty())?)?)
}

/// The next entry and whether it is a directory.
fn next_entry(directory: &mut Dir) -> io::Result<Option<(CString, bool)>> {
    while let Some(entry) = directory.read() {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        let is_directory = match entry.file_type() {
            FileType::Unknown => {
                let stat = rustix::fs::statat(directory.fd()?, name, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode) == FileType::Directory
            }
            known => known == FileType::Directory,
        };
        return Ok(Some((name.to_owned(), is_directory)));
    }
    Ok(None)
}

/// Removes an entry. An entry that another process has removed meanwhile is no error.
fn unlink(directory: impl std::os::fd::AsFd, name: &CString, flags: AtFlags) -> io::Result<()> {
    match unlinkat(directory, &**name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Makes nested directories, deeper than any path could name.
    fn nest(top: &Path, levels: usize) {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let mut here = openat(CWD, top, flags, Mode::empty()).unwrap();
        for _ in 0..levels {
            rustix::fs::mkdirat(&here, "nested", Mode::RWXU).unwrap();
            here = openat(&here, "nested", flags, Mode::empty()).unwrap();
        }
    }

    #[test]
    fn tree_is_removed_and_the_targets_of_its_links_stay() {
        let place = tempfile::tempdir().unwrap();
        let (tree, outside) = (place.path().join("tree"), place.path().join("outside"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        for file in [tree.join("a/b/file"), tree.join("file"), outside.join("file")] {
            fs::write(file, "").unwrap();
        }
        std::os::unix::fs::symlink(&outside, tree.join("link")).unwrap();
        nest(&tree, 400);

        remove_tree(&tree).unwrap();

        assert!(!tree.exists() && outside.join("file").exists());
    }

    #[test]
    fn tree_that_is_nested_too_deeply_is_refused() {
        let place = tempfile::tempdir_in("/dev/shm").unwrap();
        let tree = place.path().join("tree");
        fs::create_dir(&tree).unwrap();
        nest(&tree, DEPTH_MAX + 10);

        let error = remove_tree(&tree).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
        // In two parts, each is within the limit.
        let lower = tree.join("nested/".repeat(20));
        fs::rename(&lower, place.path().join("lower")).unwrap();
        remove_tree(&tree).unwrap();
        remove_tree(&place.path().join("lower")).unwrap();
    }
}
