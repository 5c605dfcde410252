//! Connections to a daemon.

use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use bhatti_host::socket;
use http::Uri;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

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
    },
}

/// A URL is not the URL of a daemon.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the URL of a daemon: expected http://HOST:PORT")]
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

impl Endpoint {
    pub(crate) async fn connect(&self) -> Result<Box<dyn Stream>, ConnectError> {
        match self {
            Self::Unix { data_dir } => {
                let stream = socket::connect_in(data_dir, SOCKET).await;
                let failed = |source| ConnectError::Unix { data_dir: data_dir.clone(), source };
                Ok(Box::new(stream.map_err(failed)?))
            }
            Self::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.and_then(|stream| {
                    stream.set_nodelay(true)?;
                    Ok(stream)
                });
                let failed = |source| ConnectError::Tcp { host: host.clone(), port: *port, source };
                Ok(Box::new(stream.map_err(failed)?))
            }
        }
    }

    /// The value of the `Host` header.
    pub(crate) fn host(&self) -> String {
        match self {
            Self::Unix { .. } => "localhost".to_owned(),
            Self::Tcp { host, port } => format!("{host}:{port}"),
        }
    }
}

impl FromStr for Endpoint {
    type Err = ParseUrlError;

    fn from_str(url: &str) -> Result<Self, ParseUrlError> {
        let refused = || ParseUrlError(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| refused())?;
        let host = uri.host().filter(|_| uri.scheme_str() == Some("http")).ok_or_else(refused)?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self::Tcp { host, port: uri.port_u16().unwrap_or(80) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_of_a_daemon_has_host_and_port() {
        let tcp = |host: &str, port| Ok(Endpoint::Tcp { host: host.to_owned(), port });

        assert_eq!("http://box:8080".parse(), tcp("box", 8080));
        assert_eq!("http://[::1]:8080/".parse(), tcp("::1", 8080));
        assert_eq!("http://box".parse(), tcp("box", 80));
        for url in ["", "box:8080", "https://box", "http://", "ftp://box"] {
            assert_eq!(url.parse::<Endpoint>(), Err(ParseUrlError(url.to_owned())));
        }
    }
}
