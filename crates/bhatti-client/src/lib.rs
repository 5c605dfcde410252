//! The client of the HTTP API.
//!
//! ```no_run
//! # async fn example() -> Result<(), bhatti_client::ClientError> {
//! let client = bhatti_client::Client::unix("/var/lib/bhatti".as_ref());
//! for sandbox in client.list().await? {
//!     println!("{} is {}", sandbox.name, sandbox.status);
//! }
//! # Ok(())
//! # }
//! ```

mod connect;
mod events;
mod files;
mod forward;
mod images;
mod jobs;
mod keys;
mod path;
mod ports;
mod sandboxes;
mod secrets;
mod shell;
mod snapshots;
mod stream;
mod templates;
mod tls;
mod transport;
mod users;
mod volumes;
mod websocket;

use std::sync::Arc;

use bhatti_api::ErrorBody;

pub use connect::{ConnectError, Endpoint, ParseUrlError};
pub use events::{EventFilter, Events};
pub use files::{FileChanges, FileStat};
pub use forward::{ForwardReceiver, ForwardSender};
pub use shell::{ShellEvent, ShellInput, ShellOptions, ShellOutput};
pub use stream::{CommandEvent, CommandInput, CommandOutput, MESSAGE_BYTES_MAX};
pub use transport::{Download, Upload};

use transport::Pool;

impl From<ConnectError> for ClientError {
    fn from(error: ConnectError) -> Self {
        Self::Connect(Arc::new(error))
    }
}

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The daemon cannot be reached.
    #[error(transparent)]
    Connect(Arc<ConnectError>),
    /// The daemon refused, and said why.
    #[error("{}", .0.error)]
    Refused(Box<ErrorBody>),
    /// The connection was lost.
    #[error("the connection to the daemon was lost")]
    Lost(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The WebSocket connection was lost.
    #[error("the connection to the daemon was lost")]
    StreamLost(#[source] Option<Box<tokio_tungstenite::tungstenite::Error>>),
    /// An archive is incomplete: one of its entries could not be read.
    #[error("{0}")]
    Archive(String),
    /// The peer is not a bhatti daemon, or its version does not match.
    #[error("unexpected answer from the daemon: {0}")]
    Unexpected(String),
}

/// A client of one daemon. Its clones share connections: a call uses one that an earlier call has
/// left, if there is one. Belongs to the Tokio runtime that made its first call.
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: Endpoint,
    pool: Pool,
    token: Option<String>,
    /// The user that file calls act as; the sandbox's usual user if `None`.
    user: Option<String>,
}

impl Client {
    /// Creates a client of the daemon that runs on `data_dir`.
    #[must_use]
    pub fn unix(data_dir: &std::path::Path) -> Self {
        Self::of(Endpoint::Unix { data_dir: data_dir.to_owned() }, None)
    }

    /// Creates a client of the daemon at `url`, `https://HOST:PORT` or `http://HOST:PORT`, with an
    /// API key.
    ///
    /// # Errors
    ///
    /// Returns an error if `url` is not the URL of a daemon.
    pub fn http(url: &str, token: &str) -> Result<Self, ParseUrlError> {
        Ok(Self::of(url.parse()?, Some(token.to_owned())))
    }

    fn of(endpoint: Endpoint, token: Option<String>) -> Self {
        Self { pool: transport::pool(&endpoint), endpoint, token, user: None }
    }

    /// Returns the same client, whose file and archive calls act as `user` in the sandbox: a
    /// name, a number, or `UID:GID`.
    #[must_use]
    pub fn acting_as(&self, user: Option<&str>) -> Self {
        Self { user: user.map(str::to_owned), ..self.clone() }
    }

    /// Returns the address of the daemon.
    #[must_use]
    pub const fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
}
