//! Errors of pulls.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use http::StatusCode;
use http::header::{HeaderMap, RETRY_AFTER};

use crate::connect::ConnectError;
use crate::http::HttpError;

/// An image could not be pulled.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A request failed.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The registry has no such image.
    #[error("`{0}` does not exist")]
    NotFound(String),
    /// The registry gives the image to others only.
    #[error(
        "`{registry}` gives no access to `{repository}`{}",
        if *has_credentials { ": its name or password is wrong, or has no rights there" } else { ", or it does not exist" }
    )]
    Denied {
        /// The registry.
        registry: String,
        /// The repository.
        repository: String,
        /// Whether a name and a password were sent.
        has_credentials: bool,
    },
    /// The registry answers with an error.
    #[error("`{host}` answers {status}")]
    Status {
        /// The server.
        host: String,
        /// Its answer.
        status: StatusCode,
        /// When the registry wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The registry sent something that is not what it should be.
    #[error("`{host}` sent {what} that is malformed")]
    Malformed {
        /// What it should be.
        what: &'static str,
        /// The server.
        host: String,
    },
    /// The registry sent other content than was asked for.
    #[error("`{registry}` sent content that is not `{digest}`")]
    WrongContent {
        /// The registry.
        registry: String,
        /// The digest of the right content.
        digest: String,
    },
    /// The image is not for this host.
    #[error("`{reference}` is not for this host; it is for {}", found.join(", "))]
    Platform {
        /// The image.
        reference: String,
        /// The platforms that it is for.
        found: Vec<String>,
    },
    /// The image has a format that is not supported.
    #[error("`{reference}` {problem}")]
    Unsupported {
        /// The image.
        reference: String,
        /// What is not supported.
        problem: String,
    },
    /// A file could not be read or written.
    #[error("failed to {step} `{}`", path.display())]
    File {
        /// The step that failed.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl RegistryError {
    /// Makes an error of a status, with the time that the registry asks to wait.
    pub(crate) fn status(host: String, status: StatusCode, headers: &HeaderMap) -> Self {
        let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        Self::Status { host, status, retry_after: seconds.map(Duration::from_secs) }
    }

    /// Whether the same request may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Http(error) => error.is_transient(),
            Self::Status { status, .. } => {
                status.is_server_error()
                    || matches!(
                        *status,
                        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
                    )
            }
            _ => false,
        }
    }

    /// Whether no connection could be made.
    pub(crate) fn is_unconnected(&self) -> bool {
        matches!(self, Self::Http(HttpError::Connect(ConnectError::Failed { .. })))
    }

    /// How long the registry asks to wait before the next request.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
