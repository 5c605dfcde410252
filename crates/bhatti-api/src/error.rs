//! Errors.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What went wrong, for programs. The words are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request makes no sense.
    BadRequest,
    /// The body is larger than the limit.
    BodyTooLarge,
    /// There is no key, or an unknown one.
    Unauthorized,
    /// The key's owner may not do this.
    Forbidden,
    /// There is no such thing, or it is somebody else's.
    NotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// The name is in use.
    NameTaken,
    /// The sandbox is in a state in which this cannot be done.
    WrongState,
    /// The command names no program.
    CommandNotFound,
    /// The command's program may not be executed.
    CommandNotExecutable,
    /// The command's working directory cannot be entered.
    BadWorkingDirectory,
    /// The output of a buffered command is larger than the limit.
    OutputTooLarge,
    /// The connection to the sandbox broke.
    ConnectionLost,
    /// Something has to be set up on this host first.
    NotSetUp,
    /// The host has no memory for it right now: try again later.
    Busy,
    /// The caller has as much as it may have.
    QuotaExceeded,
    /// The caller asks too often: see the `Retry-After` header.
    RateLimited,
    /// There is something of that name in the guest.
    AlreadyExists,
    /// The directory in the guest is not empty.
    NotEmpty,
    /// The path in the guest is a directory, or something else that is no file.
    NotAFile,
    /// The path in the guest is no directory.
    NotADirectory,
    /// The guest's kernel does not permit it.
    PermissionDenied,
    /// The guest's disk is full.
    NoSpace,
    /// A limit of the guest's agent is reached.
    GuestLimit,
    /// The session has another client.
    Attached,
    /// Nothing listens at the port in the guest.
    PortRefused,
    /// What listens at the port answered nothing that makes sense.
    BadGateway,
    /// What listens at the port did not answer in time.
    GatewayTimeout,
    /// A snapshot is damaged, or was taken on another machine or before the disk was written.
    SnapshotUnusable,
    /// The daemon's engine cannot do it: its containers have no snapshots and no forks.
    Unsupported,
    /// The virtual machine did not come up.
    BootFailed,
    /// The disk of the daemon's host is full.
    HostDiskFull,
    /// What the daemon's store holds of it is damaged. A sandbox can still be destroyed.
    DamagedRow,
    /// The daemon is at fault.
    Internal,
}

/// The body of every response that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// For a person.
    pub error: String,
    /// For a program.
    pub code: ErrorCode,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Names the request in the daemon's log.
    pub request_id: String,
}
