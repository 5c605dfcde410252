//! Damages a daemon's store.

use std::path::Path;

use crate::tool::std_command;

/// Runs SQL statements on the store of a data directory, with Python's `sqlite3`.
///
/// # Panics
///
/// Panics if a statement fails.
pub fn change_store(data_dir: &Path, sql: &str) {
    const RUN: &str =
        "import sqlite3, sys; sqlite3.connect(sys.argv[1]).executescript(sys.argv[2])";
    let store = data_dir.join("state.db");
    assert!(std_command("python3", &["-c", RUN, &store.to_string_lossy(), sql]), "{sql}");
}
