//! The files that a VM depends on.
//!
//! A VM's directory has a hard link to each file that the VM depends on. So the file stays when
//! another owner deletes its link, and the file system counts the file's users. Such files are
//! never written.

use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// Prefix and suffix of the names of memory files.
const MEMORY_PREFIX: &str = "memory-";
const MEMORY_SUFFIX: &str = ".img";

/// Maximum size of the devices' state of a saved VM, in bytes. The state has a few MiB; a VMM
/// that a guest has taken over could write more.
pub const STATE_BYTES_MAX: u64 = 64 << 20;

/// Returns the name of a memory file with this content.
#[must_use]
pub fn memory_name(hash: &blake3::Hash) -> String {
    format!("{MEMORY_PREFIX}{}{MEMORY_SUFFIX}", &hash.to_hex()[..32])
}

/// Whether `name` is the name of a memory file.
#[must_use]
pub(crate) fn is_memory(name: &str) -> bool {
    name.starts_with(MEMORY_PREFIX) && name.ends_with(MEMORY_SUFFIX)
}

/// Returns a name that no other file of this host has.
///
/// # Errors
///
/// Returns an error if the host provides no random bytes.
pub fn new_name(prefix: &str, suffix: &str) -> io::Result<String> {
    let number = getrandom::u64().map_err(io::Error::other)?;
    Ok(format!("{prefix}{number:016x}{suffix}"))
}

/// Creates a directory that only its owner can access. It may already exist.
///
/// # Errors
///
/// Returns the error of mkdir(2).
pub fn create_private(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

/// Links a file into `directory`, under `name`, without copying it. The link may already exist.
///
/// # Errors
///
/// Returns the error of link(2) or symlink(2).
pub fn share(file: &Path, directory: &Path, name: &str) -> io::Result<()> {
    let place = directory.join(name);
    match fs::hard_link(file, &place) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        // On another file system, use a symbolic link.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            std::os::unix::fs::symlink(fs::canonicalize(file)?, place)
        }
        linked => linked,
    }
}

/// Removes the memory files that a VM no longer depends on: all but `kept`.
///
/// # Errors
///
/// Returns the error of reading the directory or of removing a file.
pub fn remove_other_memory(directory: &Path, kept: &str) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if is_memory(&name) && name != kept {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Reads a file of at most `limit` bytes.
///
/// # Errors
///
/// Returns [`io::ErrorKind::FileTooLarge`] if the file is longer, and the error of opening or
/// reading it.
pub(crate) fn read_at_most(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    let file = fs::File::open(path)?;
    if file.take(limit + 1).read_to_end(&mut content)? as u64 > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("the file has more than {limit} bytes"),
        ));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_longer_than_the_limit_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        fs::write(&path, [7; 100]).unwrap();

        assert_eq!(read_at_most(&path, 100).unwrap(), [7; 100]);
        let error = read_at_most(&path, 99).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);

        // A sparse file takes no disk space, but would take all memory.
        fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(read_at_most(&path, 1 << 20).is_err());
    }
}
