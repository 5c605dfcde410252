//! From hot to warm and back.
//!
//! ```text
//!         suspend the guest, pause the vCPUs
//!   hot ────────────────────────────────────► warm
//!    ▲                                          │
//!    └── tell the guest ◄── resume the vCPUs ◄──┘
//! ```
//!
//! A pause or resume that fails leaves the sandbox in its state.

use std::time::Duration;

use bhatti_types::Report;
use serde_json::json;
use tokio::time::timeout;
use tracing::warn;

use super::access::Running;
use super::error::TransitionError;
use super::sandbox::Sandbox;
use super::state::State;
use super::steps::Step;

/// How long a guest may take to freeze its processes.
const SUSPEND_LIMIT: Duration = Duration::from_secs(2);
/// How long a guest may take to freeze its processes and to write its disks.
const SYNC_LIMIT: Duration = Duration::from_secs(25);

impl Sandbox {
    /// Pauses the sandbox on request. The next use wakes it.
    pub(super) async fn pause_on_request(&self) -> Result<(), TransitionError> {
        let Some(running) = self.access.running() else { return Ok(()) };
        self.pause(&running, false).await?;
        self.record("thermal.paused", json!({ "asked": true }));
        Ok(())
    }

    /// From hot to warm. Returns whether the guest's processes were frozen first. With `sync`, the
    /// guest writes its disks.
    pub(super) async fn pause(
        &self,
        running: &Running,
        sync: bool,
    ) -> Result<bool, TransitionError> {
        self.access.set(State::Warm(running.clone()));
        let paused = self.pause_vm(running, sync).await;
        if paused.is_err() {
            self.access.set(State::Hot(running.clone()));
        }
        paused
    }

    /// Pauses a VM, whatever the sandbox's state. As [`pause`](Self::pause) otherwise.
    pub(super) async fn pause_vm(
        &self,
        running: &Running,
        sync: bool,
    ) -> Result<bool, TransitionError> {
        // Volumes outlive the memory of the guest that writes them.
        let sync = sync || self.writes_volumes();
        let limit = if sync { SYNC_LIMIT } else { SUSPEND_LIMIT };
        let suspended = timeout(limit, running.agent.suspend(sync)).await;
        match &suspended {
            Ok(Ok(())) => {}
            // The memory is kept all the same. Processes that were not frozen first see a jump of
            // time.
            Ok(Err(error)) => {
                warn!(
                    sandbox = %self.id,
                    error = %Report(error),
                    "The guest did not freeze its processes; it is paused as it is"
                );
            }
            Err(_) => {
                warn!(sandbox = %self.id, "The guest does not answer; it is paused as it is");
            }
        }
        if let Err(error) = running.vm.pause().await {
            self.tell_woken(running).await;
            return Err(error.into());
        }
        self.reached(Step::Paused).await;
        Ok(matches!(suspended, Ok(Ok(()))))
    }

    /// From warm to hot.
    pub(super) async fn resume(&self, running: &Running) -> Result<(), TransitionError> {
        self.resume_guest(running).await?;
        self.access.set(State::Hot(running.clone()));
        self.access.touch();
        Ok(())
    }

    /// Resumes a paused VM and tells its guest, whatever the sandbox's state.
    pub(super) async fn resume_guest(&self, running: &Running) -> Result<(), TransitionError> {
        // A snapshot of a save that did not end the VM is older than the VM from here on.
        let left = self.saved().consume().await.map_err(TransitionError::Consume)?;
        self.resume_vm(running.vm.as_ref(), left).await?;
        self.reached(Step::Resumed).await;
        self.forget_consumed().await;
        self.tell_woken(running).await;
        self.listen(running);
        Ok(())
    }

    /// Returns the state of a running sandbox with this VM: hot, or warm if it is paused or does
    /// not say so. A VM that is warm is resumed before use, which changes nothing if it runs.
    pub(super) async fn state_with(&self, running: &Running) -> State {
        match running.vm.is_running().await {
            Ok(true) => State::Hot(running.clone()),
            Ok(false) | Err(_) => State::Warm(running.clone()),
        }
    }

    /// Has the guest write the volumes that outlive it, before its end. Failures are logged.
    pub(super) async fn write_volumes(&self, running: &Running) {
        if !self.writes_named_volumes() {
            return;
        }
        // A paused guest has written them, unless it did not freeze then.
        if matches!(running.vm.is_running().await, Ok(false))
            && let Err(error) = self.resume_guest(running).await
        {
            warn!(
                sandbox = %self.id,
                error = %Report(&error),
                "Failed to resume a sandbox to write its volumes"
            );
            return;
        }
        match timeout(SYNC_LIMIT, running.agent.suspend(true)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn!(
                    sandbox = %self.id,
                    error = %Report(&error),
                    "The guest did not write its volumes before its end"
                );
            }
            Err(_) => warn!(sandbox = %self.id, "The guest did not write its volumes in time"),
        }
    }
}
