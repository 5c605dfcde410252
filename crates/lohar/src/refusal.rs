//! How operations fail: the agent refuses them with a reason for the host, or aborts them because
//! the host is gone.

use std::io;
use std::path::Path;

use bhatti_proto::{AgentError, ErrorKind, FrameType, ReadFrameError, SendJsonError};

use crate::connection::{HostWriter, Transport};
use crate::log::errno_text;

/// An operation did not succeed.
#[derive(Debug)]
pub(crate) enum OpError {
    /// Refused. The host gets the reason.
    Refused(AgentError),
    /// The host is gone, so it gets no reason.
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

/// Converts an error of the connection to the host. Errors of files and processes are refusals.
pub(crate) fn host_gone(_: io::Error) -> OpError {
    OpError::HostGone
}

/// A refusal.
pub(crate) fn refused(kind: ErrorKind, message: impl Into<String>) -> AgentError {
    AgentError { kind, message: message.into() }
}

/// A refusal of a request that is not JSON or has the wrong fields.
pub(crate) fn bad_json(what: &str, error: &serde_json::Error) -> AgentError {
    refused(ErrorKind::BadRequest, format!("{what}: {error}"))
}

/// A refusal of a file operation by the kernel, in the words of the original agent:
/// `open /x: no such file or directory`.
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

/// Sends an error to the host, in detail if the host asked for that.
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
