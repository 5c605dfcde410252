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
mod stream;

use bhatti_api::{
    CloneVolume, CreateSandbox, CreateSnapshot, CreateUser, CreateVolume, CreatedUser, Deleted,
    ErrorBody, ForkSandbox, Forks, Health, ResizeVolume, ResumeSnapshot, Sandbox, Snapshot,
    StartSandbox, UpdateSandbox, User, Volume,
};
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use connect::{ConnectError, Endpoint, ParseUrlError};
pub use stream::{CommandEvent, CommandInput, CommandOutput, MESSAGE_BYTES_MAX};

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The daemon cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The daemon refused, and said why.
    #[error("{}", .0.error)]
    Refused(ErrorBody),
    /// The connection broke.
    #[error("the connection to the daemon was lost")]
    Lost(#[source] hyper::Error),
    /// The connection broke while a command ran.
    #[error("the connection to the daemon was lost")]
    StreamLost(#[source] Option<Box<tokio_tungstenite::tungstenite::Error>>),
    /// What answered is no bhatti daemon, or one of another time.
    #[error("the daemon answered something unexpected: {0}")]
    Unexpected(String),
}

/// Calls one daemon. Each call is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: Endpoint,
    token: Option<String>,
}

impl Client {
    /// A client of the daemon that runs on `data_dir`.
    #[must_use]
    pub fn unix(data_dir: &std::path::Path) -> Self {
        Self { endpoint: Endpoint::Unix { data_dir: data_dir.to_owned() }, token: None }
    }

    /// A client of the daemon at `url`, `http://HOST:PORT`, with an API key.
    ///
    /// # Errors
    ///
    /// Returns an error if the URL is none that can be called.
    pub fn http(url: &str, token: &str) -> Result<Self, ParseUrlError> {
        Ok(Self { endpoint: url.parse()?, token: Some(token.to_owned()) })
    }

