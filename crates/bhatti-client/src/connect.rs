//! Connections to a daemon.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};

use bhatti_host::socket;
use http::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tower_service::Service;

use crate::tls;

/// The daemon's socket in its data directory.
const SOCKET: &str = "bhatti.sock";

/// The address of a daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// On this machine.
    Unix {
        /// The daemon's data directory.
        data_dir: PathBuf,
    },
    /// On the network.
    Tcp {
        /// The daemon's host name or address.
        host: String,
        /// The daemon's port.
        port: u16,
        /// Whether the connection is encrypted.
        tls: bool,
    },
}

/// A URL is not the URL of a daemon.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the URL of a daemon: expected https://HOST:PORT or http://HOST:PORT")]
pub struct ParseUrlError(String);

/// A daemon is not reachable.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No daemon runs on the data directory.
    #[error("no daemon runs on `{}`", data_dir.display())]
    Unix {
        /// The data directory.
        data_dir: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No encrypted connection to the daemon can be made.
    #[error("no TLS connection to {host}:{port}")]
    Tls {
        /// The host name or address.
        host: String,
        /// The port.
        port: u16,
        /// The cause, such as a certificate that is not trusted.
        #[source]
        source: io::Error,
    },
    /// No daemon answers at the address.
    #[error("no daemon answers at {host}:{port}")]
    Tcp {
        /// The host name or address.
        host: String,
        /// The port.
        port: u16,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A byte stream to the daemon.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Connection for Box<dyn Stream> {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

/// Connects the pool of HTTP connections to a daemon, whatever address a request names.
#[derive(Clone, Debug)]
pub(crate) struct Connector(pub(crate) Endpoint);

impl Service<Uri> for Connector {
    type Response = TokioIo<Box<dyn Stream>>;
    /// Shared, because the pool only lends its error.
    type Error = Arc<ConnectError>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let endpoint = self.0.clone();
        Box::pin(async move { Ok(TokioIo::new(endpoint.connect().await?)) })
    }
}

impl Endpoint {
    pub(crate) async fn connect(&self) -> Result<Box<dyn Stream>, ConnectError> {
        match self {
            Self::Unix { data_dir } => {
                let stream = socket::connect_in(data_dir, SOCKET).await;
                let failed = |source| ConnectError::Unix { data_dir: data_dir.clone(), source };
                Ok(Box::new(stream.map_err(failed)?))
            }
            Self::Tcp { host, port, tls } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.and_then(|stream| {
                    stream.set_nodelay(true)?;
                    Ok(stream)
                });
                let failed = |source| ConnectError::Tcp { host: host.clone(), port: *port, source };
                let stream = stream.map_err(failed)?;
                if !*tls {
                    return Ok(Box::new(stream));
                }
                let encrypted = tls::connect(host, stream).await;
                Ok(Box::new(encrypted.map_err(|source| ConnectError::Tls {
                    host: host.clone(),
                    port: *port,
                    source,
                })?))
            }
        }
    }

    /// The scheme of the daemon's URLs.
    pub(crate) const fn scheme(&self) -> &'static str {
        match self {
            Self::Tcp { tls: true, .. } => "https",
            Self::Unix { .. } | Self::Tcp { .. } => "http",
        }
    }

    /// The value of the `Host` header.
    pub(crate) fn host(&self) -> String {
        match self {
            Self::Unix { .. } => "localhost".to_owned(),
            Self::Tcp { host, port, .. } if host.contains(':') => format!("[{host}]:{port}"),
            Self::Tcp { host, port, .. } => format!("{host}:{port}"),
        }
    }

    /// Whether the connection is private: it is encrypted, or does not leave this machine. On any
    /// other, other machines of the network may read the key.
    #[must_use]
    pub fn is_private(&self) -> bool {
        match self {
            Self::Unix { .. } | Self::Tcp { tls: true, .. } => true,
            Self::Tcp { host, .. } => {
                let address: Option<IpAddr> = host.parse().ok();
                host == "localhost" || address.is_some_and(|address| address.is_loopback())
            }
        }
    }
}

impl FromStr for Endpoint {
    type Err = ParseUrlError;

    fn from_str(url: &str) -> Result<Self, ParseUrlError> {
        let refused = || ParseUrlError(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| refused())?;
        let (tls, usual_port) = match uri.scheme_str() {
            Some("https") => (true, 443),
            Some("http") => (false, 80),
            _ => return Err(refused()),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(refused)?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self::Tcp { host, port: uri.port_u16().unwrap_or(usual_port), tls })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_of_a_daemon_has_host_and_port() {
        let tcp = |host: &str, port, tls| Ok(Endpoint::Tcp { host: host.to_owned(), port, tls });

        assert_eq!("http://box:8080".parse(), tcp("box", 8080, false));
        assert_eq!("http://[::1]:8080/".parse(), tcp("::1", 8080, false));
        assert_eq!("http://box".parse(), tcp("box", 80, false));
        assert_eq!("https://box".parse(), tcp("box", 443, true));
        assert_eq!("https://box:8443/".parse(), tcp("box", 8443, true));
        for url in ["", "box:8080", "http://", "https://", "ftp://box"] {
            assert_eq!(url.parse::<Endpoint>(), Err(ParseUrlError(url.to_owned())));
        }
    }

    #[test]
    fn connection_is_private_with_tls_or_on_this_machine() {
        let is_private = |url: &str| url.parse::<Endpoint>().unwrap().is_private();
        for url in ["https://box", "http://localhost:1", "http://127.0.0.2:1", "http://[::1]:1"] {
            assert!(is_private(url), "{url}");
        }
        for url in ["http://box", "http://10.0.0.1", "http://localhost.example.com"] {
            assert!(!is_private(url), "{url}");
        }
    }
}
