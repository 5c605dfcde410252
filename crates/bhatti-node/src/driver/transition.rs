//! From hot to cold and back.
//!
//! ```text
//!        suspend, pause          save, end
//!   hot ───────────────► warm ─────────────► cold
//!    ▲ ◄───────────────   │                    │
//!    │   resume, tell     │                    │ load, consume, resume, tell
//!    └────────────────────┴────────────────────┘
//! ```
//!
//! What fails leaves the sandbox where it was: a VM that could not be saved runs on, a snapshot that could not be loaded stays. A snapshot is
//! consumed before its VM runs, so it is never restored twice; a VMM ends only when the snapshot is on the disk.

use std::path::Path;
use std::time::Duration;

use bhatti_engine::{Disks, MemoryKind, SnapshotRequest, Vm};
use bhatti_types::{Denied, FailReason, Report, SandboxState, Thermal};
use serde_json::json;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use crate::driver::access::Running;
use crate::driver::saved::{SNAPSHOT, Saved};
use crate::driver::steps::Step;
use crate::driver::{Driver, TransitionError};
use crate::snapshots::SavedSandbox;
use crate::volumes::{self, MadeFrom};

/// How long a guest may take to stand still, without and with its disks.
const SUSPEND_LIMIT: Duration = Duration::from_secs(2);
const SYNC_LIMIT: Duration = Duration::from_secs(25);

/// How long a guest may take to say what it does.
const ACTIVITY_LIMIT: Duration = Duration::from_secs(1);

impl Driver {
    /// Makes the sandbox hot, if it is one that runs.
    pub(crate) async fn wake(&self) -> Result<(), TransitionError> {
        self.access.state().admit_use()?;
        let began = Instant::now();
        let (from, woken) = match (self.access.running(), self.access.thermal()) {
            (Some(_), Some(Thermal::Hot)) => return Ok(()),
            (Some(running), _) => (Thermal::Warm, self.resume(&running).await),
            (None, _) => {
                self.breaker.admit()?;
                (Thermal::Cold, self.wake_cold().await)
            }
        };
        self.note_wake(from, began, &woken);
        woken
    }

    fn note_wake(&self, from: Thermal, began: Instant, woken: &Result<(), TransitionError>) {
        let took = began.elapsed();
        self.breaker.note(woken);
        match woken {
            Ok(()) => {
                self.shared.metrics.woken(from, took);
                let detail = json!({ "from": from.as_str(), "wake_ms": ms(took) });
                self.record("thermal.woken", detail);
            }
            Err(TransitionError::Restore(error)) => {
                self.record("snapshot.refused", json!({ "error": error.to_string() }));
            }
            Err(error) => self.record("thermal.wake_failed", json!({ "error": error.to_string() })),
        }
    }

