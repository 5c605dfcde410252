//! The HTTP API.
//!
//! A handler parses the request, calls the control once and converts the result.
//! Authentication comes before the handler and depends on the listener that accepted the request.
//! Errors get their response body after the handler, in one place (`request_id.rs`).

mod answers;
mod auth;
mod concurrency;
mod console;
mod e2b;
mod extract;
mod idempotency;
mod json;
mod large_json;
mod listings;
mod metrics;
mod page;
mod proxy;
mod rates;
mod request_id;
mod routes;
mod serve;
mod shells;
mod status;
mod times;
mod utf8;
mod websocket;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::Uri;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use bhatti_api::ErrorCode;
use bhatti_control::Control;
use bhatti_edge::{
    Admitted, Identity, Keyring, OF_STRANGERS_BYTES, Permit, Permits, Tickets, drain,
    end_input_with_key, end_with_key, hold,
};
use bhatti_store::StoreError;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tower_service::Service;

pub use metrics::HttpMetrics;
pub use proxy::public_router;
pub use routes::open_api;
pub use serve::{ServeError, bind, serve_public, serve_tcp, serve_unix};

use answers::AnswerMemory;
use idempotency::InFlight;
use listings::Listings;
use metrics::Measured;
use proxy::Visits;
use rates::Rates;
use shells::Shells;
use status::ApiError;

/// Interval at which a stopping daemon checks whether its WebSockets have closed.
const DRAIN_LOOK: Duration = Duration::from_millis(10);

/// The version of the API, which a path may begin with.
const VERSION: &str = "/v1";

/// Name of the daemon's Unix socket in the data directory.
pub const SOCKET: &str = "bhatti.sock";

/// Shared state of all request handlers.
#[derive(Clone)]
pub struct AppState(Arc<Inner>);

/// See [`AppState`].
pub struct Inner {
    /// The sandboxes.
    pub control: Control,
    /// When the daemon started.
    pub started: Instant,
    /// How published ports are reached.
    pub public: PublicAddress,
    /// Time limit for an application in a guest to start its response.
    pub proxy_limit: Duration,
    /// The API of E2B's SDKs.
    pub(crate) e2b: bhatti_e2b::E2b,
    /// The metrics.
    pub metrics: HttpMetrics,
    /// Becomes true when the daemon stops. Streams without an end of their own then end.
    pub stopping: watch::Receiver<bool>,
    pub(crate) keyring: Keyring,
    /// Held while keys are changed in the store and in the keyring, so that both agree.
    pub(crate) changing_keys: Mutex<()>,
    pub(crate) tickets: Tickets,
    pub(crate) rates: Rates,
    pub(crate) shells: Shells,
    pub(crate) visits: Visits,
    pub(crate) answers: AnswerMemory,
    pub(crate) permits: Permits,
    pub(crate) in_flight: InFlight,
    pub(crate) listings: Mutex<Listings>,
}

/// How published ports are reached from outside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublicAddress {
    /// The listener for published ports, if there is one.
    pub listener: Option<SocketAddr>,
    /// The domain under which each alias is a host name.
    pub zone: Option<String>,
    /// Whether the listeners on the network speak TLS.
    pub tls: bool,
}

/// Parts of an [`AppState`].
pub struct StateParts {
    /// See [`Inner::control`].
    pub control: Control,
    /// See [`Inner::started`].
    pub started: Instant,
    /// See [`Inner::public`].
    pub public: PublicAddress,
    /// See [`Inner::proxy_limit`].
    pub proxy_limit: Duration,
    /// See [`Inner::stopping`].
    pub stopping: watch::Receiver<bool>,
}

impl AppState {
    /// Creates the state of one daemon.
    ///
    /// # Errors
    ///
    /// Returns an error if the API keys cannot be read from the store.
    pub fn new(parts: StateParts) -> Result<Self, StoreError> {
        let StateParts { control, started, public, proxy_limit, stopping } = parts;
        let metrics = HttpMetrics::new(&control);
        let keyring = Keyring::new(&control.list_keys(None)?);
        let e2b = bhatti_e2b::E2b::new(control.clone(), Box::new(e2b::AsNative), None);
        Ok(Self(Arc::new(Inner {
            e2b,
            control,
            started,
            public,
            proxy_limit,
            metrics,
            stopping,
            keyring,
            changing_keys: Mutex::default(),
            tickets: Tickets::default(),
            rates: Rates::default(),
            shells: Shells::default(),
            visits: Visits::default(),
            answers: AnswerMemory::default(),
            permits: Permits::default(),
            in_flight: InFlight::default(),
            listings: Mutex::default(),
        })))
    }

