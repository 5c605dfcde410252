//! The routes, one file per resource.

mod exec;
mod exec_stream;
mod health;
mod sandboxes;
mod snapshots;
mod users;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use bhatti_api::ErrorCode;

use crate::AppState;
use crate::json::BODY_BYTES_MAX;
use crate::status::ApiError;

/// Every route of the API.
pub(crate) fn router() -> Router<AppState> {
    Router::new()
        .route("/health", get(health::get))
        .route("/sandboxes", get(sandboxes::list).post(sandboxes::create))
        .route(
            "/sandboxes/{sandbox}",
            get(sandboxes::get).patch(sandboxes::update).delete(sandboxes::destroy),
        )
        .route("/sandboxes/{sandbox}/pause", post(sandboxes::pause))
        .route("/sandboxes/{sandbox}/resume", post(sandboxes::resume))
        .route("/sandboxes/{sandbox}/stop", post(sandboxes::stop))
        .route("/sandboxes/{sandbox}/start", post(sandboxes::start))
        .route("/sandboxes/{sandbox}/fork", post(sandboxes::fork))
        .route("/sandboxes/{sandbox}/exec", post(exec::run))
        .route("/sandboxes/{sandbox}/exec/ws", get(exec_stream::run))
        .route("/sandboxes/{sandbox}/checkpoint", post(snapshots::create))
        .route("/snapshots", get(snapshots::list))
        .route("/snapshots/{snapshot}", get(snapshots::get).delete(snapshots::delete))
        .route("/snapshots/{snapshot}/resume", post(snapshots::resume))
        .route("/users", get(users::list).post(users::create))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
}

async fn no_route() -> ApiError {
    ApiError::new(ErrorCode::NotFound, "not found")
}

async fn no_method() -> ApiError {
    ApiError::new(ErrorCode::MethodNotAllowed, "method not allowed")
}
