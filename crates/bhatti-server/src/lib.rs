//! The HTTP API.
//!
//! A handler parses, makes one call of the supervisor and converts. Who may call is decided before, by the listener that the request
//! came through; what an error looks like after, in one place.

mod auth;
mod json;
mod keys;
mod request_id;
mod routes;
mod serve;
mod status;
mod utf8;

use std::sync::Arc;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use bhatti_store::Store;
use bhatti_supervisor::Supervisor;
use tokio::time::Instant;

pub use serve::{ServeError, serve_tcp, serve_unix};

/// The daemon's socket in the data directory.
pub const SOCKET: &str = "bhatti.sock";

/// What handlers work with.
#[derive(Clone)]
pub struct AppState {
    /// The sandboxes.
    pub supervisor: Supervisor,
    /// The users.
    pub store: Arc<Store>,
    /// When the daemon started.
    pub started: Instant,
}

/// Where a request came in, which decides how its caller is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// The daemon's own socket, which only its owner can open: the caller is the admin.
    Unix,
    /// The network: the caller shows a key.
    Tcp,
}

/// The API as served on `listener`.
pub fn router(state: AppState, listener: Listener) -> Router {
    routes::router()
        .layer(from_fn_with_state((state.clone(), listener), auth::authenticate))
        .layer(from_fn(request_id::identify))
        .with_state(state)
}
