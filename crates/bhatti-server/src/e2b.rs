//! Requests of E2B's SDKs: who sends them, and which part of `bhatti-e2b` answers them.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::http::Method;
use axum::response::{IntoResponse, Response};
use bhatti_api::ErrorCode;
use bhatti_control::{CreateError, ForkError, SnapshotOpError};
use bhatti_e2b::{Describe, ENVD_PORT, Error, Place};
use bhatti_edge::{
    Admitted, OF_STRANGERS_BYTES, Permit, drain, end_input_with_key, end_with_key, hold,
};
use bhatti_node::UseError;
use bhatti_store::StoreError;
use futures_util::StreamExt;

use crate::auth::{self, Caller};
use crate::metrics::Measured;
use crate::rates::Kind;
use crate::status::{ApiError, status};
use crate::{AppState, Listener, concurrency, ended_key, proxy, request_id};

/// Describes errors as the native API does.
pub(crate) struct AsNative;

fn plain(error: impl Into<ApiError>) -> Error {
    let error: ApiError = error.into();
    let wait = error.wait();
    Error::new(status(error.code), error.message).retry_after(wait)
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
    state.rates.check_kind(identity.user(), kind(&request)).map_err(plain)?;
    let request = concurrency::limit(state, request).map_err(plain)?;
    let permit = request.extensions().get::<Arc<Permit>>().cloned();
    let mut response = tokio::select! {
        biased;
        () = identity.ended() => return Err(plain(ended_key())),
        response = state.e2b.control_plane(identity.user(), request) => response,
    };
    response.extensions_mut().insert(Admitted);
    Ok(response.map(|body| hold(end_with_key(body, &identity), permit)))
}

/// Serves a request to a port of a sandbox. It is charged to the sandbox's owner.
async fn sandbox_side(
    state: &AppState,
    sandbox: String,
    port: u16,
    request: Request,
) -> Result<Response, Error> {
    let mut request = drain(request, OF_STRANGERS_BYTES);
    let owner = state.e2b.owner(&sandbox)?;
    request.extensions_mut().insert(Caller(owner));
    state.rates.check_kind(owner, Kind::Port).map_err(plain)?;
    let mut request = concurrency::limit(state, request).map_err(plain)?;
    request.extensions_mut().remove::<Caller>();
    let permit = request.extensions().get::<Arc<Permit>>().cloned();
    let mut response = if port == ENVD_PORT {
        state.e2b.envd(&sandbox, request).await
    } else {
        to_port(state, &sandbox, port, request).await?
    };
    response.extensions_mut().insert(Admitted);
    let stopped = state.clone();
    Ok(response.map(|body| {
        // Streams of processes have no end of their own.
        let until = async move { stopped.stopped().await };
        let body = Body::from_stream(body.into_data_stream().take_until(Box::pin(until)));
        hold(body, permit)
    }))
}

/// Returns what a request to the control plane does.
fn kind(request: &Request) -> Kind {
    let path = request.uri().path();
    let creates = ["/sandboxes", "/fork", "/snapshots"];
    match *request.method() {
        Method::POST if creates.iter().any(|end| path.ends_with(end)) => Kind::Create,
        Method::GET | Method::HEAD => Kind::Read,
        _ => Kind::Use,
    }
}

/// Relays a request to another port of a sandbox.
async fn to_port(
    state: &AppState,
    sandbox: &str,
    port: u16,
    request: Request,
) -> Result<Response, Error> {
    let target = state.e2b.enter(sandbox).await?;
    state.e2b.admit_to_port(&target, &request)?;
    let relayed = proxy::relay_to(state, Arc::clone(&target.used), port, request).await;
    relayed.map_err(|error| match error.code {
        ErrorCode::PortRefused => Error::no_port(sandbox, port),
        _ => plain(error),
    })
}
