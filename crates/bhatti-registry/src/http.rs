//! HTTP requests with limits: redirects, sizes and times.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE,
    USER_AGENT,
};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::timeout;

use crate::config::{Config, authority};
use crate::connect::{ConnectError, Connector};

/// Maximum number of redirects of one request.
const REDIRECTS_MAX: usize = 5;
/// Time limit for a response to begin.
const RESPONSE_LIMIT: Duration = Duration::from_secs(60);
/// Time limit for a short body.
const BODY_LIMIT: Duration = Duration::from_secs(60);
/// Time after which an unused connection is closed.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// Maximum size of a response's headers, in bytes.
const HEADER_BYTES_MAX: usize = 64 << 10;

const AGENT: &str = concat!("bhatti/", env!("CARGO_PKG_VERSION"));

/// A request failed before it had a response.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// No connection could be made.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection broke, or the server does not follow HTTP.
    #[error("the connection to `{host}` failed: {source}")]
    Broken {
        /// The server's name.
        host: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A redirect cannot be followed.
    #[error("`{host}` redirects {problem}")]
    Redirect {
        /// The server's name.
        host: String,
        /// What is wrong with the redirect.
        problem: &'static str,
    },
    /// A response is longer than it may be.
    #[error("`{host}` sent more than {limit} bytes")]
    TooLong {
        /// The server's name.
        host: String,
        /// The limit, in bytes.
        limit: usize,
    },
}

impl HttpError {
    /// A server that does not answer in time.
    pub(crate) fn timed_out(host: &str) -> Self {
        let source = Box::new(io::Error::from(io::ErrorKind::TimedOut));
        Self::Broken { host: host.to_owned(), source }
    }

    /// Whether the same request may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect(ConnectError::Failed { source, .. }) => {
                // A certificate that is not trusted stays so.
                source.kind() != io::ErrorKind::InvalidData
            }
            Self::Broken { .. } => true,
            _ => false,
        }
    }
}

/// What a request asks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted<'a> {
    /// Media types, in the form of the header `Accept`.
    pub(crate) accept: Option<&'a str>,
    /// The header `Authorization`.
    pub(crate) authorization: Option<HeaderValue>,
    /// The first byte.
    pub(crate) from: u64,
}

/// The body of a request.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A body to send, and how long that may take.
pub(crate) struct Sent {
    pub(crate) body: Body,
    pub(crate) limit: Duration,
}

/// Returns a body without content.
pub(crate) fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// Sends requests.
#[derive(Clone)]
pub(crate) struct Http {
    client: Client<Connector, Body>,
}

impl Http {
    /// # Errors
    ///
    /// Returns an error if this machine has no certificate authorities. Blocks on disk.
    pub(crate) fn new(config: Arc<Config>) -> io::Result<Self> {
        let tls = config.tls()?;
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_LIMIT)
            .http1_max_buf_size(HEADER_BYTES_MAX)
            .build(Connector { config, tls });
        Ok(Self { client })
    }

    /// Sends a request and follows redirects. Returns the first other response. The authorization
    /// is for the first host alone.
    pub(crate) async fn get(
        &self,
        uri: Uri,
        wanted: &Wanted<'_>,
    ) -> Result<Response<Incoming>, HttpError> {
        let first = authority(&uri);
        let mut uri = uri;
        for _ in 0..=REDIRECTS_MAX {
            let mut request = Request::builder().method(Method::GET).uri(uri.clone());
            if let Some(headers) = request.headers_mut() {
                set_headers(headers, wanted, authority(&uri) == first);
            }
            let host = authority(&uri).0;
            let broken = |source: Box<dyn std::error::Error + Send + Sync>| HttpError::Broken {
                host: host.clone(),
                source,
            };
            let request = request.body(empty()).map_err(|error| broken(error.into()))?;
            let response = self.exchange(&host, request, RESPONSE_LIMIT).await?;
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            uri = target(&uri, response.headers())
                .map_err(|problem| HttpError::Redirect { host, problem })?;
        }
        Err(HttpError::Redirect { host: first.0, problem: "too often" })
    }
}

