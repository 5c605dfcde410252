//! Spares: VMs that are started ahead of demand. A spare is a VMM that waits for a base snapshot's
//! state, or a paused VM that has loaded it. Most of the time of a creation is then spent before
//! the request.
//!
//! A spare's directory is the directory of the sandbox that it becomes, with a marker in it until
//! then. A later daemon removes the spares that it finds, because no request waits for them.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bhatti_agent::{AgentClient, CallError};
use bhatti_engine::{Disks, RestoreError, RestoreSpec, Staged, Vm, VolumeFile};
use bhatti_host::blocking;
use bhatti_proto::ExecRequest;
use bhatti_types::{MemoryMib, Report, SandboxId};
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};
use tracing::{error, warn};

use crate::Shared;
use crate::admission::Admitted;
use crate::bases::{Base, run_if_there};
use crate::identity::{self, random};
use crate::networks;

/// Name of the file that marks a directory as a spare's.
const MARKER: &str = "spare";

/// Pause after a creation before the next spare is made.
const FILL_PAUSE: Duration = Duration::from_millis(200);

/// How long a stopping daemon waits for a spare that is being made.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// Time limit of a spare's warm-up run.
const WARM_UP_LIMIT: Duration = Duration::from_secs(30);

/// Time limit for a VMM to start, or to load a state.
pub(crate) const RESTORE_LIMIT: Duration = Duration::from_secs(60);

/// A VM that waits to become a sandbox.
pub(crate) struct Spare {
    pub(crate) id: SandboxId,
    pub(crate) stage: Stage,
    base: Base,
    admitted: Admitted,
}

/// The stage of a spare.
pub(crate) enum Stage {
    /// The VMM waits for the state.
    Waiting(Box<dyn Staged>),
    /// The VM has loaded the state and is paused.
    Loaded(Arc<dyn Vm>),
}

/// The spares of a daemon, all from the base snapshot that was requested last.
#[derive(Default)]
pub(crate) struct Spares {
    spares: Mutex<VecDeque<Spare>>,
    filling: tokio::sync::Mutex<()>,
    closed: AtomicBool,
    /// Number of requests that wait for memory. They take precedence over spares.
    held_back: Arc<AtomicUsize>,
}

/// Blocks the making of spares until it is dropped.
pub(crate) struct HeldBack(Arc<AtomicUsize>);

impl Drop for HeldBack {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Spare {
    /// Removes the marker: the VM belongs to a sandbox from now on. Returns the stage and the
    /// memory.
    pub(crate) fn claim(self, shared: &Shared) -> io::Result<(Stage, Admitted)> {
        fs::remove_file(shared.directory(self.id).join(MARKER))?;
        Ok((self.stage, self.admitted))
    }
}

impl Stage {
    /// Loads the state, unless it is loaded already.
    pub(crate) async fn load(self) -> Result<Arc<dyn Vm>, RestoreError> {
        match self {
            Self::Waiting(staged) => staged.load().await,
            Self::Loaded(vm) => Ok(vm),
        }
    }
}

/// Starts a VMM that waits to load `snapshot`, for the sandbox `id`.
pub(crate) async fn stage(
    shared: &Shared,
    id: SandboxId,
    snapshot: &Path,
    has_network: bool,
    volumes: Vec<Option<VolumeFile>>,
) -> Result<Box<dyn Staged>, RestoreError> {
    let spec = RestoreSpec {
        id,
        directory: shared.directory(id),
        snapshot: snapshot.to_owned(),
        disks: Disks::Frozen,
        tap: networks::tap(id, has_network),
        volumes,
        root: None,
        limit: RESTORE_LIMIT,
    };
    shared.engine.stage(&spec).await
}

impl Spares {
    /// Takes a spare made from this base snapshot.
    pub(crate) fn take(&self, base: &Base) -> Option<Spare> {
        let mut spares = self.spares.lock();
        let place = spares.iter().position(|spare| spare.base == *base)?;
        spares.remove(place)
    }

    /// Puts a spare back that was not used.
    pub(crate) fn put_back(&self, spare: Spare) {
        self.spares.lock().push_front(spare);
    }

