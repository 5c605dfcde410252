//! Coming back: from a snapshot, or from the disk alone, and telling the guest so.

use std::io;
use std::time::Duration;

use bhatti_agent::CallError;
use bhatti_engine::{BootError, Disks, RestoreSpec, VmSpec};
use bhatti_store::SandboxRow;
use bhatti_types::{Denied, Report, Thermal};
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use crate::admission::Admitted;
use crate::bring_up::configure;
use crate::create::{CreateError, boot_files};
use crate::driver::access::Running;
use crate::driver::boot_mark::BootMark;
use crate::driver::saved::SNAPSHOT;
use crate::driver::steps::Step;
use crate::driver::{Driver, TransitionError};
use crate::identity::{self, Extras};
use crate::networks::{self, NetworkError};
use crate::pool::RESTORE_LIMIT;
use crate::volumes::{self, OwnVolumes};

/// How long a guest may take to be told something.
const TELL_LIMIT: Duration = Duration::from_secs(10);
/// The error of a guest's clock that is put up with.
const TELL_EXACT: Duration = Duration::from_millis(10);

/// How often a guest that did not listen is told again, and the pause in between.
const TELL_AGAIN: u32 = 30;
const TELL_PAUSE: Duration = Duration::from_secs(2);

impl Driver {
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
        self.access.set_vm(Some(running.clone()), Thermal::Warm);
        self.tell_woken(&running).await;
        self.listen(&running);
        self.access.set_thermal(Thermal::Hot);
        self.access.touch();
        self.forget_consumed().await;
        Ok(())
    }

    /// Connects the sandbox's tap. Does nothing to one that is connected.
    pub(crate) async fn connect_network(&self) -> Result<(), NetworkError> {
        self.shared.connect_network(self.id, self.owner, self.address).await
    }

    /// Ends the VM. Returns whether it is gone.
    async fn end_failed_wake(&self) -> bool {
        let killed = self.shared.engine.kill(self.id, &self.directory()).await;
        if let Err(error) = &killed {
            warn!(sandbox = %self.id, error = %Report(error), "Failed to end a VM that did not wake");
        }
        killed.is_ok()
    }

    /// Boots the sandbox from its disk, without its memory. The saved memory is given up only when nothing but the boot itself can fail, and
    /// is put back if no VM was started. Once a guest has run, its disk may be newer than the memory, so the memory is never used again.
    /// `admitted` is memory that the sandbox has already.
    pub(crate) async fn boot_again(
        &self,
        admitted: Option<Admitted>,
    ) -> Result<(), TransitionError> {
        let row = self.shared.store.get_sandbox(self.id)?.ok_or(Denied::Destroyed)?;
        let files =
            boot_files(&self.shared, &row.spec.image).await.map_err(|error| match error {
                CreateError::Images(error) => TransitionError::Images(error),
                _ => Denied::Destroyed.into(),
            })?;
        let secrets = self.shared.control.secrets(row.owner, &row.spec.secrets);
        let extras = Extras { secrets, ..Extras::default() };
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
            kernel: files.kernel,
            initramfs: files.initramfs,
            root_base: files.root,
            keep_disk: true,
            tap: networks::tap(row.id, row.address.is_some()),
            volumes: volumes::files(&self.shared, row.id, &row.volumes, OwnVolumes::Left).await?,
            boot_limit: self.shared.config.boot_limit,
        };
        self.shared.enforce_network(row.owner, row.address).await?;
        // What can fail for want of room comes before the memory is given up.
        let boot_mark = BootMark::mark(&spec.directory).map_err(TransitionError::MarkBoot)?;
        let consumed = match self.give_up_memory().await {
            Ok(consumed) => consumed,
            Err(error) => {
                boot_mark.clear();
                return Err(TransitionError::Consume(error));
            }
        };
        match self.boot_and_configure(&spec, &row, &extras, admitted).await {
            Ok(running) => {
                // Before requests reach the sandbox: a later boot would discard their work.
                boot_mark.clear();
                self.forget_consumed().await;
                Ok(self.running(running)?)
            }
            Err(error) => {
                if self.end_failed_wake().await {
                    // Before the snapshot is put back: a later boot would discard it.
                    boot_mark.clear();
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

    /// Tells the guest that it has stood still. One that does not listen is told again in the background: its processes stand still until
    /// it has heard.
    pub(crate) async fn tell_woken(&self, running: &Running) {
        let began = Instant::now();
        let mut told = self.try_tell_woken(running).await;
        if told && began.elapsed() > TELL_EXACT {
            // What took so long made the clock late; the second time nothing does.
            told = self.try_tell_woken(running).await;
        }
        if !told {
            let (id, agent) = (self.id, running.agent.clone());
            let access = std::sync::Arc::clone(&self.access);
            tokio::spawn(async move {
                for _ in 0..TELL_AGAIN {
                    sleep(TELL_PAUSE).await;
                    if access.thermal() != Some(Thermal::Hot) {
                        // It was paused since: it must stand still now, and is told when it is resumed.
                        return;
                    }
                    let Ok(woken) = identity::woken() else { return };
                    if matches!(timeout(TELL_LIMIT, agent.woken(&woken)).await, Ok(Ok(()))) {
                        info!(sandbox = %id, "Guest was told at last that it has woken");
                        return;
                    }
                }
            });
        }
    }

    async fn try_tell_woken(&self, running: &Running) -> bool {
        let told = timeout(TELL_LIMIT, async {
            running.agent.reach().await?;
            // Only now: the time in it is the time when it arrives.
            let woken = identity::woken().map_err(|_| CallError::Entropy)?;
            running.agent.woken(&woken).await
        });
        let told = told.await.unwrap_or(Err(CallError::Silent { limit: TELL_LIMIT }));
        if let Err(error) = &told {
            warn!(sandbox = %self.id, error = %Report(error), "Guest was not told that it has woken");
        }
        told.is_ok()
    }
}

/// Whether a boot that failed with `error` may have run the guest.
const fn guest_may_have_run(error: &TransitionError) -> bool {
    !matches!(error, TransitionError::Boot(BootError::NotInstalled { .. } | BootError::NoDisk))
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
