//! Connections to registries and to the servers that they refer to.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tower_service::Service;

use crate::config::{Config, authority};
use crate::guard;

/// Time limit for a name to be resolved, and for each address to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Maximum number of addresses of a name that are tried.
const ADDRESSES_MAX: usize = 8;

/// No connection could be made.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// The operator forbids the address.
    #[error("`{host}` has the address {address}, which is not on the Internet")]
    Forbidden {
        /// The server's name.
        host: String,
        /// The first forbidden address.
        address: std::net::IpAddr,
    },
    /// A request without TLS, to a registry that is not configured so.
    #[error("`{0}` would be contacted without TLS")]
    NotEncrypted(String),
    /// The name cannot be resolved, or no address answers.
    #[error("no connection to `{host}`: {source}")]
    Failed {
        /// The server's name.
        host: String,
        /// Why.
        source: Arc<io::Error>,
    },
}

/// A byte stream to a server.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Connection for Box<dyn Stream> {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

/// Connects the pool of HTTP connections to the servers that requests name.
#[derive(Clone)]
pub(crate) struct Connector {
    pub(crate) config: Arc<Config>,
    pub(crate) tls: Arc<ClientConfig>,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Box<dyn Stream>>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect(&uri).await.map(TokioIo::new) })
    }
}

impl Connector {
    async fn connect(&self, uri: &Uri) -> Result<Box<dyn Stream>, ConnectError> {
        let (host, port) = authority(uri);
        let failed = |source| ConnectError::Failed { host: host.clone(), source: Arc::new(source) };
        let is_encrypted = uri.scheme_str() == Some("https");
        let settings = self.config.of(&format!("{host}:{port}"));
        if !is_encrypted && !settings.plain_http {
            return Err(ConnectError::NotEncrypted(host));
        }
        let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let found = timeout(CONNECT_LIMIT, lookup_host((name.as_str(), port))).await;
        let found = found.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?;
        let addresses: Vec<SocketAddr> = found.map_err(failed)?.take(ADDRESSES_MAX).collect();
        let allowed: Vec<&SocketAddr> = addresses
            .iter()
            .filter(|address| settings.private || guard::is_public(address.ip()))
            .collect();
        if allowed.is_empty()
            && let Some(first) = addresses.first()
        {
            return Err(ConnectError::Forbidden { host, address: first.ip() });
        }
        let stream = connect_any(&allowed).await.map_err(failed)?;
        if !is_encrypted {
            return Ok(Box::new(stream));
        }
        let name = ServerName::try_from(name).map_err(io::Error::other).map_err(failed)?;
        let encrypted = TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream);
        let encrypted = timeout(CONNECT_LIMIT, encrypted).await;
        let encrypted = encrypted.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?;
        Ok(Box::new(encrypted.map_err(failed)?))
    }
}

/// Connects to the first address that answers.
async fn connect_any(addresses: &[&SocketAddr]) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match timeout(CONNECT_LIMIT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}
