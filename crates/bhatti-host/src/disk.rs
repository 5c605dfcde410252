//! Free space of a file system, where it places directories, and copies of large sparse files.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use rustix::fs::{IFlags, copy_file_range, ioctl_ficlone, ioctl_getflags, ioctl_setflags, seek};
use rustix::io::Errno;

/// Maximum that one call copies, in bytes.
const COPY_BYTES: u64 = 1 << 30;

/// Returns the number of bytes that can still be written below `directory`.
///
/// # Errors
///
/// Returns the error of statvfs(3).
pub fn free_bytes(directory: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(directory)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Asks the file system to place the directories in `directory` far from each other. Ext4 then
/// looks for free inodes in another place for each of them. In one place it passes over all inodes
/// that were deleted in the last minutes, one by one, for each new file. Does nothing on file
/// systems without such a flag, and in a directory of another user.
///
/// # Errors
///
/// Returns the error of open(2) or of the ioctl (`FS_IOC_SETFLAGS`, see ioctl_iflags(2)).
pub fn spread_directories(directory: &Path) -> io::Result<()> {
    let opened = File::open(directory)?;
    let set = ioctl_getflags(&opened).and_then(|flags| {
        if flags.contains(IFlags::TOPDIR) {
            return Ok(());
        }
        ioctl_setflags(&opened, flags | IFlags::TOPDIR)
    });
    match set {
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::PERM | Errno::ACCESS) => Ok(()),
        set => Ok(set?),
    }
}

/// Copies a file with its holes. If the file system supports reflinks, the copy shares its blocks
/// with the original; otherwise it takes as much space as the data that has been written.
///
/// # Errors
///
/// Returns an error if `to` exists already, or if a file cannot be read or written. If a read or
/// a write fails, `to` may be incomplete.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let (source, mut target) = (File::open(from)?, File::create_new(to)?);
    match ioctl_ficlone(&target, &source) {
        Ok(()) => return Ok(()),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    let size = source.metadata()?.len();
    target.set_len(size)?;
    let mut at = 0;
    while let Some(Range { start, end }) = next_data(&source, at)? {
        copy_range(&source, &mut target, start, end)?;
        at = end;
    }
    Ok(())
}

/// Returns the first range of data in the file at or after `at`, without holes.
///
/// # Errors
///
/// Returns the error of lseek(2).
pub fn next_data(file: &File, at: u64) -> io::Result<Option<Range<u64>>> {
    let start = match seek(file, rustix::fs::SeekFrom::Data(at)) {
        Err(Errno::NXIO) => return Ok(None),
        start => start?,
    };
    Ok(Some(start..seek(file, rustix::fs::SeekFrom::Hole(start))?))
}

fn copy_range(source: &File, target: &mut File, start: u64, end: u64) -> io::Result<()> {
    let (mut from, mut to) = (start, start);
    while from < end {
        let left = usize::try_from((end - from).min(COPY_BYTES)).map_err(io::Error::other)?;
        match copy_file_range(source, Some(&mut from), &*target, Some(&mut to), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            // The file systems do not support `copy_file_range` between them.
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                return copy_through(source, target, from, end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_through(mut source: &File, target: &mut File, start: u64, end: u64) -> io::Result<()> {
    source.seek(SeekFrom::Start(start))?;
    target.seek(SeekFrom::Start(start))?;
    let copied = io::copy(&mut io::Read::take(source, end - start), target)?;
    if copied == end - start { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn directories_are_spread_where_the_file_system_can_do_that() {
        /// `EXT4_SUPER_MAGIC` of linux/magic.h.
        const EXT4: i64 = 0xef53;
        let directory = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            spread_directories(directory.path()).unwrap();
        }
        let is_ext4 = rustix::fs::statfs(directory.path()).unwrap().f_type == EXT4;
        let flags = ioctl_getflags(File::open(directory.path()).unwrap());
        assert_eq!(flags.is_ok_and(|flags| flags.contains(IFlags::TOPDIR)), is_ext4);
        let missing = spread_directories(&directory.path().join("none")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn copy_has_the_content_and_the_holes() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        for (at, byte) in [(0, 1), (5 << 20, 2), ((64 << 20) - 1, 3)] {
            file.write_all_at(&[byte], at).unwrap();
        }

        copy(&from, &to).unwrap();

        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20, "the copy is not sparse");
        assert_eq!(copy(&from, &to).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        for empty in [0, 1 << 20] {
            let (from, to) = (
                directory.path().join(format!("e{empty}")),
                directory.path().join(format!("c{empty}")),
            );
            File::create(&from).unwrap().set_len(empty).unwrap();
            copy(&from, &to).unwrap();
            assert_eq!(fs::metadata(&to).unwrap().len(), empty);
        }
    }
}
