//! Maps errors to responses. Only this module knows HTTP status codes.

mod creation;
mod images;

use std::io;
use std::time::Duration;

use axum::http::header::CONTENT_TYPE;
use axum::http::header::{LOCATION, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bhatti_agent::CallError;
use bhatti_api::ErrorCode;
use bhatti_control::{EditError, ForkError, SecretError, SnapshotOpError};
use bhatti_engine::{RestoreError, SnapshotError};
use bhatti_node::{Busy, DestroyError, TransitionError, UseError};
use bhatti_proto::{ErrorKind, SendJsonError};
use bhatti_store::{
    ChangeError, CountError, KeyInsertError, PublishError, StoreError, TemplateInsertError,
    UserDeleteError, UserInsertError,
};
use bhatti_types::{Denied, QuotaExceeded, Report};

use creation::{boot_error, node_network_error, restore_error, volume_error};
pub(crate) use images::operation_failure;

/// Retry delay for a host whose memory is in use, or a guest that is busy.
const BUSY_RETRY: Duration = Duration::from_secs(10);

/// An error for the caller. [`crate::request_id`] turns it into a response body.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
    retry_after: Option<Duration>,
}

impl ApiError {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, retry_after: None }
    }

    /// Sets the delay after which a retry makes sense.
    pub(crate) fn retry_after(self, wait: Duration) -> Self {
        Self { retry_after: Some(wait), ..self }
    }

    /// The delay after which a retry makes sense.
    pub(crate) const fn wait(&self) -> Option<Duration> {
        self.retry_after
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    pub(crate) fn bad_request(error: &dyn std::error::Error) -> Self {
        Self::new(ErrorCode::BadRequest, Report(error).to_string())
    }

    /// Returns the error of a daemon that is stopping.
    pub(crate) fn stopping() -> Self {
        Self::new(ErrorCode::ConnectionLost, "the daemon is stopping")
            .hint("the sandbox keeps running; try again after the daemon has restarted")
    }

    /// Hides an internal error from the caller. The error may name paths of this host, so only
    /// the log gets it.
    pub(crate) fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        if has_kind(error, &[io::ErrorKind::FileTooLarge]) {
            let message = "the file system of the daemon's host holds no file of this size";
            return Self::new(ErrorCode::HostDiskFull, message)
                .hint("choose a smaller size: a file on ext4 is smaller than 16 TiB");
        }
        tracing::error!(error = %Report(error), "Request failed");
        if is_full_disk(error) {
            return Self::new(ErrorCode::HostDiskFull, "the disk of the daemon's host is full")
                .hint(
                    "delete unneeded sandboxes or snapshots, or ask the operator for disk space",
                );
        }
        if let Some(fenced) = store_error(error, |error| matches!(error, StoreError::Fenced(_))) {
            return Self::new(ErrorCode::Busy, fenced.to_string())
                .hint("another daemon runs the sandbox now; ask again")
                .retry_after(BUSY_RETRY);
        }
        if is_damaged_row(error) {
            return Self::new(
                ErrorCode::DamagedRow,
                "the object's row in the daemon's store is damaged",
            )
            .hint(
                "the daemon's log has the cause; a sandbox can be destroyed: bhatti destroy NAME",
            );
        }
        Self::new(ErrorCode::Internal, "internal error")
            .hint("the daemon's log has the cause under this request id")
    }
}

/// Returns the error of a guest or host that is too busy to respond in time. A retry helps.
fn busy_guest(error: &(dyn std::error::Error + 'static)) -> ApiError {
    tracing::warn!(error = %Report(error), "Request failed");
    ApiError::new(ErrorCode::Busy, error.to_string())
        .hint("the sandbox is very busy; try again")
        .retry_after(BUSY_RETRY)
}

/// Returns an error and its chain of causes.
fn chain<'error>(
    error: &'error (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'error (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

/// Returns the error of the store in a chain of errors, if it is of a kind.
fn store_error<'error>(
    error: &'error (dyn std::error::Error + 'static),
    is: impl Fn(&StoreError) -> bool,
) -> Option<&'error StoreError> {
    chain(error).filter_map(|error| error.downcast_ref()).find(|error| is(error))
}

