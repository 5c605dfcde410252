//! `/health` and `/metrics`.

use axum::Extension;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bhatti_api::Health;

use crate::AppState;
use crate::auth::Caller;
use crate::json::Json;
use crate::status::ApiError;

/// Returns the state of the daemon. Needs no API key.
#[utoipa::path(get, path = "/health", tag = "daemon", security(()),
    responses((status = 200, body = Health), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn get(State(state): State<AppState>) -> Result<Json<Health>, ApiError> {
    let engine = state.control.capabilities();
    Ok(Json(Health {
        status: "ok".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        engine: engine.name.to_owned(),
        accelerator: engine.accelerator_name().to_owned(),
        network: state.control.network().unwrap_or_default().as_str().to_owned(),
        sandboxes: state.control.count()?,
        taking_up: state.control.taking_up() as u64,
        uptime: uptime(state.started.elapsed().as_secs()),
    }))
}

/// Returns the daemon's metrics in the OpenMetrics text format, which Prometheus reads. Admin
/// only.
#[utoipa::path(get, path = "/metrics", tag = "daemon",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn metrics(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let text = state.metrics.text().map_err(|error| ApiError::internal(&error))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(CONTENT_TYPE, kind)], text).into_response())
}

fn uptime(seconds: u64) -> String {
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, _) => format!("{minutes}m{rest}s"),
        _ => format!("{hours}h{minutes}m{rest}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::uptime;

    #[test]
    fn uptime_is_readable() {
        assert_eq!([0, 59, 60, 8130].map(uptime), ["0s", "59s", "1m0s", "2h15m30s"]);
    }
}