    /// Makes spares from this base snapshot until there are enough, and removes all others.
    pub(crate) async fn fill(&self, shared: &Shared, base: &Base, memory: MemoryMib) {
        // The task that holds the lock also fills for requests that arrive meanwhile.
        let Ok(_filling) = self.filling.try_lock() else { return };
        // Leaves the processors to the creation that has just taken a spare.
        sleep(FILL_PAUSE).await;
        let others: Vec<Spare> = {
            let mut spares = self.spares.lock();
            let (same, others) = spares.drain(..).partition(|spare| spare.base == *base);
            *spares = same;
            others.into()
        };
        for other in others {
            remove(shared, other.id).await;
        }
        loop {
            let number = self.spares.lock().len();
            if self.closed.load(Ordering::Relaxed)
                || self.held_back.load(Ordering::SeqCst) > 0
                || number >= shared.config.ready_vmms.max(shared.config.ready_forks)
            {
                return;
            }
            // Spares take no memory that a sandbox could have.
            let Some(admitted) = shared.admission.admit_now(memory) else { return };
            let load = number < shared.config.ready_forks;
            match make(shared, base, load, admitted).await {
                Ok(spare) => {
                    self.spares.lock().push_back(spare);
                    if self.held_back.load(Ordering::SeqCst) > 0 {
                        self.clear(shared).await;
                    }
                }
                Err(error) => {
                    warn!(error = %Report(&error), "Failed to make a spare VM");
                    return;
                }
            }
        }
    }

    /// Blocks the making of spares until the returned value is dropped.
    pub(crate) fn hold_back(&self) -> HeldBack {
        self.held_back.fetch_add(1, Ordering::SeqCst);
        HeldBack(Arc::clone(&self.held_back))
    }

    /// Removes all spares, and makes no more.
    pub(crate) async fn close(&self, shared: &Shared) {
        self.closed.store(true, Ordering::Relaxed);
        // A spare in the making takes as long as a restore and a warm-up run. If it takes longer
        // than the limit, the next daemon removes it.
        let _filling = timeout(CLOSE_LIMIT, self.filling.lock()).await;
        self.clear(shared).await;
    }

    /// Removes all spares.
    pub(crate) async fn clear(&self, shared: &Shared) {
        let spares: Vec<Spare> = self.spares.lock().drain(..).collect();
        for spare in spares {
            remove(shared, spare.id).await;
        }
    }
}

async fn make(
    shared: &Shared,
    base: &Base,
    load: bool,
    admitted: Admitted,
) -> Result<Spare, RestoreError> {
    let failed = |step| move |source| RestoreError::File { step, source };
    let random = random().map_err(io::Error::other).map_err(failed("draw an id"))?;
    let id = SandboxId::from_entropy(random);
    let place: PathBuf = shared.directory(id);
    blocking(|| fs::create_dir(&place).and_then(|()| fs::write(place.join(MARKER), "")))
        .map_err(failed("create the VM's directory"))?;
    let made = async {
        let stage =
            Stage::Waiting(stage(shared, id, &base.directory, base.has_network, Vec::new()).await?);
        if !load {
            return Ok(stage);
        }
        let vm = stage.load().await?;
        warm_up(vm.as_ref(), base.has_network).await?;
        Ok(Stage::Loaded(vm))
    };
    match made.await {
        Ok(stage) => Ok(Spare { id, stage, base: base.clone(), admitted }),
        Err(error) => {
            remove(shared, id).await;
            Err(error)
        }
    }
}

/// Runs once in a VM what every new sandbox runs, and pauses the VM again. Under software
/// emulation, a guest's code is translated when it first runs, which is most of the time of a
/// creation and the first command.
async fn warm_up(vm: &dyn Vm, has_network: bool) -> Result<(), RestoreError> {
    let failed = |step| move |source| RestoreError::Vmm { step, source };
    vm.resume().await.map_err(failed("resume a spare VM"))?;
    let agent = AgentClient::new(vm.channel());
    let run = async {
        let identity = identity::warm_up(has_network).map_err(|_| CallError::Entropy)?;
        agent.assume_identity(&identity).await?;
        let command = || ExecRequest { argv: vec!["true".to_owned()], ..ExecRequest::default() };
        run_if_there(&agent, command()).await?;
        let woken = identity::woken().map_err(|_| CallError::Entropy)?;
        agent.woken(&woken).await?;
        agent.suspend(false).await
    };
    let warmed_up = timeout(WARM_UP_LIMIT, run).await;
    let warmed_up = warmed_up.unwrap_or(Err(CallError::Silent { limit: WARM_UP_LIMIT }));
    warmed_up.map_err(io::Error::other).map_err(|source| RestoreError::File {
        step: "do the warm-up run of a spare VM",
        source,
    })?;
    vm.pause().await.map_err(failed("pause a spare VM"))
}

/// Returns whether a directory is that of a spare.
pub(crate) fn is_spare(directory: &Path) -> bool {
    directory.join(MARKER).exists()
}

/// Removes the VM and the files of a spare, or of a sandbox that could not be restored.
pub(crate) async fn remove(shared: &Shared, id: SandboxId) {
    if let Err(left) = shared.engine.remove(id, &shared.directory(id)).await {
        error!(sandbox = %id, error = %Report(&left), "Failed to remove an unused VM");
    }
}