fn is_damaged_row(error: &(dyn std::error::Error + 'static)) -> bool {
    store_error(error, |error| matches!(error, StoreError::Damaged(_))).is_some()
}

/// Returns whether an error, or one of its causes, is a full disk of this host.
fn is_full_disk(error: &(dyn std::error::Error + 'static)) -> bool {
    has_kind(error, &[io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded])
        || store_error(error, StoreError::is_full_disk).is_some()
}

/// Returns whether an error, or one of its causes, is an I/O error of one of these kinds.
fn has_kind(error: &(dyn std::error::Error + 'static), kinds: &[io::ErrorKind]) -> bool {
    chain(error)
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .any(|error| kinds.contains(&error.kind()))
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = status(self.code).into_response();
        if let Some(wait) = self.retry_after {
            // Round up to whole seconds, so that the client does not retry too early.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// Returns the response to a request that created something.
pub(crate) fn created(body: impl IntoResponse) -> Response {
    (StatusCode::CREATED, body).into_response()
}

/// Returns the response to a request whose work continues.
pub(crate) fn accepted(body: impl IntoResponse) -> Response {
    (StatusCode::ACCEPTED, body).into_response()
}

/// Returns a redirect that keeps the method and the body.
pub(crate) fn moved(location: String) -> Response {
    (StatusCode::PERMANENT_REDIRECT, [(LOCATION, location)]).into_response()
}

/// Returns the status for a caller that already has the content.
pub(crate) const fn not_modified() -> StatusCode {
    StatusCode::NOT_MODIFIED
}

/// What a request has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    /// A resource, or a job.
    Something,
    /// Nothing.
    Nothing,
    /// The request failed in between.
    Unknown,
}

/// Returns what a request has made, according to its response.
pub(crate) fn made(response: &Response) -> Made {
    match response.status() {
        StatusCode::CREATED | StatusCode::ACCEPTED => Made::Something,
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::INSUFFICIENT_STORAGE => Made::Nothing,
        status if status.is_server_error() => Made::Unknown,
        _ => Made::Nothing,
    }
}

/// Returns a JSON response that was given before.
pub(crate) fn repeat(status: u16, body: Vec<u8>) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}

/// Returns whether a response switches the connection to another protocol.
pub(crate) fn changes_protocol<T>(response: &axum::http::Response<T>) -> bool {
    response.status() == StatusCode::SWITCHING_PROTOCOLS
}

/// Returns the number of an error's status, for its body.
pub(crate) fn number(code: ErrorCode) -> u16 {
    status(code).as_u16()
}

pub(crate) const fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::BadRequest
        | ErrorCode::CommandNotFound
        | ErrorCode::CommandNotExecutable
        | ErrorCode::BadWorkingDirectory => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorCode::Forbidden | ErrorCode::PermissionDenied | ErrorCode::QuotaExceeded => {
            StatusCode::FORBIDDEN
        }
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::NameTaken
        | ErrorCode::RequestInProgress
        | ErrorCode::WrongState
        | ErrorCode::SnapshotUnusable
        | ErrorCode::AlreadyExists
        | ErrorCode::NotEmpty
        | ErrorCode::NotAFile
        | ErrorCode::NotADirectory
        | ErrorCode::GuestLimit
        | ErrorCode::Attached => StatusCode::CONFLICT,
        ErrorCode::IdempotencyMismatch | ErrorCode::BuildFailed => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorCode::RateLimited => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::NoSpace | ErrorCode::HostDiskFull => StatusCode::INSUFFICIENT_STORAGE,
        ErrorCode::GatewayTimeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::BodyTooLarge | ErrorCode::OutputTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::ConnectionLost
        | ErrorCode::PortRefused
        | ErrorCode::BadGateway
        | ErrorCode::PullFailed => StatusCode::BAD_GATEWAY,
        ErrorCode::Unsupported => StatusCode::NOT_IMPLEMENTED,
        ErrorCode::NotSetUp | ErrorCode::Busy => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::BootFailed | ErrorCode::DamagedRow | ErrorCode::Internal => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            // Another request deleted the row first.
            StoreError::NoSuchRow => Self::new(ErrorCode::NotFound, "the object no longer exists"),
            error => Self::internal(&error),
        }
    }
}

impl From<UserInsertError> for ApiError {
    fn from(error: UserInsertError) -> Self {
        match error {
            UserInsertError::NameTaken(_) => Self::new(ErrorCode::NameTaken, error.to_string()),
            UserInsertError::Store(error) => error.into(),
        }
    }
}

