//! `/health`.

use axum::Json;
use axum::extract::State;
use bhatti_api::Health;

use crate::AppState;
use crate::status::ApiError;

pub(crate) async fn get(State(state): State<AppState>) -> Result<Json<Health>, ApiError> {
    let engine = state.supervisor.capabilities();
    Ok(Json(Health {
        status: "ok".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        engine: engine.name.to_owned(),
        accelerator: engine.accelerator.as_str().to_owned(),
        sandboxes: state.supervisor.count()?,
        uptime: uptime(state.started.elapsed().as_secs()),
    }))
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
