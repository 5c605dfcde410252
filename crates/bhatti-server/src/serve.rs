//! Opens the daemon's listeners and serves the API on them.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use bhatti_edge::Tls;
use bhatti_host::socket;
use tokio::net::{TcpListener, UnixListener};

use crate::{AppState, Listener, SOCKET, public_router, router};

/// The daemon cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket in the data directory cannot be made.
    #[error("failed to listen on `{}`", path.display())]
    Unix {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The address cannot be used.
    #[error("failed to listen on {address}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Serves the API on the Unix socket in `data_dir` until `stop` resolves. The socket exists when
/// this function returns its future.
///
/// # Errors
///
/// Returns an error if the socket cannot be made.
pub fn serve_unix<S>(
    state: AppState,
    data_dir: &Path,
    stop: S,
) -> Result<impl Future<Output = ()> + use<S>, ServeError>
where
    S: Future<Output = ()> + Send + 'static,
{
    let failed = |source| ServeError::Unix { path: data_dir.join(SOCKET), source };
    let listener = listen(data_dir).map_err(failed)?;
    Ok(bhatti_edge::serve(listener, router(state, Listener::Unix), None, stop))
}

/// Serves the API on a TCP address, with TLS if given, until `stop` resolves. Returns the bound
/// address.
///
/// # Errors
///
/// Returns an error if the address cannot be used.
pub async fn serve_tcp(
    state: AppState,
    address: SocketAddr,
    tls: Option<Arc<Tls>>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(SocketAddr, impl Future<Output = ()>), ServeError> {
    serve_on(router(state, Listener::Tcp), bind(address).await?, tls, stop)
}

/// Serves published ports on a listener, with TLS if given, until `stop` resolves.
///
/// # Errors
///
/// Returns an error if the listener cannot be used.
pub fn serve_public(
    state: AppState,
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(SocketAddr, impl Future<Output = ()>), ServeError> {
    serve_on(public_router(state), listener, tls, stop)
}

/// Listens on a TCP address.
///
/// # Errors
///
/// Returns an error if the address cannot be used.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|source| ServeError::Tcp { address, source })
}

fn serve_on(
    app: Router,
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(SocketAddr, impl Future<Output = ()>), ServeError> {
    let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
    let address =
        listener.local_addr().map_err(|source| ServeError::Tcp { address: unknown, source })?;
    Ok((address, bhatti_edge::serve(listener, app, tls, stop)))
}

/// Creates the socket under a temporary name, restricts it to its owner, and only then renames it
/// into place. The rename replaces a socket that an earlier daemon left behind, and the socket
/// never has wider permissions under its final name.
fn listen(data_dir: &Path) -> io::Result<UnixListener> {
    let name = format!(".{SOCKET}.{}", std::process::id());
    let temporary = data_dir.join(&name);
    let listener = socket::listen_in(data_dir, &name)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
    fs::rename(&temporary, data_dir.join(SOCKET))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}
