//! Relays one request to an application in a guest.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use axum::http::HeaderValue;
use axum::http::header::{CONNECTION, TRANSFER_ENCODING, UPGRADE};
use axum::response::Response;
use bhatti_api::ErrorCode;
use bhatti_edge::{Identity, PeerSocket, Permit};
use bhatti_node::SandboxUse;
use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncWriteExt, copy};
use tokio::time::{Instant, timeout, timeout_at};

use super::addresses::Addresses;
use super::{Target, headers};
use crate::AppState;
use crate::status::{ApiError, changes_protocol};

/// Maximum number of headers in an application's response.
const HEADERS_MAX: usize = 512;

/// Time limit for one direction of a connection after the other has ended.
const HALF_OPEN_LIMIT: Duration = Duration::from_secs(30);

/// Relays a request, and returns the application's response.
pub(super) async fn relay(
    state: &AppState,
    (used, visit): (Arc<SandboxUse>, impl Send + Sync + 'static),
    target: Target,
    mut request: Request,
) -> Result<Response, ApiError> {
    let Target { identity, port, path_and_query, prefix } = target;
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip());
    let socket = request.extensions().get::<PeerSocket>().cloned();
    let permit = request.extensions().get::<Arc<Permit>>().cloned();
    let wanted = headers::upgrade(request.headers());
    let client = hyper::upgrade::on(&mut request);
    let has_body = request.headers().contains_key(TRANSFER_ENCODING);
    headers::strip_hop_by_hop(request.headers_mut());
    if has_body {
        // Requests of some methods usually have no body, so announce this one.
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    headers::strip_credentials(request.headers_mut());
    // A caller on the Unix socket has no address.
    let scheme = if state.public.tls && peer.is_some() { "https" } else { "http" };
    headers::join_cookies(request.headers_mut());
    headers::forward(request.headers_mut(), scheme, &prefix, peer);
    let addresses = Addresses::of(request.headers(), port, prefix);
    addresses.translate_request(request.headers_mut());
    if let Some(protocol) = &wanted {
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(UPGRADE, protocol.clone());
    }
    *request.uri_mut() = path_and_query.parse().map_err(|error| ApiError::bad_request(&error))?;
    *request.version_mut() = axum::http::Version::HTTP_11;

    let mut response = ask(state, &used, port, request).await?;
    // The application may use an earlier HTTP version; the connection to the client does not.
    *response.version_mut() = axum::http::Version::HTTP_11;
    addresses.translate_answer(response.headers_mut());
    if changes_protocol(&response) {
        if wanted.is_none() {
            let message =
                format!("port {port} switched to a protocol that the client did not ask for");
            return Err(ApiError::new(ErrorCode::BadGateway, message));
        }
        let application = hyper::upgrade::on(&mut response);
        let state = state.clone();
        tokio::spawn(async move {
            let _open = state.metrics.open_websocket();
            let abandoned = async {
                match socket {
                    Some(socket) => socket.abandoned().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = tunnel(client, application) => {}
                () = ended(&state, identity) => {}
                () = abandoned => {}
            }
            drop((used, visit, permit));
        });
        return Ok(response.map(|_| Body::empty()));
    }
    headers::strip_hop_by_hop(response.headers_mut());
    // The sandbox stays hot until the last byte has gone out.
    Ok(response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _in_use = (&used, &visit);
            frame
        }))
    }))
}

async fn ask(
    state: &AppState,
    used: &SandboxUse,
    port: u16,
    request: Request,
) -> Result<hyper::Response<hyper::body::Incoming>, ApiError> {
    let bad = |error: hyper::Error| {
        let message = format!("port {port} sent no valid HTTP response: {error}");
        ApiError::new(ErrorCode::BadGateway, message)
    };
    // The application's time limit starts when it has the whole request. While the request is on
    // its way, each piece of it restarts the limit.
    let last_piece = Arc::new(Mutex::new(Instant::now()));
    let progress = Arc::clone(&last_piece);
    let request = request.map(|body| {
        Body::new(body.map_frame(move |frame| {
            *progress.lock() = Instant::now();
            frame
        }))
    });
    let mut answered = pin!(async {
        let stream = used.agent.forward(port).await?;
        let (mut sender, connection) = http1::Builder::new()
            .max_headers(HEADERS_MAX)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(bad)?;
        // The connection's task ends with the response, or when the request is dropped.
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.map_err(bad)
    });
    loop {
        let until = *last_piece.lock() + state.proxy_limit;
        match timeout_at(until, &mut answered).await {
            Ok(answer) => return answer,
            Err(_) if *last_piece.lock() + state.proxy_limit > until => {}
            Err(_) => {
                let seconds = state.proxy_limit.as_secs();
                let message = format!("port {port} did not start a response within {seconds} s");
                return Err(ApiError::new(ErrorCode::GatewayTimeout, message));
            }
        }
    }
}

/// Relays bytes in both directions until both have ended, or until [`HALF_OPEN_LIMIT`] after the
/// first has ended.
async fn tunnel(client: OnUpgrade, application: OnUpgrade) {
    let (Ok(client), Ok(application)) = (client.await, application.await) else { return };
    // These streams include bytes that came right after the response's head.
    let (mut from_client, mut to_client) = tokio::io::split(TokioIo::new(client));
    let (mut from_application, mut to_application) = tokio::io::split(TokioIo::new(application));
    let up = async {
        drop(copy(&mut from_client, &mut to_application).await);
        drop(to_application.shutdown().await);
    };
    let down = async {
        drop(copy(&mut from_application, &mut to_client).await);
        drop(to_client.shutdown().await);
    };
    let (mut up, mut down) = (std::pin::pin!(up), std::pin::pin!(down));
    tokio::select! {
        () = &mut up => drop(timeout(HALF_OPEN_LIMIT, down).await),
        () = &mut down => drop(timeout(HALF_OPEN_LIMIT, up).await),
    }
}

/// Resolves when the daemon stops, or the key that authorized the caller is revoked.
async fn ended(state: &AppState, identity: Option<Identity>) {
    match identity {
        Some(identity) => drop(state.ended(&identity).await),
        None => state.stopped().await,
    }
}
