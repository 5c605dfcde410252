//! What a request is for: the control plane, or a port of a sandbox.

use axum::extract::Request;
use axum::http::{HeaderMap, Uri, header};

use crate::Error;

/// The port of the sandbox side.
pub const ENVD_PORT: u16 = 49983;

/// The prefix of a path that chooses this API.
const PREFIX: &str = "/e2b";

/// The path of uploads, before a token.
const UPLOADS: &str = "/uploads/";

const SANDBOX_HEADER: &str = "e2b-sandbox-id";
const PORT_HEADER: &str = "e2b-sandbox-port";
const KEY_HEADER: &str = "x-api-key";

/// What a request of this API is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The control plane.
    Control,
    /// A port of a sandbox.
    Port {
        /// The sandbox's id.
        sandbox: String,
        /// The port.
        port: u16,
    },
    /// Files for the steps of a template, by the token of a link.
    Upload(String),
    /// A file of the sandbox that the URL's signature is for.
    SignedFile,
}

impl Place {
    /// Returns what a request is for, or `None` if it is for another API. Removes this API's prefix
    /// from the path.
    ///
    /// # Errors
    ///
    /// Returns an error if the headers that name a sandbox are not valid.
    pub fn take(request: &mut Request) -> Result<Option<Self>, Error> {
        let is_prefixed = strip_prefix(request);
        if let Some(port) = port_in_headers(request.headers())? {
            return Ok(Some(port));
        }
        let uri = request.uri();
        if is_prefixed && let Some(token) = uri.path().strip_prefix(UPLOADS) {
            return Ok(Some(Self::Upload(token.to_owned())));
        }
        if uri.path() == "/files" && uri.query().is_some_and(|query| query.contains("signature=")) {
            return Ok(Some(Self::SignedFile));
        }
        // Applications behind the native proxy may have keys of their own.
        let is_proxied = uri.path().contains("/proxy/");
        let headers = request.headers();
        let has_key = headers.contains_key(KEY_HEADER)
            && !headers.contains_key(header::AUTHORIZATION)
            && !is_proxied;
        Ok((is_prefixed || has_key).then_some(Self::Control))
    }
}

/// Returns the API key of a request, in the form of the native API.
#[must_use]
pub fn key(headers: &HeaderMap) -> Option<String> {
    let key = headers.get(KEY_HEADER)?.to_str().ok()?;
    // Older SDKs accept no other prefix. The digits are those of the native key.
    Some(key.strip_prefix("e2b_").map_or_else(|| key.to_owned(), |rest| format!("bht_{rest}")))
}

fn port_in_headers(headers: &HeaderMap) -> Result<Option<Place>, Error> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let (sandbox, port) = match (text(SANDBOX_HEADER), text(PORT_HEADER)) {
        (None, None) => return Ok(None),
        (Some(sandbox), Some(port)) => (sandbox, port),
        (sandbox, _) => {
            let (given, missing) = match sandbox {
                Some(_) => (SANDBOX_HEADER, PORT_HEADER),
                None => (PORT_HEADER, SANDBOX_HEADER),
            };
            let message = format!("header `{given}` without `{missing}`");
            return Err(Error::bad_request(message));
        }
    };
    let is_id = |text: &str| {
        (1..=63).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    if !is_id(sandbox) {
        return Err(Error::bad_request(format!("invalid sandbox id {sandbox:?}")));
    }
    let number = port.parse().ok().filter(|port| *port > 0);
    let number = number.ok_or_else(|| Error::bad_request(format!("invalid port {port:?}")))?;
    Ok(Some(Place::Port { sandbox: sandbox.to_owned(), port: number }))
}

/// Removes the prefix from a path. Returns whether it was there.
fn strip_prefix(request: &mut Request) -> bool {
    let uri = request.uri();
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let Some(rest) = path.strip_prefix(PREFIX) else { return false };
    let rest = match rest.as_bytes().first() {
        None => "/".to_owned(),
        Some(b'/') => rest.to_owned(),
        Some(b'?') => format!("/{rest}"),
        Some(_) => return false,
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = rest.parse().ok();
    match Uri::from_parts(parts) {
        Ok(uri) => {
            *request.uri_mut() = uri;
            true
        }
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn place(uri: &str, headers: &[(&str, &str)]) -> Result<(Option<Place>, String), Error> {
        let mut request = Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(Body::empty()).unwrap();
        let place = Place::take(&mut request)?;
        Ok((place, request.uri().to_string()))
    }

    #[test]
    fn request_goes_to_what_its_prefix_headers_or_signature_name() {
        let port = || Some(Place::Port { sandbox: "0123abc".to_owned(), port: 80 });
        let named = [("e2b-sandbox-id", "0123abc"), ("e2b-sandbox-port", "80")];
        assert_eq!(place("/x?y", &named), Ok((port(), "/x?y".to_owned())));
        assert_eq!(place("/e2b/x?y", &named), Ok((port(), "/x?y".to_owned())));
        for (uri, rest) in [("/e2b/sandboxes", "/sandboxes"), ("/e2b", "/"), ("/e2b?a", "/?a")] {
            assert_eq!(place(uri, &[]), Ok((Some(Place::Control), rest.to_owned())));
        }
        let key = [("x-api-key", "e2b_1")];
        assert_eq!(place("/sandboxes", &key).unwrap().0, Some(Place::Control));
        assert_eq!(place("/files?path=a&signature=v1_x", &[]).unwrap().0, Some(Place::SignedFile));
    }

    #[test]
    fn native_requests_are_left_alone() {
        let both = [("x-api-key", "k"), ("authorization", "Bearer bht_1")];
        for (uri, headers) in [
            ("/sandboxes", &[][..]),
            ("/e2bx", &[]),
            ("/files", &[]),
            ("/sandboxes", &both),
            ("/sandboxes/a/proxy/80/x", &both[..1]),
        ] {
            assert_eq!(place(uri, headers), Ok((None, uri.to_owned())), "{uri}");
        }
    }

    #[test]
    fn half_and_malformed_names_of_a_sandbox_are_refused() {
        for headers in [
            &[("e2b-sandbox-id", "a")][..],
            &[("e2b-sandbox-port", "80")],
            &[("e2b-sandbox-id", "a-b"), ("e2b-sandbox-port", "80")],
            &[("e2b-sandbox-id", "a"), ("e2b-sandbox-port", "0")],
            &[("e2b-sandbox-id", "a"), ("e2b-sandbox-port", "65536")],
        ] {
            assert!(place("/", headers).is_err(), "{headers:?}");
        }
    }
}
