//! SQLite store: the state that outlives the daemon.
//!
//! The store is one file, `<data dir>/state.db`, in WAL mode, with one module per table:
//!
//! | group | tables | written by |
//! |---|---|---|
//! | `desired` | what users want | control; a sandbox's state by its node, with a claim |
//! | `host` | what is true of this host alone | the node |
//! | `events` | the log | both |
//!
//! Every call is one transaction. Calls wait for the disk: at most one is active, and a commit
//! flushes. A call on a worker thread of a runtime hands the worker's other tasks to another thread
//! meanwhile ([`bhatti_host::blocking`]).
//!
//! A commit survives the death of the daemon and of the machine: it is flushed before the call
//! returns (`synchronous = FULL`). Events are written through a separate connection that does not
//! flush (`NORMAL`): a power cut may lose the last events.

mod desired;
mod events;
mod host;
mod migrations;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bhatti_host::blocking;
use bhatti_types::{NodeId, QuotaExceeded, SandboxId};
use parking_lot::Mutex;
use rusqlite::Connection;
use rusqlite::config::DbConfig;

pub use desired::claims::Claim;
pub use desired::idempotency::{IDEMPOTENCY_SECONDS, Repeated, StoredResponse};
pub use desired::images::{ImageInsertError, ImageRow, Replace};
pub use desired::keys::{KeyInsertError, KeyRow};
pub use desired::publications::{PublicationRow, PublishError};
pub use desired::sandboxes::{
    ChangeError, InsertError, NewSandbox, SandboxChange, SandboxFilter, SandboxRow, StoredSandbox,
};
pub use desired::secrets::{Ciphertext, LOGIN_PREFIX, SecretRow};
pub use desired::snapshots::{SnapshotInsertError, SnapshotKind, SnapshotRow};
pub use desired::templates::{TemplateInsertError, TemplateRow};
pub use desired::users::{DEFAULT_KEY, UserDeleteError, UserInsertError, UserRow};
pub use desired::volumes::{
    Attach, AttachError, AttachKind, Attachment, VolumeError, VolumeRow, VolumeWork,
};
pub use events::{EventFilter, EventRow, NewEvent};
pub use host::networks::{NetworkAssignError, NetworkRow, PortRow};

/// The store's file in the data directory.
pub const FILE: &str = "state.db";

/// Capacity of the cache of prepared statements: more than the daemon has.
const STATEMENTS: usize = 128;

/// The store could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file could not be opened or brought up to date.
    #[error("failed to open the store `{}`", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: rusqlite::Error,
    },
    /// The file is from a newer daemon.
    #[error("the store `{}` has version {version}; this daemon knows versions up to {known}", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// The version of the file.
        version: usize,
        /// The latest version that this daemon knows.
        known: usize,
    },
    /// A query failed.
    #[error("a query of the store failed")]
    Query(#[from] rusqlite::Error),
    /// A row holds a value that no version of this daemon wrote.
    #[error("the store holds a damaged row: {0}")]
    Damaged(String),
    /// A required row is missing.
    #[error("the store has no such row")]
    NoSuchRow,
    /// Another node, or a later daemon of this node, has claimed the sandbox.
    #[error("sandbox `{0}` was claimed by another daemon")]
    Fenced(SandboxId),
}

impl StoreError {
    /// Whether the store's disk is full.
    #[must_use]
    pub fn is_full_disk(&self) -> bool {
        let (Self::Open { source, .. } | Self::Query(source)) = self else { return false };
        source.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
    }
}

/// The store of one data directory.
pub struct Store {
    connection: Mutex<Connection>,
    /// The connection that writes events.
    lazy: Mutex<Connection>,
    node: NodeId,
}

impl Store {
    /// Opens the store in `data_dir`. Creates it or migrates it to the current version.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be opened, is damaged, or is from a newer daemon. The
    /// file is then unchanged.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let path = data_dir.join(FILE);
        let failed = |source| StoreError::Open { path: path.clone(), source };
        let mut connection = open(&path, "FULL").map_err(failed)?;
        migrations::run(&mut connection, &path)?;
        let node = desired::claims::node_of(&connection)?;
        let lazy = open(&path, "NORMAL").map_err(failed)?;
        // Make the file's directory entry durable, too.
        sync_directory(data_dir)
            .map_err(|error| failed(rusqlite::Error::ToSqlConversionFailure(Box::new(error))))?;
        Ok(Self { connection: Mutex::new(connection), lazy: Mutex::new(lazy), node })
    }

    /// Works with the connection. See [`blocking`].
    fn work<T>(&self, work: impl FnOnce(&mut Connection) -> T) -> T {
        blocking(|| work(&mut self.connection.lock()))
    }

    /// Works with the connection that writes events. See [`blocking`].
    fn log_work<T>(&self, work: impl FnOnce(&mut Connection) -> T) -> T {
        blocking(|| work(&mut self.lazy.lock()))
    }
}

fn open(path: &Path, synchronous: &str) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.execute_batch(&format!(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = {synchronous}; PRAGMA busy_timeout = 5000;
         PRAGMA foreign_keys = ON;"
    ))?;
    // Otherwise SQLite replans a cached statement whenever its parameters may make another plan
    // better.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    Ok(connection)
}

fn sync_directory(directory: &Path) -> std::io::Result<()> {
    std::fs::File::open(directory)?.sync_all()
}

