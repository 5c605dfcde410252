//! Durable files: if a write is interrupted at any point, the file is either complete or
//! unchanged.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Number of writes that this process has begun.
static WRITES: AtomicU64 = AtomicU64::new(0);

/// Writes `content` to `path` atomically and durably: a temporary file beside it, fsync, rename,
/// fsync of the directory.
///
/// # Errors
///
/// Returns the first error. If the write or the rename failed, `path` is unchanged and the
/// temporary file is removed; if only the fsync of the directory failed, `path` has the new
/// content.
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    write_with_mode(path, content, 0o666)
}

/// As [`write()`], for a file that only its owner may read.
///
/// # Errors
///
/// As [`write()`].
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    write_with_mode(path, content, 0o600)
}

/// As [`write()`], for a file that is replaced and never changed. A process of the same user
/// cannot write to the file unless it has root's rights.
///
/// # Errors
///
/// As [`write()`].
pub fn write_sealed(path: &Path, content: &[u8]) -> io::Result<()> {
    write_with_mode(path, content, 0o444)
}

/// Creates a sealed file, as [`write_sealed`] does, that the caller writes once through the
/// returned handle. The file is not made durable.
///
/// # Errors
///
/// Returns the error of open(2); the file must not exist yet.
pub fn create_sealed(path: &Path) -> io::Result<File> {
    File::options().write(true).create_new(true).mode(0o444).open(path)
}

/// Seals a file, as [`write_sealed`] does, before other files depend on it.
///
/// # Errors
///
/// Returns the error of stat(2) or chmod(2).
pub fn seal(path: &Path) -> io::Result<()> {
    let mut permissions = fs::metadata(path)?.permissions();
    if permissions.readonly() {
        return Ok(());
    }
    permissions.set_readonly(true);
    fs::set_permissions(path, permissions)
}

fn write_with_mode(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let directory = parent(path)?;
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    // Writers of one name, here or in another process, never share a temporary file.
    let number = WRITES.fetch_add(1, Ordering::Relaxed);
    let temporary =
        directory.join(format!(".{}.{}-{number}.tmp", name.display(), std::process::id()));
    let written = File::options()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
        .and_then(|()| rename(&temporary, path));
    if written.is_err() {
        // Return the first error. The file may never have been made.
        drop(fs::remove_file(&temporary));
    }
    written
}

/// Renames `from` to `to` and makes the new name durable.
///
/// # Errors
///
/// Returns the error of the rename, or of the directory's fsync.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_parent(to)
}

/// Makes the creation or the removal of `path` durable.
///
/// # Errors
///
/// Returns the error of the directory's fsync.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(parent(path)?)?.sync_all()
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_replaces_the_file_and_leaves_no_temporary_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        write(&file, b"old").unwrap();

        write(&file, b"new").unwrap();

        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn concurrent_writes_each_leave_a_whole_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");

        std::thread::scope(|scope| {
            for byte in 0..8u8 {
                let file = &file;
                scope.spawn(move || {
                    for _ in 0..20 {
                        write(file, &[byte; 50_000]).unwrap();
                        let read = fs::read(file).unwrap();
                        assert!(read.len() == 50_000 && read.iter().all(|other| *other == read[0]));
                    }
                });
            }
        });

        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn failed_write_leaves_no_temporary_file() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("target");
        fs::create_dir(&target).unwrap();

        write(&target, b"a file cannot replace a directory").unwrap_err();

        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
