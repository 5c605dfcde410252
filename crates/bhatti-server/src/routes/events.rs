//! `/events`: past events, and a stream of new ones.

use std::convert::Infallible;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use bhatti_api::{ErrorCode, Event};
use bhatti_store::{EventFilter, EventRow};
use futures_util::stream;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::AppState;
use crate::auth::Caller;
use crate::extract::{ApiQuery, accepts, number};
use crate::json::Json;
use crate::page::check_limit;
use crate::status::ApiError;

const EVENT_STREAM: &str = "text/event-stream";

/// Default number of events in a response.
const LIMIT: u32 = 100;

/// Interval of keep-alive messages on an idle stream.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Selects events.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct EventsQuery {
    /// Only events whose type begins with this text.
    #[serde(rename = "type")]
    kind: Option<String>,
    /// Only events of this sandbox, by id or name. Destroyed sandboxes have events, too.
    sandbox: Option<String>,
    /// Only events after this one, oldest first (default: the latest events).
    #[param(maximum = 9_223_372_036_854_775_807_i64)]
    #[serde(default, deserialize_with = "number")]
    after: Option<u64>,
    /// Maximum number of events, 1 to 1000 (default: 100). A stream has no maximum.
    #[param(minimum = 1, maximum = 1000)]
    #[serde(default, deserialize_with = "number")]
    limit: Option<u32>,
}

/// Lists the caller's events, or streams new ones.
///
/// With `Accept: text/event-stream`, the response is a stream. It begins after the event in the
/// header `Last-Event-ID` or in `after`, or with the next event. The admin sees the events of all
/// users.
#[utoipa::path(get, path = "/events", tag = "events", params(EventsQuery),
    responses((status = 200, content((Vec<Event> = "application/json"), (String = "text/event-stream"))),
        (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    ApiQuery(query): ApiQuery<EventsQuery>,
) -> Result<Response, ApiError> {
    let limit = query.limit.unwrap_or(LIMIT);
    check_limit(Some(limit))?;
    if query.after.is_some_and(|after| i64::try_from(after).is_err()) {
        let message = format!("invalid after: expected 0 to {}", i64::MAX);
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    let filter = EventFilter {
        owner: (!caller.is_admin()).then_some(caller.0),
        kind_prefix: query.kind,
        sandbox: query.sandbox,
        after: query.after.unwrap_or_default(),
        limit,
        latest: query.after.is_none(),
    };
    if accepts(&headers, EVENT_STREAM) {
        return follow(state, &headers, filter, query.after);
    }
    let events: Vec<Event> = state.control.list_events(&filter)?.into_iter().map(event).collect();
    Ok(Json(events).into_response())
}

/// Streams events as they happen. Each event is read from the store, so a client that is slow or
/// reconnects misses none.
fn follow(
    state: AppState,
    headers: &HeaderMap,
    filter: EventFilter,
    after: Option<u64>,
) -> Result<Response, ApiError> {
    let watch = state.control.watch_events();
    let last_seen = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let after = match last_seen.or(after) {
        Some(after) => after,
        None => {
            let latest = EventFilter { limit: 1, latest: true, ..EventFilter::default() };
            state.control.list_events(&latest)?.last().map_or(0, |event| event.id)
        }
    };
    let filter = EventFilter { after, latest: false, limit: LIMIT, ..filter };
    let events =
        stream::unfold((state, watch, filter), |(state, mut watch, mut filter)| async move {
            let rows = loop {
                // Read before the query: the next query finds events that happen after it.
                let latest = *watch.borrow_and_update();
                match state.control.list_events(&filter) {
                    // No event up to `latest` matches, so the next query can skip them.
                    Ok(rows) if rows.is_empty() => filter.after = filter.after.max(latest),
                    Ok(rows) => break rows,
                    Err(_) => return None,
                }
                tokio::select! {
                    changed = watch.changed() => changed.ok()?,
                    () = state.stopped() => return None,
                }
            };
            filter.after = rows.last().map_or(filter.after, |row| row.id);
            let events: Vec<_> =
                rows.into_iter().map(|row| Ok::<_, Infallible>(sse_event(row))).collect();
            Some((stream::iter(events), (state, watch, filter)))
        });
    let events = futures_util::StreamExt::flatten(events);
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

fn sse_event(row: EventRow) -> sse::Event {
    let (id, kind) = (row.id.to_string(), row.kind.clone());
    let json = serde_json::to_string(&event(row)).unwrap_or_default();
    sse::Event::default().id(id).event(kind).data(json)
}

fn event(row: EventRow) -> Event {
    Event {
        id: row.id,
        at: row.at,
        kind: row.kind,
        sandbox_id: row.sandbox_id,
        sandbox_name: row.sandbox_name,
        user_id: row.owner.to_string(),
        detail: row.detail,
    }
}
