//! The start of a daemon: rows and reality are brought together.
//!
//! | row | VMM | what is done |
//! |---|---|---|
//! | creating | any | removed: whoever asked for it got no answer |
//! | destroyed | any | removed: that had begun |
//! | running | there | taken up, with its memory and processes; paused ones stay so |
//! | running | gone, a snapshot is there | asleep: the next request wakes it |
//! | running | gone | failed, with that reason |
//! | stopped | there | stopped now: that had begun |
//! | stopped | gone | stays stopped |
//! | failed | any | stays failed |
//! | none, but marked as a spare | any | removed: nobody asked for it |
//! | none | any | left alone and reported: the store may be an older copy |

use std::collections::HashSet;
use std::io;
use std::path::Path;

use bhatti_engine::AdoptError;
use bhatti_store::{SandboxRow, StoreError};
use bhatti_types::{FailReason, Report, SandboxId, SandboxState, Thermal};
use tracing::{error, info, warn};

use crate::access::Running;
use crate::driver::{Driver, directory};
use crate::fork::FORKING;
use crate::snapshots::SAVING;
use crate::transition::{CONSUMED, SNAPSHOT};
use crate::{Supervisor, spares};

/// The sandboxes of an earlier daemon could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A directory cannot be read.
    #[error("failed to list the daemon's directories")]
    List(#[source] io::Error),
}

impl Supervisor {
    /// Takes up the sandboxes of an earlier daemon. May be interrupted at any point and run again.
    ///
    /// # Errors
    ///
    /// Returns an error if the store or a directory cannot be read. A sandbox that makes trouble of its own is reported and left.
    pub async fn recover(&self) -> Result<(), RecoverError> {
        let rows = self.shared.store.list_all_sandboxes()?;
        self.look_at_unknown_directories(&rows).await.map_err(RecoverError::List)?;
        let named = self.shared.store.list_snapshots(None)?.into_iter().map(|row| row.id).collect();
        self.settle_snapshots(&named).await.map_err(RecoverError::List)?;
        self.shared.templates.recover(&self.shared).await.map_err(RecoverError::List)?;
        self.settle_volumes().await.map_err(RecoverError::List)?;
        // Before any sandbox goes on: the rules may have been lost.
        self.shared.settle_networks().await;
        for row in rows {
            match row.state {
                SandboxState::Creating | SandboxState::Destroyed => self.finish_removal(&row).await,
                SandboxState::Running | SandboxState::Stopped => self.take_up(&row).await?,
                SandboxState::Failed(_) => {
                    drop(tokio::spawn(Driver::register(&self.shared, &row, row.state).run()));
                }
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
                if row.address.is_some() {
                    self.shared.settle_networks().await;
                }
                info!(sandbox = %row.id, state = row.state.as_str(), "Removed what was left of a sandbox");
            }
            Err(error) => {
                error!(sandbox = %row.id, error = %Report(&error), "Failed to forget a sandbox");
            }
        }
    }

    async fn take_up(&self, row: &SandboxRow) -> Result<(), StoreError> {
        let place = directory(&self.shared, row.id);
        let driver = match self.shared.engine.adopt(row.id, &place).await {
            Ok(vm) => {
                let admitted = self.shared.admission.count(row.spec.memory);
                let running = Running::new(vm, &row.agent_token, admitted);
                let driver = Driver::register(&self.shared, row, SandboxState::Running);
                take_up_running(&driver, running).await;
                driver
            }
            Err(AdoptError::Gone) if settle_snapshot(&place) => {
                info!(sandbox = %row.id, state = row.state.as_str(), "Found a sandbox asleep");
                Driver::register(&self.shared, row, row.state)
            }
            // It can still be booted, and says so when it is started.
            Err(AdoptError::Gone) if row.state == SandboxState::Stopped => {
                Driver::register(&self.shared, row, row.state)
            }
            Err(error) => {
                let reason = match &error {
                    AdoptError::Gone => FailReason::VmmMissing,
                    AdoptError::Broken { .. } => FailReason::VmmUnusable,
                };
                warn!(sandbox = %row.id, error = %Report(&error), "Could not take up a sandbox");
                let failed = SandboxState::Failed(reason);
                self.shared.store.set_sandbox_state(row.id, failed)?;
                let driver = Driver::register(&self.shared, row, failed);
                driver
                    .record("sandbox.failed", serde_json::json!({ "reason": reason.to_string() }));
                driver
            }
        };
        let keep_hot = row.spec.keep_hot && row.state == SandboxState::Running;
        let stopping = row.state == SandboxState::Stopped && driver.access.running().is_some();
        tokio::spawn(async move {
            if stopping && let Err(error) = driver.stop().await {
                error!(sandbox = %driver.id, error = %Report(&error), "Failed to finish a stop");
            }
            if keep_hot && let Err(error) = driver.wake().await {
                warn!(sandbox = %driver.id, error = %Report(&error), "Failed to wake a sandbox that is to be hot");
            }
            driver.run().await;
        });
        Ok(())
    }