impl Http {
    /// Sends a request, and does not follow redirects.
    pub(crate) async fn send(
        &self,
        method: Method,
        uri: Uri,
        headers: Vec<(HeaderName, HeaderValue)>,
        sent: Option<Sent>,
    ) -> Result<Response<Incoming>, HttpError> {
        let host = authority(&uri).0;
        let (body, limit) = match sent {
            Some(Sent { body, limit }) => (body, limit),
            None => (empty(), RESPONSE_LIMIT),
        };
        let mut request = Request::builder().method(method).uri(uri);
        if let Some(all) = request.headers_mut() {
            set_headers(all, &Wanted::default(), true);
            all.extend(headers);
        }
        let request = request
            .body(body)
            .map_err(|error| HttpError::Broken { host: host.clone(), source: error.into() })?;
        self.exchange(&host, request, limit).await
    }

    async fn exchange(
        &self,
        host: &str,
        request: Request<Body>,
        limit: Duration,
    ) -> Result<Response<Incoming>, HttpError> {
        match timeout(limit, self.client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(explain(host, error)),
            Err(_) => Err(HttpError::timed_out(host)),
        }
    }
}

/// Reads a body of at most `limit` bytes.
pub(crate) async fn read(host: &str, body: Incoming, limit: usize) -> Result<Bytes, HttpError> {
    let broken = |source| HttpError::Broken { host: host.to_owned(), source };
    match timeout(BODY_LIMIT, Limited::new(body, limit).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            Err(HttpError::TooLong { host: host.to_owned(), limit })
        }
        Ok(Err(error)) => Err(broken(error)),
        Err(_) => Err(HttpError::timed_out(host)),
    }
}

fn set_headers(headers: &mut HeaderMap, wanted: &Wanted<'_>, is_first_host: bool) {
    headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
    // Another encoding would have another digest.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    if let Some(accept) = wanted.accept.and_then(|accept| HeaderValue::from_str(accept).ok()) {
        headers.insert(ACCEPT, accept);
    }
    if wanted.from > 0
        && let Ok(range) = HeaderValue::from_str(&format!("bytes={}-", wanted.from))
    {
        headers.insert(RANGE, range);
    }
    if let Some(authorization) = wanted.authorization.clone().filter(|_| is_first_host) {
        headers.insert(AUTHORIZATION, authorization);
    }
}

/// Finds the connector's own error in one of the pool.
fn explain(host: &str, error: hyper_util::client::legacy::Error) -> HttpError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(error) = cause {
        if let Some(connect) = error.downcast_ref::<ConnectError>() {
            return connect.clone().into();
        }
        cause = error.source();
    }
    HttpError::Broken { host: host.to_owned(), source: error.into() }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Returns the URI that a redirect leads to.
fn target(from: &Uri, headers: &HeaderMap) -> Result<Uri, &'static str> {
    let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
    resolve(from, location.ok_or("to nowhere")?)
}

/// Returns the URI that a location means which a response to `from` names.
pub(crate) fn resolve(from: &Uri, location: &str) -> Result<Uri, &'static str> {
    let (scheme, authority) =
        (from.scheme_str().unwrap_or("https"), from.authority().ok_or("to nowhere")?);
    let absolute = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        location.to_owned()
    };
    let uri: Uri = absolute.parse().map_err(|_| "to a malformed address")?;
    match uri.scheme_str() {
        Some("https" | "http") if uri.host().is_some() => Ok(uri),
        _ => Err("to an address that is not http:// or https://"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_to_servers() {
        let from: Uri = "https://registry.example:5000/v2/a?b".parse().unwrap();
        let to = |location: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(LOCATION, location.parse().unwrap());
            target(&from, &headers).map(|uri| uri.to_string())
        };
        assert_eq!(to("/c").unwrap(), "https://registry.example:5000/c");
        assert_eq!(to("//other/c").unwrap(), "https://other/c");
        assert_eq!(to("http://other/c?d=e").unwrap(), "http://other/c?d=e");
        for refused in ["file:///etc/passwd", "c", "gopher://x/", "https://"] {
            assert!(to(refused).is_err(), "{refused}");
        }
        assert!(target(&from, &HeaderMap::new()).is_err());
    }
}
