//! The Connect protocol with JSON messages, as E2B's SDKs use it: unary calls, server streams and
//! client streams over HTTP/1.1 and HTTP/2. <https://connectrpc.com/docs/protocol>
//!
//! A stream whose sandbox dies must end without its last message. The official crate always sends
//! it, and needs generated types, so this is a small implementation of its own.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, BufMut, BytesMut};
use futures_util::{Stream, StreamExt, stream};
use http_body_util::{BodyExt, Limited};
use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

pub(crate) use crate::code::Code;
use crate::status;

/// The largest message, in bytes of JSON.
pub(crate) const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// The length of an envelope's head: flags and length.
const HEAD_BYTES: usize = 5;

/// Flags of an envelope.
const COMPRESSED: u8 = 1;
const END: u8 = 2;

/// Messages of a stream that may wait for a slow client.
const MESSAGES_WAITING: usize = 2;

/// See [`keepalive`], if the client asks for no other time.
const KEEPALIVE: Duration = Duration::from_secs(90);

/// How long the message of a unary call may take to arrive.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(60);

const UNARY: &str = "application/json";
const STREAM: &str = "application/connect+json";

/// A call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RpcError {
    pub(crate) code: Code,
    pub(crate) message: String,
}

impl RpcError {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    fn json(&self) -> Value {
        json!({ "code": self.code.name(), "message": self.message })
    }
}

/// The kind of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Unary,
    Stream,
}

impl IntoResponse for RpcError {
    fn into_response(self) -> Response {
        (status::of_call(self.code), axum::Json(self.json())).into_response()
    }
}

/// Answers a call that failed before its first message.
pub(crate) fn failed(kind: Kind, error: RpcError) -> Response {
    match kind {
        Kind::Unary => error.into_response(),
        Kind::Stream => {
            let end = envelope(END, &json!({ "error": error.json() }));
            ([(header::CONTENT_TYPE, STREAM)], end).into_response()
        }
    }
}

/// Answers a unary call.
pub(crate) fn answered(result: Result<Value, RpcError>) -> Response {
    match result {
        Ok(message) => axum::Json(message).into_response(),
        Err(error) => error.into_response(),
    }
}

/// Checks that a request has the content type of its kind of call. A response of another kind would
/// be misread, so this error has a status alone.
#[expect(clippy::result_large_err, reason = "the error is the response")]
pub(crate) fn check_type(kind: Kind, headers: &HeaderMap) -> Result<(), Response> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media = given.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let wanted = match kind {
        Kind::Unary => UNARY,
        Kind::Stream => STREAM,
    };
    if media.eq_ignore_ascii_case(wanted) {
        return Ok(());
    }
    let accepted = [(header::HeaderName::from_static("accept-post"), wanted)];
    Err((status::WRONG_TYPE, accepted).into_response())
}

/// The time limit that a client sets for a call.
///
/// # Errors
///
/// Returns an error if it is not a number of at most ten digits.
pub(crate) fn time_limit(headers: &HeaderMap) -> Result<Option<Duration>, RpcError> {
    let Some(value) = headers.get("connect-timeout-ms") else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let is_number = (1..=10).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    let number = is_number.then(|| text.parse().ok()).flatten();
    let invalid =
        || RpcError::new(Code::InvalidArgument, format!("invalid connect-timeout-ms {text:?}"));
    number.map(|ms| Some(Duration::from_millis(ms))).ok_or_else(invalid)
}

/// How long a stream may be silent before its client is told that it is alive.
pub(crate) fn keepalive(headers: &HeaderMap) -> Duration {
    let asked = headers.get("keepalive-ping-interval").and_then(|value| value.to_str().ok());
    let seconds = asked.and_then(|text| text.parse::<u64>().ok());
    seconds.map_or(KEEPALIVE, |seconds| Duration::from_secs(seconds.clamp(1, 3600)))
}

