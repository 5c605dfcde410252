//! The log of a VMM: a named pipe, which holds the first 64 KiB of unread output and drops the
//! rest.
//!
//! A guest can make its VMM log as often as it likes, and a file would fill the host's disk. The
//! VMM holds both ends of the pipe, so it can write whether a daemon runs or not, and never
//! blocks.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};

/// Length of the returned tail, in bytes.
const TAIL_BYTES: usize = 4096;

/// Maximum number of bytes to read at once: the kernel's default limit of a pipe's capacity.
const READ_BYTES_MAX: u64 = 1 << 20;

/// Creates the pipe, in place of an earlier one, and opens it for the VMM.
///
/// # Errors
///
/// Returns the error of creating or opening the pipe.
pub fn create_log(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    File::options().read(true).write(true).custom_flags(non_blocking()).open(path)
}

/// Returns the end of the VMM's output since the previous call. Empty if there is no output, or
/// no pipe.
#[must_use]
pub fn log_tail(path: &Path) -> String {
    let tail = read_tail(path).unwrap_or_default();
    String::from_utf8_lossy(&tail).into_owned()
}

fn read_tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut log = File::options().read(true).custom_flags(non_blocking()).open(path)?;
    if !log.metadata()?.file_type().is_fifo() {
        // An earlier daemon started this VMM, with a regular file as its log.
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
    fn log_keeps_a_bounded_amount_of_output() {
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
    fn tail_of_a_regular_log_file_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmm.log");
        fs::write(&path, [vec![b'x'; 100_000], b"end".to_vec()].concat()).unwrap();

        let tail = log_tail(&path);

        assert!(tail.len() == TAIL_BYTES && tail.ends_with("end"));
        assert_eq!(log_tail(&directory.path().join("none")), "");
    }
}
