//! Errors.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Error code, for programs. Codes are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is invalid.
    BadRequest,
    /// The body is larger than the limit.
    BodyTooLarge,
    /// The API key is missing or unknown.
    Unauthorized,
    /// The caller may not do this.
    Forbidden,
    /// The resource does not exist, or belongs to another user.
    NotFound,
    /// The path exists, but not with this method.
    MethodNotAllowed,
    /// The name is in use.
    NameTaken,
    /// The current state does not allow the operation.
    WrongState,
    /// The program of the command does not exist.
    CommandNotFound,
    /// The program of the command is not executable.
    CommandNotExecutable,
    /// The command's working directory cannot be entered.
    BadWorkingDirectory,
    /// The output of a buffered command, or another answer of the guest, exceeds the limit.
    OutputTooLarge,
    /// The connection to the sandbox was lost, or the guest did not answer in time.
    ConnectionLost,
    /// The host is not set up for the request.
    NotSetUp,
    /// The host or the guest has no capacity for the request right now: retry later.
    Busy,
    /// The caller's quota is used up.
    QuotaExceeded,
    /// The caller exceeds a rate limit: see the `Retry-After` header.
    RateLimited,
    /// The path exists already in the guest.
    AlreadyExists,
    /// The directory in the guest is not empty.
    NotEmpty,
    /// The path in the guest is a directory or a special file, not a regular file.
    NotAFile,
    /// The path in the guest is not a directory.
    NotADirectory,
    /// The guest's kernel does not permit the operation.
    PermissionDenied,
    /// The guest's disk is full.
    NoSpace,
    /// A limit of the guest agent is reached.
    GuestLimit,
    /// Another client is attached to the session.
    Attached,
    /// Nothing listens at the port in the guest.
    PortRefused,
    /// The application at the port sent an invalid answer.
    BadGateway,
    /// The registry of an image failed or cannot be reached, or the pull or push was canceled.
    PullFailed,
    /// A build of an image failed.
    BuildFailed,
    /// The application at the port did not answer in time.
    GatewayTimeout,
    /// The snapshot is damaged, was taken on another machine, or is older than the disk.
    SnapshotUnusable,
    /// The daemon's engine does not support the operation: containers have no snapshots and no
    /// forks.
    Unsupported,
    /// The virtual machine did not boot.
    BootFailed,
    /// The disk of the daemon's host is full.
    HostDiskFull,
    /// The row of the resource in the daemon's store is damaged. A sandbox can still be
    /// destroyed.
    DamagedRow,
    /// A request with the same idempotency key is being carried out.
    RequestInProgress,
    /// The idempotency key was used for another request.
    IdempotencyMismatch,
    /// An internal error of the daemon.
    Internal,
}

/// The body of every error response: problem details (RFC 9457), and members of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// Error text, for people.
    pub error: String,
    /// Error code, for programs.
    pub code: ErrorCode,
    /// How to fix the problem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Id of the request in the daemon's log.
    pub request_id: String,
    /// URI of the kind of problem: `urn:bhatti:error:` and the code.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// The kind of problem in words.
    #[serde(default)]
    pub title: String,
    /// HTTP status of the response.
    #[serde(default)]
    pub status: u16,
    /// The same text as `error`.
    #[serde(default)]
    pub detail: String,
    /// URI of the request: `urn:bhatti:request:` and its id.
    #[serde(default)]
    pub instance: String,
}

impl ErrorBody {
    /// Makes the body of an error. `status` is 0 if there was no HTTP response, as on a WebSocket.
    #[must_use]
    pub fn new(
        code: ErrorCode,
        error: String,
        hint: Option<String>,
        request_id: String,
        status: u16,
    ) -> Self {
        let word = serde_json::to_value(code).ok();
        let word = word.as_ref().and_then(|word| word.as_str()).unwrap_or("internal");
        Self {
            kind: format!("urn:bhatti:error:{word}"),
            title: word.replace('_', " "),
            status,
            detail: error.clone(),
            instance: format!("urn:bhatti:request:{request_id}"),
            error,
            code,
            hint,
            request_id,
        }
    }
}
