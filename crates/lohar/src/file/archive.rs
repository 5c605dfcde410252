//! Directories as tar archives, read and written by the agent itself: a guest's image need not
//! have `tar`, and archives follow the same rules of users and owners as files.

mod pack;
mod unpack;

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::path::Path;

use bhatti_proto::{AgentError, ArchiveRequest, CHUNK_BYTES, ErrorKind, FrameType, exit_payload};
use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use tokio::time::timeout;

use self::pack::Content;
use super::{checked, worker};
use crate::Agent;
use crate::connection::{HostReader, HostWriter, Transport};
use crate::refusal::{OpError, host_gone, refused};

/// Pieces that may wait between the connection and the thread.
const PIECES_WAITING: usize = 4;

/// The most names of skipped entries that are sent to the host. Of further entries, the host gets
/// only the number.
const SKIPPED_NAMES_MAX: usize = 100;

/// The most levels of nested directories. Each is open while its content is read.
const DEPTH_MAX: usize = 512;

/// Serves one `ARCHIVE_READ_REQ`.
pub(crate) async fn read<T: Transport>(
    agent: &Agent,
    request: &ArchiveRequest,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let (sender, mut pieces) = mpsc::channel(PIECES_WAITING);
    let content = if request.image { Content::Image } else { Content::Files };
    let packing = move || pack::pack(&path, content, Output::new(sender));
    let mut packing = worker::begin(agent, request.user.as_deref(), packing).await?;
    while let Some(bytes) = pieces.recv().await {
        writer.send(FrameType::STDOUT, &bytes).await.map_err(host_gone)?;
    }
    finish(packing.end().await?, writer).await
}

/// Serves one `ARCHIVE_WRITE_REQ`.
pub(crate) async fn write<T: Transport>(
    agent: &Agent,
    request: &ArchiveRequest,
    mut reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    agent.awake().await;
    let (sender, pieces) = mpsc::channel(PIECES_WAITING);
    let file_bytes = agent.limits.file_bytes;
    let unpacking = move || unpack::unpack(&path, Input::new(pieces), file_bytes);
    let mut unpacking = worker::begin(agent, request.user.as_deref(), unpacking).await?;
    let fed = tokio::select! {
        biased;
        // Nothing after an archive's end matters, and after an error its rest is not needed.
        skipped = unpacking.end() => return finish(skipped?, writer).await,
        fed = feed(agent, &mut reader, sender) => fed,
    };
    let unpacked = unpacking.end().await;
    fed?;
    finish(unpacked?, writer).await
}

/// Moves the archive to the unpacking thread.
async fn feed<T: Transport>(
    agent: &Agent,
    reader: &mut HostReader<T>,
    pieces: mpsc::Sender<Piece>,
) -> Result<(), OpError> {
    loop {
        let stalled = |_| refused(ErrorKind::Limit, "no part of the archive arrived in time");
        let next = timeout(agent.limits.write(), reader.next()).await.map_err(stalled)?;
        let broken = || refused(ErrorKind::Other, "the archive broke off before its end");
        let frame = next.ok().flatten().ok_or_else(broken)?;
        let piece = match frame.frame_type {
            FrameType::STDIN => Piece::Content(frame.payload),
            FrameType::STDIN_EOF => Piece::End,
            _ => continue,
        };
        let is_last = matches!(piece, Piece::End);
        agent.awake().await;
        if pieces.send(piece).await.is_err() {
            // The thread has ended: let the caller take its result first.
            std::future::pending::<()>().await;
        }
        if is_last {
            return Ok(());
        }
    }
}

async fn finish<T: Transport>(skipped: Skipped, writer: &mut HostWriter<T>) -> Result<(), OpError> {
    for line in skipped.lines() {
        writer.send(FrameType::STDERR, line.as_bytes()).await.map_err(host_gone)?;
    }
    writer.send(FrameType::EXIT, &exit_payload(0)).await.map_err(host_gone)
}

/// Skipped entries, which an archive or a file system cannot hold: sockets, devices, pipes.
#[derive(Debug, Default)]
struct Skipped {
    names: VecDeque<String>,
    total: usize,
}

impl Skipped {
    fn note(&mut self, path: &Path) {
        self.total += 1;
        if self.names.len() < SKIPPED_NAMES_MAX {
            self.names.push_back(path.display().to_string());
        }
    }

    fn lines(self) -> impl Iterator<Item = String> {
        let more = self.total - self.names.len();
        self.names.into_iter().chain((more > 0).then(|| format!("and {more} more")))
    }
}

/// The writer of an archive to the host.
struct Output {
    pieces: mpsc::Sender<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Output {
    const fn new(pieces: mpsc::Sender<Vec<u8>>) -> Self {
        Self { pieces, buffer: Vec::new() }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(CHUNK_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..length]);
        if self.buffer.len() == CHUNK_BYTES {
            self.flush()?;
        }
        Ok(length)
    }

    /// # Errors
    ///
    /// `BrokenPipe` if the host takes no more.
    fn flush(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.buffer);
        if piece.is_empty() {
            return Ok(());
        }
        self.pieces.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// A message to the unpacking thread.
enum Piece {
    Content(Bytes),
    End,
}

/// The reader of an archive from the host.
struct Input {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    has_ended: bool,
}

impl Input {
    const fn new(pieces: mpsc::Receiver<Piece>) -> Self {
        Self { pieces, current: Bytes::new(), has_ended: false }
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.has_ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Content(bytes)) => self.current = bytes,
                Some(Piece::End) => self.has_ended = true,
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let length = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

fn too_deep(path: &Path) -> AgentError {
    let message = format!(
        "directories are nested deeper than {DEPTH_MAX} levels at {}",
        path.components().take(8).collect::<std::path::PathBuf>().display()
    );
    refused(ErrorKind::Limit, message)
}
