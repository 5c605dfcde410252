//! Booting a sandbox from its disk: a cold boot, and the boot after a guest's reboot.

use std::io;
use std::sync::Arc;

use bhatti_agent::CallError;
use bhatti_engine::{BootError, VmSpec};
use bhatti_host::blocking;
use bhatti_image::KernelFiles;
use bhatti_store::SandboxRow;
use bhatti_types::{Denied, FailReason, Report};
use serde_json::json;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tracing::{info, warn};

use super::access::Running;
use super::boot_mark::BootMark;
use super::error::TransitionError;
use super::sandbox::Sandbox;
use super::state::{Kind, State};
use super::steps::Step;
use crate::Shared;
use crate::admission::Admitted;
use crate::identity::{self, Extras};
use crate::networks;
use crate::volumes::{self, OwnVolumes};

impl Sandbox {
    /// Boots the sandbox from its disk, without its memory. The saved memory is given up only when
    /// nothing but the boot itself can fail, and is put back if no VM was started. Once a guest has
    /// run, its disk may be newer than the memory, so the memory is never used again. `admitted` is
    /// memory that is reserved for the sandbox already.
    pub(crate) async fn boot_again(
        &self,
        admitted: Option<Admitted>,
    ) -> Result<(), TransitionError> {
        let row = self.shared.store.get_sandbox(self.id)?.ok_or(Denied::Destroyed)?;
        let KernelFiles { kernel, initramfs } = kernel_files(&self.shared).await?;
        let secrets = self.shared.control.secrets(row.owner, &row.spec.secrets);
        let extras = Extras { secrets, ..Extras::default() };
        // A failed sandbox may still hold the memory of a VM that did not end.
        if let State::Failed(reason, Some(_)) = self.access.snapshot() {
            let killed = self.shared.engine.kill(self.id, &self.directory()).await;
            killed.map_err(TransitionError::End)?;
            self.access.set(State::Failed(reason, None));
        }
        let admitted = match admitted {
            Some(admitted) => admitted,
            None => self.shared.admit(self.memory).await?,
        };
        let directory = self.directory();
        self.shared.engine.kill(self.id, &directory).await.map_err(TransitionError::End)?;
        let spec = VmSpec {
            id: self.id,
            hostname: row.spec.name.clone(),
            cpus: row.spec.cpus,
            memory: row.spec.memory,
            disk: row.spec.disk,
            directory,
            kernel,
            initramfs,
            root_base: None,
            tap: networks::tap(row.id, row.address.is_some()),
            volumes: volumes::files(&self.shared, row.id, &row.volumes, OwnVolumes::Left).await?,
            awaits_root: false,
            is_builder: row.spec.labels.is_of_build(),
            boot_limit: self.shared.config.boot_limit,
        };
        self.shared.enforce_network(row.owner, row.address).await?;
        // What can fail for want of room comes before the memory is given up.
        let mark =
            blocking(|| BootMark::mark(&spec.directory)).map_err(TransitionError::MarkBoot)?;
        let consumed = match self.give_up_memory().await {
            Ok(consumed) => consumed,
            Err(error) => {
                mark.clear();
                return Err(TransitionError::Consume(error));
            }
        };
        match self.boot_and_configure(&spec, &row, &extras, admitted).await {
            Ok(running) => {
                // Before requests reach the sandbox: a later daemon that finds the mark boots it
                // again and discards their work.
                mark.clear();
                self.forget_consumed().await;
                let opened = self.open(running);
                if opened.is_err() {
                    // The row does not say that it runs, so it must not.
                    self.end_failed_wake().await;
                }
                Ok(opened?)
            }
            Err(error) => {
                if self.end_failed_wake().await {
                    // Before the snapshot is put back: a later boot would discard it.
                    mark.clear();
                    if consumed && !guest_may_have_run(&error) {
                        self.saved().put_back().await.map_err(TransitionError::Consume)?;
                    }
                }
                Err(error)
            }
        }
    }

