//! Recovery at the start of a daemon: brings the store's rows in line with the VMMs and files of
//! this host.
//!
//! ```text
//!  recover ──► files and rows are settled, every sandbox has a driver ──► the daemon listens
//!                 └─► for each sandbox, in its driver's own task: find its VMM, notify its guest
//!                       └─► the driver serves requests
//! ```
//!
//! A request that arrives before its sandbox is adopted waits in the driver's queue. A guest or
//! VMM that does not answer delays no other sandbox, and not the daemon.
//!
//! | row | VMM | action |
//! |---|---|---|
//! | creating | any | removed: its caller got no answer |
//! | destroyed | any | removed: the removal had begun |
//! | running | any, and its boot was interrupted ([`BootMark`]) | booted again from its disk |
//! | stopped or failed | any, and its boot was interrupted | ended; the state stays |
//! | running | exists | adopted, with its memory and processes; a paused VM stays paused |
//! | running | gone, with a snapshot from which no VM has run | asleep: the next request wakes it |
//! | running | gone | failed, with that reason |
//! | stopped | exists | stopped now: the stop had begun |
//! | stopped | gone | stays stopped |
//! | failed | any | stays failed |
//! | none, but marked as a spare | any | removed: no request waits for it |
//! | none | any | left alone and reported: the store may be an older copy |

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bhatti_engine::AdoptError;
use bhatti_host::blocking;
use bhatti_store::{Claim, SandboxRow, StoreError};
use bhatti_types::{FailReason, Report, SandboxId, SandboxState};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::admission::Admitted;
use crate::driver::access::Running;
use crate::driver::boot_mark::BootMark;
use crate::driver::saved::Saved;
use crate::driver::state::State;
use crate::driver::{self, Driver, Sandbox, Startup};
use crate::{Node, Shared, pool};

/// The sandboxes of an earlier daemon could not be recovered.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A directory cannot be read.
    #[error("failed to list the daemon's directories")]
    List(#[source] io::Error),
}

/// The recovery of an earlier daemon's sandboxes, in progress.
pub struct Recovery(JoinSet<()>);

impl Recovery {
    /// Waits until every sandbox is adopted, removed or failed.
    pub async fn finished(self) {
        self.0.join_all().await;
    }

    /// Lets the recovery continue in the background.
    pub fn detach(mut self) {
        self.0.detach_all();
    }
}

