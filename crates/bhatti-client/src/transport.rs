//! HTTP calls, on connections that are used again.

use std::io::{self, Cursor};
use std::sync::Arc;
use std::time::Duration;

use bhatti_api::{ARCHIVE_OUTCOME, ArchiveOutcome};
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST};
use http::{HeaderMap, Method, Request};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::connect::{ConnectError, Connector, Endpoint};
use crate::{Client, ClientError};

/// Maximum time for which an unused connection is kept, and maximum number of unused ones. The
/// daemon closes them after a minute.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
const IDLE_MAX: usize = 8;

/// The connections to a daemon.
pub(crate) type Pool = legacy::Client<Connector, Body>;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Returns an empty pool of connections to a daemon.
pub(crate) fn pool(endpoint: &Endpoint) -> Pool {
    legacy::Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_LIMIT)
        .pool_max_idle_per_host(IDLE_MAX)
        .build(Connector(endpoint.clone()))
}

/// The most bytes that one read of an upload returns.
const PIECE_BYTES: usize = 64 * 1024;

/// The most characters of an answer that an error quotes.
const SHOWN_CHARS: usize = 200;

/// Content that is sent while it is read.
pub struct Upload {
    content: Box<dyn AsyncRead + Send + Unpin>,
    length: Option<u64>,
}

impl Upload {
    /// Creates an upload of `length` bytes, or of unknown length.
    pub fn new(content: impl AsyncRead + Send + Unpin + 'static, length: Option<u64>) -> Self {
        Self { content: Box::new(content), length }
    }

    fn into_body(self) -> Body {
        let pieces = stream::unfold(self.content, |mut content| async move {
            let mut piece = BytesMut::with_capacity(PIECE_BYTES);
            match content.read_buf(&mut piece).await {
                Ok(0) => None,
                Ok(_) => Some((Ok(Frame::data(piece.freeze())), content)),
                Err(error) => Some((Err(error), content)),
            }
        });
        BodyExt::boxed_unsync(StreamBody::new(pieces))
    }
}

/// An answer that is read piece by piece.
#[derive(Debug)]
pub struct Download {
    headers: HeaderMap,
    body: Incoming,
    outcome: ArchiveOutcome,
}

impl Download {
    /// Returns the body alone.
    pub(crate) fn into_body(self) -> Incoming {
        self.body
    }

    /// Returns a header of the answer, if the header exists and is text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Returns the size of the file in bytes, if the daemon sent it.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        self.header("x-file-size")?.parse().ok()
    }

    /// Waits for the next piece. Returns `None` after the last one.
    ///
    /// # Errors
    ///
    /// Returns an error if the answer ends early.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            match self.body.frame().await.transpose().map_err(lost)? {
                None => return Ok(None),
                Some(frame) => match frame.into_data().map_err(Frame::into_trailers) {
                    Ok(bytes) => return Ok(Some(bytes)),
                    Err(Ok(trailers)) => self.take_outcome(&trailers)?,
                    Err(Err(_)) => {}
                },
            }
        }
    }

    /// Returns the skipped entries of an archive (sockets, pipes, devices). Complete once the
    /// last piece has arrived.
    #[must_use]
    pub fn skipped(&self) -> &[String] {
        &self.outcome.skipped
    }

    fn take_outcome(&mut self, trailers: &HeaderMap) -> Result<(), ClientError> {
        let Some(outcome) = trailers.get(ARCHIVE_OUTCOME) else { return Ok(()) };
        self.outcome = serde_json::from_slice(outcome.as_bytes())
            .map_err(|error| ClientError::Unexpected(error.to_string()))?;
        self.outcome.error.take().map_or(Ok(()), |error| Err(ClientError::Archive(error)))
    }

    async fn collect(self) -> Result<Bytes, ClientError> {
        Ok(self.body.collect().await.map_err(lost)?.to_bytes())
    }
}

