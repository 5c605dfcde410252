//! The table of events, ordered by number. A number is never used again.

use std::time::Duration;

use bhatti_types::{SandboxId, UserId};
use rusqlite::{Row, ToSql, params};

use crate::{RowName, Store, StoreError, from_json, now, parsed, sound_rows, to_json};

/// An event to record.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// The kind, such as `sandbox.created`.
    pub kind: &'static str,
    /// The owner.
    pub owner: UserId,
    /// The sandbox concerned, and its name at that time.
    pub sandbox: Option<(SandboxId, String)>,
    /// Further details.
    pub detail: serde_json::Value,
}

/// An event as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct EventRow {
    /// The event's number.
    pub id: u64,
    /// When the event happened (RFC 3339).
    pub at: String,
    /// See [`NewEvent::kind`].
    pub kind: String,
    /// See [`NewEvent::owner`].
    pub owner: UserId,
    /// See [`NewEvent::sandbox`].
    pub sandbox_id: Option<String>,
    /// See [`NewEvent::sandbox`].
    pub sandbox_name: Option<String>,
    /// See [`NewEvent::detail`].
    pub detail: serde_json::Value,
}

/// Selects events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Only events of this user.
    pub owner: Option<UserId>,
    /// Only events whose kind has this prefix.
    pub kind_prefix: Option<String>,
    /// Only events of this sandbox, by id or name.
    pub sandbox: Option<String>,
    /// Only events after this number.
    pub after: u64,
    /// The maximum number of events.
    pub limit: u32,
    /// Whether to return the latest events, rather than the earliest, if there are more than
    /// `limit`.
    pub latest: bool,
}

impl Store {
    /// Adds an event, and returns its number.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn insert_event(&self, event: &NewEvent) -> Result<u64, StoreError> {
        let NewEvent { kind, owner, sandbox, detail } = event;
        let (id, name) = sandbox.as_ref().map(|(id, name)| (id.to_string(), name)).unzip();
        self.log_work(|connection| {
            let mut insert = connection.prepare_cached(
                "INSERT INTO events (at, kind, owner, sandbox_id, sandbox_name, detail) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                 RETURNING id",
            )?;
            let parameters = params![now(), kind, owner.to_string(), id, name, to_json(detail)?];
            Ok(insert.query_row(parameters, |row| row.get(0))?)
        })
    }

    /// Returns the events that match a filter, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_events(&self, filter: &EventFilter) -> Result<Vec<EventRow>, StoreError> {
        let EventFilter { owner, kind_prefix, sandbox, after, limit, latest } = filter;
        // No event has a number beyond `i64::MAX`, the largest in SQLite.
        let after = i64::try_from(*after).unwrap_or(i64::MAX);
        let owner = owner.map(|owner| owner.to_string());
        // Only the filter's own conditions are in the query, so that SQLite uses an index.
        let mut conditions = vec!["id > ?1"];
        let mut parameters: Vec<&dyn ToSql> = vec![&after, limit];
        for (wanted, condition) in [
            (&owner, "owner = ?#"),
            (kind_prefix, "substr(kind, 1, length(?#)) = ?#"),
            (sandbox, "(sandbox_id = ?# OR sandbox_name = ?#)"),
        ] {
            if let Some(text) = wanted {
                parameters.push(text);
                conditions.push(condition);
            }
        }
        let conditions = numbered(&conditions);
        let order = if *latest { "DESC" } else { "ASC" };
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT id, at, kind, owner, sandbox_id, sandbox_name, detail FROM events
                 WHERE {conditions} ORDER BY id {order} LIMIT ?2"
            ))?;
            let mut rows: Vec<EventRow> =
                sound_rows(&mut query, &parameters[..], RowName("event", 0), read)?;
            if *latest {
                rows.reverse();
            }
            Ok(rows)
        })
    }

    /// Deletes all events but the latest `keep` of each user, and all events before `before`, a
    /// time since 1970. Returns the number of deleted events.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn prune_events(&self, keep: u64, before: Duration) -> Result<usize, StoreError> {
        let before = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
        let before = parsed(jiff::Timestamp::from_second(before))?;
        self.log_work(|connection| {
            Ok(connection.execute(
                "DELETE FROM events WHERE at < ?2 OR id IN (
                     SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY owner ORDER BY id DESC) AS place FROM events)
                     WHERE place > ?1)",
                params![keep, format!("{before:.6}")],
            )?)
        })
    }
}

/// Joins conditions and numbers their parameters: the first is `?1`, the others are `?3` and so
/// on.
fn numbered(conditions: &[&str]) -> String {
    let number =
        |(place, condition): (usize, &&str)| condition.replace("?#", &format!("?{}", place + 2));
    conditions.iter().enumerate().map(number).collect::<Vec<_>>().join(" AND ")
}

fn read(row: &Row<'_>) -> Result<EventRow, StoreError> {
    Ok(EventRow {
        id: row.get(0)?,
        at: row.get(1)?,
        kind: row.get(2)?,
        owner: parsed(row.get::<_, String>(3)?.parse())?,
        sandbox_id: row.get(4)?,
        sandbox_name: row.get(5)?,
        detail: from_json(&row.get::<_, String>(6)?)?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(kind: &'static str, owner: UserId, sandbox: u8) -> NewEvent {
        let sandbox = Some((SandboxId::from_entropy([sandbox; 8]), format!("s{sandbox}")));
        NewEvent { kind, owner, sandbox, detail: json!({ "n": 1 }) }
    }

    fn ids(store: &Store, filter: EventFilter) -> Vec<u64> {
        let filter = EventFilter { limit: filter.limit.max(2), ..filter };
        store.list_events(&filter).unwrap().iter().map(|row| row.id).collect()
    }

    #[test]
    fn events_are_filtered_by_number_owner_kind_and_sandbox() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let other = UserId::from_entropy([9; 8]);
        store.insert_event(&event("sandbox.created", UserId::ADMIN, 1)).unwrap();
        store.insert_event(&event("sandbox.woken", UserId::ADMIN, 2)).unwrap();
        store.insert_event(&event("snapshot.created", other, 2)).unwrap();
        let all = EventFilter::default;

        assert_eq!(ids(&store, all()), [1, 2]);
        assert_eq!(ids(&store, EventFilter { latest: true, ..all() }), [2, 3]);
        assert_eq!(ids(&store, EventFilter { after: 2, ..all() }), [3]);
        assert_eq!(ids(&store, EventFilter { after: u64::MAX, ..all() }), [0; 0]);
        assert_eq!(ids(&store, EventFilter { owner: Some(other), ..all() }), [3]);
        assert_eq!(ids(&store, EventFilter { kind_prefix: Some("snap".into()), ..all() }), [3]);
        assert_eq!(ids(&store, EventFilter { sandbox: Some("s2".into()), ..all() }), [2, 3]);
    }

    #[test]
    fn pruned_event_numbers_are_not_reused() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        for _ in 0..5 {
            store.insert_event(&event("x", UserId::ADMIN, 1)).unwrap();
        }

        assert_eq!(store.prune_events(2, Duration::ZERO).unwrap(), 3);
        assert_eq!(store.prune_events(9, Duration::from_secs(200_000_000_000)).unwrap(), 2);

        assert_eq!(store.insert_event(&event("x", UserId::ADMIN, 1)).unwrap(), 6);
    }
}
