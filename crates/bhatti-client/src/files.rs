//! Files in sandboxes.

use bhatti_api::{Deleted, Done, FileChange, FileEntry, MakeDirectory, RenameFile, Unpacked};
use http::Method;

use crate::path::{sandbox_path, with_query};
use crate::{Client, ClientError, Download, Upload};
use bytes::BytesMut;

/// The attributes of a file or directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// The size in bytes.
    pub size: u64,
    /// The permission bits in octal.
    pub mode: String,
    /// Whether the entry is a directory.
    pub is_dir: bool,
}

/// Changes of a watched file or directory.
pub struct FileChanges {
    answer: Download,
    unread: BytesMut,
}

impl FileChanges {
    /// Waits for the next change. Returns `None` when the watched path is gone or the daemon
    /// stops.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection was lost.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<Option<FileChange>, ClientError> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line = self.unread.split_to(end + 1);
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|error| ClientError::Unexpected(error.to_string()));
            }
            match self.answer.next().await? {
                Some(bytes) => self.unread.extend_from_slice(&bytes),
                None => return Ok(None),
            }
        }
    }
}

impl Client {
    /// Watches a file, or the direct entries of a directory.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn watch(&self, sandbox: &str, path: &str) -> Result<FileChanges, ClientError> {
        let path = self.file_query(sandbox, "/files/watch", [("path", path)]);
        let answer = self.download(Method::GET, &path, &[]).await?;
        Ok(FileChanges { answer, unread: BytesMut::new() })
    }

    /// Returns a path with a query that includes the acting user.
    fn file_query<'a>(
        &'a self,
        sandbox: &str,
        rest: &str,
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> String {
        let user = self.user.as_deref().map(|user| ("user", user));
        with_query(&sandbox_path(sandbox, rest), pairs.into_iter().chain(user))
    }

    /// Reads a file.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn read_file(&self, sandbox: &str, path: &str) -> Result<Download, ClientError> {
        let path = self.file_query(sandbox, "/files", [("path", path)]);
        self.download(Method::GET, &path, &[]).await
    }

    /// Lists a directory.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_directory(
        &self,
        sandbox: &str,
        path: &str,
    ) -> Result<Vec<FileEntry>, ClientError> {
        self.get(&self.file_query(sandbox, "/files", [("path", path), ("ls", "true")])).await
    }

    /// Returns the attributes of a file or directory.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn stat(&self, sandbox: &str, path: &str) -> Result<FileStat, ClientError> {
        let query = self.file_query(sandbox, "/files", [("path", path)]);
        let answer = match self.download(Method::HEAD, &query, &[]).await {
            // The answer to HEAD has no body with an error. A GET request fails the same way, and
            // returns the error.
            Err(ClientError::Unexpected(_)) => {
                self.download(Method::GET, &format!("{query}&max_bytes=1"), &[]).await?
            }
            answer => answer?,
        };
        let header = |name| answer.header(name).unwrap_or_default();
        Ok(FileStat {
            size: header("x-file-size").parse().unwrap_or_default(),
            mode: header("x-file-mode").to_owned(),
            is_dir: header("x-file-isdir") == "true",
        })
    }

    /// Writes a file, whole or not at all. `mode` is in octal.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn write_file(
        &self,
        sandbox: &str,
        path: &str,
        mode: Option<&str>,
        content: Upload,
    ) -> Result<Done, ClientError> {
        let query = [("path", path)].into_iter().chain(mode.map(|mode| ("mode", mode)));
        let path = self.file_query(sandbox, "/files", query);
        self.upload(Method::PUT, &path, content).await
    }

    /// Removes a file or directory; with `recursive`, a directory with its contents.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn remove_file(
        &self,
        sandbox: &str,
        path: &str,
        recursive: bool,
    ) -> Result<Deleted, ClientError> {
        let recursive = if recursive { "true" } else { "false" };
        let query = [("path", path), ("recursive", recursive)];
        self.delete(&self.file_query(sandbox, "/files", query)).await
    }

    /// Creates a directory.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn make_directory(
        &self,
        sandbox: &str,
        request: &MakeDirectory,
    ) -> Result<Done, ClientError> {
        let user = request.user.clone().or_else(|| self.user.clone());
        let request = MakeDirectory { user, ..request.clone() };
        self.post(&sandbox_path(sandbox, "/files/mkdir"), Some(&request)).await
    }

    /// Renames a file or directory.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn rename_file(
        &self,
        sandbox: &str,
        request: &RenameFile,
    ) -> Result<Done, ClientError> {
        let user = request.user.clone().or_else(|| self.user.clone());
        let request = RenameFile { user, ..request.clone() };
        self.post(&sandbox_path(sandbox, "/files/rename"), Some(&request)).await
    }

    /// Downloads a directory as a tar archive. After the last piece, [`Download::skipped`]
    /// returns the skipped entries.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn read_tar(&self, sandbox: &str, path: &str) -> Result<Download, ClientError> {
        let path = self.file_query(sandbox, "/tar", [("path", path)]);
        self.download(Method::GET, &path, &[("te", "trailers"), ("connection", "te")]).await
    }

    /// Unpacks a tar archive into a directory.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn write_tar(
        &self,
        sandbox: &str,
        path: &str,
        archive: Upload,
    ) -> Result<Unpacked, ClientError> {
        let path = self.file_query(sandbox, "/tar", [("path", path)]);
        self.upload(Method::PUT, &path, archive).await
    }
}
