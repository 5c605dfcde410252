//! The start of a daemon: rows and reality are brought together.
//!
//! | row | VMM | what is done |
//! |---|---|---|
//! | creating | any | removed: whoever asked for it got no answer |
//! | destroyed | any | removed: that had begun |
//! | running | there | taken up, with its memory and processes |
//! | running | gone | failed, with that reason |
//! | failed | any | stays failed |
//! | none | any | left alone and reported: the store may be an older copy |

use std::collections::HashSet;
use std::io;

use bhatti_engine::AdoptError;
use bhatti_store::{SandboxRow, StoreError};
use bhatti_types::{FailReason, Report, SandboxState};
use tracing::{error, info, warn};

use crate::Supervisor;
use crate::driver::{Driver, directory};

/// The sandboxes of an earlier daemon could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The sandboxes' directory cannot be read.
    #[error("failed to list the sandboxes' directory")]
    List(#[source] io::Error),
}

impl Supervisor {
    /// Takes up the sandboxes of an earlier daemon. May be interrupted at any point and run again.
    ///
    /// # Errors
    ///
    /// Returns an error if the store or the directory cannot be read. A sandbox that makes trouble of its own is reported and left.
    pub async fn recover(&self) -> Result<(), RecoverError> {
        let rows = self.shared.store.list_sandboxes(None)?;
        self.report_unknown_directories(&rows)?;
        for row in rows {
            match row.state {
                SandboxState::Creating | SandboxState::Destroyed => self.finish_removal(&row).await,
                SandboxState::Running => self.take_up(&row).await?,
                SandboxState::Failed(_) => drop(tokio::spawn(
                    Driver::register(&self.shared, row.id, row.state, None).run(),
                )),
            }
        }
        Ok(())
    }

    async fn finish_removal(&self, row: &SandboxRow) {
        let removed = self.shared.engine.remove(row.id, &directory(&self.shared, row.id)).await;
        if let Err(left) = removed {
            error!(sandbox = %row.id, error = %Report(&left), "Failed to remove what is left of a sandbox");
            return;
        }
        match self.shared.store.delete_sandbox(row.id) {
            Ok(()) => {
                info!(sandbox = %row.id, state = row.state.as_str(), "Removed what was left of a sandbox");
            }
            Err(error) => {
                error!(sandbox = %row.id, error = %Report(&error), "Failed to forget a sandbox");
            }
        }
    }

    async fn take_up(&self, row: &SandboxRow) -> Result<(), StoreError> {
        let driver = match self.shared.engine.adopt(row.id, &directory(&self.shared, row.id)).await
        {
            Ok(vm) => {
                info!(sandbox = %row.id, "Took up a running sandbox");
                Driver::register(&self.shared, row.id, SandboxState::Running, Some(vm))
            }
            Err(error) => {
                let reason = match &error {
                    AdoptError::Gone => FailReason::VmmMissing,
                    AdoptError::Broken { .. } => FailReason::VmmUnusable,
                };
                warn!(sandbox = %row.id, error = %Report(&error), "Could not take up a sandbox");
                let failed = SandboxState::Failed(reason);
                self.shared.store.set_sandbox_state(row.id, failed)?;
                Driver::register(&self.shared, row.id, failed, None)
            }
        };
        drop(tokio::spawn(driver.run()));
        Ok(())
    }

    fn report_unknown_directories(&self, rows: &[SandboxRow]) -> Result<(), RecoverError> {
        let known: HashSet<String> = rows.iter().map(|row| row.id.to_string()).collect();
        let directory = &self.shared.config.sandboxes_dir;
        for entry in std::fs::read_dir(directory).map_err(RecoverError::List)? {
            let name =
                entry.map_err(RecoverError::List)?.file_name().to_string_lossy().into_owned();
            if !known.contains(&name) {
                warn!(directory = %directory.join(name).display(), "Found a sandbox that the store does not know; it is left alone");
            }
        }
        Ok(())
    }
}
