//! What the transitions of one sandbox work with.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bhatti_store::{Attachment, Claim, SandboxRow, StoreError};
use bhatti_types::{Denied, FailReason, MemoryMib, Report, SandboxId, SandboxState, UserId};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{error, warn};

use super::access::{Access, Running};
use super::breaker::Breaker;
use super::error::TransitionError;
use super::guest_events::{Listener, Source};
use super::reboot::Reboots;
use super::saved::Saved;
use super::state::{Kind, State};
use super::steps::{self, Step};
use super::time_limit::Timer;
use crate::Shared;

/// What a driver knows of its sandbox from the start.
#[derive(Clone)]
pub(super) struct Facts {
    pub(super) id: SandboxId,
    claim: Claim,
    owner: UserId,
    timer: Arc<Timer>,
    memory: MemoryMib,
    address: Option<Ipv4Addr>,
    volumes: Vec<Attachment>,
    token: String,
}

impl Facts {
    pub(super) fn new(row: &SandboxRow, claim: Claim) -> Self {
        Self {
            id: row.id,
            claim,
            owner: row.owner,
            timer: Timer::new(row.time_limit),
            memory: row.spec.memory,
            address: row.address,
            volumes: row.volumes.clone(),
            token: row.agent_token.clone(),
        }
    }
}

/// A sandbox as its driver knows it. The files beside this one add its transitions, one file each.
pub(crate) struct Sandbox {
    pub(crate) id: SandboxId,
    /// This node's right to write the sandbox's row.
    pub(crate) claim: Claim,
    pub(crate) owner: UserId,
    pub(super) timer: Arc<Timer>,
    pub(crate) memory: MemoryMib,
    pub(crate) address: Option<Ipv4Addr>,
    pub(crate) volumes: Vec<Attachment>,
    pub(crate) token: String,
    pub(crate) shared: Arc<Shared>,
    pub(crate) access: Arc<Access>,
    pub(super) breaker: Breaker,
    pub(super) reboots: Reboots,
    listener: Listener,
    /// Notified when a request waits that is more urgent than a merge of the disk's layers.
    pub(super) hurry: Notify,
    /// Whether a save was ended for a destruction: see [`interrupt`](Self::interrupt).
    interrupted: AtomicBool,
    /// Whether another daemon has claimed the sandbox: see [`leave`](Self::leave).
    fenced: AtomicBool,
    /// Whether an event of its destruction is due: its creation was announced, and no earlier
    /// attempt has recorded it.
    is_announced: AtomicBool,
}

impl Sandbox {
    pub(super) fn new(shared: &Arc<Shared>, facts: Facts, access: Arc<Access>) -> Self {
        let Facts { id, claim, owner, timer, memory, address, volumes, token } = facts;
        let is_announced = !matches!(access.kind(), Kind::Creating | Kind::Destroying);
        Self {
            id,
            claim,
            owner,
            timer,
            memory,
            address,
            volumes,
            token,
            shared: Arc::clone(shared),
            access,
            breaker: Breaker::default(),
            reboots: Reboots::default(),
            listener: Listener::default(),
            hurry: Notify::new(),
            interrupted: AtomicBool::new(false),
            fenced: AtomicBool::new(false),
            is_announced: AtomicBool::new(is_announced),
        }
    }

    /// Returns what another driver of the sandbox needs.
    pub(super) fn facts(&self) -> Facts {
        Facts {
            id: self.id,
            claim: self.claim,
            owner: self.owner,
            timer: Arc::clone(&self.timer),
            memory: self.memory,
            address: self.address,
            volumes: self.volumes.clone(),
            token: self.token.clone(),
        }
    }

    /// Notes that the sandbox's creation was announced.
    pub(crate) fn announced(&self) {
        self.is_announced.store(true, Ordering::SeqCst);
    }

    /// Records the end of a sandbox that was announced, once.
    pub(super) fn record_destruction(&self) {
        if self.is_announced.swap(false, Ordering::SeqCst) {
            self.record("sandbox.destroyed", json!({}));
        }
    }

    /// Returns the directory of the sandbox's files.
    pub(crate) fn directory(&self) -> PathBuf {
        self.shared.directory(self.id)
    }

    /// Returns the snapshot of the sandbox in its directory, which may not exist.
    pub(crate) fn saved(&self) -> Saved {
        Saved::new(self.directory())
    }

    /// Injects the fault that a test wants at this step: see [`steps`].
    pub(crate) async fn reached(&self, step: Step) {
        if steps::reached(step) {
            drop(self.shared.engine.kill(self.id, &self.directory()).await);
        }
    }

    /// Writes the state into the sandbox's row.
    pub(super) fn write(&self, state: SandboxState) -> Result<(), StoreError> {
        let written = self.shared.store.set_sandbox_state(&self.claim, state);
        if matches!(written, Err(StoreError::Fenced(_))) {
            self.fenced.store(true, Ordering::SeqCst);
        }
        written
    }