    /// Takes the snapshot out of use for good, if there is one. Returns whether there is. If that
    /// fails, it is still there.
    async fn give_up_memory(&self) -> io::Result<bool> {
        let saved = self.saved();
        let consumed = saved.consume().await?;
        if consumed && let Err(error) = saved.note_run().await {
            if let Err(error) = saved.put_back().await {
                warn!(sandbox = %self.id, %error, "Failed to put a snapshot back");
            }
            return Err(error);
        }
        Ok(consumed)
    }

    async fn boot_and_configure(
        &self,
        spec: &VmSpec,
        row: &SandboxRow,
        extras: &Extras,
        admitted: Admitted,
    ) -> Result<Running, TransitionError> {
        let vm = self.shared.engine.boot(spec).await?;
        self.reached(Step::Running).await;
        self.connect_network().await?;
        let running = Running::new(vm, "", admitted);
        let configured = configure(&self.shared, row, extras, &running).await;
        configured.map_err(TransitionError::Unconfigured)?;
        Ok(running.with_token(&self.token))
    }

    /// Reacts to the end of the VMM. If the memory is on the disk, nothing is lost.
    pub(super) async fn vmm_ended(&self) {
        // A paused VM that an earlier daemon restored and never let run has a snapshot that was
        // consumed: it is put back.
        let is_saved = self.access.kind() == Kind::Warm
            && self.saved().settle().unwrap_or_else(|error| {
                warn!(sandbox = %self.id, %error, "Failed to look for the memory of a paused VM that ended");
                false
            });
        if is_saved {
            info!(sandbox = %self.id, "A paused VM ended whose memory is saved");
            self.access.set(State::Cold);
            return;
        }
        if !self.boot_after_reboot().await {
            self.fail(FailReason::VmmExited).await;
        }
    }

    /// Boots the sandbox again if its guest has rebooted. Returns whether it runs.
    async fn boot_after_reboot(&self) -> bool {
        let Some(running) = self.access.running() else { return false };
        let console = running.vm.last_console().await;
        if !matches!(self.access.kind(), Kind::Hot | Kind::Warm) || !self.reboots.admit(&console) {
            return false;
        }
        drop(running);
        info!(sandbox = %self.id, "The guest reboots");
        // Requests wait for the boot, as they wait for a wake.
        self.access.set(State::Rebooting);
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
}

/// Gives a booted guest this sandbox's configuration. The time limit is that of a boot, because
/// the guest may have to repair volumes.
pub(crate) async fn configure(
    shared: &Shared,
    row: &SandboxRow,
    extras: &Extras,
    running: &Running,
) -> Result<(), CallError> {
    let limit = shared.config.boot_limit;
    let configured = timeout(limit, running.agent.configure(&identity::config(row, extras))).await;
    configured.unwrap_or(Err(CallError::Silent { limit }))
}

/// Whether a boot that failed with `error` may have run the guest.
const fn guest_may_have_run(error: &TransitionError) -> bool {
    !matches!(error, TransitionError::Boot(BootError::NotInstalled { .. } | BootError::NoDisk))
}

/// Returns the files of a VM that keeps its root disk.
async fn kernel_files(shared: &Arc<Shared>) -> Result<KernelFiles, TransitionError> {
    let shared = Arc::clone(shared);
    let found = spawn_blocking(move || shared.config.images.kernel_files(&shared.config.lohar));
    Ok(found.await.map_err(|_| Denied::Destroyed)??)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_memory_is_kept_only_if_no_guest_ran() {
        for (error, ran) in [
            (TransitionError::Boot(BootError::NoDisk), false),
            (TransitionError::Boot(BootError::Ended { console: String::new() }), true),
            (TransitionError::Unconfigured(CallError::Lost), true),
        ] {
            assert_eq!(guest_may_have_run(&error), ran, "{error}");
        }
    }
}
