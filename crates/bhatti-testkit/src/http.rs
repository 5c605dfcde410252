//! Plain HTTP requests, for tests of details that `bhatti-client` hides: statuses, headers and
//! bytes in transit.

use std::net::SocketAddr;
use std::path::PathBuf;

use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{AUTHORIZATION, HOST};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::{LIMIT, Serve, TestDaemon};

/// A connection to a daemon.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// A WebSocket to a daemon.
pub type Socket = WebSocketStream<Box<dyn Connection>>;

/// A client of a daemon's API, as one user.
#[derive(Clone, Debug)]
pub struct Api {
    place: Address,
    key: Option<String>,
}

#[derive(Clone, Debug)]
enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// A complete response.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Answer {
    /// Returns the body as JSON, or null if it is not JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// Returns the body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Returns the status as a number, and the error code of the body.
    #[must_use]
    pub fn refusal(&self) -> (u16, String) {
        (self.status.as_u16(), self.json()["code"].as_str().unwrap_or_default().to_owned())
    }
}

impl TestDaemon {
    /// Starts a daemon and creates a sandbox as its admin.
    ///
    /// # Panics
    ///
    /// Panics if the daemon does not start or the sandbox is not created.
    pub async fn with_sandbox(config: &str, request: &Value) -> (Self, Api) {
        let daemon = Self::start_with(Serve { config: config.into(), ..Serve::default() }).await;
        let api = Api::admin(&daemon);
        let created = api.call("POST", "/sandboxes", request).await;
        assert_eq!(created.status, 201, "{}", created.text());
        (daemon, api)
    }
}

impl Api {
    /// Returns a client that calls a daemon as its admin.
    #[must_use]
    pub fn admin(daemon: &TestDaemon) -> Self {
        Self { place: Address::Unix(daemon.data_dir().to_owned()), key: None }
    }

    /// Returns a client that calls a daemon over TCP, with or without an API key.
    #[must_use]
    pub fn tcp(address: SocketAddr, key: Option<&str>) -> Self {
        Self { place: Address::Tcp(address), key: key.map(str::to_owned) }
    }

    /// Sends a request and waits for the complete response.
    ///
    /// # Panics
    ///
    /// Panics if no response comes.
    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let response = self.begin(method, path, headers, body).await;
        let (parts, body) = response.into_parts();
        let body = timeout(LIMIT, body.collect()).await.expect("the response ends");
        let body = body.expect("the response is complete").to_bytes();
        Answer { status: parts.status, headers: parts.headers, body }
    }

    /// Sends a request with a JSON body, or without a body if `body` is null.
    ///
    /// # Panics
    ///
    /// Panics if no response comes.
    pub async fn call(&self, method: &str, path: &str, body: &Value) -> Answer {
        let json = [("content-type", "application/json")];
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(method, path, &json, body).await
    }

    /// Sends a GET request.
    ///
    /// # Panics
    ///
    /// Panics if no response comes.
    pub async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "").await
    }

    /// Sends a request and waits for the head of the response.
    ///
    /// # Panics
    ///
    /// Panics if no response comes.
    pub async fn begin(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Response<Incoming> {
        let method: Method = method.parse().expect("the method is valid");
        let request = self.request(path, headers).method(method).body(Full::new(body.into()));
        let stream = TokioIo::new(self.connect().await);
        let handshake = http1::Builder::new().max_headers(1000).handshake(stream);
        let (mut sender, connection) = handshake.await.expect("the daemon speaks HTTP");
        // The task ends with the response.
        tokio::spawn(connection);
        let answered = timeout(LIMIT, sender.send_request(request.expect("a request"))).await;
        answered.expect("the daemon responds").expect("the response is valid HTTP")
    }

    /// Runs a command in a sandbox, and returns the response.
    ///
    /// # Panics
    ///
    /// Panics if the daemon refuses the request.
    pub async fn exec(&self, sandbox: &str, request: Value) -> Value {
        let answer = self.call("POST", &format!("/sandboxes/{sandbox}/exec"), &request).await;
        assert!(answer.status.is_success(), "{}", answer.text());
        answer.json()
    }

    /// Runs a script that must succeed in a sandbox, and returns what it printed.
    ///
    /// # Panics
    ///
    /// Panics if the script fails.
    pub async fn sh(&self, sandbox: &str, script: &str) -> String {
        let ran = self.exec(sandbox, serde_json::json!({ "cmd": ["sh", "-c", script] })).await;
        assert_eq!(ran["exit_code"], 0, "{ran}");
        ran["stdout"].as_str().expect("text").to_owned()
    }

    /// Opens a WebSocket.
    ///
    /// # Errors
    ///
    /// Returns the daemon's response if it refuses the upgrade.
    ///
    /// # Panics
    ///
    /// Panics if no response comes.
    pub async fn websocket(&self, path: &str, headers: &[(&str, &str)]) -> Result<Socket, Answer> {
        let key = generate_key();
        let upgrade = [
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", &key),
        ];
        let request = self.request(&format!("ws://x{path}"), &[headers, &upgrade].concat());
        let request = request.body(()).expect("a request");
        let opening = tokio_tungstenite::client_async(request, self.connect().await);
        match timeout(LIMIT, opening).await.expect("the daemon responds") {
            Ok((socket, _)) => Ok(socket),
            Err(Error::Http(response)) => {
                let (parts, body) = response.into_parts();
                let body = Bytes::from(body.unwrap_or_default());
                Err(Answer { status: parts.status, headers: parts.headers, body })
            }
            Err(error) => panic!("failed to open a WebSocket: {error}"),
        }
    }

    /// Connects to the daemon.
    ///
    /// # Panics
    ///
    /// Panics if the daemon cannot be reached.
    pub async fn connect(&self) -> Box<dyn Connection> {
        match &self.place {
            Address::Unix(data_dir) => {
                let stream = bhatti_host::socket::connect_in(data_dir, "bhatti.sock").await;
                Box::new(stream.expect("the daemon listens"))
            }
            Address::Tcp(address) => {
                Box::new(TcpStream::connect(address).await.expect("the daemon listens"))
            }
        }
    }

    fn request(&self, path: &str, headers: &[(&str, &str)]) -> http::request::Builder {
        let mut request = Request::builder().uri(path);
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            request = request.header(HOST, "daemon.test");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        request
    }
}

/// Waits for the next message of a WebSocket. Returns `None` at its end.
///
/// # Panics
///
/// Panics if no message comes.
pub async fn message(socket: &mut Socket) -> Option<Message> {
    let next = async {
        loop {
            match socket.next().await {
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                Some(Ok(message)) => return Some(message),
            }
        }
    };
    timeout(LIMIT, next).await.expect("a message comes")
}

/// Waits for a text message and returns it as JSON.
///
/// # Panics
///
/// Panics if another message, or none, comes.
pub async fn json_message(socket: &mut Socket) -> Value {
    match message(socket).await {
        Some(Message::Text(text)) => serde_json::from_str(&text).expect("JSON"),
        other => panic!("no text message: {other:?}"),
    }
}
