//! The driver of one sandbox: the only writer of its state.
//!
//! ```text
//!  requests ──►┌────────┐ sets        `Access`: state, VM, whether it can be used right now
//!              │ driver │────────────►
//!  VMM ends ──►│        │ writes      the row, before every effect
//!  deadline ──►└────────┘
//! ```
//!
//! It lives from the sandbox's creation, or the daemon's start, to the sandbox's destruction. One request is served after the other, so
//! a hundred that want the sandbox awake find it awake after the first.

pub(crate) mod access;
pub(crate) mod boot_mark;
mod breaker;
mod guest_events;
mod reboot;
pub(crate) mod saved;
pub(crate) mod steps;
mod transition;
mod wake;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bhatti_agent::{AgentClient, CallError};
use bhatti_engine::{BootError, MemoryKind, RemoveError, RestoreError, SnapshotError, VmmError};
use bhatti_store::{Attachment, SandboxRow, StoreError};
use bhatti_types::{
    Denied, FailReason, MemoryMib, Report, SandboxId, SandboxState, Thermal, UserId,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Duration, sleep, sleep_until};
use tracing::{error, info, warn};

use crate::Shared;
use crate::admission::Busy;
use crate::networks::NetworkError;
use crate::snapshots::SavedSandbox;
use crate::volumes::{MadeFrom, VolumeUseError};
use access::{Access, Entry, Lease, Running};
use breaker::Breaker;
use guest_events::{Listener, Source};
use reboot::Reboots;
use steps::Step;

/// How often the wall clock is looked at by who waits for a time of it.
const CLOCK_LOOK: Duration = Duration::from_secs(60);

/// Requests that may wait for a driver.
const REQUEST_QUEUE: usize = 16;

/// How often a sandbox that was woken is found asleep again, before the caller is told so.
const ENTRY_ATTEMPTS: u32 = 16;