impl Client {
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, None::<&()>).await
    }

    pub(crate) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::DELETE, path, None::<&()>).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        self.call(Method::POST, path, body).await
    }

    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let json = body.map(serde_json::to_vec).transpose();
        let json =
            json.map_err(|error| ClientError::Unexpected(error.to_string()))?.unwrap_or_default();
        let body = Full::new(Bytes::from(json)).map_err(|never| match never {}).boxed_unsync();
        let headers = [(CONTENT_TYPE.as_str(), "application/json")];
        parse(&self.send(method, path, &headers, body).await?.collect().await?)
    }

    pub(crate) async fn get_text(&self, path: &str) -> Result<String, ClientError> {
        let text = self.download(Method::GET, path, &[]).await?.collect().await?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    pub(crate) async fn download(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Download, ClientError> {
        let empty = Full::default().map_err(|never| match never {}).boxed_unsync();
        self.send(method, path, headers, empty).await
    }

    pub(crate) async fn upload<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        content: Upload,
    ) -> Result<T, ClientError> {
        let length = content.length.map(|length| length.to_string());
        let mut headers = vec![(CONTENT_TYPE.as_str(), "application/octet-stream")];
        headers.extend(length.as_deref().map(|length| (CONTENT_LENGTH.as_str(), length)));
        parse(&self.send(method, path, &headers, content.into_body()).await?.collect().await?)
    }

    /// Sends a form with a part of JSON and a part with content.
    pub(crate) async fn upload_form<T: DeserializeOwned>(
        &self,
        path: &str,
        (json_name, json): (&str, &str),
        (content_name, content): (&str, Upload),
    ) -> Result<T, ClientError> {
        let entropy = getrandom::u64().map_err(|_| ClientError::Unexpected("no entropy".into()))?;
        let boundary = format!("bhatti-{entropy:016x}");
        let head = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"{json_name}\"\r\n\
             Content-Type: application/json\r\n\r\n{json}\r\n\
             --{boundary}\r\nContent-Disposition: form-data; name=\"{content_name}\"; \
             filename=\"{content_name}\"\r\nContent-Type: application/octet-stream\r\n\r\n"
        );
        let tail = format!("\r\n--{boundary}--\r\n");
        let form = Cursor::new(head).chain(content.content).chain(Cursor::new(tail));
        let kind = format!("multipart/form-data; boundary={boundary}");
        let headers = [(CONTENT_TYPE.as_str(), kind.as_str())];
        let body = Upload::new(form, None).into_body();
        parse(&self.send(Method::POST, path, &headers, body).await?.collect().await?)
    }

    /// Sends a request and waits for the head of the answer. An error answer is read to its end
    /// and returned as an error.
    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Body,
    ) -> Result<Download, ClientError> {
        let host = self.endpoint.host();
        let uri = format!("{}://{host}{path}", self.endpoint.scheme());
        let mut request = Request::builder().method(method).uri(uri).header(HOST, host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(body);
        let request = request.map_err(|error| ClientError::Unexpected(error.to_string()))?;

        let response = self.pool.request(request).await.map_err(not_answered)?;
        let (status, (parts, body)) = (response.status(), response.into_parts());
        let outcome = ArchiveOutcome::default();
        let answer = Download { headers: parts.headers, body, outcome };
        if status.is_success() {
            return Ok(answer);
        }
        Err(refusal(&answer.collect().await?))
    }
}

fn not_answered(error: legacy::Error) -> ClientError {
    let source = std::error::Error::source(&error);
    match source.and_then(|source| source.downcast_ref::<Arc<ConnectError>>()) {
        Some(error) => ClientError::Connect(Arc::clone(error)),
        None => lost(error),
    }
}

fn lost(error: impl std::error::Error + Send + Sync + 'static) -> ClientError {
    ClientError::Lost(Box::new(error))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|_| unexpected(body))
}

/// Returns the error in the body of an error answer.
pub(crate) fn refusal(body: &[u8]) -> ClientError {
    serde_json::from_slice(body).map_or_else(|_| unexpected(body), ClientError::Refused)
}

fn unexpected(body: &[u8]) -> ClientError {
    ClientError::Unexpected(String::from_utf8_lossy(body).chars().take(SHOWN_CHARS).collect())
}
