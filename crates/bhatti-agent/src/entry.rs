//! Files with all of their attributes, which the agent reads and writes with its own rights, for
//! callers that act for many users of a guest.

use std::time::Duration;

use bhatti_proto::{
    Entry, EntryRequest, FileEvent, FileEventKind, FileWriteRequest, FrameType, InPlace,
    MkdirRequest, PIECE_BYTES_MAX, Place, TreeWatchRequest,
};
use tokio::time::timeout;

use crate::file::FileUpload;
use crate::{AgentClient, CallError, Reader, Writer, expect_soon, next, refusal};

/// The limits of a listing, in bytes of JSON and in time, since the guest decides what it lists.
const LISTING_BYTES_MAX: usize = 8 << 20;
/// See [`LISTING_BYTES_MAX`].
const LISTING_LIMIT: Duration = Duration::from_secs(60);

impl AgentClient {
    /// Returns what a path means to a user: a name, a number, or `UID:GID`; the guest's usual user
    /// if absent. The file need not exist.
    ///
    /// # Errors
    ///
    /// Returns an error if the guest has no such user, or if the path is not valid.
    pub async fn place(&self, path: &str, user: Option<&str>) -> Result<Place, CallError> {
        let request = entry_request(path, user, None);
        self.ask(FrameType::PLACE_REQ, &request, FrameType::PLACE_RESP).await
    }

    /// Returns a file with its attributes. A link at the end of the path is not followed.
    ///
    /// # Errors
    ///
    /// Returns an error if the file does not exist.
    pub async fn entry(&self, path: &str, user: Option<&str>) -> Result<Entry, CallError> {
        let mut entries = self.entries(&entry_request(path, user, None)).await?;
        entries.pop().ok_or(CallError::Unexpected)
    }

    /// Returns the entries of a directory, `depth` levels deep, by name and depth first.
    ///
    /// # Errors
    ///
    /// Returns an error if the path is not a directory; [`CallError::TooMuch`] if the list takes
    /// more than 8 MiB of JSON; [`CallError::Silent`] if it is not complete within 60 s.
    pub async fn entries_below(
        &self,
        path: &str,
        user: Option<&str>,
        depth: u32,
    ) -> Result<Vec<Entry>, CallError> {
        let request = entry_request(path, user, Some(depth));
        let listing = timeout(LISTING_LIMIT, self.entries(&request));
        listing.await.unwrap_or(Err(CallError::Silent { limit: LISTING_LIMIT }))
    }

    async fn entries(&self, request: &EntryRequest) -> Result<Vec<Entry>, CallError> {
        let (mut reader, _writer) = self.request(FrameType::ENTRY_REQ, request).await?;
        let (mut entries, mut bytes) = (Vec::new(), 0);
        loop {
            let frame = next(&mut reader).await?;
            match frame.frame_type {
                FrameType::ENTRIES => {
                    bytes += frame.payload.len();
                    if bytes > LISTING_BYTES_MAX {
                        let what = "bytes of a directory's listing";
                        return Err(CallError::TooMuch { limit: LISTING_BYTES_MAX, what });
                    }
                    entries.extend(frame.json::<Vec<Entry>>().map_err(|_| CallError::Unexpected)?);
                }
                FrameType::EXIT => return Ok(entries),
                _ => return Err(refusal(&frame).unwrap_or(CallError::Unexpected)),
            }
        }
    }

    /// Begins to write a file in place, until [`FileUpload::end`]. What was written before an
    /// error stays. Missing directories are made.
    ///
    /// # Errors
    ///
    /// Returns an error if the agent is not reachable.
    pub async fn begin_write_in_place(
        &self,
        path: &str,
        how: InPlace,
    ) -> Result<FileUpload, CallError> {
        let request = FileWriteRequest {
            path: path.to_owned(),
            mode: String::new(),
            // An agent that does not know writes of unknown size refuses the size -1.
            size: -1,
            until_eof: true,
            configures: false,
            in_place: Some(how),
            user: None,
            error_details: true,
        };
        self.begin_upload(&request).await
    }

    /// Makes a directory and the missing ones on the way, which belong to `owner`, as in
    /// [`Place::ids`]. The directory may exist.
    ///
    /// # Errors
    ///
    /// Returns an error if a part of the path is no directory.
    pub async fn make_directories_of(&self, path: &str, owner: &str) -> Result<(), CallError> {
        let request = MkdirRequest {
            path: path.to_owned(),
            parents: true,
            owner: Some(owner.to_owned()),
            error_details: true,
            ..MkdirRequest::default()
        };
        self.act_soon(FrameType::FILE_MKDIR_REQ, &request).await
    }

    /// Watches a directory, and those below it if `recursive` is set.
    ///
    /// # Errors
    ///
    /// Returns an error if the path is not a directory.
    pub async fn watch_tree(&self, path: &str, recursive: bool) -> Result<TreeEvents, CallError> {
        let request = TreeWatchRequest { path: path.to_owned(), recursive, error_details: true };
        let (mut reader, writer) = self.request(FrameType::TREE_WATCH_REQ, &request).await?;
        reader.frames.limit_payload(PIECE_BYTES_MAX);
        let first = expect_soon(&mut reader, FrameType::FILE_EVENT).await?;
        let first: FileEvent = first.json().map_err(|_| CallError::Unexpected)?;
        if first.kind != FileEventKind::Watching {
            return Err(CallError::Unexpected);
        }
        Ok(TreeEvents { reader, writer })
    }
}

fn entry_request(path: &str, user: Option<&str>, depth: Option<u32>) -> EntryRequest {
    EntryRequest {
        path: path.to_owned(),
        user: user.map(str::to_owned),
        depth,
        error_details: true,
    }
}

/// What happens on a watched tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TreeEvent {
    /// A change. The name is relative to the watched directory; absent for the directory itself.
    Change(FileEvent),
    /// All changes before a [`sync`](TreeEvents::sync) have been reported.
    Synced,
    /// The directory is gone.
    Over,
}

/// Events on a watched tree. Dropping the value ends the watch.
pub struct TreeEvents {
    reader: Reader,
    writer: Writer,
}

impl TreeEvents {
    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// Returns an error if the guest refuses.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<TreeEvent, CallError> {
        let frame = match next(&mut self.reader).await {
            Ok(frame) => frame,
            Err(CallError::Lost) => return Ok(TreeEvent::Over),
            Err(error) => return Err(error),
        };
        match frame.frame_type {
            FrameType::FILE_EVENT => {
                frame.json().map(TreeEvent::Change).map_err(|_| CallError::Unexpected)
            }
            FrameType::SYNC => Ok(TreeEvent::Synced),
            _ => Err(refusal(&frame).unwrap_or(CallError::Unexpected)),
        }
    }

    /// Asks for [`TreeEvent::Synced`] after all changes so far.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn sync(&mut self) -> Result<(), CallError> {
        self.writer.send(FrameType::SYNC, &[]).await.map_err(CallError::Write)
    }
}