    /// Whether and how the daemon runs.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.call(Method::GET, "/health", None::<&()>).await
    }

    /// Creates a sandbox and waits until it is up.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn create(&self, request: &CreateSandbox) -> Result<Sandbox, ClientError> {
        self.call(Method::POST, "/sandboxes", Some(request)).await
    }

    /// The caller's sandboxes, newest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list(&self) -> Result<Vec<Sandbox>, ClientError> {
        self.call(Method::GET, "/sandboxes", None::<&()>).await
    }

    /// One sandbox, by id or name.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn inspect(&self, sandbox: &str) -> Result<Sandbox, ClientError> {
        self.call(Method::GET, &sandbox_path(sandbox, ""), None::<&()>).await
    }

    /// Changes a sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn update(
        &self,
        sandbox: &str,
        request: &UpdateSandbox,
    ) -> Result<Sandbox, ClientError> {
        self.call(Method::PATCH, &sandbox_path(sandbox, ""), Some(request)).await
    }

    /// Pauses a sandbox until somebody uses it.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn pause(&self, sandbox: &str) -> Result<Sandbox, ClientError> {
        self.call(Method::POST, &sandbox_path(sandbox, "/pause"), None::<&()>).await
    }

    /// Makes a sandbox hot, unless it was stopped.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn resume(&self, sandbox: &str) -> Result<Sandbox, ClientError> {
        self.call(Method::POST, &sandbox_path(sandbox, "/resume"), None::<&()>).await
    }

    /// Saves a sandbox and ends its VM, until it is started.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn stop(&self, sandbox: &str) -> Result<Sandbox, ClientError> {
        self.call(Method::POST, &sandbox_path(sandbox, "/stop"), None::<&()>).await
    }

    /// Starts a sandbox that was stopped.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn start(
        &self,
        sandbox: &str,
        request: &StartSandbox,
    ) -> Result<Sandbox, ClientError> {
        self.call(Method::POST, &sandbox_path(sandbox, "/start"), Some(request)).await
    }

    /// Forks a sandbox: its memory, its processes and its disk.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn fork(&self, sandbox: &str, request: &ForkSandbox) -> Result<Forks, ClientError> {
        self.call(Method::POST, &sandbox_path(sandbox, "/fork"), Some(request)).await
    }

    /// Destroys a sandbox.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn destroy(&self, sandbox: &str) -> Result<Deleted, ClientError> {
        self.call(Method::DELETE, &sandbox_path(sandbox, ""), None::<&()>).await
    }

    /// Saves a sandbox under a name; it goes on meanwhile.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn create_snapshot(
        &self,
        sandbox: &str,
        request: &CreateSnapshot,
    ) -> Result<Snapshot, ClientError> {
        self.call(Method::POST, &sandbox_path(sandbox, "/checkpoint"), Some(request)).await
    }

    /// Makes an empty volume.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn create_volume(&self, request: &CreateVolume) -> Result<Volume, ClientError> {
        self.call(Method::POST, "/volumes", Some(request)).await
    }

    /// The caller's volumes, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn list_volumes(&self) -> Result<Vec<Volume>, ClientError> {
        self.call(Method::GET, "/volumes", None::<&()>).await
    }

    /// One volume, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn inspect_volume(&self, name: &str) -> Result<Volume, ClientError> {
        self.call(Method::GET, &segment_path("/volumes/", name, ""), None::<&()>).await
    }

    /// Makes a volume larger.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn resize_volume(
        &self,
        name: &str,
        request: &ResizeVolume,
    ) -> Result<Volume, ClientError> {
        self.call(Method::POST, &segment_path("/volumes/", name, "/resize"), Some(request)).await
    }

    /// Copies a volume.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn clone_volume(
        &self,
        name: &str,
        request: &CloneVolume,
    ) -> Result<Volume, ClientError> {
        self.call(Method::POST, &segment_path("/volumes/", name, "/clone"), Some(request)).await
    }

    /// Deletes a volume.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon cannot be reached or refuses.
    pub async fn delete_volume(&self, name: &str) -> Result<Deleted, ClientError> {
        self.call(Method::DELETE, &segment_path("/volumes/", name, ""), None::<&()>).await
    }

    /// The caller's snapshots, newest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_snapshots(&self) -> Result<Vec<Snapshot>, ClientError> {
        self.call(Method::GET, "/snapshots", None::<&()>).await
    }

    /// One snapshot, by name.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn inspect_snapshot(&self, name: &str) -> Result<Snapshot, ClientError> {
        self.call(Method::GET, &segment_path("/snapshots/", name, ""), None::<&()>).await
    }

    /// Makes a sandbox of a snapshot, which stays.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn resume_snapshot(
        &self,
        name: &str,
        request: &ResumeSnapshot,
    ) -> Result<Sandbox, ClientError> {
        self.call(Method::POST, &segment_path("/snapshots/", name, "/resume"), Some(request)).await
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn delete_snapshot(&self, name: &str) -> Result<Deleted, ClientError> {
        self.call(Method::DELETE, &segment_path("/snapshots/", name, ""), None::<&()>).await
    }

    /// Makes a user. Its key is in the answer, and nowhere else.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn create_user(&self, request: &CreateUser) -> Result<CreatedUser, ClientError> {
        self.call(Method::POST, "/users", Some(request)).await
    }

    /// All users.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_users(&self) -> Result<Vec<User>, ClientError> {
        self.call(Method::GET, "/users", None::<&()>).await
    }

    /// Starts a command in a sandbox, its streams on one connection.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails. Whether the command could be started is the first thing that its output says.
    pub async fn start_command(
        &self,
        sandbox: &str,
        start: &bhatti_api::StreamRequest,
    ) -> Result<(CommandInput, CommandOutput), ClientError> {
        let path = sandbox_path(sandbox, "/exec/ws");
        stream::start(&self.endpoint, self.token.as_deref(), &path, start).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let json = body.map(serde_json::to_vec).transpose();
        let json =
            json.map_err(|error| ClientError::Unexpected(error.to_string()))?.unwrap_or_default();
        let mut request =
            Request::builder().method(method).uri(path).header(HOST, self.endpoint.host());
        request = request.header(CONTENT_TYPE, "application/json");
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(Full::new(Bytes::from(json)));
        let request = request.map_err(|error| ClientError::Unexpected(error.to_string()))?;

        let stream = TokioIo::new(self.endpoint.connect().await?);
        let (mut sender, connection) = http1::handshake(stream).await.map_err(ClientError::Lost)?;
        // Ends with the sender.
        tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(ClientError::Lost)?;
        let succeeded = response.status().is_success();
        let body = response.into_body().collect().await.map_err(ClientError::Lost)?.to_bytes();
        parse(succeeded, &body)
    }
}

fn parse<T: DeserializeOwned>(succeeded: bool, body: &[u8]) -> Result<T, ClientError> {
    let unexpected =
        |_| ClientError::Unexpected(String::from_utf8_lossy(body).chars().take(200).collect());
    if succeeded {
        return serde_json::from_slice(body).map_err(unexpected);
    }
    Err(serde_json::from_slice(body).map_or_else(unexpected, ClientError::Refused))
}

/// The path of a sandbox.
fn sandbox_path(sandbox: &str, rest: &str) -> String {
    segment_path("/sandboxes/", sandbox, rest)
}

/// The path of something that a person named. What was typed may hold anything: it must stay one segment.
fn segment_path(before: &str, typed: &str, rest: &str) -> String {
    let mut path = before.to_owned();
    for byte in typed.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.') {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("%{byte:02X}"));
        }
    }
    path + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anything_typed_stays_one_segment_of_the_path() {
        assert_eq!(sandbox_path("dev.v2", "/exec"), "/sandboxes/dev.v2/exec");
        assert_eq!(sandbox_path("../users?x#y é", ""), "/sandboxes/..%2Fusers%3Fx%23y%20%C3%A9");
    }
}
