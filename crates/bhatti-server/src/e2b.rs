//! Requests of E2B's SDKs: who sends them, and which part of `bhatti-e2b` answers them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::Method;
use axum::response::{IntoResponse, Response};
use bhatti_api::ErrorCode;
use bhatti_control::{CreateError, ForkError, OperationFailure, SnapshotOpError};
use bhatti_e2b::{Describe, ENVD_PORT, Error, Place};
use bhatti_edge::{
    Admitted, Identity, OF_STRANGERS_BYTES, Permit, drain, end_input_with_key, end_with_key, hold,
};
use bhatti_node::UseError;
use bhatti_store::{SandboxRow, StoreError};
use futures_util::{StreamExt, stream};
use http_body_util::BodyExt;

use crate::auth::{self, Caller};
use crate::idempotency::Once;
use crate::metrics::Measured;
use crate::rates::Kind;
use crate::status::{ApiError, status};
use crate::{AppState, Listener, concurrency, ended_key, proxy, request_id};

/// Describes errors as the native API does.
pub(crate) struct AsNative;

fn plain(error: impl Into<ApiError>) -> Error {
    let error: ApiError = error.into();
    let wait = error.wait();
    let code = match error.code {
        // SDKs have an exception for too many sandboxes, by this status.
        ErrorCode::QuotaExceeded => ErrorCode::RateLimited,
        code => code,
    };
    let plain = Error::new(status(code), error.message).retry_after(wait);
    match code {
        ErrorCode::IdempotencyMismatch => plain.named("idempotency_request_mismatch"),
        _ => plain,
    }
}

impl Describe for AsNative {
    fn creation(&self, error: CreateError) -> Error {
        plain(error)
    }

    fn using(&self, error: UseError) -> Error {
        plain(error)
    }

    fn fork(&self, error: ForkError) -> Error {
        plain(error)
    }

    fn snapshot(&self, error: SnapshotOpError) -> Error {
        plain(error)
    }

    fn operation(&self, error: OperationFailure) -> Error {
        plain(error)
    }

    fn store(&self, error: StoreError) -> Error {
        plain(error)
    }
}

/// Answers a request, if it is for this API. Otherwise returns it.
pub(crate) async fn serve(
    state: &AppState,
    listener: Listener,
    mut request: Request,
) -> Result<Response, Request> {
    let place = match Place::take(&mut request) {
        Ok(None) => return Err(request),
        Ok(Some(place)) => Ok(place),
        Err(error) => Err(error),
    };
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    Ok(request_id::identify(method, path, async {
        let measured = Measured::new(&request);
        let answered = match place {
            Ok(place) => answer(state, listener, place, request).await,
            Err(error) => Err(error),
        };
        let response = answered.unwrap_or_else(IntoResponse::into_response);
        measured.end(&state.metrics, &response);
        response
    })
    .await)
}

async fn answer(
    state: &AppState,
    listener: Listener,
    place: Place,
    request: Request,
) -> Result<Response, Error> {
    match place {
        Place::Control => control_plane(state, listener, request).await,
        Place::Port { sandbox, port } => sandbox_side(state, sandbox, port, request).await,
        Place::Upload(token) => receive(state, &token, request).await,
        Place::SignedFile => {
            let sandbox = state.e2b.of_signature(&request);
            let unknown = || plain(ApiError::new(ErrorCode::Unauthorized, "invalid signature"));
            sandbox_side(state, sandbox.ok_or_else(unknown)?, ENVD_PORT, request).await
        }
    }
}

/// Serves a request with an API key.
async fn control_plane(
    state: &AppState,
    listener: Listener,
    request: Request,
) -> Result<Response, Error> {
    let key = bhatti_e2b::key(request.headers());
    let known = auth::known(state, listener, &request, key);
    let most = if known.is_ok() { u64::MAX } else { OF_STRANGERS_BYTES };
    let mut request = drain(request, most);
    let identity = known.map_err(plain)?;
    auth::check_scope(&identity, &request).map_err(plain)?;
    request.extensions_mut().insert(Caller(identity.user()));
    let request = request.map(|body| end_input_with_key(body, &identity));
    let kind = kind(&request);
    state.rates.check_kind(identity.user(), kind).map_err(plain)?;
    let request = concurrency::limit(state, request).map_err(plain)?;
    let permit = request.extensions().get::<Arc<Permit>>().cloned();
    let mut response = tokio::select! {
        biased;
        () = identity.ended() => return Err(plain(ended_key())),
        answered = answer_once(state, &identity, kind, request) => answered?,
    };
    response.extensions_mut().insert(Admitted);
    Ok(response.map(|body| hold(end_with_key(body, &identity), permit)))
}

