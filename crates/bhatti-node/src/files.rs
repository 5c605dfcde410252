//! Files of this host that the node removes.

use std::io;
use std::path::Path;

use bhatti_types::Report;
use tracing::warn;

/// Removes a directory with all that is in it. `whose` names its owner for the log, such as "a
/// volume". A missing directory is no failure; others are logged, and the next daemon repeats the
/// removal.
pub(crate) async fn remove_or_warn(directory: &Path, whose: &str) {
    match tokio::fs::remove_dir_all(directory).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(
                path = %directory.display(),
                error = %Report(&error),
                "Failed to remove the files of {whose}"
            );
        }
        _ => {}
    }
}