    /// Waits until no WebSocket is open.
    pub async fn drained(&self) {
        while self.metrics.open_websockets() > 0 {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    }

    /// Resolves when the streams of a caller must end, and returns the reason.
    pub(crate) async fn ended(&self, identity: &Identity) -> ApiError {
        tokio::select! {
            () = self.stopped() => ApiError::stopping(),
            () = identity.ended() => ended_key(),
        }
    }

    /// Resolves when the daemon stops.
    pub(crate) async fn stopped(&self) {
        // If the sender is gone, the daemon is stopping, too.
        drop(self.stopping.clone().wait_for(|stopping| *stopping).await.map(|_| ()));
    }
}

fn ended_key() -> ApiError {
    ApiError::new(ErrorCode::Unauthorized, "the API key is no longer valid")
}

impl std::ops::Deref for AppState {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

/// Listener that accepted a request. It decides how the caller is authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// The daemon's Unix socket. Only the daemon's owner can open it, so the caller is the admin.
    Unix,
    /// The network. The caller sends an API key.
    Tcp,
}

/// Returns the API's router for `listener`.
pub fn router(state: AppState, listener: Listener) -> Router {
    let routes = routes::router()
        .merge(console::router())
        .layer(from_fn_with_state((state.clone(), listener), pass))
        .with_state(state.clone());
    Router::new().fallback(move |request: Request| {
        let (state, mut routes) = (state.clone(), routes.clone());
        async move {
            match e2b::serve(&state, listener, request).await {
                Ok(response) => Ok(response),
                // A router is ready at any time, and never fails.
                Err(request) => routes.call(without_version(request)).await,
            }
        }
    })
}

/// Marks a request whose path began with the version.
#[derive(Clone, Copy)]
struct Versioned;

/// Removes the version from a path. Paths without a version mean the same.
fn without_version(mut request: Request) -> Request {
    let uri = request.uri();
    let rest = uri.path_and_query().and_then(|path| path.as_str().strip_prefix(VERSION));
    let rest = rest.filter(|rest| rest.starts_with('/')).and_then(|rest| rest.parse().ok());
    if let Some(rest) = rest {
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = Some(rest);
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
            request.extensions_mut().insert(Versioned);
        }
    }
    request
}

/// Runs the steps that surround every handler: request id, metrics, authentication, draining,
/// rate limit and concurrency limit. All steps are one layer, because every layer copies all
/// layers below it for every request.
async fn pass(
    State((state, listener)): State<(AppState, Listener)>,
    request: Request,
    next: Next,
) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    request_id::identify(method, path, async {
        let measured = Measured::new(&request);
        let (known, request) = auth::authenticate(&state, listener, request);
        let most = if known.is_ok() { u64::MAX } else { OF_STRANGERS_BYTES };
        let request = drain(request, most);
        let identity = request.extensions().get::<Identity>().cloned().unwrap_or(Identity::ADMIN);
        let request = request.map(|body| end_input_with_key(body, &identity));
        let admitted = known
            .and_then(|()| rates::limit(&state, request))
            .and_then(|request| concurrency::limit(&state, request));
        let response = match admitted {
            Ok(request) => {
                let permit = request.extensions().get::<Arc<Permit>>().cloned();
                let ran = tokio::select! {
                    // First, because the handler sees a body that ended with the key.
                    biased;
                    () = identity.ended() => Err(ended_key()),
                    ran = idempotency::run(&state, identity.user(), request, next) => ran,
                };
                let mut response = ran.unwrap_or_else(IntoResponse::into_response);
                // The key may have ended after the first look, and the body with it.
                if response.status().is_client_error() && !identity.is_valid() {
                    response = ended_key().into_response();
                }
                if permit.is_some() {
                    response.extensions_mut().insert(Admitted);
                }
                response.map(|body| hold(end_with_key(body, &identity), permit))
            }
            Err(error) => error.into_response(),
        };
        measured.end(&state.metrics, &response);
        response
    })
    .await
}