    /// Pauses the sandbox because somebody wants it so. The next request wakes it.
    pub(crate) async fn pause_as_asked(&self) -> Result<(), TransitionError> {
        self.access.state().admit_use()?;
        match self.access.running() {
            Some(running) if self.access.thermal() == Some(Thermal::Hot) => {
                self.pause(&running, false).await?;
                self.record("thermal.paused", json!({ "asked": true }));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Stops the sandbox until it is started.
    pub(crate) async fn stop(&self) -> Result<(), TransitionError> {
        match self.access.state() {
            SandboxState::Stopped => return Ok(()),
            state => state.admit_use()?,
        }
        self.shared.store.set_sandbox_state(self.id, SandboxState::Stopped)?;
        self.reached(Step::StopNoted).await;
        self.access.set_state(SandboxState::Stopped);
        let slept = if self.saves_memory() { self.sleep(true).await } else { self.end().await };
        if slept.is_err() {
            // Whatever the store says to it: a daemon that finds a stopped sandbox with a VM finishes the stop.
            self.access.set_state(SandboxState::Running);
            self.shared.store.set_sandbox_state(self.id, SandboxState::Running)?;
        }
        match &slept {
            Ok(()) => self.record("sandbox.stopped", json!({})),
            Err(error) => self.record("sandbox.stop_failed", json!({ "error": error.to_string() })),
        }
        slept
    }

    /// Starts a sandbox that was stopped, or, by booting, one that failed.
    pub(crate) async fn start(&self, cold_boot: bool) -> Result<(), TransitionError> {
        let before = self.access.state();
        if self.access.running().is_some() && before != SandboxState::Creating {
            if cold_boot {
                return Err(Denied::Running.into());
            }
            // Never another VM beside the one that is there.
            self.shared.store.set_sandbox_state(self.id, SandboxState::Running)?;
            self.access.set_state(SandboxState::Running);
            return self.wake().await;
        }
        match before {
            SandboxState::Failed(_) if cold_boot => {}
            SandboxState::Stopped | SandboxState::Running => {}
            SandboxState::Creating | SandboxState::Failed(_) | SandboxState::Destroyed => {
                before.admit_use()?;
            }
        }
        if cold_boot || !self.saves_memory() {
            self.boot_again(None).await?;
            self.breaker.note(&Ok(()));
            self.record("sandbox.started", json!({ "cold_boot": true }));
            return Ok(());
        }
        self.shared.store.set_sandbox_state(self.id, SandboxState::Running)?;
        self.reached(Step::StartNoted).await;
        // From now on it is told as running: whoever uses it waits for this start instead of being refused.
        self.access.set_state(SandboxState::Running);
        let began = Instant::now();
        let woken = self.wake_cold().await;
        self.note_wake(Thermal::Cold, began, &woken);
        if woken.is_ok() {
            self.record("sandbox.started", json!({ "cold_boot": false }));
        } else {
            self.access.set_state(before);
            self.shared.store.set_sandbox_state(self.id, before)?;
        }
        woken
    }

    pub(crate) async fn set_keep_hot(&self, keep_hot: bool) -> Result<(), TransitionError> {
        self.shared.store.set_sandbox_keep_hot(self.id, keep_hot)?;
        self.access.set_keep_hot(keep_hot);
        if keep_hot && self.access.state() == SandboxState::Running {
            return self.wake().await;
        }
        Ok(())
    }

    /// The sandbox has not been used for a while.
    pub(crate) async fn cool(&self) {
        let Some(running) = self.access.running() else { return };
        let (kind, cooled) = match self.access.thermal() {
            Some(Thermal::Hot) => {
                if is_busy(&running).await || !self.access.close_if_unused() {
                    self.access.touch();
                    return;
                }
                ("thermal.paused", self.pause(&running, false).await.map(drop))
            }
            _ => ("thermal.saved", self.sleep(false).await),
        };
        if let Err(error) = cooled {
            self.record("thermal.failed", json!({ "error": error.to_string() }));
            warn!(sandbox = %self.id, error = %Report(&error), "Failed to let a sandbox cool");
            self.access.touch();
        } else {
            self.record(kind, json!({ "asked": false }));
        }
    }

    /// Another sandbox needs the memory.
    pub(crate) async fn give_memory(&self) -> Result<(), TransitionError> {
        if !self.saves_memory() || self.access.idle_since().is_none() {
            // Somebody uses it by now, or it has none.
            return Ok(());
        }
        let given = self.sleep(false).await;
        if let Err(error) = &given {
            warn!(sandbox = %self.id, error = %Report(error), "Failed to save a sandbox whose memory was wanted");
        }
        given
    }

    /// Saves the sandbox, and lets it go on: for forks, and for snapshots with a name.
    pub(crate) async fn save(
        &self,
        directory: &Path,
        memory: Option<MemoryKind>,
        made_from: MadeFrom,
    ) -> Result<SavedSandbox, TransitionError> {
        self.access.state().admit_use()?;
        self.require_saved_memory()?;
        // One that was paused may not have stood still then.
        self.wake().await?;
        let running = self.access.running().ok_or(TransitionError::Restless)?;
        // Before it stands still: it takes a while, if it has to be.
        self.merge_layers(&running, false).await;
        let began = Instant::now();
        if !self.pause(&running, false).await? {
            self.resume(&running).await?;
            return Err(TransitionError::Moving);
        }
        let copies = volumes::copies(&self.shared, self.id, &self.volumes, made_from);
        let request = SnapshotRequest {
            directory: directory.to_owned(),
            memory,
            disks: Disks::Frozen,
            copies,
        };
        let captured = running.vm.capture(&request).await;
        self.reached(Step::Captured).await;
        self.resume(&running).await?;
        let paused = began.elapsed();
        let info = captured?.finish().await?;
        Ok(SavedSandbox { info, paused })
    }

    /// Merges the layers of the disk, if that frees disk space of the host. Returns whether it did.
    pub(crate) async fn merge_disk(&self) -> Result<bool, TransitionError> {
        self.access.state().admit_use()?;
        self.wake().await?;
        let running = self.access.running().ok_or(TransitionError::Restless)?;
        Ok(self.merge_layers(&running, true).await)
    }

    /// Returns whether layers were merged. A disk whose layers cannot be merged is used as it is.
    async fn merge_layers(&self, running: &Running, to_save_space: bool) -> bool {
        match running.vm.merge_disk(to_save_space).await {
            Ok(true) => {
                self.reached(Step::Merged).await;
                true
            }
            Ok(false) => false,
            Err(error) => {
                warn!(sandbox = %self.id, error = %Report(&error), "The layers of a disk were not merged");
                false
            }
        }
    }

    /// From hot to warm. Returns whether the guest's processes stood still before.
    async fn pause(&self, running: &Running, sync: bool) -> Result<bool, TransitionError> {
        self.access.set_thermal(Thermal::Warm);
        // Volumes outlive what is in the memory of who writes them.
        let sync = sync || self.writes_volumes();
        let limit = if sync { SYNC_LIMIT } else { SUSPEND_LIMIT };
        let suspended = timeout(limit, running.agent.suspend(sync)).await;
        match &suspended {
            Ok(Ok(())) => {}
            // Its memory is kept all the same; only what its processes see of the time in between is less exact.
            Ok(Err(error)) => {
                warn!(sandbox = %self.id, error = %Report(error), "Guest does not stand still");
            }
            Err(_) => {
                warn!(sandbox = %self.id, "Guest does not answer; it is paused as it is");
            }
        }
        if let Err(error) = running.vm.pause().await {
            self.tell_woken(running).await;
            self.access.set_thermal(Thermal::Hot);
            return Err(error.into());
        }
        self.reached(Step::Paused).await;
        Ok(matches!(suspended, Ok(Ok(()))))
    }

    /// Whether anything is written to volumes here.
    fn writes_volumes(&self) -> bool {
        self.volumes.iter().any(|volume| !volume.read_only)
    }

    /// Has the guest write what it has of its volumes, before it ends.
    pub(crate) async fn write_volumes(&self) {
        let named = self.volumes.iter().any(|volume| volume.volume.is_some() && !volume.read_only);
        let Some(running) = self.access.running().filter(|_| named) else { return };
        // It has done so if it is paused, unless it did not stand still then.
        if self.access.thermal() == Some(Thermal::Warm)
            && let Err(error) = self.resume(&running).await
        {
            warn!(sandbox = %self.id, error = %Report(&error), "Failed to run a sandbox once more for its volumes");
            return;
        }
        match timeout(SYNC_LIMIT, running.agent.suspend(true)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn!(sandbox = %self.id, error = %Report(&error), "Guest did not write its volumes before its end");
            }
            Err(_) => warn!(sandbox = %self.id, "Guest did not write its volumes in time"),
        }
    }

    /// From warm to hot.
    async fn resume(&self, running: &Running) -> Result<(), TransitionError> {
        // Left by an end that did not come: from here on it is older than the VM.
        let left = self.saved().consume().await.map_err(TransitionError::Consume)?;
        self.resume_vm(running.vm.as_ref(), left).await?;
        self.reached(Step::Resumed).await;
        self.forget_consumed().await;
        self.tell_woken(running).await;
        self.listen(running);
        self.access.set_thermal(Thermal::Hot);
        self.access.touch();
        Ok(())
    }

    /// From hot or warm to cold. With `sync`, the guest writes its disks first.
    pub(crate) async fn sleep(&self, sync: bool) -> Result<(), TransitionError> {
        let Some(running) = self.access.running() else { return Ok(()) };
        let was_warm = self.access.thermal() == Some(Thermal::Warm);
        let was_hot = !was_warm && running.vm.is_running().await?;
        if was_hot {
            self.pause(&running, sync).await?;
        }
        let began = Instant::now();
        let slept = self.save_and_end(&running).await;
        match slept {
            Ok(info) => {
                let took = began.elapsed();
                self.shared.metrics.save.observe(took.as_secs_f64());
                let save_ms = ms(took);
                info!(sandbox = %self.id, kind = ?info.memory, memory_bytes = info.memory_bytes, save_ms, "Sandbox sleeps");
                Ok(())
            }
            Err(error) => {
                if was_hot && let Err(error) = self.resume(&running).await {
                    warn!(sandbox = %self.id, error = %Report(&error), "Failed to resume a sandbox that could not be saved");
                }
                Err(error)
            }
        }
    }

    /// The daemon is to leave nothing that runs. What cannot be saved goes on all the same: its processes would be lost.
    pub(crate) async fn sleep_for_shut_down(&self) -> Result<(), TransitionError> {
        if self.access.running().is_some() {
            self.require_saved_memory()?;
        }
        self.sleep(false).await
    }

    fn require_saved_memory(&self) -> Result<(), TransitionError> {
        let engine = self.shared.engine.capabilities();
        if engine.saves_memory {
            Ok(())
        } else {
            Err(TransitionError::NoSnapshots { engine: engine.name })
        }
    }

    /// Ends the VM, and with it what it has in memory.
    async fn end(&self) -> Result<(), TransitionError> {
        self.write_volumes().await;
        let killed = self.shared.engine.kill(self.id, &self.directory()).await;
        killed.map_err(TransitionError::End)?;
        self.access.set_vm(None, Thermal::Cold);
        self.reached(Step::Ended).await;
        Ok(())
    }

    async fn save_and_end(
        &self,
        running: &Running,
    ) -> Result<bhatti_engine::SnapshotInfo, TransitionError> {
        let directory = self.directory();
        // Of an end that did not come: the VM may have run since.
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
        self.access.set_vm(None, Thermal::Cold);
        self.reached(Step::Ended).await;
        Ok(info)
    }

    /// The snapshot that the sandbox sleeps in, if it does.
    pub(crate) fn saved(&self) -> Saved {
        Saved::new(self.directory())
    }

    /// Has a VM run. If it was made of a snapshot, that is never used again from before then on.
    pub(crate) async fn resume_vm(
        &self,
        vm: &dyn Vm,
        consumed: bool,
    ) -> Result<(), TransitionError> {
        if consumed {
            self.saved().note_run().await.map_err(TransitionError::Consume)?;
        }
        if let Err(error) = vm.resume().await {
            if consumed {
                // It did not run; the snapshot is what it was.
                self.saved().put_back().await.map_err(TransitionError::Consume)?;
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// The VMM has ended by itself. If it was to end, and what it had is on the disk, nothing is lost.
    pub(crate) async fn vmm_ended(&self) {
        // A paused VM that an earlier daemon restored and never let run has a snapshot that was
        // consumed: it is put back.
        let is_saved = self.access.thermal() == Some(Thermal::Warm)
            && self.saved().settle().unwrap_or_else(|error| {
                warn!(sandbox = %self.id, %error, "Failed to look for the memory of a paused VM that ended");
                false
            });
        if is_saved {
            info!(sandbox = %self.id, "A paused VM ended whose memory is saved");
            self.access.set_vm(None, Thermal::Cold);
            return;
        }
        if !self.boot_after_reboot().await {
            self.fail(FailReason::VmmExited);
        }
    }

    /// Boots the sandbox again if its guest has rebooted. Returns whether it runs.
    async fn boot_after_reboot(&self) -> bool {
        let Some(running) = self.access.running() else { return false };
        let console = running.vm.last_console().await;
        if self.access.state() != SandboxState::Running || !self.reboots.admit(&console) {
            return false;
        }
        drop(running);
        info!(sandbox = %self.id, "The guest reboots");
        // Requests wait for the boot meanwhile, as they wait for a wake.
        self.access.set_vm(None, Thermal::Cold);
        match self.boot_again(None).await {
            Ok(()) => {
                self.record("sandbox.rebooted", json!({}));
                true
            }
            Err(error) => {
                warn!(sandbox = %self.id, error = %Report(&error), "Failed to boot a sandbox whose guest rebooted");
                false
            }
        }
    }

    /// Removes the snapshot that a VM that runs has gone on from.
    pub(crate) async fn forget_consumed(&self) {
        if let Err(error) = self.saved().forget().await {
            warn!(sandbox = %self.id, %error, "Failed to remove a snapshot that was used");
        }
    }
}

/// Whether something in the guest goes on without a client: asked while it runs, for a paused guest cannot answer.
async fn is_busy(running: &Running) -> bool {
    match timeout(ACTIVITY_LIMIT, running.agent.activity()).await {
        Ok(Ok(activity)) => activity.running_jobs > 0 || activity.attached_sessions > 0,
        // A guest that does not say so is not busy with anything of ours.
        Ok(Err(_)) | Err(_) => false,
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
