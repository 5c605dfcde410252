//! Firecracker's API: HTTP on a Unix socket, one connection per request.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bhatti_engine::VmmError;
use bhatti_host::socket;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};

/// The socket in Firecracker's root directory.
pub(crate) const SOCKET: &str = "api.sock";

/// Time limit of a request that takes no noticeable time.
pub(crate) const CALL_LIMIT: Duration = Duration::from_secs(10);

/// How often to check whether a started Firecracker listens.
const LOOK_PAUSE: Duration = Duration::from_millis(1);

/// Firecracker's state and version.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Instance {
    pub(crate) state: State,
    pub(crate) vmm_version: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum State {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

/// The client of one Firecracker.
#[derive(Clone, Debug)]
pub struct Api {
    directory: PathBuf,
}

impl Api {
    pub(crate) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Waits until Firecracker listens. The caller must stop waiting if the process ends.
    pub(crate) async fn listening(&self, limit: Duration) -> Result<(), VmmError> {
        let began = Instant::now();
        while let Err(error) = socket::try_connect_in(&self.directory, SOCKET) {
            let is_early = matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::WouldBlock
            );
            if !is_early {
                return Err(error.into());
            }
            if began.elapsed() > limit {
                return Err(VmmError::Silent { limit });
            }
            sleep(LOOK_PAUSE).await;
        }
        Ok(())
    }

    /// Returns Firecracker's state and version.
    pub(crate) async fn instance(&self) -> Result<Instance, VmmError> {
        let answer = self.send(Method::GET, "/", None, CALL_LIMIT).await?;
        serde_json::from_slice(&answer).map_err(|_| VmmError::Garbled)
    }

    /// Creates a resource, or performs an action.
    pub(crate) async fn put(
        &self,
        resource: &str,
        body: &Value,
        limit: Duration,
    ) -> Result<(), VmmError> {
        self.send(Method::PUT, resource, Some(body), limit).await.map(drop)
    }

    /// Changes a resource.
    pub(crate) async fn patch(
        &self,
        resource: &str,
        body: &Value,
        limit: Duration,
    ) -> Result<(), VmmError> {
        self.send(Method::PATCH, resource, Some(body), limit).await.map(drop)
    }

    async fn send(
        &self,
        method: Method,
        resource: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Bytes, VmmError> {
        let answered = timeout(limit, self.exchange(method, resource, body));
        answered.await.unwrap_or(Err(VmmError::Silent { limit }))
    }

    async fn exchange(
        &self,
        method: Method,
        resource: &str,
        body: Option<&Value>,
    ) -> Result<Bytes, VmmError> {
        let lost = |error: hyper::Error| VmmError::Unreachable(io::Error::other(error));
        let stream = TokioIo::new(socket::connect_in(&self.directory, SOCKET).await?);
        let (mut sender, connection) = http1::handshake(stream).await.map_err(lost)?;
        let request = Request::builder()
            .method(method)
            .uri(resource)
            .header("Host", "localhost")
            .header("Accept", "application/json")
            .header("Content-Type", "application/json")
            .body(Full::new(Bytes::from(body.map(Value::to_string).unwrap_or_default())))
            .map_err(|error| VmmError::Unreachable(io::Error::other(error)))?;
        let answering = async {
            let response = sender.send_request(request).await.map_err(lost)?;
            let succeeded = response.status().is_success();
            let body = response.into_body().collect().await.map_err(lost)?.to_bytes();
            if succeeded {
                return Ok(body);
            }
            let fault: Fault = serde_json::from_slice(&body).map_err(|_| VmmError::Garbled)?;
            Err(VmmError::Refused(fault.fault_message))
        };
        let mut answering = std::pin::pin!(answering);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            answer = &mut answering => answer,
            // Firecracker closes the connection after its answer, which has arrived by then.
            _ended = &mut connection => answering.await,
        }
    }
}
