//! Snapshots, which new sandboxes can start from.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bhatti_control::SnapshotOpError;
use bhatti_store::SnapshotRow;
use serde::Deserialize;
use serde_json::{Value, json};

use super::list::{page, paged};
use super::{Id, Json, Owner, Query, find};
use crate::{E2b, Error, status};

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct NewSnapshot {
    name: Option<String>,
    memory: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Wanted {
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    name: String,
    limit: Option<usize>,
    next_token: String,
}

/// `POST /sandboxes/{id}/snapshots`.
pub(super) async fn create(
    State(e2b): State<E2b>,
    owner: Owner,
    Id(id): Id,
    Json(new): Json<NewSnapshot>,
) -> Result<Response, Error> {
    if new.memory == Some(false) {
        return Err(super::create::not_offered("memory: false"));
    }
    let row = find(&e2b, owner, &id)?;
    let name = match new.name.filter(|name| !name.is_empty()) {
        Some(name) => name,
        None => {
            let digits = getrandom::u64().map_err(|error| Error::internal(error.to_string()))?;
            format!("snapshot-{digits:016x}")
        }
    };
    let untagged = name.strip_suffix(":default").unwrap_or(&name);
    let parsed = untagged.parse();
    let parsed = parsed.map_err(|error| Error::bad_request(format!("invalid name: {error}")))?;
    let made = e2b.0.control.replace_snapshot(row.owner, &row.id.to_string(), parsed).await;
    let made = made.map_err(|error| e2b.0.describe.snapshot(error))?;
    Ok((status::CREATED, axum::Json(described(&made))).into_response())
}

fn described(snapshot: &SnapshotRow) -> Value {
    let name = snapshot.name.as_str();
    json!({ "snapshotID": name, "names": [name] })
}

/// `GET /snapshots`.
pub(super) async fn list(
    State(e2b): State<E2b>,
    Owner(owner): Owner,
    Query(query): Query<Wanted>,
) -> Result<Response, Error> {
    let rows = e2b.0.control.list_snapshots(owner);
    let rows = rows.map_err(|error| e2b.0.describe.store(error))?;
    let is_wanted = |row: &&SnapshotRow| {
        (query.sandbox_id.is_empty() || row.sandbox_id.to_string() == query.sandbox_id)
            && (query.name.is_empty() || row.name.as_str() == query.name)
    };
    let place = |row: &SnapshotRow| format!("{} {}", row.created_at, row.id);
    let all = rows.iter().filter(is_wanted).map(|row| (place(row), described(row)));
    let mut all: Vec<_> = all.collect();
    all.sort_by(|(one, _), (other, _)| other.cmp(one));
    let (shown, next) = page(all, false, &query.next_token, query.limit)?;
    Ok(paged(shown, next))
}

/// `DELETE /templates/{id}`: a snapshot or a template.
pub(super) async fn delete(
    State(e2b): State<E2b>,
    Owner(owner): Owner,
    Id(id): Id,
) -> Result<StatusCode, Error> {
    let control = &e2b.0.control;
    let untagged = id.strip_suffix(":default").unwrap_or(&id);
    match control.delete_snapshot(owner, untagged).await {
        Ok(()) => return Ok(status::NO_CONTENT),
        Err(SnapshotOpError::NotFound(_)) => {}
        Err(error) => return Err(e2b.0.describe.snapshot(error)),
    }
    super::templates::delete(&e2b, owner, &id).await?;
    Ok(status::NO_CONTENT)
}
