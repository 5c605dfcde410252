//! The load of a sandbox, and changes of its network.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bhatti_types::NetworkMode;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::create::{Network, not_offered};
use super::{Id, Json, Owner, Query, find};
use crate::settings::Settings;
use crate::{E2b, Error, Load, status};

/// The times that a request asks for, in seconds since 1970.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Range {
    start: Option<i64>,
    end: Option<i64>,
}

impl Range {
    fn contains(&self, second: i64) -> bool {
        self.start.is_none_or(|start| second >= start) && self.end.is_none_or(|end| second <= end)
    }
}

/// `GET /sandboxes/{id}/metrics`: the load of this moment, if it is in the range of times. A
/// sandbox that sleeps has none.
pub(super) async fn metrics(
    State(e2b): State<E2b>,
    owner: Owner,
    Id(id): Id,
    Query(range): Query<Range>,
) -> Result<Response, Error> {
    let row = find(&e2b, owner, &id)?;
    let load = Load::of(e2b.0.control.load(row.id).await, &row);
    let now = Timestamp::now();
    let load = load.filter(|_| range.contains(now.as_second()));
    let metric = load.map(|load| {
        json!({
            "timestamp": now.to_string(),
            "timestampUnix": now.as_second(),
            "cpuCount": load.cpus,
            "cpuUsedPct": load.cpu_used_pct,
            "memUsed": load.info.memory_used,
            "memTotal": load.info.memory,
            "memCache": load.info.memory_cache,
            "diskUsed": load.info.disk_used,
            "diskTotal": load.info.disk,
        })
    });
    Ok(axum::Json(metric.into_iter().collect::<Vec<_>>()).into_response())
}

/// A change of the network, which replaces what was there.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct NetworkUpdate {
    #[serde(rename = "allow_internet_access")]
    internet: Option<bool>,
    #[serde(flatten)]
    rules: serde_json::Map<String, Value>,
}

/// `PUT /sandboxes/{id}/network`.
///
/// A sandbox has a network or none for its whole life, so a change of that is refused.
pub(super) async fn update_network(
    State(e2b): State<E2b>,
    owner: Owner,
    Id(id): Id,
    Json(update): Json<NetworkUpdate>,
) -> Result<StatusCode, Error> {
    let row = find(&e2b, owner, &id)?;
    let mut settings = Settings::of(&row);
    let mut rules = update.rules;
    if !settings.public_traffic {
        // Who may reach the ports is no part of this change.
        rules.insert("allowPublicTraffic".to_owned(), json!(false));
    }
    let rules = Value::Object(rules);
    let wanted = Network::of(Some(&rules), update.internet)?;
    let is_cut_off = wanted.mode == Some(NetworkMode::None);
    if is_cut_off != (row.spec.network.mode == NetworkMode::None) {
        return Err(not_offered("a change between a network and none"));
    }
    (settings.internet, settings.network) = (update.internet, Some(rules));
    let kept = e2b.0.control.set_annex(row.id, &settings.checked_annex()?);
    kept.map_err(|error| e2b.0.describe.store(error))?;
    Ok(status::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_has_both_its_ends() {
        let range = Range { start: Some(10), end: Some(20) };
        let inside = [9, 10, 20, 21].map(|second| range.contains(second));
        assert_eq!(inside, [false, true, true, false]);
        assert!(Range::default().contains(0));
    }
}
