//! From warm or cold to hot.
//!
//! ```text
//!   cold ──► load the snapshot ──► consume it ──► mark it as used
//!        ──► resume ──► tell the guest ──► hot
//! ```
//!
//! A snapshot is consumed before its VM runs, so it is never restored twice. A snapshot that could
//! not be loaded stays.

use std::time::Duration;

use bhatti_engine::{Disks, RestoreSpec, Vm};
use bhatti_types::{Report, Thermal};
use serde_json::json;
use tokio::time::Instant;
use tracing::warn;

use super::access::Running;
use super::error::TransitionError;
use super::sandbox::Sandbox;
use super::saved::SNAPSHOT;
use super::state::{Kind, State};
use super::steps::Step;
use crate::networks::{self, NetworkError};
use crate::pool::RESTORE_LIMIT;
use crate::volumes::{self, OwnVolumes};

impl Sandbox {
    /// Makes a running sandbox hot.
    pub(crate) async fn wake(&self) -> Result<(), TransitionError> {
        let began = Instant::now();
        let (from, woken) = match (self.access.kind(), self.access.running()) {
            (Kind::Hot, _) => return Ok(()),
            (_, Some(running)) => (Thermal::Warm, self.resume(&running).await),
            (_, None) => {
                self.breaker.admit()?;
                (Thermal::Cold, self.wake_cold().await)
            }
        };
        self.note_wake(from, began, &woken);
        woken
    }

    pub(super) fn note_wake(
        &self,
        from: Thermal,
        began: Instant,
        woken: &Result<(), TransitionError>,
    ) {
        let took = began.elapsed();
        self.breaker.note(woken);
        match woken {
            Ok(()) => {
                self.shared.metrics.woken(from, took);
                let detail = json!({ "from": from.as_str(), "wake_ms": milliseconds(took) });
                self.record("thermal.woken", detail);
            }
            Err(TransitionError::Restore(error)) => {
                self.record("snapshot.refused", json!({ "error": error.to_string() }));
            }
            Err(error) => self.record("thermal.wake_failed", json!({ "error": error.to_string() })),
        }
    }

    /// From cold to hot.
    pub(crate) async fn wake_cold(&self) -> Result<(), TransitionError> {
        let admitted = self.shared.admit(self.memory).await?;
        let directory = self.directory();
        let volumes =
            volumes::files(&self.shared, self.id, &self.volumes, OwnVolumes::Kept).await?;
        let spec = RestoreSpec {
            id: self.id,
            directory: directory.clone(),
            snapshot: directory.join(SNAPSHOT),
            disks: Disks::InPlace,
            tap: networks::tap(self.id, self.address.is_some()),
            volumes,
            root: None,
            limit: RESTORE_LIMIT,
        };
        let loaded = async {
            let staged = self.shared.engine.stage(&spec).await?;
            self.reached(Step::Staged).await;
            staged.load().await
        };
        let (loaded, enforced) =
            tokio::join!(loaded, self.shared.enforce_network(self.owner, self.address));
        let connected = async {
            let vm = loaded?;
            enforced?;
            self.connect_network().await?;
            Ok(vm)
        };
        let vm = match connected.await {
            Ok(vm) => vm,
            Err(error) => {
                self.end_failed_wake().await;
                return Err(error);
            }
        };
        self.reached(Step::Loaded).await;
        let consumed = match self.saved().consume().await {
            Ok(consumed) => consumed,
            Err(error) => {
                self.end_failed_wake().await;
                return Err(TransitionError::Consume(error));
            }
        };
        self.reached(Step::Consumed).await;
        if let Err(error) = self.resume_vm(vm.as_ref(), consumed).await {
            self.end_failed_wake().await;
            return Err(error);
        }
        self.reached(Step::Woken).await;
        let running = Running::new(vm, &self.token, admitted);
        self.access.set(State::Warm(running.clone()));
        self.tell_woken(&running).await;
        self.listen(&running);
        self.access.set(State::Hot(running));
        self.access.touch();
        self.forget_consumed().await;
        Ok(())
    }

    /// Connects the sandbox's tap, unless it is connected.
    pub(crate) async fn connect_network(&self) -> Result<(), NetworkError> {
        self.shared.connect_network(self.id, self.owner, self.address).await
    }

    /// Ends the VM. Returns whether it is gone.
    pub(super) async fn end_failed_wake(&self) -> bool {
        let killed = self.shared.engine.kill(self.id, &self.directory()).await;
        if let Err(error) = &killed {
            warn!(sandbox = %self.id, error = %Report(error), "Failed to end a VM that could not be woken");
        }
        killed.is_ok()
    }

    /// Resumes a VM. If it was restored from a snapshot (`consumed`), the snapshot is marked first:
    /// it is never used again.
    pub(super) async fn resume_vm(
        &self,
        vm: &dyn Vm,
        consumed: bool,
    ) -> Result<(), TransitionError> {
        if consumed {
            self.saved().note_run().await.map_err(TransitionError::Consume)?;
        }
        if let Err(error) = vm.resume().await {
            if consumed {
                // The VM did not run, so the snapshot can still be used.
                self.saved().put_back().await.map_err(TransitionError::Consume)?;
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// Removes the snapshot that the running VM was restored from.
    pub(crate) async fn forget_consumed(&self) {
        if let Err(error) = self.saved().forget().await {
            warn!(sandbox = %self.id, %error, "Failed to remove a snapshot that was used");
        }
    }
}

/// Returns a duration in milliseconds.
pub(super) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
