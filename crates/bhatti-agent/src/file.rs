//! Files in the guest. Each call acts as one user: see [`AgentClient::acting_as`].

use std::time::Duration;

use bhatti_proto::{
    CHUNK_BYTES, FileEvent, FileInfo, FilePathRequest, FileReadRequest, FileReadResponse,
    FileWriteRequest, FrameType, MkdirRequest, PIECE_BYTES_MAX, RemoveRequest, RenameRequest,
    StatusOk,
};
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

use crate::{AgentClient, CallError, Reader, Writer, expect, expect_soon, next, refusal};

/// The limits of a directory listing, in bytes of JSON and in time, since the guest decides what
/// it lists.
const LISTING_BYTES_MAX: usize = 8 << 20;
/// See [`LISTING_BYTES_MAX`].
const LISTING_LIMIT: Duration = Duration::from_secs(60);

/// The part of a file to read; by default all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// The first line, counted from 1.
    pub offset: Option<u32>,
    /// The most lines.
    pub limit: Option<u32>,
    /// The most bytes.
    pub max_bytes: Option<u64>,
}

/// The content of a file that is being read. Dropping the value ends the read.
pub struct FileContent {
    /// The size of the whole file in bytes, and its permission bits.
    pub info: FileReadResponse,
    reader: Reader,
    _writer: Writer,
}

impl FileContent {
    /// Waits for the next piece. Returns `None` after the last one.
    ///
    /// # Errors
    ///
    /// Returns an error if the read fails in the guest or the connection is lost.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        let frame = next(&mut self.reader).await?;
        match frame.frame_type {
            FrameType::STDOUT => Ok(Some(frame.payload)),
            FrameType::EXIT => Ok(None),
            _ => Err(refusal(&frame).unwrap_or(CallError::Unexpected)),
        }
    }

    /// Reads the rest, at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`next`](Self::next), and [`CallError::TooMuch`] if the rest is
    /// longer.
    pub async fn read_to_end(mut self, limit: usize) -> Result<Vec<u8>, CallError> {
        let mut content = Vec::new();
        while let Some(bytes) = self.next().await? {
            content.extend_from_slice(&bytes);
            if content.len() > limit {
                return Err(CallError::TooMuch { limit, what: "bytes" });
            }
        }
        Ok(content)
    }
}

/// A file that is being written. Dropping it before [`finish`](Self::finish) leaves the guest's
/// file unchanged.
pub struct FileUpload {
    reader: Reader,
    writer: Writer,
}

impl FileUpload {
    /// Sends a part of the content.
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

    /// Marks content of unknown size as complete.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`write`](Self::write).
    pub async fn end(&mut self) -> Result<(), CallError> {
        self.writer.send(FrameType::STDIN_EOF, &[]).await.map_err(CallError::Write)
    }

    /// Waits until the file is in place and durable.
    ///
    /// # Errors
    ///
    /// Returns an error if the guest refused.
    pub async fn finish(mut self) -> Result<(), CallError> {
        let frame = expect(&mut self.reader, FrameType::FILE_WRITE_RESP).await?;
        frame.json::<StatusOk>().map(drop).map_err(|_| CallError::Unexpected)
    }
}

/// Events on a watched path. Dropping the value ends the watch.
pub struct FileEvents {
    reader: Reader,
    _writer: Writer,
}

