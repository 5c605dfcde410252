//! Gives each request an id, and each error its body.

use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, Method};
use axum::response::{IntoResponse, Response};
use bhatti_api::{ErrorBody, ErrorCode};
use tracing::{Instrument, debug, info_span};

use crate::json::Json;
use crate::status::{ApiError, number};

const HEADER: &str = "x-request-id";

/// Adds an id to a request's log lines and response, and turns an [`ApiError`] into a response
/// body.
pub(crate) async fn identify(
    method: Method,
    path: String,
    answer: impl Future<Output = Response>,
) -> Response {
    let request_id = request_id();
    let span = info_span!("request", id = %request_id, %method, path);
    let answer = async {
        let response = answer.await;
        debug!(status = response.status().as_u16(), "Request answered");
        response
    };
    finish(answer.instrument(span).await, request_id)
}

fn finish(mut response: Response, request_id: String) -> Response {
    let name = HeaderValue::from_str(&request_id);
    if let Some(ApiError { code, message, hint, .. }) = response.extensions_mut().remove() {
        let body = ErrorBody::new(code, message, hint, request_id, number(code));
        let mut with_body = (response.status(), Json(body)).into_response();
        let problem = HeaderValue::from_static("application/problem+json");
        with_body.headers_mut().insert(CONTENT_TYPE, problem);
        if let Some(wait) = response.headers_mut().remove(RETRY_AFTER) {
            with_body.headers_mut().insert(RETRY_AFTER, wait);
        }
        if code == ErrorCode::Unauthorized {
            with_body.headers_mut().insert("www-authenticate", HeaderValue::from_static("Bearer"));
        }
        response = with_body;
    }
    if let Ok(name) = name {
        response.headers_mut().insert(HEADER, name);
    }
    response
}

/// Returns eight random hex digits. They identify a request and protect nothing, so a host
/// without random bytes gets a constant.
fn request_id() -> String {
    getrandom::u32().map_or_else(|_| "00000000".to_owned(), |number| format!("{number:08x}"))
}
