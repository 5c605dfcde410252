//! The start of a daemon: rows and reality are brought together.
//!
//! ```text
//!  recover ──► files and rows are settled, every sandbox has a driver ──► the daemon listens
//!                    └─► for each sandbox, in its driver's own task: find its VMM, tell its guest ──► the driver serves requests
//! ```
//!
//! A request that comes before its sandbox was taken up waits in the driver's queue. A guest or VMM that does not answer keeps no other
//! sandbox waiting, nor the daemon.
//!
//! | row | VMM | what is done |
//! |---|---|---|
//! | creating | any | removed: whoever asked for it got no answer |
//! | destroyed | any | removed: that had begun |
//! | running | any, and its boot was interrupted ([`BootMark`]) | booted again from its disk |
//! | stopped or failed | any, and its boot was interrupted | ended; the state stays |
//! | running | there | taken up, with its memory and processes; paused ones stay so |
//! | running | gone, a snapshot is there whose VM never ran on | asleep: the next request wakes it |
//! | running | gone | failed, with that reason |
//! | stopped | there | stopped now: that had begun |
//! | stopped | gone | stays stopped |
//! | failed | any | stays failed |
//! | none, but marked as a spare | any | removed: nobody asked for it |
//! | none | any | left alone and reported: the store may be an older copy |

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bhatti_engine::AdoptError;
use bhatti_store::{SandboxRow, StoreError};
use bhatti_types::{FailReason, Report, SandboxId, SandboxState, Thermal};
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::admission::Admitted;
use crate::driver::access::Running;
use crate::driver::boot_mark::BootMark;
use crate::driver::saved::Saved;
use crate::driver::{self, Driver};
use crate::{Node, Shared, pool};

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

/// The sandboxes of an earlier daemon, on their way.
pub struct Recovery(JoinSet<()>);

impl Recovery {
    /// Waits until all have been taken up, or given up.
    pub async fn finished(self) {
        self.0.join_all().await;
    }

    /// Has it go on without being waited for.
    pub fn detach(mut self) {
        self.0.detach_all();
    }
}

/// A sandbox that is being taken up or removed, until this is dropped.
struct TakingUp(Arc<Shared>);

impl TakingUp {
    fn begin(shared: &Arc<Shared>) -> Self {
        shared.taking_up.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(shared))
    }
}

