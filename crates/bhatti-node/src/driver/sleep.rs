//! From hot or warm to cold: the memory is saved, and the VM ends.
//!
//! The VMM ends only when the snapshot is on the disk. A VM that cannot be saved runs on.

use bhatti_engine::{Disks, SnapshotInfo, SnapshotRequest};
use bhatti_types::Report;
use tokio::time::Instant;
use tracing::{info, warn};

use super::access::Running;
use super::error::TransitionError;
use super::sandbox::Sandbox;
use super::saved::SNAPSHOT;
use super::state::State;
use super::steps::Step;
use super::wake::milliseconds;

impl Sandbox {
    /// From hot or warm to cold. With `sync`, the guest writes its disks first.
    pub(super) async fn sleep(&self, sync: bool) -> Result<(), TransitionError> {
        let Some(running) = self.access.running() else { return Ok(()) };
        // New users wait for the driver from here on.
        self.access.set(State::Warm(running.clone()));
        let saved = self.save_and_end(&running, sync).await;
        let state = match &saved {
            Ok(()) => State::Cold,
            Err(_) => self.state_with(&running).await,
        };
        self.access.set(state);
        saved
    }

    /// Saves an unused sandbox because another sandbox needs its memory.
    pub(super) async fn give_memory(&self) -> Result<(), TransitionError> {
        if !self.saves_memory() || self.access.idle_since().is_none() {
            return Ok(());
        }
        let given = self.sleep(false).await;
        if let Err(error) = &given {
            warn!(
                sandbox = %self.id,
                error = %Report(error),
                "Failed to save a sandbox whose memory is needed"
            );
        }
        given
    }

    /// Saves the sandbox because the daemon stops. A sandbox that cannot be saved runs on: its
    /// processes would be lost.
    pub(super) async fn sleep_for_shut_down(&self) -> Result<(), TransitionError> {
        if self.access.running().is_some() {
            self.require_saved_memory()?;
        }
        self.sleep(false).await
    }

    /// Refuses if the engine cannot save memory.
    pub(super) fn require_saved_memory(&self) -> Result<(), TransitionError> {
        let engine = self.shared.engine.capabilities();
        if engine.saves_memory {
            Ok(())
        } else {
            Err(TransitionError::NoSnapshots { engine: engine.name })
        }
    }

    /// Saves the memory into the sandbox's directory and ends the VM, whatever the sandbox's state.
    /// A VM that ran before and cannot be saved runs again.
    pub(super) async fn save_and_end(
        &self,
        running: &Running,
        sync: bool,
    ) -> Result<(), TransitionError> {
        let ran = running.vm.is_running().await?;
        if ran {
            self.pause_vm(running, sync).await?;
        }
        let began = Instant::now();
        match self.save_in_place(running).await {
            Ok(info) => {
                let took = began.elapsed();
                self.shared.metrics.save.observe(took.as_secs_f64());
                info!(
                    sandbox = %self.id,
                    kind = ?info.memory,
                    memory_bytes = info.memory_bytes,
                    save_ms = milliseconds(took),
                    "Sandbox saved"
                );
                Ok(())
            }
            Err(error) => {
                if ran && let Err(error) = self.resume_guest(running).await {
                    warn!(
                        sandbox = %self.id,
                        error = %Report(&error),
                        "Failed to resume a sandbox that could not be saved"
                    );
                }
                Err(error)
            }
        }
    }

    async fn save_in_place(&self, running: &Running) -> Result<SnapshotInfo, TransitionError> {
        let directory = self.directory();
        // A snapshot of a save that did not end the VM: the VM may have run since.
        self.saved().discard().await.map_err(TransitionError::Consume)?;
        let request = SnapshotRequest {
            directory: directory.join(SNAPSHOT),
            memory: None,
            disks: Disks::InPlace,
            copies: Vec::new(),
        };
        let info = running.vm.capture(&request).await?.finish().await?;
        self.reached(Step::Saved).await;
        self.shared.engine.kill(self.id, &directory).await.map_err(TransitionError::End)?;
        self.reached(Step::Ended).await;
        Ok(info)
    }
}
