//! The table of events: what happened, in the order of their numbers, which are never used again.

use std::time::Duration;

use bhatti_types::{SandboxId, UserId};
use rusqlite::{Row, ToSql, params};

use crate::{Store, StoreError, from_json, now, parsed, to_json};

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// What: `sandbox.created`.
    pub kind: &'static str,
    /// Whose it is.
    pub owner: UserId,
    /// The sandbox that it happened to, and its name then.
    pub sandbox: Option<(SandboxId, String)>,
    /// Anything else.
    pub detail: serde_json::Value,
}

/// An event as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct EventRow {
    /// Its number.
    pub id: u64,
    /// When it happened (RFC 3339).
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

/// Which events are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Those of one user.
    pub owner: Option<UserId>,
    /// Those whose kind begins so.
    pub kind_prefix: Option<String>,
    /// Those of a sandbox, by id or name.
    pub sandbox: Option<String>,
    /// Those behind this one.
    pub after: u64,
    /// How many.
    pub limit: u32,
    /// Whether the latest ones are wanted if there are more.
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
        let connection = self.lazy.lock();
        let mut insert = connection.prepare_cached(
            "INSERT INTO events (at, kind, owner, sandbox_id, sandbox_name, detail) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             RETURNING id",
        )?;
        let parameters = params![now(), kind, owner.to_string(), id, name, to_json(detail)?];
        Ok(insert.query_row(parameters, |row| row.get(0))?)
    }

    /// The events that a filter lets through, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_events(&self, filter: &EventFilter) -> Result<Vec<EventRow>, StoreError> {
        let EventFilter { owner, kind_prefix, sandbox, after, limit, latest } = filter;
        // No event has a number beyond SQLite's.
        let after = i64::try_from(*after).unwrap_or(i64::MAX);
        let owner = owner.map(|owner| owner.to_string());
        // Only what is asked for is in the query, so that its index is used.
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
        let connection = self.connection.lock();
        let mut query = connection.prepare_cached(&format!(
            "SELECT id, at, kind, owner, sandbox_id, sandbox_name, detail FROM events
             WHERE {conditions} ORDER BY id {order} LIMIT ?2"
        ))?;
        let mut rows: Vec<EventRow> = query
            .query_map(&parameters[..], |row| Ok(read(row)))?
            .map(|row| row?)
            .collect::<Result<_, _>>()?;
        if *latest {
            rows.reverse();
        }
        Ok(rows)
    }

    /// Forgets all events but the latest `keep` of each user, and those that happened before `before`, in time since 1970. Returns how many.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn prune_events(&self, keep: u64, before: Duration) -> Result<usize, StoreError> {
        let before = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
        let before = parsed(jiff::Timestamp::from_second(before))?;
        let connection = self.lazy.lock();
        Ok(connection.execute(
            "DELETE FROM events WHERE at < ?2 OR id IN (
                 SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY owner ORDER BY id DESC) AS place FROM events)
                 WHERE place > ?1)",
            params![keep, format!("{before:.6}")],
        )?)
    }
}

/// Conditions in one, with the numbers of their parameters: the first is `?1`, the others are `?3` and so on.
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
    fn events_are_found_by_what_they_are() {
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
    fn old_events_go_and_their_numbers_with_them() {
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
