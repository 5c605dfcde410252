//! Sandboxes as JSON.

use bhatti_store::SandboxRow;
use bhatti_types::{DiskMib, OnTimeout, SandboxState};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::settings::Settings;
use crate::{E2b, token};

/// The version of the sandbox side, by which SDKs decide what they may ask for. 0.6.4 is the last
/// one that they look at.
const ENVD_VERSION: &str = "0.6.4";

/// SDKs need a text here, which means nothing.
const CLIENT_ID: &str = "bhatti";

/// How long a sandbox without a time limit seems to live, in seconds: SDKs need a time.
const FOREVER_SEC: i64 = 10 * 365 * 86_400;

/// Describes a sandbox to the client that created it or connects to it.
pub(super) fn sandbox(e2b: &E2b, row: &SandboxRow, settings: &Settings) -> Value {
    let mut sandbox = json!({
        "templateID": settings.template,
        "sandboxID": row.id.to_string(),
        "clientID": CLIENT_ID,
        "envdVersion": ENVD_VERSION,
        "envdAccessToken": token::access(row),
        "alias": row.spec.name.as_str(),
    });
    if !settings.public_traffic {
        sandbox["trafficAccessToken"] = json!(token::traffic(row));
    }
    if let Some(zone) = &e2b.0.zone {
        sandbox["domain"] = json!(zone);
    }
    sandbox
}

/// Returns the state's name, or `None` if SDKs have no word for it.
pub(super) const fn state(row: &SandboxRow) -> Option<&'static str> {
    match row.state {
        SandboxState::Running => Some("running"),
        SandboxState::Stopped => Some("paused"),
        SandboxState::Creating | SandboxState::Failed(_) | SandboxState::Destroyed => None,
    }
}

/// Describes a sandbox as lists have it.
pub(super) fn listed(row: &SandboxRow, settings: &Settings) -> Option<Value> {
    let state = state(row)?;
    let started: Option<Timestamp> = row.created_at.parse().ok();
    let end = match row.time_limit.expires_at.and_then(|at| i64::try_from(at).ok()) {
        Some(at) => Timestamp::from_second(at).ok(),
        None => started.and_then(|at| Timestamp::from_second(at.as_second() + FOREVER_SEC).ok()),
    };
    Some(json!({
        "templateID": settings.template,
        "sandboxID": row.id.to_string(),
        "clientID": CLIENT_ID,
        "alias": row.spec.name.as_str(),
        "startedAt": row.created_at,
        "endAt": end.map(|end| end.to_string()),
        "envdVersion": ENVD_VERSION,
        "cpuCount": row.spec.cpus.get(),
        "memoryMB": row.spec.memory.get(),
        "diskSizeMB": row.spec.disk.map_or(0, DiskMib::get),
        "state": state,
        "metadata": settings.metadata,
    }))
}

/// Describes a sandbox with all that is known of it.
pub(super) fn detail(
    e2b: &E2b,
    row: &SandboxRow,
    settings: &Settings,
    with_token: bool,
) -> Option<Value> {
    let mut detail = listed(row, settings)?;
    if with_token {
        detail["envdAccessToken"] = json!(token::access(row));
    }
    let on_timeout = match row.time_limit.on_timeout {
        OnTimeout::Destroy => "kill",
        OnTimeout::Stop => "pause",
    };
    detail["lifecycle"] = json!({ "autoResume": settings.auto_resume, "onTimeout": on_timeout });
    if let Some(internet) = settings.internet {
        detail["allowInternetAccess"] = json!(internet);
    }
    if let Some(network) = &settings.network {
        detail["network"] = network.clone();
    }
    if row.state == SandboxState::Stopped {
        detail["pauseMode"] = json!(if settings.is_disk_only { "filesystem" } else { "full" });
    }
    if let Some(zone) = &e2b.0.zone {
        detail["domain"] = json!(zone);
    }
    Some(detail)
}
