//! Takes connections and serves them, within limits: a peer that has shown nothing yet gets little.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use axum::response::Response;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::sleep;
use tower_service::Service;
use tracing::{debug, warn};

/// Connections of one listener at once. Beyond it, further ones wait to be taken.
const CONNECTIONS_MAX: usize = 8192;

/// How long a peer may take for the head of a request, or keep a connection on which it asks nothing.
const HEAD_LIMIT: Duration = Duration::from_secs(60);

/// How long to wait when the host has no descriptor for another connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Where connections come from.
pub(crate) trait Source: Send + Sync + 'static {
    /// A connection.
    type Connection: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Waits for the next one. Cancel safe.
    fn accept(
        &self,
    ) -> impl Future<Output = io::Result<(Self::Connection, Option<SocketAddr>)>> + Send;
}

impl Source for UnixListener {
    type Connection = UnixStream;

    async fn accept(&self) -> io::Result<(UnixStream, Option<SocketAddr>)> {
        Ok((Self::accept(self).await?.0, None))
    }
}

impl Source for TcpListener {
    type Connection = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, Option<SocketAddr>)> {
        let (stream, peer) = Self::accept(self).await?;
        // Small answers are not to wait for the acknowledgement of earlier ones, and a peer that vanished is to be noticed. A connection on
        // which neither can be said has ended already.
        drop(stream.set_nodelay(true));
        drop(bhatti_host::socket::keep_alive(&stream));
        Ok((stream, Some(peer)))
    }
}

/// Serves `app` on what comes until `stop` resolves, and then until all requests have been answered.
pub(crate) async fn serve(source: impl Source, app: Router, stop: impl Future<Output = ()> + Send) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let stopping = watch::Sender::new(());
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_LIMIT);
    let mut stop = pin!(stop);
    loop {
        let next = async {
            let place = Arc::clone(&room).acquire_owned().await;
            (place, source.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            () = &mut stop => break,
        };
        let (connection, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "Failed to take a connection");
                sleep(EXHAUSTED_PAUSE).await;
                continue;
            }
        };
        let app = app.clone();
        let service = service_fn(move |request| answer(app.clone(), request, peer));
        let serving = http.serve_connection(TokioIo::new(connection), service).with_upgrades();
        let mut stopped = stopping.subscribe();
        tokio::spawn(async move {
            let mut serving = pin!(serving);
            let ended = tokio::select! {
                ended = &mut serving => ended,
                _ = stopped.changed() => {
                    serving.as_mut().graceful_shutdown();
                    serving.await
                }
            };
            if let Err(error) = ended {
                debug!(%error, "A connection broke off");
            }
            drop(place);
        });
    }
    // Nobody waits in vain for a daemon that takes no more.
    drop(source);
    stopping.send_replace(());
    stopping.closed().await;
}

async fn answer(
    mut app: Router,
    request: hyper::Request<hyper::body::Incoming>,
    peer: Option<SocketAddr>,
) -> Result<Response, Infallible> {
    let mut request: Request = request.map(Body::new);
    if let Some(peer) = peer {
        request.extensions_mut().insert(ConnectInfo(peer));
    }
    app.call(request).await
}

#[cfg(test)]
pub(crate) mod tests {
    use parking_lot::Mutex;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// One connection, and no other.
    struct One(Mutex<Option<DuplexStream>>);

    impl Source for One {
        type Connection = DuplexStream;

        async fn accept(&self) -> io::Result<(DuplexStream, Option<SocketAddr>)> {
            let one = self.0.lock().take();
            match one {
                Some(one) => Ok((one, None)),
                None => std::future::pending().await,
            }
        }
    }

    /// A connection to a server of `app`.
    pub(crate) fn serve_one(app: Router) -> DuplexStream {
        let (ours, theirs) = duplex(1024);
        tokio::spawn(serve(One(Mutex::new(Some(theirs))), app, std::future::pending()));
        ours
    }

    fn serve_answers() -> DuplexStream {
        serve_one(Router::new().fallback(|| async { "answered" }))
    }

    #[tokio::test(start_paused = true)]
    async fn peer_that_asks_nothing_or_slowly_is_let_go() {
        for begin in ["", "GET / HTTP/1.1\r\nHost:"] {
            let mut peer = serve_answers();
            peer.write_all(begin.as_bytes()).await.unwrap();

            let mut said = Vec::new();
            let ended = tokio::time::timeout(2 * HEAD_LIMIT, peer.read_to_end(&mut said)).await;

            assert!(ended.is_ok(), "{begin:?} is waited for");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn kept_connection_answers_again() {
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
