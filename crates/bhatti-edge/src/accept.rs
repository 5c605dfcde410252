//! Accepts connections and serves HTTP on them, within limits. A peer that sends no request gets
//! few resources.

mod peers;
mod socket;

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use axum::http::HeaderValue;
use axum::http::header::HOST;
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tower_service::Service;
use tracing::{debug, warn};

use peers::{Asking, Peers};
pub use socket::PeerSocket;
use socket::{Connection, Stream};

use crate::body::hold;
use crate::tls::Tls;

/// Maximum number of connections of one listener. Beyond it, a new connection replaces a silent
/// one (see [`peers`]).
const CONNECTIONS_MAX: usize = 8192;

/// Time limit for a TLS handshake, and the time between two HTTP/2 pings.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(60);

/// Time limit for a connection without a request in flight, whatever else its peer sends: a head,
/// for example.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// The same limit for a connection that has had an admitted request. Clients keep connections for
/// minutes, E2B's Python SDK for five. A request that meets a closed one fails.
const KEPT_LIMIT: Duration = Duration::from_secs(640);

/// Maximum length of a request's head, in bytes, and of one read from a connection.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// HTTP/2: the maximum number of requests in flight on one connection, and of bytes on their way
/// to a request's handler or to the client: of one request, and of a connection.
const STREAMS_MAX: u32 = 128;
const WINDOW_BYTES: u32 = 256 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;

/// Pause after a failed accept, which usually means that the host has no free file descriptor.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Source of connections.
pub trait Source: Send + Sync + 'static {
    /// A connection.
    type Connection: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Waits for the next connection. Cancel safe.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Connection, Peer)>> + Send;
}

/// The other end of a connection.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    address: Option<SocketAddr>,
    socket: Option<PeerSocket>,
    has_tls: bool,
}

/// Marks a request that came with TLS.
#[derive(Clone, Copy, Debug)]
pub struct WithTls;

impl Source for UnixListener {
    type Connection = Connection;

    async fn accept(&self) -> io::Result<(Connection, Peer)> {
        let connection = Connection::new(Stream::Unix(Self::accept(self).await?.0));
        let socket = Some(connection.peer());
        Ok((connection, Peer { socket, ..Peer::default() }))
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
        Ok((connection, Peer { address: Some(peer), socket, has_tls: false }))
    }
}

