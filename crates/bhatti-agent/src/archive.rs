//! Directories in the guest as tar archives. Each call acts as one user: see
//! [`AgentClient::acting_as`].

use bhatti_proto::{ArchiveRequest, CHUNK_BYTES, FrameType};
use bytes::Bytes;

use crate::{AgentClient, CallError, Reader, Writer, next, refusal};

/// The most names of skipped entries that are kept, and the most bytes of each name.
const SKIPPED_MAX: usize = 128;
const SKIPPED_BYTES_MAX: usize = 4096;

/// A directory that is being read as an archive. Dropping the value ends the read.
pub struct ArchiveContent {
    reader: Reader,
    _writer: Writer,
    skipped: Vec<String>,
}

impl ArchiveContent {
    /// Waits for the next piece. Returns `None` after the last one.
    ///
    /// # Errors
    ///
    /// Returns an error if an entry cannot be read or the connection is lost. The pieces so far
    /// are then not a whole archive.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        loop {
            let frame = next(&mut self.reader).await?;
            match frame.frame_type {
                FrameType::STDOUT => return Ok(Some(frame.payload)),
                FrameType::STDERR => note(&mut self.skipped, &frame.payload),
                FrameType::EXIT => return Ok(None),
                _ => return Err(refusal(&frame).unwrap_or(CallError::Unexpected)),
            }
        }
    }

    /// Returns the paths of skipped entries (sockets, pipes, devices). Complete once the last
    /// piece has arrived.
    #[must_use]
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }
}

/// An archive that is being unpacked in the guest. Dropping it before [`finish`](Self::finish)
/// leaves the entries that were unpacked until then.
pub struct ArchiveUpload {
    reader: Reader,
    writer: Writer,
}

impl ArchiveUpload {
    /// Sends a part of the archive.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection has ended. [`finish`](Self::finish) may then return the
    /// cause.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), CallError> {
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.writer.send(FrameType::STDIN, chunk).await.map_err(CallError::Write)?;
        }
        Ok(())
    }

    /// Marks the archive as complete.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`write`](Self::write).
    pub async fn end(&mut self) -> Result<(), CallError> {
        self.writer.send(FrameType::STDIN_EOF, &[]).await.map_err(CallError::Write)
    }

    /// Waits until the archive is unpacked and durable. Returns the paths of skipped entries
    /// (pipes, devices).
    ///
    /// # Errors
    ///
    /// Returns an error if the guest refused. The entries that were unpacked until then stay.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn finish(&mut self) -> Result<Vec<String>, CallError> {
        let mut skipped = Vec::new();
        loop {
            let frame = next(&mut self.reader).await?;
            match frame.frame_type {
                FrameType::STDERR => note(&mut skipped, &frame.payload),
                FrameType::EXIT => return Ok(skipped),
                _ => return Err(refusal(&frame).unwrap_or(CallError::Unexpected)),
            }
        }
    }
}

fn note(skipped: &mut Vec<String>, name: &[u8]) {
    if skipped.len() < SKIPPED_MAX {
        let name = &name[..name.len().min(SKIPPED_BYTES_MAX)];
        skipped.push(String::from_utf8_lossy(name).into_owned());
    }
}

impl AgentClient {
    fn archive_request(&self, path: &str) -> ArchiveRequest {
        let (path, user) = (path.to_owned(), self.acting_user());
        ArchiveRequest { path, image: false, user, error_details: true }
    }

    /// Reads the guest's root file system as a tar archive that can become an image.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent is not reachable.
    pub async fn read_root(&self) -> Result<ArchiveContent, CallError> {
        let request = ArchiveRequest {
            path: "/".to_owned(),
            image: true,
            user: Some("0".to_owned()),
            error_details: true,
        };
        let (reader, writer) = self.request(FrameType::ARCHIVE_READ_REQ, &request).await?;
        Ok(ArchiveContent { reader, _writer: writer, skipped: Vec::new() })
    }

    /// Reads a directory as a tar archive, with names relative to the directory. If it is known
    /// from the start that an entry is unreadable, the error comes before the first piece.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent is not reachable.
    pub async fn read_archive(&self, path: &str) -> Result<ArchiveContent, CallError> {
        let request = self.archive_request(path);
        let (reader, writer) = self.request(FrameType::ARCHIVE_READ_REQ, &request).await?;
        Ok(ArchiveContent { reader, _writer: writer, skipped: Vec::new() })
    }

    /// Starts to unpack a tar archive into a directory, which the agent creates if it is missing.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent is not reachable.
    pub async fn write_archive(&self, path: &str) -> Result<ArchiveUpload, CallError> {
        let request = self.archive_request(path);
        let (reader, writer) = self.request(FrameType::ARCHIVE_WRITE_REQ, &request).await?;
        Ok(ArchiveUpload { reader, writer })
    }
}