impl FileEvents {
    /// Waits for the next event. Returns `None` when the watched path is gone.
    ///
    /// # Errors
    ///
    /// Returns an error if the guest refused.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<Option<FileEvent>, CallError> {
        match expect(&mut self.reader, FrameType::FILE_EVENT).await {
            Ok(frame) => frame.json().map(Some).map_err(|_| CallError::Unexpected),
            Err(CallError::Lost) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AgentClient {
    fn path_request(&self, path: &str) -> FilePathRequest {
        FilePathRequest {
            path: path.to_owned(),
            all: false,
            user: self.acting_user(),
            error_details: true,
        }
    }

    /// Reads a file, or a part of it. The bytes are always those of the file.
    ///
    /// # Errors
    ///
    /// Returns an error if the file does not exist or is not a regular file.
    pub async fn read_file(
        &self,
        path: &str,
        options: ReadOptions,
    ) -> Result<FileContent, CallError> {
        let request = FileReadRequest {
            path: path.to_owned(),
            offset: options.offset.unwrap_or_default().into(),
            limit: options.limit.unwrap_or_default().into(),
            max_bytes: options
                .max_bytes
                .map_or(0, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
            user: self.acting_user(),
            error_details: true,
        };
        let (mut reader, writer) = self.request(FrameType::FILE_READ_REQ, &request).await?;
        reader.frames.limit_payload(PIECE_BYTES_MAX);
        let info = expect_soon(&mut reader, FrameType::FILE_READ_RESP).await?;
        let info = info.json().map_err(|_| CallError::Unexpected)?;
        Ok(FileContent { info, reader, _writer: writer })
    }

    /// Starts to write a file of exactly `size` bytes, or, without a size, until
    /// [`FileUpload::end`]. `mode` is the permission bits in octal; if empty, those of the
    /// existing file, else `0644`.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent is not reachable.
    pub async fn begin_write(
        &self,
        path: &str,
        mode: &str,
        size: Option<u64>,
    ) -> Result<FileUpload, CallError> {
        self.begin_write_as(path, mode, size, false).await
    }

    /// Like [`begin_write`](Self::begin_write). With `configures`, the file is part of the
    /// guest's configuration.
    async fn begin_write_as(
        &self,
        path: &str,
        mode: &str,
        size: Option<u64>,
        configures: bool,
    ) -> Result<FileUpload, CallError> {
        let request = FileWriteRequest {
            path: path.to_owned(),
            mode: mode.to_owned(),
            // An agent that does not know writes of unknown size refuses the size -1. It must not
            // take the content for an empty file.
            size: size.map_or(Ok(-1), i64::try_from).map_err(|_| CallError::Unexpected)?,
            until_eof: size.is_none(),
            configures,
            in_place: None,
            user: self.acting_user(),
            error_details: true,
        };
        self.begin_upload(&request).await
    }

    pub(crate) async fn begin_upload(
        &self,
        request: &FileWriteRequest,
    ) -> Result<FileUpload, CallError> {
        let (reader, writer) = self.request(FrameType::FILE_WRITE_REQ, request).await?;
        Ok(FileUpload { reader, writer })
    }

    /// Writes a file of exactly `size` bytes from `content`.
    ///
    /// # Errors
    ///
    /// Returns an error if the content cannot be read or ends early, or if the guest refuses. The
    /// guest's file is then unchanged.
    pub async fn write_file(
        &self,
        path: &str,
        mode: &str,
        size: u64,
        content: impl AsyncRead + Unpin,
    ) -> Result<(), CallError> {
        let mut upload = self.begin_write(path, mode, Some(size)).await?;
        let mut content = content.take(size);
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut left = size;
        while left > 0 {
            let length = content.read(&mut buffer).await.map_err(CallError::Content)?;
            if length == 0 {
                return Err(CallError::Content(std::io::ErrorKind::UnexpectedEof.into()));
            }
            left -= length as u64;
            if upload.write(&buffer[..length]).await.is_err() {
                // The guest refused the rest. `finish` returns the reason.
                break;
            }
        }
        upload.finish().await
    }

    /// Writes a file of the guest's configuration: with the agent's rights, and with new files
    /// and directories owned by the guest's usual user.
    ///
    /// # Errors
    ///
    /// Returns an error if the guest refuses. The guest's file is then unchanged.
    pub async fn write_configured_file(
        &self,
        path: &str,
        mode: &str,
        content: &[u8],
    ) -> Result<(), CallError> {
        let size = Some(content.len() as u64);
        let mut upload = self.begin_write_as(path, mode, size, true).await?;
        for piece in content.chunks(CHUNK_BYTES) {
            if upload.write(piece).await.is_err() {
                // The guest refused the rest. `finish` returns the reason.
                break;
            }
        }
        upload.finish().await
    }

    /// Returns the attributes of a file or directory. Links are followed.
    ///
    /// # Errors
    ///
    /// Returns an error if the path does not exist.
    pub async fn stat(&self, path: &str) -> Result<FileInfo, CallError> {
        self.ask(FrameType::FILE_STAT_REQ, &self.path_request(path), FrameType::FILE_STAT_RESP)
            .await
    }

    /// Returns all entries of a directory, sorted by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the path does not exist or is not a directory; [`CallError::TooMuch`]
    /// if the listing takes more than 8 MiB of JSON; [`CallError::Silent`] if it is not complete
    /// within 60 s.
    pub async fn list_directory(&self, path: &str) -> Result<Vec<FileInfo>, CallError> {
        self.list_directory_within(path, |_| true).await
    }

    /// Like [`list_directory`](Self::list_directory), for as long as `admit` accepts the number
    /// of bytes of JSON received so far.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`list_directory`](Self::list_directory), and [`CallError::TooMuch`]
    /// if `admit` refuses.
    pub async fn list_directory_within(
        &self,
        path: &str,
        admit: impl FnMut(usize) -> bool,
    ) -> Result<Vec<FileInfo>, CallError> {
        let listing = timeout(LISTING_LIMIT, self.list_all(path, admit));
        let mut entries =
            listing.await.unwrap_or(Err(CallError::Silent { limit: LISTING_LIMIT }))?;
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(entries)
    }

    async fn list_all(
        &self,
        path: &str,
        mut admit: impl FnMut(usize) -> bool,
    ) -> Result<Vec<FileInfo>, CallError> {
        let request = FilePathRequest { all: true, ..self.path_request(path) };
        let (mut reader, _writer) = self.request(FrameType::FILE_LS_REQ, &request).await?;
        let (mut entries, mut bytes) = (Vec::new(), 0);
        loop {
            let frame = match next(&mut reader).await {
                Ok(frame) => frame,
                // An old agent sends one frame, and no `EXIT`.
                Err(CallError::Lost) if !entries.is_empty() => return Ok(entries),
                Err(error) => return Err(error),
            };
            match frame.frame_type {
                FrameType::FILE_LS_RESP => {
                    bytes += frame.payload.len();
                    if bytes > LISTING_BYTES_MAX || !admit(bytes) {
                        let what = "bytes of a directory's listing";
                        return Err(CallError::TooMuch { limit: LISTING_BYTES_MAX, what });
                    }
                    entries
                        .extend(frame.json::<Vec<FileInfo>>().map_err(|_| CallError::Unexpected)?);
                }
                FrameType::EXIT => return Ok(entries),
                _ => return Err(refusal(&frame).unwrap_or(CallError::Unexpected)),
            }
        }
    }

    /// Creates a directory. With `parents`, missing parents are created, too, and the directory
    /// may exist.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory exists (without `parents`) or cannot be created.
    pub async fn make_directory(
        &self,
        path: &str,
        mode: &str,
        parents: bool,
    ) -> Result<(), CallError> {
        let request = MkdirRequest {
            path: path.to_owned(),
            mode: mode.to_owned(),
            parents,
            owner: None,
            user: self.acting_user(),
            error_details: true,
        };
        self.act_soon(FrameType::FILE_MKDIR_REQ, &request).await
    }

    /// Removes a file, a link, or a directory; with `recursive`, a directory with its contents.
    ///
    /// # Errors
    ///
    /// Returns an error if the path does not exist, or is a directory that is not empty.
    pub async fn remove(&self, path: &str, recursive: bool) -> Result<(), CallError> {
        let request = RemoveRequest {
            path: path.to_owned(),
            recursive,
            user: self.acting_user(),
            error_details: true,
        };
        self.act(FrameType::FILE_REMOVE_REQ, &request).await
    }

    /// Renames a file or directory.
    ///
    /// # Errors
    ///
    /// Returns an error if the guest's kernel refuses.
    pub async fn rename(&self, from: &str, to: &str) -> Result<(), CallError> {
        let request = RenameRequest {
            from: from.to_owned(),
            to: to.to_owned(),
            user: self.acting_user(),
            error_details: true,
        };
        self.act_soon(FrameType::FILE_RENAME_REQ, &request).await
    }

    /// Watches a file or directory. The first event reports that the watch is active.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent is not reachable.
    pub async fn watch(&self, path: &str) -> Result<FileEvents, CallError> {
        let (reader, writer) =
            self.request(FrameType::FILE_WATCH_REQ, &self.path_request(path)).await?;
        Ok(FileEvents { reader, _writer: writer })
    }
}