impl From<KeyInsertError> for ApiError {
    fn from(error: KeyInsertError) -> Self {
        match error {
            KeyInsertError::NameTaken(_) => Self::new(ErrorCode::NameTaken, error.to_string()),
            KeyInsertError::Count(CountError::TooMany(quota)) => quota.into(),
            KeyInsertError::Count(CountError::Store(error)) => error.into(),
        }
    }
}

/// Returns the error for a sandbox that is not woken again after repeated failures. The error
/// contains the cause of the last failure.
fn given_up(error: &TransitionError, wait: Duration, last: &RestoreError) -> ApiError {
    let cause = restore_error(last);
    ApiError { message: format!("{error}: {}", cause.message), ..cause }.retry_after(wait)
}

impl From<Busy> for ApiError {
    fn from(busy: Busy) -> Self {
        let error = Self::new(ErrorCode::Busy, busy.to_string());
        match busy {
            Busy::InUse { .. } => {
                error.hint("try again later, or stop or destroy a sandbox").retry_after(BUSY_RETRY)
            }
            Busy::TooLarge { .. } => Self { code: ErrorCode::BadRequest, ..error }
                .hint("ask for less memory, or raise memory_budget_mb in the configuration"),
        }
    }
}

impl From<TransitionError> for ApiError {
    fn from(error: TransitionError) -> Self {
        match &error {
            TransitionError::Denied(denied) => (*denied).into(),
            TransitionError::Busy(busy) => (*busy).into(),
            TransitionError::Restore(restore) => restore_error(restore),
            TransitionError::GivenUp { wait, error: last, .. } => given_up(&error, *wait, last),
            TransitionError::Boot(boot) => boot_error(boot, &error),
            TransitionError::Volume(volume) => volume_error(volume),
            TransitionError::Network(network) => node_network_error(network),
            TransitionError::Images(bhatti_image::StoreError::Missing(missing)) => {
                Self::new(ErrorCode::NotSetUp, missing.to_string()).hint("run `bhatti setup`")
            }
            TransitionError::Save(SnapshotError::Unsupported(_)) => {
                Self::new(ErrorCode::WrongState, Report(&error).to_string())
                    .hint("create another sandbox and copy the files that you need")
            }
            TransitionError::NoSnapshots { .. } => Self::new(ErrorCode::Unsupported, error.to_string())
                .hint("set `engine: qemu` in config.yaml, which works even without KVM; pause and stop work with any engine"),
            TransitionError::Moving => Self::new(ErrorCode::WrongState, error.to_string())
                .hint("the guest is very busy; try again"),
            TransitionError::Vmm(_)
            | TransitionError::Save(_)
            | TransitionError::Images(_)
            | TransitionError::End(_)
            | TransitionError::Consume(_)
            | TransitionError::MarkBoot(_)
            | TransitionError::Panicked
            | TransitionError::Entropy(_) => Self::internal(&error),
            TransitionError::Store(store) => Self::internal(store),
            TransitionError::Unconfigured(_) | TransitionError::Restless => busy_guest(&error),
        }
    }
}

impl From<SnapshotOpError> for ApiError {
    fn from(error: SnapshotOpError) -> Self {
        match error {
            SnapshotOpError::NotFound(_) => Self::new(ErrorCode::NotFound, error.to_string())
                .hint("list them: bhatti snapshot list"),
            SnapshotOpError::NameTaken(ref name) => {
                Self::new(ErrorCode::NameTaken, error.to_string()).hint(format!(
                    "choose another name, or delete the snapshot: bhatti snapshot delete {name}"
                ))
            }
            SnapshotOpError::Quota(quota) => quota.into(),
            SnapshotOpError::Use(error) => error.into(),
            SnapshotOpError::Save(error) => error.into(),
            SnapshotOpError::Create(error) => error.into(),
            SnapshotOpError::Store(store) => store.into(),
            SnapshotOpError::PutInPlace(_) | SnapshotOpError::Remove(_) => Self::internal(&error),
        }
    }
}

impl From<ForkError> for ApiError {
    fn from(error: ForkError) -> Self {
        match error {
            ForkError::Use(error) => error.into(),
            ForkError::Parent(error) => error.into(),
            ForkError::Create(error) => error.into(),
            ForkError::Count(_) => Self::new(ErrorCode::BadRequest, error.to_string()),
        }
    }
}

