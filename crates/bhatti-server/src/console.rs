//! `/`: the web console, one page that uses the API like any other client. Its files are built
//! from `web/` and embedded in the program.
//!
//! The page's Content-Security-Policy allows only what this daemon serves at this address, and
//! images in `data:` URLs. An inline style needs the nonce of that very page, because xterm draws
//! with `<style>` elements.

use std::sync::LazyLock;

use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use ring::digest::{SHA256, digest};

use crate::AppState;
use crate::status::{ApiError, not_modified};
use bhatti_edge::random_hex;

/// Paths of the console's files. The files are the same for all callers and need no key.
pub(crate) const PATHS: [&str; 3] = ["/", SCRIPT.path, STYLE.path];

const PAGE: &str = include_str!("../console/index.html");
/// Placeholder of the nonce in the page.
const NONCE: &str = "{nonce}";

const SCRIPT: File = File {
    path: "/console/app.js",
    kind: "text/javascript; charset=utf-8",
    content: include_str!("../console/app.js"),
};
const STYLE: File = File {
    path: "/console/app.css",
    kind: "text/css; charset=utf-8",
    content: include_str!("../console/app.css"),
};

/// A file that is the same for all callers.
struct File {
    path: &'static str,
    kind: &'static str,
    content: &'static str,
}

pub(crate) fn router() -> Router<AppState> {
    static SCRIPT_TAG: LazyLock<String> = LazyLock::new(|| tag(SCRIPT.content));
    static STYLE_TAG: LazyLock<String> = LazyLock::new(|| tag(STYLE.content));
    Router::new()
        .route("/", get(page))
        .route(SCRIPT.path, get(async |headers| file(&SCRIPT, &SCRIPT_TAG, &headers)))
        .route(STYLE.path, get(async |headers| file(&STYLE, &STYLE_TAG, &headers)))
}

async fn page() -> Result<Response, ApiError> {
    let nonce = random_hex().map_err(|error| ApiError::internal(&error))?;
    let policy = format!(
        "default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CACHE_CONTROL, "no-store"),
        (CONTENT_SECURITY_POLICY, &policy),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    Ok((headers, PAGE.replace(NONCE, &nonce)).into_response())
}

/// Returns the entity tag of a file's content.
fn tag(content: &str) -> String {
    let hash = digest(&SHA256, content.as_bytes());
    format!("\"{}\"", hex::encode(&hash.as_ref()[..16]))
}

/// Returns a file, or "not modified" if the caller already has this version.
fn file(file: &File, tag: &str, asked: &HeaderMap) -> Response {
    let headers = [
        (CONTENT_TYPE, file.kind),
        (CACHE_CONTROL, "no-cache"),
        (ETAG, tag),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    if asked.get(IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        return (not_modified(), headers).into_response();
    }
    (headers, file.content).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn page_and_policy_share_a_nonce_that_is_new_each_time() {
        let mut nonces = Vec::new();
        for _ in 0..2 {
            let response = page().await.unwrap();
            let policy = response.headers()[CONTENT_SECURITY_POLICY].to_str().unwrap().to_owned();
            let body = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
            let (_, nonce) = policy.split_once("'nonce-").unwrap();
            let (nonce, _) = nonce.split_once('\'').unwrap();
            let text = String::from_utf8(body.to_vec()).unwrap();
            assert!(text.contains(&format!("nonce=\"{nonce}\"")), "{text}");
            assert!(!policy.contains("unsafe"), "{policy}");
            nonces.push(nonce.to_owned());
        }
        assert_ne!(nonces[0], nonces[1]);
    }

    #[test]
    fn page_refers_to_every_console_file() {
        for path in &PATHS[1..] {
            assert!(PAGE.contains(&format!("\"{path}\"")), "{path}");
        }
    }

    #[test]
    fn file_with_a_known_tag_is_not_sent_again() {
        let tag = tag(STYLE.content);
        let known = HeaderMap::from_iter([(IF_NONE_MATCH, tag.parse().unwrap())]);
        assert_eq!(file(&STYLE, &tag, &HeaderMap::new()).status().as_u16(), 200);
        assert_eq!(file(&STYLE, &tag, &known).status().as_u16(), 304);
    }
}