/// Serves `app` on the connections of `source` until `stop` resolves, then finishes all requests
/// in flight. With `tls`, clients speak TLS and choose HTTP/1.1 or HTTP/2; without, HTTP/1.1.
pub async fn serve(
    source: impl Source,
    app: Router,
    tls: Option<Arc<Tls>>,
    stop: impl Future<Output = ()> + Send,
) {
    let peers = Peers::new(CONNECTIONS_MAX);
    let stopping = watch::Sender::new(());
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = source.accept() => accepted,
            () = &mut stop => break,
        };
        let (connection, mut peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "Failed to accept a connection");
                sleep(EXHAUSTED_PAUSE).await;
                continue;
            }
        };
        // Without a place the connection is closed at once: all others have a request in flight.
        let Some(place) = peers.enter(peer.address.map(|address| address.ip())) else { continue };
        let (app, tls, stopped) = (app.clone(), tls.clone(), stopping.subscribe());
        let asking = Arc::clone(&place);
        peer.has_tls = tls.is_some();
        let answer = move |request: hyper::Request<Incoming>| {
            answer(app.clone(), request.map(Body::new), peer.clone(), asking.ask())
        };
        tokio::spawn(async move {
            let ended = tokio::select! {
                ended = converse(connection, tls, answer, stopped) => ended,
                () = place.closed.notified() => return,
                () = place.long_silent(SILENCE_LIMIT, KEPT_LIMIT) => return,
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

/// Serves the requests of one connection.
async fn converse<A: Future<Output = Result<Response, Infallible>> + Send + 'static>(
    connection: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    tls: Option<Arc<Tls>>,
    answer: impl Fn(hyper::Request<Incoming>) -> A + Send + Sync + Clone + 'static,
    stopped: watch::Receiver<()>,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let service = service_fn(answer);
    let Some(tls) = tls else {
        let serving = http1().serve_connection(TokioIo::new(connection), service).with_upgrades();
        return finish(serving, stopped, |serving| serving.graceful_shutdown()).await;
    };
    let mut stopping = stopped.clone();
    let connection = tokio::select! {
        accepted = timeout(HANDSHAKE_LIMIT, tls.acceptor().accept(connection)) => accepted??,
        _ = stopping.changed() => return Ok(()),
    };
    let is_http2 = connection.get_ref().1.alpn_protocol() == Some(b"h2");
    let connection = TokioIo::new(connection);
    if is_http2 {
        let serving = http2().serve_connection(connection, service);
        return finish(serving, stopped, |serving| serving.graceful_shutdown()).await;
    }
    let serving = http1().serve_connection(connection, service).with_upgrades();
    finish(serving, stopped, |serving| serving.graceful_shutdown()).await
}

fn http1() -> http1::Builder {
    let mut http = http1::Builder::new();
    // The limits of silence apply to heads.
    http.timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(HEAD_BYTES_MAX);
    http
}

fn http2() -> http2::Builder<TokioExecutor> {
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
        .max_send_buf_size(WINDOW_BYTES as usize)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(HANDSHAKE_LIMIT);
    http
}

/// Serves a connection to its end. When the daemon stops, ends it after the requests in flight.
async fn finish<C: Future<Output = hyper::Result<()>>>(
    serving: C,
    mut stopped: watch::Receiver<()>,
    end: impl FnOnce(Pin<&mut C>),
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut serving = pin!(serving);
    tokio::select! {
        ended = &mut serving => return Ok(ended?),
        _ = stopped.changed() => {}
    }
    end(serving.as_mut());
    Ok(serving.await?)
}

/// Marks the response to a request that holds a permit, or counts against another limit of its
/// user or sandbox. Its connection is in use until the response has been sent.
#[derive(Clone, Copy, Debug)]
pub struct Admitted;

async fn answer(
    mut app: Router,
    mut request: Request,
    peer: Peer,
    asking: Asking,
) -> Result<Response, Infallible> {
    if let (None, Some(authority)) = (request.headers().get(HOST), request.uri().authority()) {
        // HTTP/2 names the host in the URI.
        let host = HeaderValue::from_str(authority.as_str());
        if let Ok(host) = host {
            request.headers_mut().insert(HOST, host);
        }
    }
    if let Some(address) = peer.address {
        request.extensions_mut().insert(ConnectInfo(address));
    }
    if peer.has_tls {
        request.extensions_mut().insert(WithTls);
    }
    if let Some(socket) = peer.socket {
        request.extensions_mut().insert(socket);
    }
    let response = app.call(request).await?;
    if response.extensions().get::<Admitted>().is_none() {
        // No permit limits how many such responses a peer leaves unread, so its connection is
        // silent.
        return Ok(response);
    }
    asking.admit();
    Ok(response.map(|body| hold(body, asking)))
}

#[cfg(test)]
mod tests {
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
    fn serve_one(app: Router) -> DuplexStream {
        let (ours, theirs) = duplex(1024);
        tokio::spawn(serve(One(Mutex::new(Some(theirs))), app, None, std::future::pending()));
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

            let mut received = Vec::new();
            let ended =
                tokio::time::timeout(2 * SILENCE_LIMIT, peer.read_to_end(&mut received)).await;

            assert!(ended.is_ok(), "the connection is still open after {begin:?}");
        }
    }

    #[tokio::test]
    async fn endless_request_head_is_refused() {
        let mut peer = serve_answers();
        let head = [b"GET / HTTP/1.1\r\nX: ", &vec![b'x'; 2 * HEAD_BYTES_MAX][..]].concat();
        drop(peer.write_all(&head).await);

        let mut received = Vec::new();
        peer.read_to_end(&mut received).await.unwrap();

        assert!(received.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&received));
    }

    #[tokio::test]
    async fn silent_connections_do_not_block_callers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().fallback(|| async { "answered" });
        tokio::spawn(serve(listener, app, None, std::future::pending()));
        let mut silent = Vec::new();
        for _ in 0..1500 {
            silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
        }

        let mut caller = tokio::net::TcpStream::connect(address).await.unwrap();
        caller.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut received = String::new();
        caller.read_to_string(&mut received).await.unwrap();

        assert!(received.ends_with("answered"), "{received}");
        // The oldest connections are closed, the newest are kept.
        assert_eq!(silent[0].read(&mut [0]).await.unwrap(), 0);
        let mut byte = [0];
        let newest = silent.last_mut().unwrap().read(&mut byte);
        assert!(tokio::time::timeout(Duration::from_millis(20), newest).await.is_err());
    }

    /// Sends a request, and reads the answer.
    async fn ask(peer: &mut DuplexStream) {
        peer.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut received = Vec::new();
        while !received.ends_with(b"answered") {
            assert_ne!(peer.read_buf(&mut received).await.unwrap(), 0);
        }
    }

    /// Returns whether a connection is open after this time.
    async fn is_open_after(peer: &mut DuplexStream, silence: Duration) -> bool {
        timeout(silence, peer.read_u8()).await.is_err()
    }

    #[tokio::test(start_paused = true)]
    async fn admitted_client_may_be_silent_for_longer() {
        let admitted = || async {
            let mut response = Response::new(Body::from("answered"));
            response.extensions_mut().insert(Admitted);
            response
        };
        let mut client = serve_one(Router::new().fallback(admitted));
        for silence in [SILENCE_LIMIT / 2, SILENCE_LIMIT * 5] {
            ask(&mut client).await;
            assert!(is_open_after(&mut client, silence).await);
        }
        assert!(!is_open_after(&mut client, KEPT_LIMIT).await);

        let mut stranger = serve_answers();
        ask(&mut stranger).await;
        assert!(is_open_after(&mut stranger, SILENCE_LIMIT / 2).await);
        ask(&mut stranger).await;
        assert!(!is_open_after(&mut stranger, SILENCE_LIMIT + Duration::from_secs(1)).await);
    }

    /// Returns a server's TLS for `localhost`, and its certificate.
    fn tls() -> (Arc<Tls>, rustls::pki_types::CertificateDer<'static>) {
        let directory = tempfile::tempdir().unwrap();
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("cert"), made.cert.pem()).unwrap();
        std::fs::write(path("key"), made.signing_key.serialize_pem()).unwrap();
        (Tls::from_files(path("cert"), path("key")).unwrap(), made.cert.der().clone())
    }

    /// Connects with TLS to a server of `app`. Returns the connection and the chosen protocol.
    async fn connect_with_tls(
        app: Router,
        protocols: &[&[u8]],
    ) -> (tokio_rustls::client::TlsStream<DuplexStream>, Option<Vec<u8>>) {
        let (tls, certificate) = tls();
        let (ours, theirs) = duplex(64 << 10);
        let source = One(Mutex::new(Some(theirs)));
        tokio::spawn(serve(source, app, Some(tls), std::future::pending()));

        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|one| one.to_vec()).collect();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector.connect("localhost".try_into().unwrap(), ours).await.unwrap();
        let protocol = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
        (stream, protocol)
    }

    #[tokio::test]
    async fn client_with_tls_chooses_its_protocol() {
        let app = || {
            let host = |headers: axum::http::HeaderMap| async move {
                headers[HOST].to_str().unwrap().to_owned()
            };
            Router::new().fallback(host)
        };
        let (stream, protocol) = connect_with_tls(app(), &[b"h2", b"http/1.1"]).await;
        assert_eq!(protocol.as_deref(), Some(&b"h2"[..]));
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .unwrap();
        tokio::spawn(connection);
        let asked = (0..20).map(|_| {
            let request = Request::builder().uri("https://localhost:8443/").body(Body::empty());
            sender.send_request(request.unwrap())
        });
        let mut answers = Vec::new();
        for answer in asked.collect::<Vec<_>>() {
            let body = answer.await.unwrap().into_body();
            answers.push(http_body_util::BodyExt::collect(body).await.unwrap().to_bytes());
        }
        assert!(answers.iter().all(|host| host == "localhost:8443"), "{answers:?}");

        for protocols in [&[&b"http/1.1"[..]][..], &[]] {
            let (mut stream, protocol) = connect_with_tls(app(), protocols).await;
            assert_eq!(protocol.as_deref(), protocols.first().copied());
            let request = b"GET / HTTP/1.1\r\nHost: there\r\nConnection: close\r\n\r\n";
            stream.write_all(request).await.unwrap();
            let mut received = Vec::new();
            // The peer may close without a TLS close message.
            drop(stream.read_to_end(&mut received).await);
            assert!(received.ends_with(b"there"), "{}", String::from_utf8_lossy(&received));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn peer_that_does_not_speak_tls_is_closed() {
        let (tls, _) = tls();
        for begin in ["", "GET / HTTP/1.1\r\n\r\n"] {
            let (mut ours, theirs) = duplex(1024);
            let source = One(Mutex::new(Some(theirs)));
            let app = Router::new();
            tokio::spawn(serve(source, app, Some(Arc::clone(&tls)), std::future::pending()));
            ours.write_all(begin.as_bytes()).await.unwrap();
            let ended = timeout(2 * SILENCE_LIMIT, ours.read_to_end(&mut Vec::new())).await;
            assert!(ended.is_ok(), "the connection is still open after {begin:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn http2_peer_without_a_request_is_closed() {
        for is_mute in [true, false] {
            let (stream, _) = connect_with_tls(Router::new(), &[b"h2"]).await;
            let closed: Pin<Box<dyn Future<Output = ()>>> = if is_mute {
                // Not even the preface of HTTP/2.
                let mut stream = stream;
                Box::pin(async move { drop(stream.read_to_end(&mut Vec::new()).await) })
            } else {
                let handshake = hyper::client::conn::http2::handshake(
                    TokioExecutor::new(),
                    TokioIo::new(stream),
                );
                let (sender, connection): (
                    hyper::client::conn::http2::SendRequest<Body>,
                    hyper::client::conn::http2::Connection<_, _, _>,
                ) = handshake.await.unwrap();
                // Answers the server's pings for as long as the connection is open.
                Box::pin(async move {
                    drop(connection.await);
                    drop(sender);
                })
            };
            let ended = timeout(3 * SILENCE_LIMIT, closed).await;
            assert!(ended.is_ok(), "the connection is still open; mute: {is_mute}");
        }
    }

    #[tokio::test]
    async fn response_without_a_permit_that_is_not_read_leaves_the_connection_silent() {
        let admitted = || async { (axum::Extension(Admitted), "answered") };
        let app = Router::new()
            .route("/stranger", axum::routing::get(|| async { "refused" }))
            .route("/user", axum::routing::get(admitted));
        for (path, is_silent) in [("/stranger", true), ("/user", false)] {
            let peers = Peers::new(1);
            let place = peers.enter(None).unwrap();
            let request = Request::get(path).body(Body::empty()).unwrap();

            let unread = answer(app.clone(), request, Peer::default(), place.ask()).await.unwrap();

            assert_eq!(peers.enter(None).is_some(), is_silent, "{path}");
            drop(unread);
        }
    }
}