/// Begins a transaction that may write: the rows that it reads stay unchanged until it commits.
fn immediate(connection: &mut Connection) -> Result<rusqlite::Transaction<'_>, StoreError> {
    Ok(connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?)
}

/// Turns "no row was changed" into an error: an update that changes no row is a bug or a race,
/// never a success.
fn changed_one(changed: usize) -> Result<(), StoreError> {
    if changed == 1 { Ok(()) } else { Err(StoreError::NoSuchRow) }
}

/// Parses the JSON of a column.
fn from_json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Damaged(error.to_string()))
}

/// Returns the JSON for a column: maps and lists of text, which can always be serialized.
fn to_json(value: &impl serde::Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Damaged(error.to_string()))
}

/// Maps the result of parsing a column to a [`StoreError`].
fn parsed<T, E: std::error::Error>(result: Result<T, E>) -> Result<T, StoreError> {
    result.map_err(|error| StoreError::Damaged(error.to_string()))
}

/// The kind of row and the index of its identifying column, for the log.
#[derive(Clone, Copy)]
struct RowName(&'static str, usize);

/// The damaged rows that were already logged: some lists are read every few seconds.
static LOGGED: Mutex<BTreeSet<(&str, String)>> = Mutex::new(BTreeSet::new());

/// Returns the result of reading a row, or `None` if the row is damaged: one damaged row must not
/// hide the others. A daemon logs each damaged row once.
fn unless_damaged<T>(
    row: &rusqlite::Row<'_>,
    RowName(what, id): RowName,
    read: Result<T, StoreError>,
) -> Result<Option<T>, StoreError> {
    let damage = match read {
        Err(StoreError::Damaged(damage)) => damage,
        Err(StoreError::Query(
            error @ (rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::InvalidColumnType(..)),
        )) => error.to_string(),
        read => return read.map(Some),
    };
    let id: String = row.get(id).unwrap_or_default();
    if LOGGED.lock().insert((what, id.clone())) {
        tracing::error!(row = what, id, damage, "Skipped a damaged row");
    }
    Ok(None)
}

/// Returns all rows of a query that are not damaged.
fn sound_rows<T>(
    query: &mut rusqlite::Statement<'_>,
    parameters: impl rusqlite::Params,
    row_name: RowName,
    read: impl Fn(&rusqlite::Row<'_>) -> Result<T, StoreError>,
) -> Result<Vec<T>, StoreError> {
    let rows = query.query_map(parameters, |row| Ok(unless_damaged(row, row_name, read(row))))?;
    rows.filter_map(|row| row.map_err(StoreError::from).flatten().transpose()).collect()
}

/// Parses a column of secret names.
fn parse_secrets(text: &str) -> Result<Vec<bhatti_types::SecretName>, StoreError> {
    if text == "[]" {
        return Ok(Vec::new());
    }
    let names: Vec<String> = from_json(text)?;
    names.iter().map(|name| parsed(name.parse())).collect()
}

/// Returns secret names as the text of a column.
fn secrets_text(secrets: &[bhatti_types::SecretName]) -> Result<String, StoreError> {
    to_json(&secrets.iter().map(bhatti_types::SecretName::as_str).collect::<Vec<_>>())
}

/// Parses the two columns of a network specification.
fn network_spec(mode: &str, allow: &str) -> Result<bhatti_types::NetworkSpec, StoreError> {
    let (mode, allow) = (parsed(mode.parse())?, host::networks::allowance(allow)?);
    Ok(bhatti_types::NetworkSpec { mode, allow })
}

/// Refuses one more row if `of` already has `max` rows.
fn check_count(
    connection: &Connection,
    sql: &str,
    of: &str,
    what: &'static str,
    max: u32,
) -> Result<(), CountError> {
    let used: u32 = connection.prepare_cached(sql)?.query_row([of], |row| row.get(0))?;
    if used >= max {
        return Err(CountError::TooMany(QuotaExceeded::Count { what, used, max }));
    }
    Ok(())
}

/// A row would exceed its limit, or the store failed.
#[derive(Debug, thiserror::Error)]
pub enum CountError {
    /// The row would exceed the limit.
    #[error(transparent)]
    TooMany(QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<rusqlite::Error> for CountError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

/// Whether an error says that a row with this unique key already exists.
fn is_taken(error: &rusqlite::Error) -> bool {
    let code = error.sqlite_error().map(|error| error.extended_code);
    code == Some(rusqlite::ffi::SQLITE_CONSTRAINT_UNIQUE)
        || code == Some(rusqlite::ffi::SQLITE_CONSTRAINT_PRIMARYKEY)
}

/// Returns the current time in the store's format: RFC 3339, in UTC, to the microsecond.
fn now() -> String {
    let now = jiff::Timestamp::now();
    format!("{now:.6}")
}

#[cfg(test)]
mod tests {
    use rusqlite::StatementStatus::RePrepare;

    use super::*;

    #[test]
    fn query_is_planned_once_for_all_parameters() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path()).unwrap();
        let connection = store.connection.lock();
        let sql = "SELECT cpus FROM sandboxes WHERE owner = ?1 AND (id = ?2 OR name = ?2) \
            ORDER BY id = ?2 DESC LIMIT 1";

        for name in ["one", "two", "three"] {
            let mut query = connection.prepare_cached(sql).unwrap();
            assert!(!query.exists(["0000000000000000", name]).unwrap());
            assert_eq!(query.get_status(RePrepare), 0, "{name}");
        }
    }
}
