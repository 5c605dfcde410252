//! Saving a sandbox that runs on, for forks and for named snapshots. Merging the layers of its
//! disk.
//!
//! The vCPUs are paused while the memory's pages are protected and the disk gets a new layer. The
//! rest (hashes, flushes, copies) is written beside the driver, while the sandbox is hot again and
//! serves requests.

use std::path::PathBuf;

use bhatti_engine::{Captured, Disks, MemoryKind, SnapshotInfo, SnapshotRequest};
use bhatti_types::Report;
use tokio::time::{Duration, Instant};
use tracing::warn;

use super::access::Running;
use super::error::TransitionError;
use super::sandbox::Sandbox;
use super::steps::Step;
use crate::volumes::{self, MadeFrom};

/// The result of saving a sandbox that runs on.
#[derive(Clone, Copy, Debug)]
pub struct SavedSandbox {
    /// The kind and size of the memory.
    pub info: SnapshotInfo,
    /// How long the sandbox's processes were stopped.
    pub paused: Duration,
}

/// A snapshot whose state is captured, and whose files are not all written.
pub(crate) struct Capture {
    captured: Box<dyn Captured>,
    paused: Duration,
}

impl Capture {
    /// Writes the rest. The sandbox may run meanwhile, but its disk must not get other layers.
    pub(crate) async fn finish(self) -> Result<SavedSandbox, TransitionError> {
        let info = self.captured.finish().await?;
        Ok(SavedSandbox { info, paused: self.paused })
    }
}

impl Sandbox {
    /// Captures the sandbox's state into `directory`, and resumes it.
    pub(super) async fn capture(
        &self,
        directory: PathBuf,
        memory: Option<MemoryKind>,
        made_from: MadeFrom,
    ) -> Result<Capture, TransitionError> {
        self.require_saved_memory()?;
        // A sandbox that is paused already may have been paused without freezing its processes.
        self.wake().await?;
        let running = self.access.running().ok_or(TransitionError::Restless)?;
        // Before the pause: merging layers takes a while.
        self.merge_layers(&running, false).await;
        let began = Instant::now();
        if !self.pause(&running, false).await? {
            self.resume(&running).await?;
            return Err(TransitionError::Moving);
        }
        let copies = volumes::copies(&self.shared, self.id, &self.volumes, made_from);
        let request = SnapshotRequest { directory, memory, disks: Disks::Frozen, copies };
        let captured = running.vm.capture(&request).await;
        self.reached(Step::Captured).await;
        self.resume(&running).await?;
        Ok(Capture { captured: captured?, paused: began.elapsed() })
    }

    /// Merges the layers of the disk if that frees disk space of the host. Returns whether it did.
    pub(super) async fn merge_disk(&self) -> Result<bool, TransitionError> {
        self.wake().await?;
        let running = self.access.running().ok_or(TransitionError::Restless)?;
        Ok(self.merge_layers(&running, true).await)
    }

    /// Returns whether layers were merged. A disk whose layers cannot be merged is used as it is.
    async fn merge_layers(&self, running: &Running, to_save_space: bool) -> bool {
        let merged = tokio::select! {
            merged = running.vm.merge_disk(to_save_space) => merged,
            () = self.hurry.notified() => {
                // The VMM goes on copying; the next snapshot ends that. It may have been paused to
                // finish.
                if let Err(error) = running.vm.resume().await {
                    warn!(sandbox = %self.id, error = %Report(&error), "Failed to resume a sandbox after a merge that was given up");
                }
                return false;
            }
        };
        match merged {
            Ok(true) => {
                self.reached(Step::Merged).await;
                true
            }
            Ok(false) => false,
            Err(error) => {
                warn!(
                    sandbox = %self.id,
                    error = %Report(&error),
                    "Failed to merge the layers of a disk"
                );
                false
            }
        }
    }
}
