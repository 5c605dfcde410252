//! Errors as responses: the only place that knows HTTP's numbers.

use std::io;

use axum::Json;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bhatti_agent::CallError;
use bhatti_api::ErrorCode;
use bhatti_engine::{BootError, RestoreError, SnapshotError};
use bhatti_proto::{ErrorKind, SendJsonError};
use bhatti_store::{StoreError, UserInsertError};
use bhatti_supervisor::{
    Busy, CreateError, DestroyError, ForkError, SnapshotOpError, TemplateError, TransitionError,
    UseError,
};
use bhatti_types::{Denied, Report};
use serde::Serialize;

/// When to come back to a host whose memory is in use, in seconds.
const RETRY_AFTER_SEC: &str = "10";

/// An error for the caller. [`crate::request_id`] gives it its body.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl ApiError {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    pub(crate) fn bad_request(error: &dyn std::error::Error) -> Self {
        Self::new(ErrorCode::BadRequest, Report(error).to_string())
    }

    /// Hides an error that is ours: it may name paths of this host, so only the log gets it.
    fn internal(error: &dyn std::error::Error) -> Self {
        tracing::error!(error = %Report(error), "Request failed");
        Self::new(ErrorCode::Internal, "internal error")
            .hint("the daemon's log has the cause under this request id")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = status(self.code).into_response();
        if self.code == ErrorCode::Busy {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SEC));
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// A response to a request that made something.
pub(crate) fn created<T: Serialize>(body: T) -> Response {
    (StatusCode::CREATED, Json(body)).into_response()
}

const fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::BadRequest
        | ErrorCode::CommandNotFound
        | ErrorCode::CommandNotExecutable
        | ErrorCode::BadWorkingDirectory => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorCode::Forbidden => StatusCode::FORBIDDEN,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::NameTaken | ErrorCode::WrongState | ErrorCode::SnapshotUnusable => {
            StatusCode::CONFLICT
        }
        ErrorCode::BodyTooLarge | ErrorCode::OutputTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::ConnectionLost => StatusCode::BAD_GATEWAY,
        ErrorCode::NotSetUp | ErrorCode::Busy => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::BootFailed | ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        Self::internal(&error)
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

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> Self {
        match &error {
            CreateError::NameTaken(name) => Self::new(ErrorCode::NameTaken, error.to_string())
                .hint(format!("choose another name, or destroy it: bhatti destroy {name}")),
            CreateError::Images(bhatti_image::StoreError::Missing(missing)) => {
                Self::new(ErrorCode::NotSetUp, missing.to_string()).hint("run `bhatti setup`")
            }
            CreateError::Busy(busy) | CreateError::Template(TemplateError::Busy(busy)) => {
                (*busy).into()
            }
            CreateError::TooMuchEnvironment | CreateError::Name(_) => {
                Self::new(ErrorCode::BadRequest, error.to_string())
            }
            CreateError::Template(TemplateError::Boot(boot)) => boot_error(boot, &error),
            CreateError::Boot(boot) => boot_error(boot, &error),
            CreateError::Restore(restore) => restore_error(restore),
            CreateError::Template(_)
            | CreateError::Vmm(_)
            | CreateError::Unconfigured(_)
            | CreateError::Report(_)
            | CreateError::Images(_)
            | CreateError::Store(_)
            | CreateError::Entropy(_)
            | CreateError::Interrupted => Self::internal(&error),
        }
    }
}

fn boot_error(boot: &BootError, whole: &dyn std::error::Error) -> ApiError {
    match boot {
        BootError::NotInstalled { .. } => {
            ApiError::new(ErrorCode::NotSetUp, Report(whole).to_string())
                .hint("`bhatti doctor` says how to install it")
        }
        // The guest's own last words hold no path of this host.
        BootError::Ended { .. } | BootError::TimedOut { .. } => {
            tracing::warn!(error = %boot, "Sandbox did not boot");
            ApiError::new(ErrorCode::BootFailed, boot.to_string())
        }
        BootError::Prepare { .. } => ApiError::internal(whole),
    }
}