    async fn look_at_unknown_directories(&self, rows: &[SandboxRow]) -> io::Result<()> {
        let known: HashSet<String> = rows.iter().map(|row| row.id.to_string()).collect();
        for entry in std::fs::read_dir(&self.shared.config.sandboxes_dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if known.contains(&name) {
                continue;
            }
            match name.parse() {
                Ok(id) if spares::is_spare(&entry.path()) => spares::remove(&self.shared, id).await,
                _ => {
                    warn!(directory = %entry.path().display(), "Found a sandbox that the store does not know; it is left alone");
                }
            }
        }
        Ok(())
    }

    /// What was being saved is finished if it is in a row, and else removed: whoever asked for it got no answer.
    async fn settle_snapshots(&self, named: &HashSet<SandboxId>) -> io::Result<()> {
        for entry in std::fs::read_dir(&self.shared.config.snapshots_dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let saved: Option<SandboxId> = name.strip_prefix(SAVING).and_then(|id| id.parse().ok());
            match saved {
                Some(id) if named.contains(&id) => {
                    tokio::fs::rename(entry.path(), entry.path().with_file_name(id.to_string()))
                        .await?;
                }
                None if !name.starts_with(FORKING) && !name.ends_with(".tmp") => {}
                _ => tokio::fs::remove_dir_all(entry.path()).await?,
            }
        }
        Ok(())
    }
}

/// Takes up a VM that runs or is paused. The daemon may have died while the guest stood still, and nobody else would tell it to go on.
async fn take_up_running(driver: &Driver, running: Running) {
    let runs = running.vm.is_running().await;
    let thermal = if matches!(runs, Ok(false)) { Thermal::Warm } else { Thermal::Hot };
    info!(sandbox = %driver.id, thermal = thermal.as_str(), "Took up a sandbox");
    let connected = async {
        driver.shared.enforce_network(driver.owner, driver.address).await?;
        driver.connect_network().await
    };
    if let Err(error) = connected.await {
        error!(sandbox = %driver.id, error = %Report(&error), "Failed to connect a sandbox that was taken up");
        driver.shared.disconnect_network(driver.id).await;
    }
    driver.access.set_vm(Some(running.clone()), thermal);
    if thermal == Thermal::Hot {
        driver.tell_woken(&running).await;
        driver.forget_consumed().await;
    }
}

/// Whether a sandbox without a VM has a snapshot to go on from. One that had been consumed, but whose VM never went on, is put back: the
/// engine refuses it if the disk has been written since.
fn settle_snapshot(directory: &Path) -> bool {
    let (snapshot, consumed) = (directory.join(SNAPSHOT), directory.join(CONSUMED));
    if !snapshot.exists()
        && consumed.exists()
        && let Err(error) = bhatti_host::durable::rename(&consumed, &snapshot)
    {
        warn!(path = %consumed.display(), %error, "Failed to put a snapshot back");
    }
    snapshot.exists()
}

#[cfg(test)]
mod tests;
