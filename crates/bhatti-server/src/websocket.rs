//! Behavior that all WebSockets share: the origin check, detection of dead peers, and closing.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::HeaderValue;
use axum::http::header::{HOST, ORIGIN};
use axum::http::request::Parts;
use axum::response::Response;
use bhatti_api::ErrorCode;
use bhatti_edge::{PeerSocket, Permit};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::sync::Mutex;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, timeout};

use crate::json::BODY_BYTES_MAX;
use crate::status::ApiError;

/// Interval of pings, and how long a peer may be silent. A peer that reads no output at the
/// moment, as a pager does, does not count as silent.
const PING_EVERY: Duration = Duration::from_secs(30);
const SILENCE_LIMIT: Duration = Duration::from_secs(90);

/// Time limit for sending a ping. A peer that reads output at all accepts a ping within it.
const PING_LIMIT: Duration = Duration::from_secs(1);

/// Time limit for a client to read the last message and close. If the daemon dropped the socket
/// earlier, with input of the client unread, the kernel would reset the connection and discard
/// output that is still on its way.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// A request to open a WebSocket.
pub(crate) struct Upgrade {
    upgrade: WebSocketUpgrade,
    peer: Option<PeerSocket>,
    permit: Option<Arc<Permit>>,
}

impl Upgrade {
    /// Accepts the request and runs `serve` on the socket. `serve` is dropped when the peer has
    /// gone. The caller's permit is held meanwhile.
    pub(crate) fn serve<F>(self, serve: impl FnOnce(WebSocket) -> F + Send + 'static) -> Response
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Self { upgrade, peer, permit } = self;
        upgrade.on_upgrade(async move |socket| {
            let _permit = permit;
            let abandoned = async {
                match peer {
                    Some(peer) => peer.abandoned().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = serve(socket) => {}
                () = abandoned => {}
            }
        })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        // Browsers let any page open a WebSocket to any address, and name the page in `Origin`.
        let host = parts.headers.get(HOST).map(HeaderValue::as_bytes).unwrap_or_default();
        let origin = parts.headers.get(ORIGIN).map(HeaderValue::as_bytes);
        if origin.is_some_and(|origin| !is_of_host(origin, host)) {
            return Err(ApiError::new(
                ErrorCode::Forbidden,
                "a page of another origin cannot open a WebSocket here",
            ));
        }
        let upgrade = WebSocketUpgrade::from_request_parts(parts, state).await;
        let upgrade = upgrade.map_err(|error| ApiError::bad_request(&error))?;
        Ok(Self {
            upgrade: upgrade.max_message_size(BODY_BYTES_MAX).max_frame_size(BODY_BYTES_MAX),
            peer: parts.extensions.get().cloned(),
            permit: parts.extensions.get().cloned(),
        })
    }
}

/// Returns whether an origin, `scheme://host`, has this host.
fn is_of_host(origin: &[u8], host: &[u8]) -> bool {
    let schemes: [&[u8]; 2] = [b"http://", b"https://"];
    let of = schemes.iter().find_map(|scheme| origin.strip_prefix(*scheme));
    of.is_some_and(|of| of.eq_ignore_ascii_case(host))
}

/// Sending half of a WebSocket, which several tasks can use.
pub(crate) struct Sender(Mutex<SplitSink<WebSocket, Message>>);

/// Receiving half of a WebSocket.
pub(crate) struct Receiver {
    messages: SplitStream<WebSocket>,
    pings: Interval,
    heard: Instant,
}

/// Splits a WebSocket into its halves.
pub(crate) fn split(socket: WebSocket) -> (Sender, Receiver) {
    let (sender, messages) = socket.split();
    let mut pings = interval(PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    pings.reset();
    (Sender(Mutex::new(sender)), Receiver { messages, pings, heard: Instant::now() })
}

impl Sender {
    /// Sends a message. Returns `None` if the connection has failed.
    pub(crate) async fn send(&self, message: Message) -> Option<()> {
        self.0.lock().await.send(message).await.ok()
    }

    /// Sends a ping, and returns whether the peer accepts data right now. Returns `None` if the
    /// peer has gone.
    async fn ping(&self) -> Option<bool> {
        let Ok(mut sender) = self.0.try_lock() else { return Some(false) };
        match timeout(PING_LIMIT, sender.send(Message::Ping(Vec::new().into()))).await {
            Ok(sent) => sent.ok().map(|()| true),
            Err(_) => Some(false),
        }
    }

    /// Sends a message as JSON.
    pub(crate) async fn send_json(&self, message: &impl serde::Serialize) -> Option<()> {
        let json = serde_json::to_string(message).ok()?;
        self.send(Message::text(json)).await
    }

    /// Closes the socket, and waits until the peer has read everything that was sent, for at most
    /// [`CLOSE_LIMIT`].
    pub(crate) async fn hang_up(&self, receiver: &mut Receiver) {
        let closing = async {
            if self.0.lock().await.close().await.is_ok() {
                while let Some(Ok(_)) = receiver.messages.next().await {}
            }
        };
        // If the peer has gone, the close need not arrive.
        drop(timeout(CLOSE_LIMIT, closing).await);
    }

    /// Sends the last message, closes the socket, and waits until the peer has read everything.
    pub(crate) async fn close(&self, last: &impl serde::Serialize, receiver: &mut Receiver) {
        if let Ok(Some(())) = timeout(CLOSE_LIMIT, self.send_json(last)).await {
            self.hang_up(receiver).await;
        }
    }
}

impl Receiver {
    /// Restarts the silence limit, after the daemon itself did not read from the peer.
    pub(crate) fn heard_now(&mut self) {
        self.heard = Instant::now();
    }

    /// Waits for a message with content. Returns `None` if the peer has gone, or has been silent
    /// for too long.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub(crate) async fn next(&mut self, sender: &Sender) -> Option<Message> {
        loop {
            tokio::select! {
                message = self.messages.next() => {
                    self.heard = Instant::now();
                    match message {
                        Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                        Some(Ok(Message::Close(_))) => {
                            // The reply is already queued and needs only a flush.
                            let answering = async { sender.0.lock().await.flush().await };
                            drop(timeout(CLOSE_LIMIT, answering).await);
                            return None;
                        }
                        Some(Err(_)) | None => return None,
                        Some(Ok(message)) => return Some(message),
                    }
                }
                _ = self.pings.tick() => {
                    if self.heard.elapsed() > SILENCE_LIMIT {
                        return None;
                    }
                    if !sender.ping().await? {
                        self.heard = Instant::now();
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::get;
    use bhatti_edge::{Peer, Source, serve};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::sync::mpsc;
    use tokio::time::sleep;

    use super::*;

    /// Source of a single connection.
    struct One(parking_lot::Mutex<Option<DuplexStream>>);

    impl Source for One {
        type Connection = DuplexStream;

        async fn accept(&self) -> std::io::Result<(DuplexStream, Peer)> {
            let one = self.0.lock().take();
            match one {
                Some(one) => Ok((one, Peer::default())),
                None => std::future::pending().await,
            }
        }
    }

    /// Returns a client's connection to a server of `app`.
    fn serve_one(app: Router) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(1024);
        let source = One(parking_lot::Mutex::new(Some(theirs)));
        tokio::spawn(serve(source, app, None, std::future::pending()));
        ours
    }

    const HANDSHAKE: &[u8] =
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
        Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";

    /// An empty ping as a server sends it, and an empty pong and the text `x` as a client sends
    /// them, masked with zeros (RFC 6455, section 5.2).
    const PING: [u8; 2] = [0x89, 0];
    const PONG: [u8; 6] = [0x8a, 0x80, 0, 0, 0, 0];
    const TEXT: [u8; 7] = [0x81, 0x81, 0, 0, 0, 0, b'x'];

    /// Returns a client's connection, and a channel with each message that the server receives
    /// and its time. The server also sends `output` bytes.
    async fn peer(output: usize) -> (DuplexStream, mpsc::Receiver<(Option<String>, Instant)>) {
        let (received, receives) = mpsc::channel(1);
        let app = get(async move |upgrade: Upgrade| {
            upgrade.serve(async move |socket| {
                let (sender, mut receiver) = split(socket);
                let sender = Arc::new(sender);
                if output > 0 {
                    let sender = Arc::clone(&sender);
                    tokio::spawn(
                        async move { sender.send(Message::binary(vec![0; output])).await },
                    );
                }
                loop {
                    let message = receiver.next(&sender).await;
                    let text = message.map(|message| message.into_text().unwrap().to_string());
                    let ends = text.is_none();
                    drop(received.send((text, Instant::now())).await);
                    if ends {
                        break;
                    }
                }
            })
        });
        let mut peer = serve_one(Router::new().route("/", app));
        peer.write_all(HANDSHAKE).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(peer.read_u8().await.unwrap());
        }
        (peer, receives)
    }

    #[tokio::test(start_paused = true)]
    async fn silent_peer_is_pinged_and_then_disconnected() {
        let (mut peer, mut receives) = peer(0).await;
        let began = Instant::now();

        let (received, then) = receives.recv().await.unwrap();

        assert_eq!(received, None);
        let silent = then - began;
        assert!(silent > SILENCE_LIMIT && silent <= SILENCE_LIMIT + PING_EVERY, "{silent:?}");
        let mut received = Vec::new();
        peer.read_to_end(&mut received).await.unwrap();
        assert!(received.starts_with(&[PING, PING].concat()), "{received:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn peer_that_only_answers_pings_stays_connected() {
        let (mut peer, mut receives) = peer(0).await;
        for _ in 0..10 {
            let mut ping = [0; 2];
            peer.read_exact(&mut ping).await.unwrap();
            assert_eq!(ping, PING);
            peer.write_all(&PONG).await.unwrap();
        }

        peer.write_all(&TEXT).await.unwrap();

        let (received, _) = receives.recv().await.unwrap();
        assert_eq!(received.as_deref(), Some("x"));
    }

    #[tokio::test(start_paused = true)]
    async fn peer_that_reads_no_output_does_not_count_as_silent() {
        let output = 1 << 20;
        let (mut peer, mut receives) = peer(output).await;
        sleep(5 * SILENCE_LIMIT).await;

        peer.write_all(&TEXT).await.unwrap();

        let (received, _) = receives.recv().await.unwrap();
        assert_eq!(received.as_deref(), Some("x"));
        // The peer still gets all of the output.
        let mut received = vec![0; output];
        peer.read_exact(&mut received).await.unwrap();
    }
}
