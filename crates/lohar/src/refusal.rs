//! How operations fail: refused, with a reason for the host, or broken off, because the host is gone.

use std::io;
use std::path::Path;

use bhatti_proto::{AgentError, ErrorKind, FrameType, ReadFrameError, SendJsonError};

use crate::connection::{HostWriter, Transport};
use crate::log::errno_text;

/// An operation did not succeed.
#[derive(Debug)]
pub(crate) enum OpError {
    /// The host is told why.
    Refused(AgentError),
    /// The host cannot be told anything.
    HostGone,
}

impl From<AgentError> for OpError {
    fn from(error: AgentError) -> Self {
        Self::Refused(error)
    }
}

impl From<SendJsonError> for OpError {
    fn from(_: SendJsonError) -> Self {
        Self::HostGone
    }
}

impl From<ReadFrameError> for OpError {
    fn from(_: ReadFrameError) -> Self {
        Self::HostGone
    }
}

/// For errors of the connection to the host; those of files and processes are refusals.
pub(crate) fn host_gone(_: io::Error) -> OpError {
    OpError::HostGone
}

/// A refusal.
pub(crate) fn refused(kind: ErrorKind, message: impl Into<String>) -> AgentError {
    AgentError { kind, message: message.into() }
}

/// A request that is no JSON, or not the right one.
pub(crate) fn bad_json(what: &str, error: &serde_json::Error) -> AgentError {
    refused(ErrorKind::BadRequest, format!("{what}: {error}"))
}

/// A file operation that the kernel refused, worded as the original agent did: `open /x: no such file or directory`.
pub(crate) fn io_refused(step: &str, path: &Path, error: &io::Error) -> AgentError {
    refused(kind_of(error), format!("{step} {}: {}", path.display(), errno_text(error)))
}

pub(crate) fn kind_of(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
        io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
        io::ErrorKind::NotADirectory => ErrorKind::NotDirectory,
        io::ErrorKind::IsADirectory => ErrorKind::IsDirectory,
        io::ErrorKind::DirectoryNotEmpty => ErrorKind::NotEmpty,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidFilename => ErrorKind::BadRequest,
        _ => ErrorKind::Other,
    }
}

/// Tells the host; in detail, if it asked for that.
pub(crate) async fn tell<T: Transport>(
    writer: &mut HostWriter<T>,
    details: bool,
    error: &AgentError,
) -> io::Result<()> {
    if details {
        return writer.send_json(FrameType::ERROR_DETAILS, error).await.map_err(io::Error::other);
    }
    writer.send(FrameType::ERROR, error.message.as_bytes()).await
}
