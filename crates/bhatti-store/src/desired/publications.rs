//! The table of published ports.

use bhatti_types::{Alias, QuotaExceeded, SandboxId, UserId};
use rusqlite::{OptionalExtension, Row, params};

use crate::{
    CountError, RowName, Store, StoreError, changed_one, check_count, immediate, is_taken, now,
    parsed, sound_rows,
};

/// The maximum number of published ports of one sandbox.
const PORTS_MAX: u32 = 64;

const SELECT: &str = "SELECT p.alias, p.sandbox_id, p.port, p.created_at, s.owner
     FROM publications p JOIN sandboxes s ON s.id = p.sandbox_id AND s.state <> 'destroyed'";

/// A published port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicationRow {
    /// The port's alias.
    pub alias: Alias,
    /// The sandbox.
    pub sandbox_id: SandboxId,
    /// The port in the guest.
    pub port: u16,
    /// When the port was published (RFC 3339).
    pub created_at: String,
    /// The owner of the sandbox.
    pub owner: UserId,
}

/// A port could not be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The alias names another port, possibly of another user's sandbox.
    #[error("alias `{0}` is in use")]
    AliasTaken(Alias),
    /// The port is already published under an alias other than the requested one.
    #[error("port {} is already published as `{}`", .0.port, .0.alias)]
    Published(PublicationRow),
    /// The sandbox has the maximum number of published ports.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<rusqlite::Error> for PublishError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

impl Store {
    /// Publishes a port under the alias `wanted`, or under `fallback` if `wanted` is `None`. A
    /// port that is already published keeps its alias.
    ///
    /// # Errors
    ///
    /// Returns an error if the alias is in use, or if the port is published under another alias.
    pub fn publish(
        &self,
        sandbox: SandboxId,
        port: u16,
        wanted: Option<Alias>,
        fallback: Alias,
    ) -> Result<PublicationRow, PublishError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            let sql = format!("{SELECT} WHERE p.sandbox_id = ?1 AND p.port = ?2");
            let there = || {
                let parameters = params![sandbox.to_string(), port];
                transaction.query_row(&sql, parameters, |row| Ok(read(row))).optional()?.transpose()
            };
            if let Some(row) = there()? {
                return match wanted {
                    Some(wanted) if wanted != row.alias => Err(PublishError::Published(row)),
                    _ => Ok(row),
                };
            }
            let count = "SELECT count(*) FROM publications WHERE sandbox_id = ?1";
            let published =
                check_count(&transaction, count, &sandbox.to_string(), "published port", PORTS_MAX);
            published.map_err(|error| match error {
                CountError::TooMany(quota) => PublishError::Quota(quota),
                CountError::Store(error) => PublishError::Store(error),
            })?;
            let alias = wanted.unwrap_or(fallback);
            let inserted = transaction.execute(
                "INSERT INTO publications (alias, sandbox_id, port, created_at) VALUES (?1, ?2, ?3, ?4)",
                params![alias.as_str(), sandbox.to_string(), port, now()],
            );
            match inserted {
                Ok(_) => {}
                Err(error) if is_taken(&error) => return Err(PublishError::AliasTaken(alias)),
                Err(error) => return Err(error.into()),
            }
            let row = there()?.ok_or(StoreError::NoSuchRow)?;
            transaction.commit()?;
            Ok(row)
        })
    }

    /// Returns the published port with this alias.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_publication(&self, alias: &str) -> Result<Option<PublicationRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!("{SELECT} WHERE p.alias = ?1"))?;
            query.query_row([alias], |row| Ok(read(row))).optional()?.transpose()
        })
    }

    /// Returns the published ports of a sandbox, by number.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_publications(&self, sandbox: SandboxId) -> Result<Vec<PublicationRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection
                .prepare_cached(&format!("{SELECT} WHERE p.sandbox_id = ?1 ORDER BY p.port"))?;
            sound_rows(&mut query, [sandbox.to_string()], RowName("published port", 0), read)
        })
    }

    /// Unpublishes a port.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if the port is not published.
    pub fn unpublish(&self, sandbox: SandboxId, port: u16) -> Result<(), StoreError> {
        self.work(|connection| {
            let deleted = connection.execute(
                "DELETE FROM publications WHERE sandbox_id = ?1 AND port = ?2",
                params![sandbox.to_string(), port],
            )?;
            changed_one(deleted)
        })
    }
}

fn read(row: &Row<'_>) -> Result<PublicationRow, StoreError> {
    let text = |index: usize| row.get::<_, String>(index);
    Ok(PublicationRow {
        alias: parsed(text(0)?.parse())?,
        sandbox_id: parsed(text(1)?.parse())?,
        port: row.get(2)?,
        created_at: text(3)?,
        owner: parsed(text(4)?.parse())?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::sandboxes::tests::{id, new};

    #[test]
    fn alias_names_one_port_until_its_sandbox_is_deleted() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        store.insert_sandbox(new(id(1))).unwrap();
        let alias = |text: &str| text.parse::<Alias>().unwrap();

        let row = store.publish(id(1), 80, None, alias("web-1")).unwrap();
        let again = store.publish(id(1), 80, None, alias("web-2")).unwrap();
        assert_eq!(again, row);
        let other = store.publish(id(1), 80, Some(alias("mine")), alias("web-3"));
        assert!(matches!(other, Err(PublishError::Published(_))));
        let taken = store.publish(id(1), 81, Some(alias("web-1")), alias("web-3"));
        assert!(matches!(taken, Err(PublishError::AliasTaken(_))));

        assert_eq!(store.find_publication("web-1").unwrap(), Some(row.clone()));
        assert_eq!(store.list_publications(id(1)).unwrap(), [row]);
        store.delete_sandbox(&store.claim(id(1)).unwrap()).unwrap();
        assert_eq!(store.find_publication("web-1").unwrap(), None);
    }
}