fn restore_error(error: &RestoreError) -> ApiError {
    match error {
        RestoreError::Damaged { .. } | RestoreError::Mismatch { .. } | RestoreError::Stale => {
            tracing::warn!(error = %Report(error), "Snapshot cannot be used");
            ApiError::new(ErrorCode::SnapshotUnusable, error.to_string())
                .hint("boot it from its disk, without its memory: bhatti start --cold-boot NAME")
        }
        RestoreError::Vmm { .. } | RestoreError::File { .. } => ApiError::internal(error),
    }
}

impl From<Busy> for ApiError {
    fn from(busy: Busy) -> Self {
        let error = Self::new(ErrorCode::Busy, busy.to_string());
        match busy {
            Busy::InUse { .. } => error.hint("try again later, or stop or destroy a sandbox"),
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
            TransitionError::Boot(boot) => boot_error(boot, &error),
            TransitionError::Images(bhatti_image::StoreError::Missing(missing)) => {
                Self::new(ErrorCode::NotSetUp, missing.to_string()).hint("run `bhatti setup`")
            }
            TransitionError::Save(SnapshotError::Unsupported(_)) => {
                Self::new(ErrorCode::WrongState, Report(&error).to_string())
                    .hint("create another and copy into it what you need")
            }
            TransitionError::Moving => Self::new(ErrorCode::WrongState, error.to_string())
                .hint("its guest is very busy; try again"),
            TransitionError::Vmm(_)
            | TransitionError::Save(_)
            | TransitionError::Unconfigured(_)
            | TransitionError::Images(_)
            | TransitionError::End(_)
            | TransitionError::Consume(_)
            | TransitionError::Store(_)
            | TransitionError::Entropy(_)
            | TransitionError::Restless => Self::internal(&error),
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
                    "choose another name, or delete it: bhatti snapshot delete {name}"
                ))
            }
            SnapshotOpError::Use(error) => error.into(),
            SnapshotOpError::Save(error) => error.into(),
            SnapshotOpError::Create(error) => error.into(),
            SnapshotOpError::Store(_) | SnapshotOpError::Place(_) | SnapshotOpError::Remove(_) => {
                Self::internal(&error)
            }
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
            UseError::Store(_) | UseError::Destroy(_) => Self::internal(&error),
        }
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        let error = Self::new(ErrorCode::WrongState, denied.to_string());
        match denied {
            Denied::Failed(_) => error.hint(
                "boot it from its disk: bhatti start --cold-boot NAME, or destroy it: bhatti destroy NAME",
            ),
            Denied::Running => error.hint("a cold boot loses its memory; stop it first: bhatti stop NAME"),
            Denied::Stopped => error.hint("start it: bhatti start NAME"),
            Denied::StillCreating => error.hint("wait until it is running"),
            Denied::Destroyed => error,
        }
    }
}

impl From<CallError> for ApiError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Agent(start) => {
                let code = match start.kind {
                    ErrorKind::NotFound => ErrorCode::CommandNotFound,
                    ErrorKind::NotExecutable => ErrorCode::CommandNotExecutable,
                    ErrorKind::BadCwd => ErrorCode::BadWorkingDirectory,
                    ErrorKind::BadRequest => ErrorCode::BadRequest,
                    ErrorKind::Other => ErrorCode::Internal,
                    ErrorKind::NoSuchUser
                    | ErrorKind::NoSuchSession
                    | ErrorKind::IsDirectory
                    | ErrorKind::NotDirectory
                    | ErrorKind::NotRegular
                    | ErrorKind::AlreadyExists
                    | ErrorKind::NotEmpty
                    | ErrorKind::PermissionDenied
                    | ErrorKind::NoSpace
                    | ErrorKind::Limit
                    | ErrorKind::Unauthorized => ErrorCode::BadRequest,
                };
                Self::new(code, start.message)
            }
            CallError::Refused(_) | CallError::ForwardRefused { .. } => {
                Self::new(ErrorCode::BadRequest, error.to_string())
            }
            CallError::Entropy => Self::internal(&error),
            CallError::Send(SendJsonError::Send(ref cause)) if cause.kind() == io::ErrorKind::InvalidInput => {
                Self::new(ErrorCode::BodyTooLarge, "the command with its environment is too long")
            }
            CallError::Silent { .. } => Self::new(ErrorCode::ConnectionLost, error.to_string())
                .hint("the guest may be out of memory or halted; destroy it and create another: bhatti destroy NAME"),
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