/// Answers a request to the control plane. One that creates something and has an idempotency key
/// is carried out once.
async fn answer_once(
    state: &AppState,
    identity: &Identity,
    kind: Kind,
    request: Request,
) -> Result<Response, Error> {
    let once = match kind {
        Kind::Create => Once::of(identity.user(), &request, "e2b ").map_err(plain)?,
        _ => None,
    };
    let Some(once) = once else { return Ok(state.e2b.control_plane(identity, request).await) };
    let (e2b, identity) = (state.e2b.clone(), identity.clone());
    let answer = async move |request| e2b.control_plane(&identity, request).await;
    once.run(state, request, answer).await.map_err(plain)
}

/// Receives files for the steps of a template. The token names their owner.
async fn receive(state: &AppState, token: &str, request: Request) -> Result<Response, Error> {
    let Some(upload) = state.e2b.upload(token) else {
        drop(drain(request, OF_STRANGERS_BYTES));
        return Err(plain(ApiError::new(
            ErrorCode::NotFound,
            "this link for an upload has expired",
        )));
    };
    let identity = upload.identity();
    let mut request = drain(request, u64::MAX);
    state.rates.check_kind(identity.user(), Kind::Use).map_err(plain)?;
    request.extensions_mut().insert(Caller(identity.user()));
    let request = request.map(|body| end_input_with_key(body, identity));
    let request = concurrency::limit(state, request).map_err(plain)?;
    let permit = request.extensions().get::<Arc<Permit>>().cloned();
    let mut response = tokio::select! {
        biased;
        () = identity.ended() => return Err(plain(ended_key())),
        response = state.e2b.receive(&upload, request) => response,
    };
    response.extensions_mut().insert(Admitted);
    Ok(response.map(|body| hold(body, permit)))
}

/// Serves a request to a port of a sandbox. A request that has the sandbox's token is charged to
/// its owner. Any other is a stranger's, as at a published port.
async fn sandbox_side(
    state: &AppState,
    sandbox: String,
    port: u16,
    request: Request,
) -> Result<Response, Error> {
    let mut request = drain(request, OF_STRANGERS_BYTES);
    let row = state.e2b.find(&sandbox)?;
    let is_known = port == ENVD_PORT && state.e2b.is_known(&row, &request);
    let mut visit = None;
    if is_known {
        state.rates.check_kind(row.owner, Kind::Port).map_err(plain)?;
        request.extensions_mut().insert(Caller(row.owner));
        request = concurrency::limit(state, request).map_err(plain)?;
        request.extensions_mut().remove::<Caller>();
    } else {
        let too_many = |wait| {
            plain(ApiError::new(ErrorCode::RateLimited, "too many requests").retry_after(wait))
        };
        state.rates.check_public(row.id).map_err(too_many)?;
        visit = Some(state.visits.enter(row.id).ok_or_else(|| too_many(BUSY_WAIT))?);
    }
    let permit = request.extensions().get::<Arc<Permit>>().cloned();
    let mut response = if port == ENVD_PORT {
        state.e2b.envd(row, request).await
    } else {
        to_port(state, row, port, request).await?
    };
    response.extensions_mut().insert(Admitted);
    let stopping = state.clone();
    Ok(response.map(|body| {
        let body = until(body, async move { stopping.stopped().await });
        hold(
            Body::new(body.map_frame(move |frame| {
                let _counted = &visit;
                frame
            })),
            permit,
        )
    }))
}

/// How long a stranger waits if too many requests are in flight.
const BUSY_WAIT: Duration = Duration::from_secs(1);

/// Cuts a body when the daemon stops: streams of processes have no end of their own, and a client
/// must not take the rest for the whole.
fn until(body: Body, stopped: impl Future<Output = ()> + Send + 'static) -> Body {
    let begun = Some((body.into_data_stream(), Box::pin(stopped)));
    Body::from_stream(stream::unfold(begun, async |left| {
        let (mut body, mut stopped) = left?;
        tokio::select! {
            piece = body.next() => piece.map(|piece| (piece, Some((body, stopped)))),
            () = &mut stopped => {
                let cut = io::Error::from(io::ErrorKind::ConnectionAborted);
                Some((Err(axum::Error::new(cut)), None))
            }
        }
    }))
}

/// Returns what a request to the control plane does.
fn kind(request: &Request) -> Kind {
    let path = request.uri().path();
    let creates = ["/sandboxes", "/fork", "/snapshots"];
    let builds = path.starts_with("/v2/templates/") && path.contains("/builds/");
    match *request.method() {
        Method::POST if builds || creates.iter().any(|end| path.ends_with(end)) => Kind::Create,
        Method::GET | Method::HEAD => Kind::Read,
        _ => Kind::Use,
    }
}

/// Relays a request to another port of a sandbox.
async fn to_port(
    state: &AppState,
    row: SandboxRow,
    port: u16,
    request: Request,
) -> Result<Response, Error> {
    state.e2b.admit_to_port(&row, &request)?;
    let id = row.id.to_string();
    let target = state.e2b.enter(row).await?;
    let relayed = proxy::relay_to(state, Arc::clone(&target.used), port, request).await;
    relayed.map_err(|error| match error.code {
        ErrorCode::PortRefused => Error::no_port(&id, port),
        _ => plain(error),
    })
}