/// Counts a sandbox that is being adopted or removed, until this is dropped.
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
    /// Settles the files and rows that an earlier daemon left, and begins to adopt its sandboxes.
    /// May be interrupted at any point and run again.
    ///
    /// # Errors
    ///
    /// Returns an error if the store or a directory cannot be read. A sandbox with a problem of
    /// its own is logged and left alone.
    pub async fn recover(&self) -> Result<Recovery, RecoverError> {
        // Before the rows are read: an earlier daemon cannot write them any more.
        let claims = self.shared.store.claim_sandboxes()?;
        let rows = self.shared.store.list_all_sandboxes()?;
        let mut tasks = JoinSet::new();
        let node = self.clone();
        tasks.spawn(async move { node.settle_images() });
        let ids = self.shared.store.list_all_sandbox_ids()?;
        let known = ids.iter().map(|(id, _)| id.to_string()).collect();
        blocking(|| self.look_at_unknown_directories(&known, &mut tasks))
            .map_err(RecoverError::List)?;
        self.finish_damaged_removals(&ids, &rows, &mut tasks);
        let named = self.shared.store.snapshot_ids()?.into_iter().collect();
        self.shared.snapshots.settle(&named).await.map_err(RecoverError::List)?;
        let mut found = Vec::new();
        for row in rows {
            // The rows of other nodes are not this node's to change.
            let Some(claim) = claims.get(&row.id).copied() else { continue };
            match row.state {
                SandboxState::Creating | SandboxState::Destroyed => {
                    self.finish_removal(&row, claim, &mut tasks);
                }
                SandboxState::Running | SandboxState::Stopped => {
                    // The VM is looked for in a task. Until then the sandbox is as if it had none.
                    let state = if row.state == SandboxState::Running {
                        State::Cold
                    } else {
                        State::Stopped
                    };
                    let driver = Driver::register(&self.shared, &row, claim, state);
                    // Before anything new is admitted. A sandbox without a VM gives it back.
                    let memory = self.shared.admission.count(row.spec.memory);
                    found.push((row, driver, memory, TakingUp::begin(&self.shared)));
                }
                SandboxState::Failed(reason) => {
                    // Its VM may be alive. The memory is given back when the VM is ended.
                    let memory = self.shared.admission.count(row.spec.memory);
                    let state = State::Failed(reason, Some(Arc::new(memory)));
                    let driver = Driver::register(&self.shared, &row, claim, state);
                    let startup: Startup =
                        Box::new(move |sandbox| Box::pin(end_failed(sandbox, reason)));
                    tokio::spawn(driver.starting_with(startup).run());
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
            // Before any sandbox continues, because the rules may have been lost.
            node.shared.settle_networks().await;
            let mut taking_up = Vec::new();
            for (row, driver, memory, counted) in found {
                let (done, is_done) = oneshot::channel::<()>();
                let startup: Startup = Box::new(move |sandbox| {
                    Box::pin(async move {
                        let boot_with = take_up(&row, sandbox, memory).await;
                        drop((counted, done));
                        continue_lifecycle(&row, sandbox, boot_with).await;
                    })
                });
                tokio::spawn(driver.starting_with(startup).run());
                taking_up.push(is_done);
            }
            for is_done in taking_up {
                // An error is the usual end: the sender is dropped, also by a panic.
                drop(is_done.await);
            }
        });
        Ok(Recovery(tasks))
    }

    /// Returns the number of an earlier daemon's sandboxes that are not adopted or removed yet.
    #[must_use]
    pub fn taking_up(&self) -> usize {
        self.shared.taking_up.load(Ordering::SeqCst)
    }

    /// Removes a sandbox whose creation or destruction an earlier daemon did not finish. If that
    /// fails, the sandbox's driver tries again.
    fn finish_removal(&self, row: &SandboxRow, claim: Claim, tasks: &mut JoinSet<()>) {
        if row.state == SandboxState::Creating {
            // Its caller got no answer. From now on it is not listed, and its name is free.
            let noted = self.shared.store.set_sandbox_state(&claim, SandboxState::Destroyed);
            if let Err(error) = noted {
                warn!(sandbox = %row.id, error = %Report(&error), "Failed to record that a sandbox is being removed");
            }
        }
        // The VM may be alive until it is removed.
        let memory = Arc::new(self.shared.admission.count(row.spec.memory));
        let driver = Driver::register(&self.shared, row, claim, State::Destroying(Some(memory)));
        let counted = TakingUp::begin(&self.shared);
        let (done, is_done) = oneshot::channel::<()>();
        let startup: Startup = Box::new(move |sandbox| {
            Box::pin(async move {
                if let Err(error) = sandbox.destroy().await {
                    error!(
                        sandbox = %sandbox.id,
                        error = %Report(&error),
                        "Failed to remove the remains of a sandbox; the daemon tries again"
                    );
                }
                drop((counted, done));
            })
        });
        tokio::spawn(driver.starting_with(startup).run());
        tasks.spawn(async move { drop(is_done.await) });
    }

    /// Finishes the removal of sandboxes that were being destroyed and whose rows are damaged.
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
                if let Err(error) = driver::remove(&counted.0, id, None).await {
                    error!(sandbox = %id, error = %Report(&error), "Failed to remove the remains of a sandbox");
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

/// Connects a sandbox with its VMM. Returns the memory to boot it with, if an earlier daemon's boot
/// was interrupted.
async fn take_up(row: &SandboxRow, sandbox: &Sandbox, memory: Admitted) -> Option<Admitted> {
    match BootMark::find(&sandbox.directory()) {
        Some(mark) => end_interrupted_boot(row, sandbox, mark, memory).await,
        None => {
            adopt(row, sandbox, memory).await;
            None
        }
    }
}

/// Finishes what an earlier daemon began: a boot, a stop. Wakes a sandbox that stays hot.
async fn continue_lifecycle(row: &SandboxRow, sandbox: &Sandbox, boot_with: Option<Admitted>) {
    if let Some(memory) = boot_with
        && let Err(error) = sandbox.boot_again(Some(memory)).await
    {
        warn!(sandbox = %sandbox.id, error = %Report(&error), "Failed to boot a sandbox again");
        sandbox.fail(FailReason::VmmUnusable).await;
    }
    if row.state == SandboxState::Stopped
        && sandbox.access.running().is_some()
        && let Err(error) = sandbox.stop().await
    {
        error!(sandbox = %sandbox.id, error = %Report(&error), "Failed to finish a stop");
    }
    if row.spec.keep_hot
        && row.state == SandboxState::Running
        && sandbox.access.state() == SandboxState::Running
        && let Err(error) = sandbox.wake().await
    {
        warn!(
            sandbox = %sandbox.id,
            error = %Report(&error),
            "Failed to wake a sandbox that is kept hot"
        );
    }
}

/// Adopts the sandbox's VMM, or finds the snapshot to restore.
async fn adopt(row: &SandboxRow, sandbox: &Sandbox, memory: Admitted) {
    let directory = sandbox.directory();
    match sandbox.shared.engine.adopt(row.id, &directory).await {
        Ok(vm) => take_up_running(sandbox, Running::new(vm, &row.agent_token, memory)).await,
        Err(AdoptError::Gone) if is_saved(&directory) => {
            info!(sandbox = %row.id, state = row.state.as_str(), "Found a saved sandbox");
        }
        // It can still be booted. Starting it without `cold_boot` fails with the reason.
        Err(AdoptError::Gone) if row.state == SandboxState::Stopped => {}
        Err(error) => {
            let reason = match &error {
                AdoptError::Gone => FailReason::VmmMissing,
                AdoptError::Broken { .. } => FailReason::VmmUnusable,
            };
            warn!(sandbox = %row.id, error = %Report(&error), "Failed to take up a sandbox");
            // The VMM may be alive until it is ended, so its memory is reserved until then.
            sandbox.access.set(State::Failed(reason, Some(Arc::new(memory))));
            sandbox.fail(reason).await;
        }
    }
}

/// Ends the VM of a sandbox whose boot an earlier daemon did not finish. Returns the memory for
/// another boot, if the sandbox's state is running.
async fn end_interrupted_boot(
    row: &SandboxRow,
    sandbox: &Sandbox,
    mark: BootMark,
    memory: Admitted,
) -> Option<Admitted> {
    let directory = sandbox.directory();
    info!(
        sandbox = %row.id,
        state = row.state.as_str(),
        "Found a sandbox with an interrupted boot"
    );
    if let Err(error) = sandbox.shared.engine.kill(row.id, &directory).await {
        warn!(sandbox = %row.id, error = %Report(&error), "Failed to end a sandbox's VM");
        let reason = FailReason::VmmUnusable;
        sandbox.access.set(State::Failed(reason, Some(Arc::new(memory))));
        sandbox.fail(reason).await;
        return None;
    }
    if row.state == SandboxState::Running {
        // The boot that follows clears the mark.
        return Some(memory);
    }
    mark.clear();
    is_saved(&directory);
    None
}

/// Ends the VM that a failed sandbox may have: of a boot that an earlier daemon did not finish, or
/// of a row that could not be written.
async fn end_failed(sandbox: &Sandbox, reason: FailReason) {
    let directory = sandbox.directory();
    match sandbox.shared.engine.kill(sandbox.id, &directory).await {
        Ok(()) => {
            if let Some(mark) = BootMark::find(&directory) {
                mark.clear();
            }
            sandbox.access.set(State::Failed(reason, None));
        }
        Err(error) => {
            warn!(sandbox = %sandbox.id, error = %Report(&error), "Failed to end a sandbox's VM");
        }
    }
}

/// Takes up a VM that runs or is paused. An earlier daemon may have died while the guest was
/// suspended, so the guest is told to go on.
async fn take_up_running(sandbox: &Sandbox, running: Running) {
    let runs = running.vm.is_running().await;
    let is_paused = matches!(runs, Ok(false));
    let activity = if is_paused { "warm" } else { "hot" };
    info!(sandbox = %sandbox.id, activity, "Adopted a sandbox");
    let connected = async {
        sandbox.shared.enforce_network(sandbox.owner, sandbox.address).await?;
        sandbox.connect_network().await
    };
    if let Err(error) = connected.await {
        error!(
            sandbox = %sandbox.id,
            error = %Report(&error),
            "Failed to connect the network of a sandbox that was taken up"
        );
        sandbox.shared.disconnect_network(sandbox.id).await;
    }
    if is_paused {
        sandbox.access.set(State::Warm(running));
        return;
    }
    sandbox.access.set(State::Hot(running.clone()));
    sandbox.tell_woken(&running).await;
    sandbox.listen(&running);
    sandbox.forget_consumed().await;
}

/// Returns whether a sandbox without a VM has a snapshot to restore.
fn is_saved(directory: &Path) -> bool {
    let saved = Saved::new(directory.to_owned());
    saved.settle().unwrap_or_else(|error| {
        warn!(path = %directory.display(), %error, "Failed to settle a sandbox's snapshot");
        saved.is_there()
    })
}

#[cfg(test)]
mod tests;