impl Drop for TakingUp {
    fn drop(&mut self) {
        self.0.taking_up.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Node {
    /// Settles what an earlier daemon has left, and begins to take up its sandboxes. May be interrupted at any point and run again.
    ///
    /// # Errors
    ///
    /// Returns an error if the store or a directory cannot be read. A sandbox that makes trouble of its own is reported and left.
    pub async fn recover(&self) -> Result<Recovery, RecoverError> {
        let rows = self.shared.store.list_all_sandboxes()?;
        let mut tasks = JoinSet::new();
        let ids = self.shared.store.list_all_sandbox_ids()?;
        let known = ids.iter().map(|(id, _)| id.to_string()).collect();
        self.look_at_unknown_directories(&known, &mut tasks).map_err(RecoverError::List)?;
        self.finish_damaged_removals(&ids, &rows, &mut tasks);
        let named = self.shared.store.snapshot_ids()?.into_iter().collect();
        self.shared.snapshots.settle(&named).await.map_err(RecoverError::List)?;
        let mut found = Vec::new();
        for row in rows {
            match row.state {
                SandboxState::Creating | SandboxState::Destroyed => {
                    if row.state == SandboxState::Creating {
                        // Nobody was told of it. It is not listed from now on, and its name is free.
                        let noted =
                            self.shared.store.set_sandbox_state(row.id, SandboxState::Destroyed);
                        if let Err(error) = noted {
                            warn!(sandbox = %row.id, error = %Report(&error), "Failed to note that a sandbox is removed");
                        }
                    }
                    let (node, counted) = (self.clone(), TakingUp::begin(&self.shared));
                    tasks.spawn(async move {
                        node.finish_removal(&row).await;
                        drop(counted);
                    });
                }
                SandboxState::Running | SandboxState::Stopped => {
                    let driver = Driver::register(&self.shared, &row, row.state);
                    // Before anything new is admitted. One that turns out to have no VM gives it back.
                    let memory = self.shared.admission.count(row.spec.memory);
                    found.push((row, driver, memory, TakingUp::begin(&self.shared)));
                }
                SandboxState::Failed(_) => {
                    let driver = Driver::register(&self.shared, &row, row.state);
                    tokio::spawn(async move {
                        end_failed(&driver).await;
                        driver.run().await;
                    });
                }
            }
        }
        let node = self.clone();
        tasks.spawn(async move {
            let shared = &node.shared;
            if let Err(error) = shared.bases.recover(shared).await {
                warn!(%error, "Failed to look for unfinished base snapshots");
            }
        });
        let node = self.clone();
        tasks.spawn(async move {
            // Before any sandbox goes on: the rules may have been lost.
            node.shared.settle_networks().await;
            let mut taking_up = JoinSet::new();
            for (row, driver, memory, counted) in found {
                taking_up.spawn(async move {
                    take_up(row, driver, memory).await;
                    drop(counted);
                });
            }
            taking_up.join_all().await;
        });
        Ok(Recovery(tasks))
    }

    /// How many sandboxes of an earlier daemon have not been taken up or removed yet.
    #[must_use]
    pub fn taking_up(&self) -> usize {
        self.shared.taking_up.load(Ordering::SeqCst)
    }

    async fn finish_removal(&self, row: &SandboxRow) {
        let removed = self.shared.engine.remove(row.id, &self.shared.directory(row.id)).await;
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

    /// Removes what is left of sandboxes that were being destroyed, and whose rows are damaged.
    fn finish_damaged_removals(
        &self,
        ids: &[(SandboxId, bool)],
        rows: &[SandboxRow],
        tasks: &mut JoinSet<()>,
    ) {
        let is_sound = |id: SandboxId| rows.iter().any(|row| row.id == id);
        let destroyed = ids.iter().filter(|(id, is_destroyed)| *is_destroyed && !is_sound(*id));
        for &(id, _) in destroyed {
            let counted = TakingUp::begin(&self.shared);
            tasks.spawn(async move {
                if let Err(error) = driver::remove(&counted.0, id).await {
                    error!(sandbox = %id, error = %Report(&error), "Failed to remove what is left of a sandbox");
                }
            });
        }
    }

    fn look_at_unknown_directories(
        &self,
        known: &HashSet<String>,
        tasks: &mut JoinSet<()>,
    ) -> io::Result<()> {
        for entry in std::fs::read_dir(&self.shared.config.sandboxes_dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if known.contains(&name) {
                continue;
            }
            match name.parse() {
                Ok(id) if pool::is_spare(&entry.path()) => {
                    let counted = TakingUp::begin(&self.shared);
                    tasks.spawn(async move { pool::remove(&counted.0, id).await });
                }
                _ => {
                    warn!(directory = %entry.path().display(), "Found a sandbox that the store does not know; it is left alone");
                }
            }
        }
        Ok(())
    }
}

/// Brings a sandbox and its VMM together, and has its driver serve requests from then on.
async fn take_up(row: SandboxRow, driver: Driver, memory: Admitted) {
    let boot_mark = BootMark::find(&driver.directory());
    let boot_with = match boot_mark {
        Some(mark) => end_boot_mark(&row, &driver, mark, memory).await,
        None => {
            adopt(&row, &driver, memory).await;
            None
        }
    };
    let keep_hot = row.spec.keep_hot && row.state == SandboxState::Running;
    let stopping = row.state == SandboxState::Stopped && driver.access.running().is_some();
    tokio::spawn(async move {
        if let Some(memory) = boot_with
            && let Err(error) = driver.boot_again(Some(memory)).await
        {
            warn!(sandbox = %driver.id, error = %Report(&error), "Failed to boot a sandbox again");
            driver.fail(FailReason::VmmUnusable);
        }
        if stopping && let Err(error) = driver.stop().await {
            error!(sandbox = %driver.id, error = %Report(&error), "Failed to finish a stop");
        }
        if keep_hot && let Err(error) = driver.wake().await {
            warn!(sandbox = %driver.id, error = %Report(&error), "Failed to wake a sandbox that is to be hot");
        }
        driver.run().await;
    });
}

/// Adopts the sandbox's VMM, or finds the snapshot to restore.
async fn adopt(row: &SandboxRow, driver: &Driver, memory: Admitted) {
    let place = driver.directory();
    match driver.shared.engine.adopt(row.id, &place).await {
        Ok(vm) => {
            let running = Running::new(vm, &row.agent_token, memory);
            driver.access.set_state(SandboxState::Running);
            take_up_running(driver, running).await;
        }
        Err(AdoptError::Gone) if is_saved(&place) => {
            drop(memory);
            info!(sandbox = %row.id, state = row.state.as_str(), "Found a sandbox asleep");
        }
        // It can still be booted, and says so when it is started.
        Err(AdoptError::Gone) if row.state == SandboxState::Stopped => drop(memory),
        Err(error) => {
            drop(memory);
            let reason = match &error {
                AdoptError::Gone => FailReason::VmmMissing,
                AdoptError::Broken { .. } => FailReason::VmmUnusable,
            };
            warn!(sandbox = %row.id, error = %Report(&error), "Could not take up a sandbox");
            driver.fail(reason);
        }
    }
}

/// Ends the VM of a sandbox whose boot an earlier daemon did not finish. Returns the memory to
/// boot it with, if it is to run.
async fn end_boot_mark(
    row: &SandboxRow,
    driver: &Driver,
    mark: BootMark,
    memory: Admitted,
) -> Option<Admitted> {
    let place = driver.directory();
    info!(sandbox = %row.id, state = row.state.as_str(), "Found a sandbox with an interrupted boot");
    if let Err(error) = driver.shared.engine.kill(row.id, &place).await {
        warn!(sandbox = %row.id, error = %Report(&error), "Failed to end a sandbox's VM");
        driver.fail(FailReason::VmmUnusable);
        return None;
    }
    if row.state == SandboxState::Running {
        // The boot that follows clears the mark.
        return Some(memory);
    }
    mark.clear();
    is_saved(&place);
    None
}

/// Ends the VM of a failed sandbox whose boot an earlier daemon did not finish.
async fn end_failed(driver: &Driver) {
    let place = driver.directory();
    let Some(mark) = BootMark::find(&place) else { return };
    match driver.shared.engine.kill(driver.id, &place).await {
        Ok(()) => mark.clear(),
        Err(error) => {
            warn!(sandbox = %driver.id, error = %Report(&error), "Failed to end a sandbox's VM");
        }
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
        driver.listen(&running);
        driver.forget_consumed().await;
    }
}

/// Whether a sandbox without a VM has a snapshot to go on from.
fn is_saved(directory: &Path) -> bool {
    let saved = Saved::new(directory.to_owned());
    saved.settle().unwrap_or_else(|error| {
        warn!(path = %directory.display(), %error, "Failed to settle a sandbox's snapshot");
        saved.is_there()
    })
}

#[cfg(test)]
mod tests;
