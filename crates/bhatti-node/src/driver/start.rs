//! Starting a sandbox that was stopped, or, by booting, one that failed.

use bhatti_types::{SandboxState, Thermal};
use serde_json::json;
use tokio::time::Instant;

use super::error::TransitionError;
use super::sandbox::Sandbox;
use super::state::{Kind, State};
use super::steps::Step;

impl Sandbox {
    /// Starts the sandbox with its memory. An engine that cannot save memory boots it.
    pub(super) async fn start(&self) -> Result<(), TransitionError> {
        if self.access.running().is_some() {
            self.write(SandboxState::Running)?;
            return self.wake().await;
        }
        if !self.saves_memory() {
            return self.cold_boot().await;
        }
        let was_stopped = self.access.kind() == Kind::Stopped;
        self.write(SandboxState::Running)?;
        self.reached(Step::StartNoted).await;
        // Requests wait for this start from here on, instead of being refused.
        self.access.set(State::Cold);
        let began = Instant::now();
        let woken = self.wake_cold().await;
        self.note_wake(Thermal::Cold, began, &woken);
        if woken.is_ok() {
            self.record("sandbox.started", json!({ "cold_boot": false }));
        } else if was_stopped {
            self.access.set(State::Stopped);
            self.write(SandboxState::Stopped)?;
        }
        woken
    }

    /// Boots the sandbox from its disk. Its memory is lost.
    pub(super) async fn cold_boot(&self) -> Result<(), TransitionError> {
        self.boot_again(None).await?;
        self.breaker.note(&Ok(()));
        self.record("sandbox.started", json!({ "cold_boot": true }));
        Ok(())
    }

    /// Sets whether the sandbox stays hot, and makes it hot then.
    pub(super) async fn set_keep_hot(&self, keep_hot: bool) -> Result<(), TransitionError> {
        self.shared.store.set_sandbox_keep_hot(self.id, keep_hot)?;
        self.access.set_keep_hot(keep_hot);
        if keep_hot && self.access.state() == SandboxState::Running {
            return self.wake().await;
        }
        Ok(())
    }
}