    /// Whether this node still holds its claim. If the store cannot be asked, it is assumed.
    pub(super) fn holds_claim(&self) -> bool {
        match self.shared.store.claim(self.id) {
            Ok(claim) if claim != self.claim => self.fenced.store(true, Ordering::SeqCst),
            _ => {}
        }
        !self.is_fenced()
    }

    /// Whether another daemon has claimed the sandbox.
    pub(super) fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::SeqCst)
    }

    /// Leaves the sandbox to the daemon that has claimed it. If that daemon is on another node, the
    /// VM here is ended; a later daemon of this node has adopted the VM.
    pub(super) async fn leave(&self) {
        error!(sandbox = %self.id, "Another daemon has claimed a sandbox; leaving it");
        let is_elsewhere = match self.shared.store.claim(self.id) {
            Ok(claim) => claim.node != self.claim.node,
            Err(StoreError::NoSuchRow) => true,
            // Unknown: a later daemon of this node may run the VM.
            Err(_) => false,
        };
        if is_elsewhere {
            if let Err(error) = self.shared.engine.kill(self.id, &self.directory()).await {
                error!(
                    sandbox = %self.id,
                    error = %Report(&error),
                    "Failed to end the VM of a sandbox that another node has claimed"
                );
            }
            if self.address.is_some() {
                self.shared.disconnect_network(self.id).await;
            }
        }
        self.access.set(State::Destroyed);
        self.shared.registry.remove(self.id);
    }

    /// Opens the sandbox for use: its VM runs, and the guest has its identity.
    ///
    /// # Errors
    ///
    /// Returns an error if the row cannot be written. The state is then unchanged, and the caller
    /// ends the VM.
    pub(crate) fn open(&self, running: Running) -> Result<(), StoreError> {
        self.write(SandboxState::Running)?;
        self.listen(&running);
        self.access.set(State::Hot(running));
        self.access.touch();
        Ok(())
    }

    /// Ends the VM while it is being saved, because the sandbox is to be destroyed: the save fails
    /// then. Does nothing if the guest has volumes that outlive it and may not be written yet.
    pub(super) fn interrupt(&self) -> Option<JoinHandle<()>> {
        if !self.saves_memory() || self.writes_named_volumes() {
            return None;
        }
        self.interrupted.store(true, Ordering::Relaxed);
        let (shared, id, directory) = (Arc::clone(&self.shared), self.id, self.directory());
        // If this fails, the save goes on, and the destruction comes after it.
        Some(tokio::spawn(async move { drop(shared.engine.kill(id, &directory).await) }))
    }

    /// Returns why a save failed: the destruction that ended it, or `error`.
    pub(super) fn cause(&self, error: TransitionError) -> TransitionError {
        if self.interrupted.load(Ordering::Relaxed) { Denied::Destroyed.into() } else { error }
    }

    /// Records the guest's own events from now on.
    pub(crate) fn listen(&self, running: &Running) {
        let source = Source {
            sandbox: self.id,
            owner: self.owner,
            control: Arc::clone(&self.shared.control),
        };
        self.listener.listen(source, running);
    }

    /// Whether the engine can save memory.
    pub(crate) fn saves_memory(&self) -> bool {
        self.shared.engine.capabilities().saves_memory
    }

    /// Whether the sandbox has volumes that it may write.
    pub(super) fn writes_volumes(&self) -> bool {
        self.volumes.iter().any(|volume| !volume.read_only)
    }

    /// Whether the sandbox has volumes that it may write and that outlive it.
    pub(super) fn writes_named_volumes(&self) -> bool {
        self.volumes.iter().any(|volume| volume.volume.is_some() && !volume.read_only)
    }

    /// Records an event of the sandbox.
    pub(crate) fn record(&self, kind: &'static str, detail: Value) {
        self.shared.control.record(kind, self.owner, self.id, detail);
    }

    /// Marks the sandbox failed. The memory of a VMM that may be alive stays reserved.
    pub(crate) async fn fail(&self, reason: FailReason) {
        let running = self.access.running();
        let console = running.as_ref().map(|running| running.vm.console_tail()).unwrap_or_default();
        warn!(sandbox = %self.id, %reason, console, "Sandbox failed");
        let memory = self.access.memory();
        if !self.holds_claim() {
            return;
        }
        // A failed sandbox must not run on: its processes would have no owner and no budget.
        let killed = self.shared.engine.kill(self.id, &self.directory()).await;
        let left = match killed {
            Ok(()) => None,
            Err(error) => {
                error!(
                    sandbox = %self.id,
                    error = %Report(&error),
                    "Failed to end the VM of a failed sandbox"
                );
                if self.address.is_some() {
                    self.shared.disconnect_network(self.id).await;
                }
                memory
            }
        };
        if let Err(error) = self.write(SandboxState::Failed(reason)) {
            error!(
                sandbox = %self.id,
                error = %Report(&error),
                "Failed to write the state of a failed sandbox"
            );
        }
        self.access.set(State::Failed(reason, left));
        self.record("sandbox.failed", json!({ "reason": reason.to_string() }));
    }
}
