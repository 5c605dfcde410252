//! Accepts connections and serves HTTP on them, within limits. A peer that sends no request gets
//! few resources.

mod peers;
mod socket;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{ConnectInfo, Request};
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::time::sleep;
use tower_service::Service;
use tracing::{debug, warn};

use peers::{Asking, Peers};
pub(crate) use socket::PeerSocket;
use socket::{Connection, Stream};

/// Maximum number of connections of one listener. Beyond it, a new connection replaces a silent
/// one (see [`peers`]).
const CONNECTIONS_MAX: usize = 8192;

/// Time limit for the head of a request, and for a connection on which the peer sends no request.
const HEAD_LIMIT: Duration = Duration::from_secs(60);

/// Maximum length of a request's head, in bytes, and of one read from a connection.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// Pause after a failed accept, which usually means that the host has no free file descriptor.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Source of connections.
pub(crate) trait Source: Send + Sync + 'static {
    /// A connection.
    type Connection: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Waits for the next connection. Cancel safe.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Connection, Peer)>> + Send;
}

/// The other end of a connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    address: Option<SocketAddr>,
    socket: Option<PeerSocket>,
}

impl Source for UnixListener {
    type Connection = Connection;

    async fn accept(&self) -> io::Result<(Connection, Peer)> {
        let connection = Connection::new(Stream::Unix(Self::accept(self).await?.0));
        let socket = Some(connection.peer());
        Ok((connection, Peer { address: None, socket }))
    }
}

impl Source for TcpListener {
    type Connection = Connection;

    async fn accept(&self) -> io::Result<(Connection, Peer)> {
        let (stream, peer) = Self::accept(self).await?;
        // Small responses must not wait for the acknowledgment of earlier ones, and a vanished
        // peer must be noticed. If an option cannot be set, the connection has already ended.
        drop(stream.set_nodelay(true));
        drop(bhatti_host::socket::keep_alive(&stream));
        let connection = Connection::new(Stream::Tcp(stream));
        let socket = Some(connection.peer());
        Ok((connection, Peer { address: Some(peer), socket }))
    }
}

/// Serves `app` on the connections of `source` until `stop` resolves, then finishes all requests
/// in flight.
pub(crate) async fn serve(source: impl Source, app: Router, stop: impl Future<Output = ()> + Send) {
    let peers = Peers::new(CONNECTIONS_MAX);
    let stopping = watch::Sender::new(());
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_LIMIT).max_buf_size(HEAD_BYTES_MAX);
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = source.accept() => accepted,
            () = &mut stop => break,
        };
        let (connection, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "Failed to accept a connection");
                sleep(EXHAUSTED_PAUSE).await;
                continue;
            }
        };
        // Without a place the connection is closed at once: all others have a request in flight.
        let Some(place) = peers.enter(peer.address.map(|address| address.ip())) else { continue };
        let (app, asking) = (app.clone(), Arc::clone(&place));
        let service =
            service_fn(move |request| answer(app.clone(), request, peer.clone(), asking.ask()));
        let serving = http.serve_connection(TokioIo::new(connection), service).with_upgrades();
        let mut stopped = stopping.subscribe();
        tokio::spawn(async move {
            let mut serving = pin!(serving);
            let ended = tokio::select! {
                ended = &mut serving => ended,
                () = place.closed.notified() => return,
                _ = stopped.changed() => {
                    serving.as_mut().graceful_shutdown();
                    serving.await
                }
            };
            if let Err(error) = ended {
                debug!(%error, "Connection failed");
            }
        });
    }
    // Close the listener, so that no client waits for a daemon that accepts no more connections.
    drop(source);
    stopping.send_replace(());
    stopping.closed().await;
}

async fn answer(
    mut app: Router,
    request: hyper::Request<hyper::body::Incoming>,
    peer: Peer,
    asking: Asking,
) -> Result<Response, Infallible> {
    let mut request: Request = request.map(Body::new);
    if let Some(address) = peer.address {
        request.extensions_mut().insert(ConnectInfo(address));
    }
    if let Some(socket) = peer.socket {
        request.extensions_mut().insert(socket);
    }
    let response = app.call(request).await?;
    Ok(hold(response, asking))
}

/// Keeps `held` alive until the response's body has been sent.
pub(crate) fn hold(response: Response, held: impl Send + 'static) -> Response {
    response.map(|body| Body::new(Held { body, _held: held }))
}

/// A body that keeps a value alive.
struct Held<T> {
    body: Body,
    _held: T,
}

// The held value is never accessed, so it need not stay in place.
impl<T> Unpin for Held<T> {}

impl<T: Send + 'static> HttpBody for Held<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use parking_lot::Mutex;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// Source of a single connection.
    struct One(Mutex<Option<DuplexStream>>);

    impl Source for One {
        type Connection = DuplexStream;

        async fn accept(&self) -> io::Result<(DuplexStream, Peer)> {
            let one = self.0.lock().take();
            match one {
                Some(one) => Ok((one, Peer::default())),
                None => std::future::pending().await,
            }
        }
    }

    /// Returns a client's connection to a server of `app`.
    pub(crate) fn serve_one(app: Router) -> DuplexStream {
        let (ours, theirs) = duplex(1024);
        tokio::spawn(serve(One(Mutex::new(Some(theirs))), app, std::future::pending()));
        ours
    }

    fn serve_answers() -> DuplexStream {
        serve_one(Router::new().fallback(|| async { "answered" }))
    }

    #[tokio::test(start_paused = true)]
    async fn connection_without_a_complete_request_head_is_closed() {
        for begin in ["", "GET / HTTP/1.1\r\nHost:"] {
            let mut peer = serve_answers();
            peer.write_all(begin.as_bytes()).await.unwrap();

            let mut said = Vec::new();
            let ended = tokio::time::timeout(2 * HEAD_LIMIT, peer.read_to_end(&mut said)).await;

            assert!(ended.is_ok(), "the connection is still open after {begin:?}");
        }
    }

    #[tokio::test]
    async fn endless_request_head_is_refused() {
        let mut peer = serve_answers();
        let head = [b"GET / HTTP/1.1\r\nX: ", &vec![b'x'; 2 * HEAD_BYTES_MAX][..]].concat();
        drop(peer.write_all(&head).await);

        let mut said = Vec::new();
        peer.read_to_end(&mut said).await.unwrap();

        assert!(said.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&said));
    }

    #[tokio::test]
    async fn silent_connections_do_not_block_callers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().fallback(|| async { "answered" });
        tokio::spawn(serve(listener, app, std::future::pending()));
        let mut silent = Vec::new();
        for _ in 0..1500 {
            silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
        }

        let mut caller = tokio::net::TcpStream::connect(address).await.unwrap();
        caller.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut said = String::new();
        caller.read_to_string(&mut said).await.unwrap();

        assert!(said.ends_with("answered"), "{said}");
        // The oldest connections are closed, the newest are kept.
        assert_eq!(silent[0].read(&mut [0]).await.unwrap(), 0);
        let mut byte = [0];
        let newest = silent.last_mut().unwrap().read(&mut byte);
        assert!(tokio::time::timeout(Duration::from_millis(20), newest).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn connection_serves_a_second_request() {
        let mut peer = serve_answers();
        for _ in 0..2 {
            peer.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            let mut said = Vec::new();
            while !said.ends_with(b"answered") {
                assert_ne!(peer.read_buf(&mut said).await.unwrap(), 0);
            }
            sleep(HEAD_LIMIT / 2).await;
        }
    }
}
