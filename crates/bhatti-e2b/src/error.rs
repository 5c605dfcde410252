//! Errors, as JSON with a number and a message. SDKs decide by the number, by the status, and in
//! some cases by words of the message.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::status;

/// An error response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    status: StatusCode,
    message: String,
    name: Option<&'static str>,
    retry_after: Option<Duration>,
    /// The sandbox and port of an error of the proxy.
    sandbox: Option<(String, Option<u16>)>,
}

impl Error {
    /// An error with an HTTP status.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), name: None, retry_after: None, sandbox: None }
    }

    /// Sets the name of the error, for clients that tell errors of one status apart.
    #[must_use]
    pub fn named(self, name: &'static str) -> Self {
        Self { name: Some(name), ..self }
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
            ..Self::new(status::BAD_GATEWAY, "The sandbox was not found")
        }
    }

    /// The answer for a port that nothing listens on. SDKs look for the words `port is not open`.
    #[must_use]
    pub fn no_port(id: &str, port: u16) -> Self {
        Self {
            sandbox: Some((id.to_owned(), Some(port))),
            ..Self::new(status::BAD_GATEWAY, "The sandbox is running but port is not open")
        }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(status::BAD_REQUEST, message)
    }

    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(status::UNAUTHORIZED, message)
    }

    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(status::FORBIDDEN, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(status::NOT_FOUND, message)
    }

    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(status::CONFLICT, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(status::INTERNAL, message)
    }

    pub(crate) fn no_space(message: impl Into<String>) -> Self {
        Self::new(status::NO_SPACE, message)
    }

    pub(crate) fn is_not_found(&self) -> bool {
        self.status == status::NOT_FOUND
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// The body.
    pub(crate) fn json(&self) -> serde_json::Value {
        let mut body = json!({ "code": self.status.as_u16(), "message": self.message });
        if let Some(name) = self.name {
            body["error_code"] = json!(name);
        }
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
        let mut response = (self.status, axum::Json(self.json())).into_response();
        // Without this header, SDKs decide by the status and repeat requests that would fail again.
        let repeat = if self.retry_after.is_some() { "true" } else { "false" };
        response.headers_mut().insert("should-retry", HeaderValue::from_static(repeat));
        if let Some(wait) = self.retry_after {
            // SDKs read whole seconds.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}