/// Resolves at a deadline; never without one.
pub(crate) async fn over(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The error of a call whose time is over.
pub(crate) fn late() -> RpcError {
    RpcError::new(Code::DeadlineExceeded, "the time limit of the call is over")
}

/// Reads the message of a unary call.
pub(crate) async fn message<T: DeserializeOwned>(request: Request) -> Result<T, RpcError> {
    let encoding = request.headers().get(header::CONTENT_ENCODING);
    if let Some(other) = encoding.filter(|encoding| *encoding != "identity") {
        return Err(unknown_compression(other.to_str().unwrap_or_default()));
    }
    let body = Limited::new(request.into_body(), MESSAGE_BYTES_MAX).collect();
    let body = timeout(ARRIVAL_LIMIT, body)
        .await
        .map_err(|_| RpcError::new(Code::DeadlineExceeded, "the message did not arrive in time"))?;
    let body = body.map_err(|error| {
        if error.is::<http_body_util::LengthLimitError>() {
            return too_large();
        }
        RpcError::new(Code::InvalidArgument, "the request ended early")
    })?;
    parse(&body.to_bytes())
}

fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, RpcError> {
    serde_json::from_slice(json).map_err(|error| {
        RpcError::new(Code::InvalidArgument, format!("the message is not valid JSON: {error}"))
    })
}

fn unknown_compression(name: &str) -> RpcError {
    RpcError::new(
        Code::Unimplemented,
        format!("unknown compression {name:?}: supported encodings are identity"),
    )
}

fn too_large() -> RpcError {
    let message = format!("a message has at most {MESSAGE_BYTES_MAX} bytes");
    RpcError::new(Code::ResourceExhausted, message)
}

/// The messages that a client sends on a stream.
pub(crate) struct Messages {
    body: Body,
    buffer: BytesMut,
}

impl Messages {
    /// # Errors
    ///
    /// Returns an error if the client compresses messages.
    pub(crate) fn of(request: Request) -> Result<Self, RpcError> {
        let encoding = request.headers().get("connect-content-encoding");
        if let Some(other) = encoding.filter(|encoding| *encoding != "identity") {
            return Err(unknown_compression(other.to_str().unwrap_or_default()));
        }
        Ok(Self { body: request.into_body(), buffer: BytesMut::new() })
    }

    /// Reads the one message of a server stream.
    pub(crate) async fn only<T: DeserializeOwned>(mut self) -> Result<T, RpcError> {
        let missing = || RpcError::new(Code::Unimplemented, "the stream has no message");
        let message = self.next().await?.ok_or_else(missing)?;
        match self.next::<IgnoredAny>().await? {
            None => Ok(message),
            Some(_) => Err(RpcError::new(Code::Unimplemented, "the stream has several messages")),
        }
    }

    /// Returns the next message, or `None` at the end of the request.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, RpcError> {
        let invalid = |message: &str| RpcError::new(Code::InvalidArgument, message);
        loop {
            if let Some(head) = self.buffer.first_chunk::<HEAD_BYTES>() {
                let [flags, length @ ..] = *head;
                let length = u32::from_be_bytes(length) as usize;
                if length > MESSAGE_BYTES_MAX {
                    return Err(too_large());
                }
                if flags & COMPRESSED != 0 {
                    let message = "received a compressed message without compression";
                    return Err(RpcError::new(Code::Internal, message));
                }
                if flags != 0 {
                    return Err(invalid("received an envelope with unknown flags"));
                }
                if self.buffer.len() >= HEAD_BYTES + length {
                    self.buffer.advance(HEAD_BYTES);
                    return parse(&self.buffer.split_to(length)).map(Some);
                }
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        self.buffer.extend_from_slice(&bytes);
                    }
                }
                Some(Err(_)) => return Err(invalid("the request ended early")),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(invalid("the request ended inside an envelope")),
            }
        }
    }
}

/// What a stream's task sends.
enum Part {
    Message(Bytes),
    /// The last message, with an error or without one.
    End(Bytes),
}

/// The sender of a stream's messages. Dropping it before [`end`](Self::end) cuts the connection,
/// as the death of a sandbox must.
pub(crate) struct Sender(mpsc::Sender<Part>);

impl Sender {
    /// Sends a message. Returns false if the client is gone.
    pub(crate) async fn send(&self, message: &impl Serialize) -> bool {
        self.0.send(Part::Message(envelope(0, message))).await.is_ok()
    }

    /// Ends the stream.
    pub(crate) async fn end(self, result: Result<(), RpcError>) {
        let end = match result {
            Ok(()) => json!({}),
            Err(error) => json!({ "error": error.json() }),
        };
        // A client that is gone needs no end.
        drop(self.0.send(Part::End(envelope(END, &end))).await);
    }

    /// Waits until the client is gone.
    pub(crate) async fn gone(&self) {
        self.0.closed().await;
    }
}

/// Returns the response of a stream, and the sender of its messages.
pub(crate) fn stream() -> (Sender, Response) {
    let (sender, parts) = mpsc::channel(MESSAGES_WAITING);
    let body = Body::from_stream(pieces(parts));
    (Sender(sender), ([(header::CONTENT_TYPE, STREAM)], body).into_response())
}

