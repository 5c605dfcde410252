//! The files that a VM stands on.
//!
//! Whatever a VM stands on lies in its own directory, as a hard link: nothing that anybody else removes takes it away, and the file
//! system counts who still needs it. Such files are never written.

use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// How the names of memory files begin and end.
const MEMORY_PREFIX: &str = "memory-";
const MEMORY_SUFFIX: &str = ".img";

/// The most that a VM's devices may be when it is saved, in bytes. They have a few MiB; a VMM that a guest has taken over could write more.
pub const STATE_BYTES_MAX: u64 = 64 << 20;

/// The name of a memory file with this content.
#[must_use]
pub fn memory_name(hash: &blake3::Hash) -> String {
    format!("{MEMORY_PREFIX}{}{MEMORY_SUFFIX}", &hash.to_hex()[..32])
}

/// Whether a memory file is called so.
#[must_use]
pub fn is_memory(name: &str) -> bool {
    name.starts_with(MEMORY_PREFIX) && name.ends_with(MEMORY_SUFFIX)
}

/// A name that no other file of this host has.
///
/// # Errors
///
/// Returns an error if this host gives no random bytes.
pub fn new_name(prefix: &str, suffix: &str) -> io::Result<String> {
    let number = getrandom::u64().map_err(io::Error::other)?;
    Ok(format!("{prefix}{number:016x}{suffix}"))
}

/// Creates a directory that is its owner's alone. It may be there already.
///
/// # Errors
///
/// Returns the error of mkdir(2).
pub fn create_private(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

/// Puts a file of an earlier owner into `directory`, under `name`, without copying it. It may be there already.
///
/// # Errors
///
/// Returns the error of link(2) or symlink(2).
pub fn share(file: &Path, directory: &Path, name: &str) -> io::Result<()> {
    let place = directory.join(name);
    match fs::hard_link(file, &place) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        // On another file system a name has to do.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            std::os::unix::fs::symlink(fs::canonicalize(file)?, place)
        }
        linked => linked,
    }
}

/// Removes the memory files that a VM does not stand on any more.
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
/// Returns [`io::ErrorKind::FileTooLarge`] if it has more, and the error of opening or reading it.
pub fn read_at_most(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    let file = fs::File::open(path)?;
    if file.take(limit + 1).read_to_end(&mut content)? as u64 > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has more than {limit} bytes"),
        ));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_beyond_the_limit_is_refused_and_one_at_the_limit_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        fs::write(&path, [7; 100]).unwrap();

        assert_eq!(read_at_most(&path, 100).unwrap(), [7; 100]);
        let error = read_at_most(&path, 99).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);

        // Sparse: it takes no room on the disk, and would take all memory.
        fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(read_at_most(&path, 1 << 20).is_err());
    }
}