impl From<UseError> for ApiError {
    fn from(error: UseError) -> Self {
        match error {
            UseError::NotFound(_) => {
                Self::new(ErrorCode::NotFound, error.to_string()).hint("list them: bhatti list")
            }
            UseError::Denied(denied) => denied.into(),
            UseError::Exec(error) => error.into(),
            UseError::Transition(error) => error.into(),
            UseError::Destroy(DestroyError::AlreadyGone) => {
                Self::new(ErrorCode::NotFound, error.to_string())
            }
            UseError::Store(store) => store.into(),
            UseError::Destroy(DestroyError::Store(store)) => store.into(),
            UseError::Destroy(DestroyError::Remove(_)) | UseError::Entropy(_) => {
                Self::internal(&error)
            }
        }
    }
}

impl From<QuotaExceeded> for ApiError {
    fn from(error: QuotaExceeded) -> Self {
        if error.passes() {
            Self::new(ErrorCode::QuotaExceeded, error.to_string())
                .hint("destroy or delete something first, or ask the admin for a higher limit")
        } else {
            Self::new(ErrorCode::BadRequest, error.to_string())
        }
    }
}

impl From<EditError> for ApiError {
    fn from(error: EditError) -> Self {
        match error {
            EditError::Use(error) => error.into(),
            EditError::Change(error @ ChangeError::NameTaken(_)) => {
                Self::new(ErrorCode::NameTaken, error.to_string())
            }
            EditError::Change(ChangeError::Label(error)) => Self::bad_request(&error),
            EditError::Change(ChangeError::Store(error)) => error.into(),
        }
    }
}

impl From<SecretError> for ApiError {
    fn from(error: SecretError) -> Self {
        match error {
            SecretError::NotFound(_) => Self::new(ErrorCode::NotFound, error.to_string()),
            SecretError::Value => Self::new(ErrorCode::BadRequest, error.to_string()),
            SecretError::Quota(quota) => quota.into(),
            SecretError::Store(store) => store.into(),
            SecretError::Seal(_) | SecretError::Unseal { .. } => Self::internal(&error),
        }
    }
}

impl From<TemplateInsertError> for ApiError {
    fn from(error: TemplateInsertError) -> Self {
        match error {
            TemplateInsertError::NameTaken(_) => Self::new(ErrorCode::NameTaken, error.to_string()),
            TemplateInsertError::Quota(quota) => quota.into(),
            TemplateInsertError::Store(error) => error.into(),
        }
    }
}

impl From<PublishError> for ApiError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::AliasTaken(_) => Self::new(ErrorCode::NameTaken, error.to_string())
                .hint("choose another alias, or leave it out to get a generated one"),
            PublishError::Published(_) => {
                Self::new(ErrorCode::NameTaken, error.to_string()).hint("unpublish the port first")
            }
            PublishError::Quota(quota) => quota.into(),
            PublishError::Store(error) => error.into(),
        }
    }
}

impl From<UserDeleteError> for ApiError {
    fn from(error: UserDeleteError) -> Self {
        match error {
            UserDeleteError::Owns { .. } => Self::new(ErrorCode::WrongState, error.to_string())
                .hint("destroy or delete them first"),
            UserDeleteError::Store(error) => error.into(),
        }
    }
}

impl From<getrandom::Error> for ApiError {
    fn from(error: getrandom::Error) -> Self {
        Self::internal(&error)
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        let error = Self::new(ErrorCode::WrongState, denied.to_string());
        match denied {
            Denied::Failed(_) => error.hint(
                "boot the sandbox from its disk: bhatti start --cold-boot NAME, or destroy it: bhatti destroy NAME",
            ),
            Denied::Running => error.hint("a cold boot discards the sandbox's memory; stop the sandbox first: bhatti stop NAME"),
            Denied::Stopped => error.hint("start the sandbox: bhatti start NAME"),
            Denied::StillCreating => error.hint("wait until the sandbox is running"),
            Denied::Destroyed => error,
        }
    }
}

