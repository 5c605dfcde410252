//! Reading files: whole, or some lines, or some bytes of some lines.

use std::fs::File;
use std::io::{self, ErrorKind as IoErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use bhatti_proto::{
    AgentError, CHUNK_BYTES, FileReadRequest, FileReadResponse, FrameType, exit_payload,
};
use rustix::fs::{FileType, Mode, OFlags, SeekFrom, fstat, open, seek};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::{checked, is_a_directory, is_not_regular, octal, worker};
use crate::Agent;
use crate::connection::{HostWriter, Transport};
use crate::refusal::{OpError, host_gone, io_refused};

/// Pieces that may wait for the host: enough for the next to be read while one is sent.
const PIECES_WAITING: usize = 2;

/// A message from the reading thread.
enum Piece {
    Facts(FileReadResponse),
    Content(Vec<u8>),
}

/// Serves one `FILE_READ_REQ`.
pub(crate) async fn read<T: Transport>(
    agent: &Agent,
    request: &FileReadRequest,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let part = Part::new(request);
    let (sender, mut pieces) = mpsc::channel(PIECES_WAITING);
    let reading = move || read_part(&path, part, &sender);
    let mut reading = worker::begin(agent, request.user.as_deref(), reading).await?;
    while let Some(piece) = pieces.recv().await {
        match piece {
            Piece::Facts(facts) => writer.send_json(FrameType::FILE_READ_RESP, &facts).await?,
            Piece::Content(bytes) => {
                writer.send(FrameType::STDOUT, &bytes).await.map_err(host_gone)?;
            }
        }
    }
    reading.end().await?;
    writer.send(FrameType::EXIT, &exit_payload(0)).await.map_err(host_gone)
}

/// Reads the requested part. Stops early if the receiver is gone.
fn read_part(path: &Path, mut part: Part, pieces: &mpsc::Sender<Piece>) -> Result<(), AgentError> {
    let (mut file, facts) = open_regular(path)?;
    if pieces.blocking_send(Piece::Facts(facts)).is_err() {
        return Ok(());
    }
    let failed = |error: &io::Error| io_refused("read", path, error);
    let mut buffer = vec![0; CHUNK_BYTES];
    while !part.is_complete() && !pieces.is_closed() {
        if part.skip_lines > 0 && !skip_hole(&file).map_err(|error| failed(&error))? {
            return Ok(());
        }
        let length = match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == IoErrorKind::Interrupted => continue,
            // A kernel file that has no more for now, such as /proc/kmsg.
            Err(error) if error.kind() == IoErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(failed(&error)),
        };
        let wanted = part.cut(&buffer[..length]);
        if !wanted.is_empty() && pieces.blocking_send(Piece::Content(wanted.to_vec())).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Moves past a hole, which contains no line ends: a sparse file may have terabytes of holes.
/// Returns whether data follows.
fn skip_hole(file: &File) -> io::Result<bool> {
    let here = seek(file, SeekFrom::Current(0))?;
    match seek(file, SeekFrom::Data(here)) {
        Ok(_) => Ok(true),
        // There is no data from here on.
        Err(Errno::NXIO) => Ok(false),
        // Kernel files have no holes.
        Err(Errno::INVAL | Errno::SPIPE | Errno::NOTSUP) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Opens a regular file for reading. Refuses any other file without opening it: a pipe would
/// block, and a device might react.
fn open_regular(path: &Path) -> Result<(File, FileReadResponse), AgentError> {
    let failed = |error: io::Error| io_refused("open", path, &error);
    let place = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| failed(error.into()))?;
    let stat = fstat(&place).map_err(|error| failed(error.into()))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(is_a_directory(path)),
        _ => return Err(is_not_regular(path)),
    }
    // Opens the same file, even if the path leads elsewhere by now. Some kernel files would block
    // without `O_NONBLOCK`.
    let mut options = File::options();
    let opened = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", place.as_raw_fd()));
    let facts = FileReadResponse { mode: octal(stat.st_mode), size: stat.st_size };
    Ok((opened.map_err(failed)?, facts))
}

/// The requested part of a file, cut from the file's chunks as they arrive.
#[derive(Debug)]
struct Part {
    /// Lines that are still to be skipped.
    skip_lines: u64,
    /// Lines that are still wanted; `None` is all.
    lines: Option<u64>,
    /// Bytes that are still wanted; `None` is all.
    bytes: Option<usize>,
}

impl Part {
    fn new(request: &FileReadRequest) -> Self {
        let positive = |number: i64| u64::try_from(number).ok().filter(|number| *number > 0);
        Self {
            skip_lines: positive(request.offset).map_or(0, |offset| offset - 1),
            lines: positive(request.limit),
            bytes: positive(request.max_bytes)
                .map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX)),
        }
    }

    const fn is_complete(&self) -> bool {
        matches!(self.lines, Some(0)) || matches!(self.bytes, Some(0))
    }

    /// Returns the wanted part of the next chunk.
    fn cut<'a>(&mut self, chunk: &'a [u8]) -> &'a [u8] {
        let skipped = behind_lines(chunk, &mut self.skip_lines);
        if self.skip_lines > 0 {
            return &[];
        }
        let rest = &chunk[skipped..];
        let mut length = match &mut self.lines {
            Some(lines) => behind_lines(rest, lines),
            None => rest.len(),
        };
        if let Some(bytes) = &mut self.bytes {
            length = length.min(*bytes);
            *bytes -= length;
        }
        &rest[..length]
    }
}

/// Returns the index after the first `lines` lines of `chunk`, or its end. Subtracts the lines
/// that end in `chunk` from `lines`.
fn behind_lines(chunk: &[u8], lines: &mut u64) -> usize {
    let mut at = 0;
    while *lines > 0 {
        let Some(end) = memchr::memchr(b'\n', &chunk[at..]) else { return chunk.len() };
        at += end + 1;
        *lines -= 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn part_has_the_requested_lines_and_bytes(
            content in "([a-z]{0,5}\r?\n?){0,20}",
            offset in -1i64..12,
            limit in -1i64..12,
            max_bytes in -1i64..40,
            piece in 1usize..20,
        ) {
            let request = FileReadRequest { offset, limit, max_bytes, ..FileReadRequest::default() };
            let mut part = Part::new(&request);
            let cut: Vec<u8> =
                content.as_bytes().chunks(piece).flat_map(|chunk| part.cut(chunk).to_vec()).collect();

            let count = |number: i64| usize::try_from(number).ok().filter(|number| *number > 0);
            let lines = content.split_inclusive('\n').skip(count(offset).unwrap_or(1) - 1);
            let wanted: String = lines.take(count(limit).unwrap_or(usize::MAX)).collect();
            let wanted = &wanted.as_bytes()[..wanted.len().min(count(max_bytes).unwrap_or(usize::MAX))];
            prop_assert_eq!(cut, wanted);
        }
    }
}
