//! Errors, as JSON with a number and a message. SDKs decide by the number, by the status, and in
//! some cases by words of the message.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

/// Statuses that SDKs know.
const BAD_REQUEST: u16 = 400;
const UNAUTHORIZED: u16 = 401;
const FORBIDDEN: u16 = 403;
const NOT_FOUND: u16 = 404;
const CONFLICT: u16 = 409;
const INTERNAL: u16 = 500;
const BAD_GATEWAY: u16 = 502;
const NO_SPACE: u16 = 507;

/// An error response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    status: u16,
    message: String,
    retry_after: Option<Duration>,
    /// The sandbox and port of an error of the proxy.
    sandbox: Option<(String, Option<u16>)>,
}

impl Error {
    /// An error with an HTTP status.
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), retry_after: None, sandbox: None }
    }

    /// Sets the delay after which a retry makes sense.
    #[must_use]
    pub fn retry_after(self, wait: Option<Duration>) -> Self {
        Self { retry_after: wait, ..self }
    }

    /// The answer for a sandbox that does not exist or does not run. SDKs look for the words `was
    /// not found`.
    pub(crate) fn no_sandbox(id: &str) -> Self {
        Self {
            sandbox: Some((id.to_owned(), None)),
            ..Self::new(BAD_GATEWAY, "The sandbox was not found")
        }
    }

    /// The answer for a port that nothing listens on. SDKs look for the words `port is not open`.
    #[must_use]
    pub fn no_port(id: &str, port: u16) -> Self {
        Self {
            sandbox: Some((id.to_owned(), Some(port))),
            ..Self::new(BAD_GATEWAY, "The sandbox is running but port is not open")
        }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(BAD_REQUEST, message)
    }

    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(UNAUTHORIZED, message)
    }

    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(FORBIDDEN, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(NOT_FOUND, message)
    }

    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(CONFLICT, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(INTERNAL, message)
    }

    pub(crate) fn no_space(message: impl Into<String>) -> Self {
        Self::new(NO_SPACE, message)
    }

    pub(crate) const fn is_not_found(&self) -> bool {
        self.status == NOT_FOUND
    }

    /// The body.
    pub(crate) fn json(&self) -> serde_json::Value {
        let mut body = json!({ "code": self.status, "message": self.message });
        if let Some((id, port)) = &self.sandbox {
            body["sandboxId"] = json!(id);
            if let Some(port) = port {
                body["port"] = json!(port);
            }
        }
        body
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self.json())).into_response();
        if let Some(wait) = self.retry_after {
            // SDKs read whole seconds.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        } else {
            // Without this header, SDKs repeat requests that would fail again.
            response.headers_mut().insert("should-retry", HeaderValue::from_static("false"));
        }
        response
    }
}
