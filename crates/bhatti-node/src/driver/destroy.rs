//! Destroying a sandbox. If a step fails, the driver repeats the destruction, with longer and
//! longer pauses, until nothing is left. The VM's memory stays reserved until then.

use std::sync::Arc;

use bhatti_store::StoreError;
use bhatti_types::{Report, SandboxId, SandboxState, UserId};
use serde_json::json;
use tokio::time::{Duration, Instant};
use tracing::{info, warn};

use super::error::DestroyError;
use super::sandbox::Sandbox;
use super::state::{Kind, State};
use super::steps::Step;
use crate::Shared;

/// The pause before the second attempt. It doubles up to the longest one.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// When work that failed, such as a destruction, is tried again.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Retry {
    failures: u32,
    at: Option<Instant>,
}

impl Retry {
    /// Returns when the next attempt is due: at once before the first.
    pub(super) fn at(&self) -> Instant {
        self.at.unwrap_or_else(Instant::now)
    }

    /// Counts a failure.
    pub(super) fn note_failure(&mut self) {
        let pause = PAUSE_FIRST.saturating_mul(1 << self.failures.min(16)).min(PAUSE_MAX);
        self.failures += 1;
        self.at = Some(Instant::now() + pause);
    }
}

impl Sandbox {
    /// Destroys the sandbox, or goes on with it after a failure.
    pub(crate) async fn destroy(&self) -> Result<(), DestroyError> {
        if self.access.kind() != Kind::Destroying {
            self.begin_destruction().await?;
        }
        let directory = self.directory();
        let removed = self.shared.engine.remove(self.id, &directory).await;
        removed.map_err(DestroyError::Remove)?;
        self.reached(Step::Removed).await;
        // Nothing of the VM is left, so its memory is free, even if the row stays for now.
        self.access.set(State::Destroying(None));
        self.record_destruction();
        match self.shared.store.delete_sandbox(&self.claim) {
            Ok(()) | Err(StoreError::NoSuchRow) => {}
            Err(error) => return Err(DestroyError::Store(error)),
        }
        self.access.set(State::Destroyed);
        self.shared.registry.remove(self.id);
        if self.address.is_some() {
            self.shared.settle_networks().await;
        }
        info!(sandbox = %self.id, "Sandbox destroyed");
        Ok(())
    }

    async fn begin_destruction(&self) -> Result<(), DestroyError> {
        match self.write(SandboxState::Destroyed) {
            Ok(()) => {}
            // The sandbox is another daemon's.
            Err(error @ StoreError::Fenced(_)) => return Err(DestroyError::Store(error)),
            // A store on a full disk cannot note the destruction. The sandbox's files take the
            // space that the store lacks, so they are removed all the same. A daemon that dies in
            // between finds a running sandbox without a VM, which is true.
            Err(error) => {
                warn!(
                    sandbox = %self.id,
                    error = %Report(&error),
                    "Failed to record that a sandbox is being destroyed"
                );
            }
        }
        self.reached(Step::DestroyNoted).await;
        let running = self.access.running();
        self.access.set(State::Destroying(self.access.memory()));
        if let Some(running) = running {
            self.write_volumes(&running).await;
        }
        Ok(())
    }
}

/// Removes a sandbox that has no driver because its row is damaged: its VMM, its files, its row.
/// If a step fails, the row stays, and the request can be repeated.
pub(crate) async fn remove(
    shared: &Arc<Shared>,
    id: SandboxId,
    owner: Option<UserId>,
) -> Result<(), DestroyError> {
    let claim = match shared.store.claim(id) {
        // A concurrent request destroyed the sandbox.
        Err(StoreError::NoSuchRow) => return Err(DestroyError::AlreadyGone),
        claim => claim.map_err(DestroyError::Store)?,
    };
    if claim.node != shared.store.node() {
        return Err(DestroyError::Store(StoreError::Fenced(id)));
    }
    let removed = shared.engine.remove(id, &shared.directory(id)).await;
    removed.map_err(DestroyError::Remove)?;
    if let Some(owner) = owner {
        // The event needs the name, which is in the row.
        shared.control.record("sandbox.destroyed", owner, id, json!({}));
    }
    match shared.store.delete_sandbox(&claim) {
        Err(StoreError::NoSuchRow) => return Err(DestroyError::AlreadyGone),
        deleted => deleted.map_err(DestroyError::Store)?,
    }
    shared.settle_networks().await;
    info!(sandbox = %id, "Sandbox destroyed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_between_attempts_grow_up_to_a_limit() {
        let mut retry = Retry::default();
        assert_eq!(retry.at(), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..20 {
            retry.note_failure();
            pauses.push((retry.at() - Instant::now()).as_secs());
        }
        assert_eq!(pauses[..5], [1, 2, 4, 8, 16]);
        assert_eq!(pauses[19], PAUSE_MAX.as_secs());
    }
}
