//! SQLite: what the daemon must not forget.
//!
//! One file, `<data dir>/state.db`, in WAL mode; one module per table. Every call is one transaction. Calls block on disk for a moment:
//! call them from a blocking task, or where a moment does not matter.
//!
//! A commit survives the death of the daemon at any point. Rows describe VMs, which do not survive the machine, so commits are not
//! flushed one by one (`synchronous = NORMAL`): a power cut may lose the last ones, never the file's soundness.

mod migrations;
mod sandboxes;
mod snapshots;
mod users;

use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rusqlite::Connection;

pub use sandboxes::{InsertError, NewSandbox, SandboxRow};
pub use snapshots::{SnapshotInsertError, SnapshotRow};
pub use users::{UserInsertError, UserRow};

/// The store's file in the data directory.
pub const FILE: &str = "state.db";

/// The store could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file could not be opened or brought up to date.
    #[error("failed to open the store `{}`", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The file is from a newer daemon.
    #[error("the store `{}` has version {version}; this daemon knows versions up to {known}", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: usize,
        /// The latest version that is known.
        known: usize,
    },
    /// A query failed.
    #[error("the store failed")]
    Query(#[from] rusqlite::Error),
    /// A row holds something that no version of this daemon wrote.
    #[error("the store holds a damaged row: {0}")]
    Damaged(String),
    /// A row that had to be there is not.
    #[error("the store has no such row")]
    NoSuchRow,
}

/// The store of one data directory.
pub struct Store {
    connection: Mutex<Connection>,
}

impl Store {
    /// Opens the store in `data_dir`, making it or bringing it up to date.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be opened, is damaged, or is from a newer daemon. It is then as it was.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let path = data_dir.join(FILE);
        let opened = Connection::open(&path).and_then(|connection| {
            connection.execute_batch(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA busy_timeout = 5000;
                 PRAGMA foreign_keys = ON;",
            )?;
            Ok(connection)
        });
        let mut connection =
            opened.map_err(|source| StoreError::Open { path: path.clone(), source })?;
        migrations::run(&mut connection, &path)?;
        Ok(Self { connection: Mutex::new(connection) })
    }
}

/// Turns "nothing was changed" into an error: an update that hits no row is a bug or a race, never a success.
fn changed_one(changed: usize) -> Result<(), StoreError> {
    if changed == 1 { Ok(()) } else { Err(StoreError::NoSuchRow) }
}

/// The current time as the store keeps it: RFC 3339, in UTC, to the microsecond.
fn now() -> String {
    let now = jiff::Timestamp::now();
    format!("{now:.6}")
}
