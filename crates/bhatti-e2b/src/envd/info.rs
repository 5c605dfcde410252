//! Health, load and variables of a sandbox.

use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::{Error, Load, Target, status};

/// Says that the sandbox answers.
pub(super) fn health() -> Response {
    status::NO_CONTENT.into_response()
}

/// Returns the load of the sandbox.
pub(super) async fn metrics(target: &Target) -> Response {
    let Some(load) = Load::of(target.used.agent.load().await.ok(), &target.row) else {
        return Error::internal("the sandbox does not tell its load").into_response();
    };
    axum::Json(json!({
        "ts": jiff::Timestamp::now().as_second(),
        "cpu_count": load.cpus,
        "cpu_used_pct": load.cpu_used_pct,
        "mem_total": load.info.memory,
        "mem_used": load.info.memory_used,
        "mem_cache": load.info.memory_cache,
        "disk_total": load.info.disk,
        "disk_used": load.info.disk_used,
    }))
    .into_response()
}

/// Returns the variables of every process in the sandbox.
pub(super) fn environment(target: &Target) -> Response {
    let mut variables: Map<String, Value> = Map::new();
    for (name, value) in target.row.spec.environment.as_map() {
        variables.insert(name.clone(), json!(value));
    }
    for (name, value) in of_sandbox(target) {
        variables.insert(name.to_owned(), json!(value));
    }
    axum::Json(Value::Object(variables)).into_response()
}

/// Returns the variables that tell a program where it runs.
pub(super) fn of_sandbox(target: &Target) -> [(&'static str, String); 3] {
    [
        ("E2B_SANDBOX", "true".to_owned()),
        ("E2B_SANDBOX_ID", target.row.id.to_string()),
        ("E2B_TEMPLATE_ID", target.settings.template.clone()),
    ]
}
