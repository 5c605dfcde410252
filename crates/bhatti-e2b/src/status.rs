//! The HTTP statuses of this API. SDKs need exactly these.

use axum::http::StatusCode;

use crate::code::Code;

pub(crate) const OK: StatusCode = StatusCode::OK;
pub(crate) const CREATED: StatusCode = StatusCode::CREATED;
pub(crate) const ACCEPTED: StatusCode = StatusCode::ACCEPTED;
pub(crate) const NO_CONTENT: StatusCode = StatusCode::NO_CONTENT;
pub(crate) const BAD_REQUEST: StatusCode = StatusCode::BAD_REQUEST;
pub(crate) const UNAUTHORIZED: StatusCode = StatusCode::UNAUTHORIZED;
pub(crate) const FORBIDDEN: StatusCode = StatusCode::FORBIDDEN;
pub(crate) const NOT_FOUND: StatusCode = StatusCode::NOT_FOUND;
pub(crate) const CONFLICT: StatusCode = StatusCode::CONFLICT;
pub(crate) const TOO_LARGE: StatusCode = StatusCode::PAYLOAD_TOO_LARGE;
pub(crate) const TOO_MANY: StatusCode = StatusCode::TOO_MANY_REQUESTS;
pub(crate) const WRONG_TYPE: StatusCode = StatusCode::UNSUPPORTED_MEDIA_TYPE;
pub(crate) const INTERNAL: StatusCode = StatusCode::INTERNAL_SERVER_ERROR;
/// A sandbox that does not run, or a port that nothing listens on.
pub(crate) const BAD_GATEWAY: StatusCode = StatusCode::BAD_GATEWAY;
pub(crate) const NO_SPACE: StatusCode = StatusCode::INSUFFICIENT_STORAGE;

/// The status of a unary call that failed: <https://connectrpc.com/docs/protocol#error-codes>
pub(crate) const fn of_call(code: Code) -> StatusCode {
    match code {
        Code::Unknown | Code::Internal => INTERNAL,
        Code::InvalidArgument => BAD_REQUEST,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::NotFound => NOT_FOUND,
        Code::AlreadyExists => CONFLICT,
        Code::PermissionDenied => FORBIDDEN,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Unauthenticated => UNAUTHORIZED,
    }
}
