//! What a VMM complains about: a pipe with a name, which holds the first 64 KiB that nobody has read and drops the rest.
//!
//! A guest can make its VMM complain as often as it likes. A file would fill the host's disk. The VMM has both ends of the pipe, so it can write
//! whether there is a daemon or not, and never waits.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};

/// How much of its end is told, in bytes.
const TAIL_BYTES: usize = 4096;

/// The most that is read at once, in bytes: what a pipe holds, unless somebody has changed that.
const READ_BYTES_MAX: u64 = 1 << 20;

/// Makes the pipe, in place of an earlier one, and opens it for its VMM.
///
/// # Errors
///
/// Returns the error of making or opening it.
pub fn create_log(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    File::options().read(true).write(true).custom_flags(non_blocking()).open(path)
}

/// The end of what the VMM has complained about since this was asked last. Empty if there is nothing, or no pipe.
#[must_use]
pub fn log_tail(path: &Path) -> String {
    let tail = read_tail(path).unwrap_or_default();
    String::from_utf8_lossy(&tail).into_owned()
}

fn read_tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut log = File::options().read(true).custom_flags(non_blocking()).open(path)?;
    if !log.metadata()?.file_type().is_fifo() {
        // Of a VMM that an earlier daemon has started.
        let begin = log.metadata()?.len().saturating_sub(TAIL_BYTES as u64);
        log.seek(SeekFrom::Start(begin))?;
    }
    let mut tail = Vec::new();
    match log.take(READ_BYTES_MAX).read_to_end(&mut tail) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
        _ => {}
    }
    Ok(tail.split_off(tail.len().saturating_sub(TAIL_BYTES)))
}

fn non_blocking() -> i32 {
    OFlags::NONBLOCK.bits().cast_signed()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn log_has_an_end_however_much_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmm.log");
        let mut log = create_log(&path).unwrap();
        assert_eq!(log_tail(&path), "");

        writeln!(log, "first").unwrap();
        assert_eq!(log_tail(&path), "first\n");
        let written = (0..1 << 20).filter(|_| log.write_all(b"virtio: bad ring\n").is_ok()).count();

        assert!(written < 10_000, "{written} lines were kept");
        let tail = log_tail(&path);
        assert!(tail.len() == TAIL_BYTES && tail.ends_with("bad ring\n"));
        log.write_all(b"there is room again").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }

    #[test]
    fn file_of_an_earlier_daemon_is_read_at_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmm.log");
        fs::write(&path, [vec![b'x'; 100_000], b"end".to_vec()].concat()).unwrap();

        let tail = log_tail(&path);

        assert!(tail.len() == TAIL_BYTES && tail.ends_with("end"));
        assert_eq!(log_tail(&directory.path().join("none")), "");
    }
}