/// A sandbox did not become what it was asked to be. It is what it was before.
#[derive(Debug, thiserror::Error)]
pub enum TransitionError {
    /// It is in no state for that.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// There is no memory for it.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// Its VMM did not do what it was asked to.
    #[error("the sandbox's virtual machine failed")]
    Vmm(#[from] VmmError),
    /// Its engine saves nothing.
    #[error(
        "engine `{engine}` cannot save the memory of a sandbox: it has no snapshots and no forks"
    )]
    NoSnapshots {
        /// The engine.
        engine: &'static str,
    },
    /// It could not be saved.
    #[error("failed to save the sandbox")]
    Save(#[from] SnapshotError),
    /// It could not be woken.
    #[error("failed to wake the sandbox")]
    Restore(#[source] Arc<RestoreError>),
    /// It could not be woken several times in a row, so this was not tried.
    #[error("failed to wake the sandbox {times} times in a row")]
    GivenUp {
        /// How often.
        times: u32,
        /// How long until it is tried again.
        wait: Duration,
        /// The last time's error.
        #[source]
        error: Arc<RestoreError>,
    },
    /// It did not boot.
    #[error("failed to boot the sandbox")]
    Boot(#[from] BootError),
    /// What it boots from is not there.
    #[error(transparent)]
    Images(#[from] bhatti_image::StoreError),
    /// Its guest did not take its configuration.
    #[error("failed to configure the sandbox's guest")]
    Unconfigured(#[source] CallError),
    /// Its network could not be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A volume cannot be used.
    #[error(transparent)]
    Volume(#[from] VolumeUseError),
    /// Its VMM does not end.
    #[error("failed to end the sandbox's virtual machine")]
    End(#[source] RemoveError),
    /// Its snapshot could not be marked.
    #[error("failed to consume the sandbox's snapshot")]
    Consume(#[source] std::io::Error),
    /// The mark of its boot could not be written.
    #[error("failed to mark the sandbox's boot in its directory")]
    MarkBoot(#[source] std::io::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// This host gives no random bytes.
    #[error("failed to draw random bytes")]
    Entropy(#[from] getrandom::Error),
    /// Its guest does not stand still: what would be saved could not become another before it goes on.
    #[error("the sandbox's processes do not stand still")]
    Moving,
    /// It goes to sleep again and again before it can be used.
    #[error("the sandbox does not stay awake")]
    Restless,
}

impl From<RestoreError> for TransitionError {
    fn from(error: RestoreError) -> Self {
        Self::Restore(Arc::new(error))
    }
}

/// A sandbox could not be destroyed as a whole. The next start of the daemon tries again.
#[derive(Debug, thiserror::Error)]
pub enum DestroyError {
    /// Something of its VM stays.
    #[error("failed to remove the sandbox's virtual machine")]
    Remove(#[source] RemoveError),
    /// Its row could not be changed.
    #[error("failed to update the sandbox's row")]
    Store(#[source] StoreError),
    /// It was destroyed by somebody else meanwhile.
    #[error("sandbox has been destroyed")]
    AlreadyGone,
}

type Reply<T = ()> = oneshot::Sender<Result<T, TransitionError>>;

/// What a driver can be asked for.
pub(crate) enum Request {
    Wake(Reply),
    Pause(Reply),
    Stop(Reply),
    Start {
        cold_boot: bool,
        reply: Reply,
    },
    KeepHot {
        keep_hot: bool,
        reply: Reply,
    },
    Save {
        directory: PathBuf,
        memory: Option<MemoryKind>,
        made_from: MadeFrom,
        reply: Reply<SavedSandbox>,
    },
    /// Merges the layers of the disk, if that frees space. Returns whether it did.
    MergeDisk(Reply<bool>),
    /// Saves the memory and gives it back, unless somebody uses the sandbox.
    GiveMemory(Reply),
    /// The same, whoever uses it: the daemon stops.
    Sleep(Reply),
    Destroy(oneshot::Sender<Result<(), DestroyError>>),
}

enum Event {
    Request(Request),
    VmmEnded,
    Deadline,
    Expired,
    Changed,
}

/// The way to a driver.
#[derive(Clone)]
pub(crate) struct Handle {
    requests: mpsc::Sender<Request>,
    pub(crate) access: Arc<Access>,
}

impl Handle {
    /// Uses the sandbox: wakes it first if it sleeps, and keeps it hot until the lease is dropped.
    pub(crate) async fn enter(&self) -> Result<(AgentClient, Lease), TransitionError> {
        for _ in 0..ENTRY_ATTEMPTS {
            match self.access.enter()? {
                Entry::Hot(agent, lease) => return Ok((agent, lease)),
                Entry::Asleep => self.ask(Request::Wake).await?,
            }
        }
        Err(TransitionError::Restless)
    }

    pub(crate) async fn ask<T>(
        &self,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, TransitionError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_| Denied::Destroyed)?;
        answer.await.map_err(|_| Denied::Destroyed)?
    }

    pub(crate) async fn destroy(&self) -> Result<(), DestroyError> {
        let (reply, destroyed) = oneshot::channel();
        self.requests.send(Request::Destroy(reply)).await.map_err(|_| DestroyError::AlreadyGone)?;
        destroyed.await.map_err(|_| DestroyError::AlreadyGone)?
    }
}

/// Drives one sandbox.
pub(crate) struct Driver {
    pub(crate) id: SandboxId,
    pub(crate) owner: UserId,
    expires_at: Option<u64>,
    pub(crate) memory: MemoryMib,
    pub(crate) address: Option<Ipv4Addr>,
    pub(crate) volumes: Vec<Attachment>,
    pub(crate) token: String,
    pub(crate) shared: Arc<Shared>,
    pub(crate) access: Arc<Access>,
    pub(crate) breaker: Breaker,
    pub(crate) reboots: Reboots,
    listener: Listener,
    requests: mpsc::Receiver<Request>,
}

impl Driver {
    /// A driver of a sandbox that stands at `state`, registered; it does nothing until it is run.
    pub(crate) fn register(shared: &Arc<Shared>, row: &SandboxRow, state: SandboxState) -> Self {
        let (requests, waiting) = mpsc::channel(REQUEST_QUEUE);
        let access = Access::new(state, row.spec.keep_hot);
        shared.registry.insert(row.id, Handle { requests, access: Arc::clone(&access) });
        Self {
            id: row.id,
            owner: row.owner,
            expires_at: row.expires_at,
            memory: row.spec.memory,
            address: row.address,
            volumes: row.volumes.clone(),
            token: row.agent_token.clone(),
            shared: Arc::clone(shared),
            access,
            breaker: Breaker::default(),
            reboots: Reboots::default(),
            listener: Listener::default(),
            requests: waiting,
        }
    }

    /// Where the sandbox's files are.
    pub(crate) fn directory(&self) -> PathBuf {
        self.shared.directory(self.id)
    }

    /// See [`steps`].
    pub(crate) async fn reached(&self, step: Step) {
        if steps::reached(step, self.shared.config.fault) {
            drop(self.shared.engine.kill(self.id, &self.directory()).await);
        }
    }

    /// Drives the sandbox until it is destroyed.
    pub(crate) async fn run(mut self) {
        while self.access.state() != SandboxState::Destroyed {
            let Some(event) = self.next_event().await else { return };
            self.apply(event).await;
        }
    }

    /// The sandbox's VM runs, and its guest is its own.
    pub(crate) fn running(&self, running: Running) -> Result<(), StoreError> {
        self.shared.store.set_sandbox_state(self.id, SandboxState::Running)?;
        self.listen(&running);
        self.access.set_vm(Some(running), Thermal::Hot);
        self.access.set_state(SandboxState::Running);
        self.access.touch();
        Ok(())
    }

    /// Has what the guest tells of itself be recorded.
    pub(crate) fn listen(&self, running: &Running) {
        let source = Source {
            sandbox: self.id,
            owner: self.owner,
            control: Arc::clone(&self.shared.control),
        };
        self.listener.listen(source, running);
    }

    /// The sandbox never came to be: nobody is to find it.
    pub(crate) fn abandon(self) -> Result<(), StoreError> {
        self.shared.registry.remove(self.id);
        self.shared.store.delete_sandbox(self.id)
    }

    async fn next_event(&mut self) -> Option<Event> {
        let running = self.access.running();
        let ended = async {
            match &running {
                Some(running) => running.vm.ended().await,
                None => std::future::pending().await,
            }
        };
        let thermal = &self.shared.config.thermal;
        // What cannot be saved stays warm: it would lose its processes.
        let cold_after = self.saves_memory().then_some(thermal.cold_after);
        let deadline = self.access.deadline(thermal.warm_after, cold_after);
        let deadline = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            request = self.requests.recv() => request.map(Event::Request),
            () = ended => Some(Event::VmmEnded),
            () = deadline => Some(Event::Deadline),
            () = until(self.expires_at) => Some(Event::Expired),
            () = self.access.changed.notified() => Some(Event::Changed),
        }
    }

    async fn apply(&self, event: Event) {
        match event {
            Event::VmmEnded => self.vmm_ended().await,
            Event::Deadline => self.cool().await,
            Event::Changed => {}
            Event::Expired => self.expire().await,
            Event::Request(request) => self.serve(request).await,
        }
    }

    /// Whoever asked may be gone by the time of the answer.
    async fn serve(&self, request: Request) {
        match request {
            Request::Wake(reply) => drop(reply.send(self.wake().await)),
            Request::Pause(reply) => drop(reply.send(self.pause_as_asked().await)),
            Request::Stop(reply) => drop(reply.send(self.stop().await)),
            Request::Start { cold_boot, reply } => drop(reply.send(self.start(cold_boot).await)),
            Request::KeepHot { keep_hot, reply } => {
                drop(reply.send(self.set_keep_hot(keep_hot).await));
            }
            Request::Save { directory, memory, made_from, reply } => {
                drop(reply.send(self.save(&directory, memory, made_from).await));
            }
            Request::MergeDisk(reply) => drop(reply.send(self.merge_disk().await)),
            Request::GiveMemory(reply) => drop(reply.send(self.give_memory().await)),
            Request::Sleep(reply) => drop(reply.send(self.sleep_for_shut_down().await)),
            Request::Destroy(reply) => {
                let destroyed = self.destroy().await;
                if let Err(error) = &destroyed {
                    error!(sandbox = %self.id, error = %Report(error), "Failed to destroy a sandbox");
                }
                drop(reply.send(destroyed));
            }
        }
    }

    /// Whether what the sandbox has in memory can outlive its VM.
    pub(crate) fn saves_memory(&self) -> bool {
        self.shared.engine.capabilities().saves_memory
    }

    /// Records something that happened to the sandbox.
    pub(crate) fn record(&self, kind: &'static str, detail: serde_json::Value) {
        self.shared.control.record(kind, self.owner, self.id, detail);
    }

    /// The sandbox's time is over.
    async fn expire(&self) {
        self.record("sandbox.expired", serde_json::json!({}));
        if let Err(error) = self.destroy().await {
            error!(sandbox = %self.id, error = %Report(&error), "Failed to destroy a sandbox whose time was over");
        }
    }

    /// The sandbox is not what it was, and nobody asked for it.
    pub(crate) fn fail(&self, reason: FailReason) {
        let console =
            self.access.running().map(|running| running.vm.console_tail()).unwrap_or_default();
        warn!(sandbox = %self.id, %reason, console, "Sandbox failed");
        let state = SandboxState::Failed(reason);
        if let Err(error) = self.shared.store.set_sandbox_state(self.id, state) {
            error!(sandbox = %self.id, error = %Report(&error), "Failed to write a sandbox's state");
        }
        self.access.set_state(state);
        self.access.set_vm(None, Thermal::Cold);
        self.record("sandbox.failed", serde_json::json!({ "reason": reason.to_string() }));
    }

    async fn destroy(&self) -> Result<(), DestroyError> {
        // A store on a full disk cannot note what is about to happen. What the sandbox's files take is then the room that it lacks, so
        // they go all the same; a daemon that dies in between finds a running sandbox without a VM, which is true.
        let noted = self.shared.store.set_sandbox_state(self.id, SandboxState::Destroyed);
        if let Err(error) = noted {
            warn!(sandbox = %self.id, error = %Report(&error), "Failed to note that a sandbox is being destroyed");
        }
        self.reached(Step::DestroyNoted).await;
        self.write_volumes().await;
        self.access.set_state(SandboxState::Destroyed);
        self.access.set_vm(None, Thermal::Cold);
        self.shared.registry.remove(self.id);
        let directory = self.directory();
        self.shared.engine.remove(self.id, &directory).await.map_err(DestroyError::Remove)?;
        self.reached(Step::Removed).await;
        self.record("sandbox.destroyed", serde_json::json!({}));
        self.shared.store.delete_sandbox(self.id).map_err(DestroyError::Store)?;
        if self.address.is_some() {
            self.shared.settle_networks().await;
        }
        info!(sandbox = %self.id, "Sandbox destroyed");
        Ok(())
    }
}

/// Waits until a time in seconds since 1970; for ever without one.
async fn until(unix_seconds: Option<u64>) {
    let Some(at) = unix_seconds else { return std::future::pending().await };
    let at = UNIX_EPOCH + Duration::from_secs(at);
    // The wall clock may be set in between: it is looked at again now and then.
    while let Ok(left) = at.duration_since(SystemTime::now()) {
        sleep(left.min(CLOCK_LOOK)).await;
    }
}

/// Removes a sandbox that has no driver because its row is damaged: its VMM, its files, its row.
/// If a step fails, the row stays, and the request can be repeated.
pub(crate) async fn remove(shared: &Arc<Shared>, id: SandboxId) -> Result<(), DestroyError> {
    let removed = shared.engine.remove(id, &shared.directory(id)).await;
    removed.map_err(DestroyError::Remove)?;
    match shared.store.delete_sandbox(id) {
        // A concurrent request destroyed the sandbox.
        Err(StoreError::NoSuchRow) => return Err(DestroyError::AlreadyGone),
        deleted => deleted.map_err(DestroyError::Store)?,
    }
    shared.settle_networks().await;
    info!(sandbox = %id, "Sandbox destroyed");
    Ok(())
}