fn pieces(parts: mpsc::Receiver<Part>) -> impl Stream<Item = io::Result<Bytes>> {
    stream::unfold(Some(parts), async |parts| {
        let mut parts = parts?;
        match parts.recv().await {
            Some(Part::Message(bytes)) => Some((Ok(bytes), Some(parts))),
            Some(Part::End(bytes)) => Some((Ok(bytes), None)),
            None => Some((Err(io::ErrorKind::ConnectionAborted.into()), None)),
        }
    })
}

fn envelope(flags: u8, message: &impl Serialize) -> Bytes {
    let json = serde_json::to_vec(message).unwrap_or_default();
    let mut envelope = BytesMut::with_capacity(HEAD_BYTES + json.len());
    envelope.put_u8(flags);
    // Messages are shorter than 4 GiB.
    envelope.put_u32(u32::try_from(json.len()).unwrap_or(u32::MAX));
    envelope.extend_from_slice(&json);
    envelope.freeze()
}

/// Answers a client stream with its one message.
pub(crate) fn answered_stream(result: Result<Value, RpcError>) -> Response {
    match result {
        Ok(message) => {
            let parts = [envelope(0, &message), envelope(END, &json!({}))];
            let body = Body::from_stream(stream::iter(parts).map(Ok::<_, Infallible>));
            ([(header::CONTENT_TYPE, STREAM)], body).into_response()
        }
        Err(error) => failed(Kind::Stream, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(bytes: Vec<u8>) -> Messages {
        Messages { body: Body::from(bytes), buffer: BytesMut::new() }
    }

    #[tokio::test]
    async fn messages_are_read_however_they_are_cut() {
        let whole = [envelope(0, &json!({"a": 1})), envelope(0, &json!({}))].concat();
        for size in 1..whole.len() {
            let chunks: Vec<_> =
                whole.chunks(size).map(|chunk| Ok::<_, Infallible>(chunk.to_vec())).collect();
            let body = Body::from_stream(stream::iter(chunks));
            let mut messages = Messages { body, buffer: BytesMut::new() };
            assert_eq!(messages.next::<Value>().await.unwrap(), Some(json!({"a": 1})));
            assert_eq!(messages.next::<Value>().await.unwrap(), Some(json!({})));
            assert_eq!(messages.next::<Value>().await.unwrap(), None);
        }
    }

    #[tokio::test]
    async fn malformed_envelopes_are_refused() {
        let mut long = vec![0];
        long.extend(u32::try_from(MESSAGE_BYTES_MAX + 1).unwrap().to_be_bytes());
        for (bytes, code) in [
            (vec![0, 0, 0, 0, 9, b'{'], Code::InvalidArgument),
            (vec![0, 0], Code::InvalidArgument),
            (vec![1, 0, 0, 0, 2, b'{', b'}'], Code::Internal),
            (vec![2, 0, 0, 0, 2, b'{', b'}'], Code::InvalidArgument),
            (vec![0, 0, 0, 0, 1, b'{'], Code::InvalidArgument),
            (long, Code::ResourceExhausted),
            (Vec::new(), Code::Unimplemented),
        ] {
            let error = messages(bytes.clone()).only::<Value>().await.unwrap_err();
            assert_eq!(error.code, code, "{bytes:?}: {}", error.message);
        }
    }

    #[tokio::test]
    async fn stream_ends_with_its_end_and_is_cut_without_one() {
        let (sender, response) = stream();
        assert!(sender.send(&json!({})).await);
        sender.end(Err(RpcError::new(Code::NotFound, "x"))).await;
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let error = br#"{"error":{"code":"not_found","message":"x"}}"#;
        assert_eq!(body[..7], [0, 0, 0, 0, 2, b'{', b'}']);
        assert_eq!((body[7], &body[12..]), (END, &error[..]));

        let (sender, response) = stream();
        drop(sender);
        assert!(response.into_body().collect().await.is_err());
    }

    #[test]
    fn time_limit_is_a_short_number() {
        let limit = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("connect-timeout-ms", text.parse().unwrap());
            time_limit(&headers)
        };
        assert_eq!(limit("60000").unwrap(), Some(Duration::from_secs(60)));
        for text in ["", "x", "-1", "12345678901"] {
            assert!(limit(text).is_err(), "{text}");
        }
    }
}