impl From<CallError> for ApiError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Agent(refused) => Self::new(agent_code(refused.kind), refused.message),
            CallError::Refused(_) => Self::new(ErrorCode::BadRequest, error.to_string()),
            CallError::ForwardRefused { .. } => {
                Self::new(ErrorCode::PortRefused, error.to_string())
            }
            CallError::Entropy => Self::internal(&error),
            CallError::Send(SendJsonError::Send(ref cause)) if cause.kind() == io::ErrorKind::InvalidInput => {
                Self::new(ErrorCode::BodyTooLarge, "the command and its environment are too long")
            }
            CallError::Silent { .. } => Self::new(ErrorCode::ConnectionLost, error.to_string())
                .hint("the guest may be out of memory or halted; boot the sandbox from its disk, without its processes: bhatti stop NAME, then bhatti start --cold-boot NAME"),
            CallError::Busy { .. } => Self::new(ErrorCode::ConnectionLost, error.to_string())
                .hint("try again when fewer processes run in the sandbox"),
            CallError::TooMuch { .. } => Self::new(ErrorCode::OutputTooLarge, error.to_string()),
            CallError::Channel(_)
            | CallError::Content(_)
            | CallError::Send(_)
            | CallError::Write(_)
            | CallError::Lost
            | CallError::Garbled(_)
            | CallError::Unexpected => {
                Self::new(ErrorCode::ConnectionLost, Report(&error).to_string())
            }
        }
    }
}

/// Maps a refusal of the guest agent to an error code.
const fn agent_code(kind: ErrorKind) -> ErrorCode {
    match kind {
        ErrorKind::NotFound => ErrorCode::CommandNotFound,
        ErrorKind::NotExecutable => ErrorCode::CommandNotExecutable,
        ErrorKind::BadCwd => ErrorCode::BadWorkingDirectory,
        ErrorKind::BadRequest | ErrorKind::NoSuchUser => ErrorCode::BadRequest,
        ErrorKind::NoSuchSession => ErrorCode::NotFound,
        ErrorKind::IsDirectory | ErrorKind::NotRegular => ErrorCode::NotAFile,
        ErrorKind::NotDirectory => ErrorCode::NotADirectory,
        ErrorKind::AlreadyExists => ErrorCode::AlreadyExists,
        ErrorKind::NotEmpty => ErrorCode::NotEmpty,
        ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
        ErrorKind::NoSpace => ErrorCode::NoSpace,
        ErrorKind::TooLarge => ErrorCode::BodyTooLarge,
        ErrorKind::Limit => ErrorCode::GuestLimit,
        // The agent refused our own token, so it is not the agent that we expect.
        ErrorKind::Unauthorized => ErrorCode::ConnectionLost,
        ErrorKind::Other => ErrorCode::Internal,
    }
}

/// Maps an error of a file operation. "Not found" then means a file, not a command.
pub(crate) fn file_error(error: CallError) -> ApiError {
    match error {
        CallError::Agent(refused) if refused.kind == ErrorKind::NotFound => {
            ApiError::new(ErrorCode::NotFound, refused.message)
        }
        CallError::Agent(refused) if refused.kind == ErrorKind::Other => {
            ApiError::new(ErrorCode::BadRequest, refused.message)
        }
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use bhatti_control::{CreateError, VolumeOpError};

    use super::*;

    #[test]
    fn file_that_the_host_cannot_hold_is_named_with_the_remedy() {
        let error = ApiError::internal(&io::Error::from(io::ErrorKind::FileTooLarge));

        assert_eq!(error.code, ErrorCode::HostDiskFull);
        assert!(error.hint.is_some_and(|hint| hint.contains("smaller size")));
    }

    #[test]
    fn damaged_row_is_reported_by_every_operation() {
        let damaged = || StoreError::Damaged("memory_mb".to_owned());
        let errors: [ApiError; 8] = [
            damaged().into(),
            UseError::Store(damaged()).into(),
            UseError::Destroy(DestroyError::Store(damaged())).into(),
            TransitionError::Store(damaged()).into(),
            SnapshotOpError::Store(damaged()).into(),
            SecretError::Store(damaged()).into(),
            CreateError::Store(damaged()).into(),
            creation::node_network_error(&bhatti_node::NetworkError::Store(damaged())),
        ];
        for error in errors {
            assert_eq!(error.code, ErrorCode::DamagedRow, "{error:?}");
            assert!(
                !error.message.contains("memory_mb"),
                "only the log may show the content of a row"
            );
        }
        let refused = VolumeOpError::Refused(bhatti_store::VolumeError::Store(damaged()));
        assert_eq!(ApiError::from(refused).code, ErrorCode::DamagedRow);
    }
}
