//! The driver of one sandbox: the only writer of its state.
//!
//! ```text
//!  requests ──►┌────────┐ sets        `Access`: the state, with the VM if there is one
//!              │ driver │────────────►
//!  VMM ends ──►│        │ writes      the row, before every effect
//!  deadline ──►└────────┘
//! ```
//!
//! A driver lives from the sandbox's creation, or the daemon's start, to the end of its
//! destruction. It carries out one request at a time, and decides about further requests when they
//! arrive ([`queue`]). [`state`] has the states and which requests each state admits. Each
//! transition is in a file of its own, as methods of [`Sandbox`].
//!
//! | file | transition |
//! |---|---|
//! | [`cool`] | an unused sandbox gets cooler |
//! | [`pause`] | hot ◄─► warm |
//! | [`mod@sleep`] | hot or warm ─► cold |
//! | [`wake`] | warm or cold ─► hot |
//! | [`stop`], [`start`] | running ◄─► stopped |
//! | [`boot`] | from the disk: a cold boot, or after the guest's reboot |
//! | [`save`] | saved elsewhere, running on; layers of the disk merged |
//! | [`destroy`] | any state ─► nothing |

pub(crate) mod access;
mod boot;
pub(crate) mod boot_mark;
mod breaker;
mod cool;
mod destroy;
mod error;
mod guest_events;
mod pause;
mod queue;
mod reboot;
mod sandbox;
mod save;
pub(crate) mod saved;
mod sleep;
mod start;
pub(crate) mod state;
pub(crate) mod steps;
mod stop;
mod tell;
mod time_limit;
mod wake;

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use bhatti_agent::AgentClient;
use bhatti_engine::MemoryKind;
use bhatti_store::{Claim, SandboxRow, StoreError};
use bhatti_types::{Denied, FailReason, OnTimeout, Report, SandboxId, TimeLimitChange};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::sleep_until;
use tracing::error;

use crate::Shared;
use crate::volumes::MadeFrom;
use access::{Access, Entry, Lease};
use cool::Silences;
use destroy::Retry;
use queue::{Decision, Queue, decide};
use save::Capture;
use state::{Admission, Kind, State, Wanted, admit};

pub(crate) use boot::configure;
pub(crate) use destroy::remove;
pub use error::{DestroyError, TransitionError};
use sandbox::Facts;
pub(crate) use sandbox::Sandbox;
pub use save::SavedSandbox;

/// Requests that may wait for a driver that has not looked at them yet.
const ARRIVALS_MAX: usize = 16;

/// How many times a sandbox that was woken is found asleep again before its caller gets an error.
const ENTRY_ATTEMPTS: u32 = 16;

type Reply<T = ()> = oneshot::Sender<Result<T, TransitionError>>;

/// A request to a driver.
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
    TimeLimit {
        change: TimeLimitChange,
        reply: Reply,
    },
    /// Saves the sandbox into a directory.
    Save {
        directory: PathBuf,
        memory: Option<MemoryKind>,
        made_from: MadeFrom,
        reply: Reply<SavedSandbox>,
    },
    /// Merges the layers of the disk if that frees space. The answer is whether it did.
    MergeDisk(Reply<bool>),
    /// Saves the sandbox and gives its memory back, unless it has leases.
    GiveMemory(Reply),
    /// Saves the sandbox, with or without leases: the daemon stops.
    Sleep(Reply),
    Destroy(oneshot::Sender<Result<(), DestroyError>>),
}

impl Request {
    const fn wanted(&self) -> Wanted {
        match self {
            Self::Wake(_) => Wanted::Wake,
            Self::Pause(_) => Wanted::Pause,
            Self::Stop(_) => Wanted::Stop,
            Self::Start { cold_boot: false, .. } => Wanted::Start,
            Self::Start { cold_boot: true, .. } => Wanted::ColdBoot,
            Self::KeepHot { .. } | Self::TimeLimit { .. } => Wanted::Change,
            Self::Save { .. } => Wanted::Save,
            Self::MergeDisk(_) => Wanted::Merge,
            Self::GiveMemory(_) => Wanted::GiveMemory,
            Self::Sleep(_) => Wanted::Sleep,
            Self::Destroy(_) => Wanted::Destroy,
        }
    }

    /// Answers that nothing is to be done. The caller may be gone, here and below.
    fn already(self) {
        match self {
            Self::Wake(reply)
            | Self::Pause(reply)
            | Self::Stop(reply)
            | Self::Start { reply, .. }
            | Self::KeepHot { reply, .. }
            | Self::TimeLimit { reply, .. }
            | Self::GiveMemory(reply)
            | Self::Sleep(reply) => drop(reply.send(Ok(()))),
            Self::MergeDisk(reply) => drop(reply.send(Ok(false))),
            // Neither is ever already done.
            Self::Save { .. } | Self::Destroy(_) => {}
        }
    }

    /// Answers that the request cannot be carried out.
    fn deny(self, denied: Denied) {
        match self {
            Self::Destroy(reply) => drop(reply.send(Err(DestroyError::AlreadyGone))),
            request => request.refuse(denied.into()),
        }
    }

    /// Answers that another daemon has claimed the sandbox.
    fn fenced(self, sandbox: SandboxId) {
        let error = StoreError::Fenced(sandbox);
        match self {
            Self::Destroy(reply) => drop(reply.send(Err(DestroyError::Store(error)))),
            request => request.refuse(error.into()),
        }
    }

    fn refuse(self, error: TransitionError) {
        match self {
            Self::Wake(reply)
            | Self::Pause(reply)
            | Self::Stop(reply)
            | Self::Start { reply, .. }
            | Self::KeepHot { reply, .. }
            | Self::TimeLimit { reply, .. }
            | Self::GiveMemory(reply)
            | Self::Sleep(reply) => drop(reply.send(Err(error))),
            Self::MergeDisk(reply) => drop(reply.send(Err(error))),
            Self::Save { reply, .. } => drop(reply.send(Err(error))),
            Self::Destroy(reply) => drop(reply.send(Err(DestroyError::AlreadyGone))),
        }
    }
}

/// Sends requests to a driver.
#[derive(Clone)]
pub(crate) struct Handle {
    requests: mpsc::Sender<Request>,
    pub(crate) access: Arc<Access>,
}

impl Handle {
    /// Takes a lease: wakes the sandbox if it sleeps, and keeps it hot until the lease is dropped.
    pub(crate) async fn enter(&self) -> Result<(AgentClient, Lease), TransitionError> {
        for _ in 0..ENTRY_ATTEMPTS {
            match self.access.enter()? {
                Entry::Hot(agent, lease) => return Ok((agent, lease)),
                Entry::Asleep => self.ask(Request::Wake).await?,
            }
        }
        Err(TransitionError::Restless)
    }

    /// Sends a request and waits for the answer.
    pub(crate) async fn ask<T>(
        &self,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, TransitionError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_| self.gone())?;
        answer.await.map_err(|_| self.gone())?
    }

    /// Returns why a driver does not answer: its sandbox is destroyed, or the driver panicked.
    fn gone(&self) -> TransitionError {
        match self.access.state().admit_use() {
            Err(denied) => denied.into(),
            Ok(()) => TransitionError::Panicked,
        }
    }

    pub(crate) async fn destroy(&self) -> Result<(), DestroyError> {
        let (reply, destroyed) = oneshot::channel();
        self.requests.send(Request::Destroy(reply)).await.map_err(|_| DestroyError::AlreadyGone)?;
        destroyed.await.map_err(|_| DestroyError::AlreadyGone)?
    }
}

enum Event {
    Request(Request),
    VmmEnded,
    Deadline,
    Expired,
    /// A destruction that failed is due again.
    Retry,
    /// Something changed that decides about the next event.
    Changed,
}

/// Drives one sandbox.
pub(crate) struct Driver {
    pub(crate) sandbox: Sandbox,
    arrivals: mpsc::Receiver<Request>,
    queue: Queue<Request>,
    silences: Silences,
    retry: Retry,
    /// The rest of a snapshot is written beside this driver.
    saving: Option<JoinHandle<()>>,
    /// Work before the first event, which is guarded as all others.
    startup: Option<Startup>,
}

/// Work that a driver does before it serves requests.
pub(crate) type Startup =
    Box<dyn for<'a> FnOnce(&'a Sandbox) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> + Send>;

impl Driver {
    /// Registers a driver of a sandbox in `state`. It does nothing until it is run.
    pub(crate) fn register(
        shared: &Arc<Shared>,
        row: &SandboxRow,
        claim: Claim,
        state: State,
    ) -> Self {
        Self::of(shared, Facts::new(row, claim), Access::new(state, row.spec.keep_hot))
    }

    fn of(shared: &Arc<Shared>, facts: Facts, access: Arc<Access>) -> Self {
        let (requests, arrivals) = mpsc::channel(ARRIVALS_MAX);
        shared.registry.insert(facts.id, Handle { requests, access: Arc::clone(&access) });
        Self {
            sandbox: Sandbox::new(shared, facts, access),
            arrivals,
            queue: Queue::default(),
            silences: Silences::default(),
            retry: Retry::default(),
            saving: None,
            startup: None,
        }
    }

    /// Has the driver do `startup` first when it is run.
    pub(crate) fn starting_with(self, startup: Startup) -> Self {
        Self { startup: Some(startup), ..self }
    }

    /// Deletes the row of a sandbox that was not created.
    pub(crate) fn abandon(self) -> Result<(), StoreError> {
        self.sandbox.shared.registry.remove(self.sandbox.id);
        self.sandbox.access.set(State::Destroyed);
        self.sandbox.shared.store.delete_sandbox(&self.sandbox.claim)
    }

    /// Drives the sandbox until it is destroyed. If the driver panics, the sandbox fails, and
    /// another driver goes on.
    pub(crate) async fn run(self) {
        let (shared, facts) = (Arc::clone(&self.sandbox.shared), self.sandbox.facts());
        let (mut driver, mut retry) = (self, Retry::default());
        loop {
            let access = Arc::clone(&driver.sandbox.access);
            match tokio::spawn(driver.drive()).await {
                Err(panic) if panic.is_panic() => {}
                _ => return,
            }
            error!(sandbox = %facts.id, "The driver of a sandbox panicked");
            let (memory, reason) = (access.memory(), FailReason::DriverPanicked);
            let was_going = matches!(access.kind(), Kind::Destroying | Kind::Destroyed);
            let left =
                if was_going { State::Destroying(memory) } else { State::Failed(reason, memory) };
            // Callers that hold the old access see the failure, too.
            access.set(left.clone());
            let next = Access::new(left, access.keep_hot());
            driver = Self::of(&shared, facts.clone(), next);
            if was_going {
                // Not at once: the destruction may panic again.
                retry.note_failure();
                driver.retry = retry;
            } else {
                driver.startup = Some(Box::new(move |sandbox| Box::pin(sandbox.fail(reason))));
            }
        }
    }

    async fn drive(mut self) {
        if let Some(startup) = self.startup.take() {
            startup(&self.sandbox).await;
        }
        while self.sandbox.access.kind() != Kind::Destroyed {
            if self.sandbox.is_fenced() {
                return self.sandbox.leave().await;
            }
            if let Some((_, request)) = self.queue.pop() {
                self.take_turn(request).await;
                continue;
            }
            let Some(event) = self.next_event().await else { return };
            self.apply(event).await;
        }
    }

    /// Waits for the next event. Cancel safe.
    async fn next_event(&mut self) -> Option<Event> {
        let sandbox = &self.sandbox;
        let running = sandbox.access.running();
        let ended = async {
            match &running {
                Some(running) => running.vm.ended().await,
                None => std::future::pending().await,
            }
        };
        let thermal = &sandbox.shared.config.thermal;
        // An engine without snapshots keeps warm sandboxes: they would lose their processes.
        let cold_after = sandbox.saves_memory().then_some(thermal.cold_after);
        let deadline = sandbox.access.deadline(thermal.warm_after, cold_after);
        let is_going = sandbox.access.kind() == Kind::Destroying;
        let retry = is_going.then(|| self.retry.at());
        tokio::select! {
            request = self.arrivals.recv() => request.map(Event::Request),
            () = ended => Some(Event::VmmEnded),
            () = at(deadline) => Some(Event::Deadline),
            () = at(retry) => Some(Event::Retry),
            () = sandbox.time_is_over(), if !is_going => Some(Event::Expired),
            () = sandbox.access.changed.notified() => Some(Event::Changed),
        }
    }

    /// Acts on an event. Never canceled.
    async fn apply(&mut self, event: Event) {
        if !matches!(event, Event::Request(_) | Event::Changed) && !self.sandbox.holds_claim() {
            return;
        }
        match event {
            Event::Request(request) => drop(arrive(&self.sandbox, &mut self.queue, request, None)),
            Event::VmmEnded => {
                // A boot in the same directory would remove files that the snapshot needs.
                self.finish_saving().await;
                self.sandbox.vmm_ended().await;
            }
            Event::Deadline => {
                if self.sandbox.access.kind() == Kind::Warm {
                    self.finish_saving().await;
                }
                self.sandbox.cool(&mut self.silences).await;
            }
            Event::Expired => self.expire().await,
            Event::Retry => self.take_turn(Request::Destroy(oneshot::channel().0)).await,
            Event::Changed => {}
        }
    }

    /// Ends a sandbox whose time is over.
    async fn expire(&mut self) {
        match self.sandbox.time_limit().on_timeout {
            OnTimeout::Destroy => {
                self.sandbox.record("sandbox.expired", json!({}));
                self.take_turn(Request::Destroy(oneshot::channel().0)).await;
            }
            OnTimeout::Stop => {
                self.take_turn(Request::Stop(oneshot::channel().0)).await;
                self.sandbox.end_time_limit();
            }
        }
    }

    /// Carries out a request whose turn has come, and decides about those that arrive meanwhile.
    async fn take_turn(&mut self, request: Request) {
        let wanted = request.wanted();
        if !self.sandbox.holds_claim() {
            return request.fenced(self.sandbox.id);
        }
        match admit(self.sandbox.access.kind(), wanted) {
            Admission::Already => return request.already(),
            Admission::Denied(denied) => return request.deny(denied),
            Admission::Perform => {}
        }
        if changes_layers(wanted) {
            self.finish_saving().await;
        }
        let Self { sandbox, arrivals, queue, .. } = self;
        let mut work = std::pin::pin!(perform(sandbox, request));
        let (mut interrupting, mut has_expired) = (None, false);
        let outcome = loop {
            tokio::select! {
                outcome = &mut work => break outcome,
                () = sandbox.time_is_over(), if !has_expired => {
                    has_expired = true;
                    sandbox.hurry.notify_waiters();
                }
                Some(request) = arrivals.recv(), if queue.has_room() => {
                    let hurries = hurries(request.wanted());
                    let supersedes = arrive(sandbox, queue, request, Some(wanted));
                    if hurries {
                        sandbox.hurry.notify_waiters();
                    }
                    if supersedes && is_a_save(wanted) {
                        interrupting = sandbox.interrupt();
                    }
                }
            }
        };
        if let Some(task) = interrupting {
            // The destruction must not meet it.
            drop(task.await);
        }
        match outcome {
            Outcome::Done => {}
            Outcome::Saving(task) => self.saving = Some(task),
            Outcome::NotDestroyed => self.retry.note_failure(),
        }
    }

    /// Waits until the files of a snapshot are written.
    async fn finish_saving(&mut self) {
        if let Some(task) = self.saving.take()
            && let Err(panic) = task.await
        {
            error!(sandbox = %self.sandbox.id, error = %panic, "Writing a snapshot panicked");
        }
    }
}

/// What comes of a request that was carried out.
enum Outcome {
    /// The request is answered.
    Done,
    /// The sandbox runs on; a task writes the rest of a snapshot and answers.
    Saving(JoinHandle<()>),
    /// A destruction failed, and is answered so. It is tried again.
    NotDestroyed,
}

/// Decides about a request that has arrived while `current` is carried out. Returns whether it
/// supersedes the others.
fn arrive(
    sandbox: &Sandbox,
    queue: &mut Queue<Request>,
    request: Request,
    current: Option<Wanted>,
) -> bool {
    let wanted = request.wanted();
    match decide(sandbox.access.kind(), current, queue.wanted(), wanted) {
        Decision::Already => request.already(),
        Decision::Denied(denied) => request.deny(denied),
        Decision::Wait => queue.push(wanted, request),
        Decision::Supersede => {
            queue.drain().for_each(|superseded| superseded.deny(Denied::Destroyed));
            queue.push(wanted, request);
            return true;
        }
    }
    false
}

/// Whether a transition adds or removes layers of the disk, or removes them all. A snapshot that is
/// still being written needs them.
const fn changes_layers(wanted: Wanted) -> bool {
    match wanted {
        Wanted::Stop
        | Wanted::ColdBoot
        | Wanted::Save
        | Wanted::Merge
        | Wanted::GiveMemory
        | Wanted::Sleep
        | Wanted::Destroy => true,
        Wanted::Wake | Wanted::Pause | Wanted::Start | Wanted::Change => false,
    }
}

/// Whether a transition saves a memory that a destruction makes useless.
const fn is_a_save(wanted: Wanted) -> bool {
    matches!(wanted, Wanted::Stop | Wanted::GiveMemory | Wanted::Sleep)
}

/// Whether a request that waits is worth giving up a merge of the disk's layers, which may take
/// minutes and can be done again later. Uses of the sandbox do not wait for a merge.
const fn hurries(wanted: Wanted) -> bool {
    !matches!(wanted, Wanted::Wake | Wanted::Change)
}

/// Carries out a request, and answers it. The caller may be gone.
async fn perform(sandbox: &Sandbox, request: Request) -> Outcome {
    match request {
        Request::Wake(reply) => drop(reply.send(sandbox.wake().await)),
        Request::Pause(reply) => drop(reply.send(sandbox.pause_on_request().await)),
        Request::Stop(reply) => {
            drop(reply.send(sandbox.stop().await.map_err(|error| sandbox.cause(error))));
        }
        Request::Start { cold_boot: false, reply } => drop(reply.send(sandbox.start().await)),
        Request::Start { cold_boot: true, reply } => drop(reply.send(sandbox.cold_boot().await)),
        Request::KeepHot { keep_hot, reply } => {
            drop(reply.send(sandbox.set_keep_hot(keep_hot).await));
        }
        Request::TimeLimit { change, reply } => {
            drop(reply.send(sandbox.change_time_limit(change)));
        }
        Request::MergeDisk(reply) => drop(reply.send(sandbox.merge_disk().await)),
        Request::GiveMemory(reply) => {
            drop(reply.send(sandbox.give_memory().await.map_err(|error| sandbox.cause(error))));
        }
        Request::Sleep(reply) => {
            let slept = sandbox.sleep_for_shut_down().await;
            drop(reply.send(slept.map_err(|error| sandbox.cause(error))));
        }
        Request::Save { directory, memory, made_from, reply } => {
            match sandbox.capture(directory, memory, made_from).await {
                Ok(capture) => return Outcome::Saving(tokio::spawn(finish(capture, reply))),
                Err(error) => drop(reply.send(Err(error))),
            }
        }
        Request::Destroy(reply) => {
            let destroyed = sandbox.destroy().await;
            let is_destroyed = destroyed.is_ok();
            if let Err(error) = &destroyed {
                error!(
                    sandbox = %sandbox.id,
                    error = %Report(error),
                    "Failed to destroy a sandbox; the daemon tries again"
                );
            }
            drop(reply.send(destroyed));
            if !is_destroyed {
                return Outcome::NotDestroyed;
            }
        }
    }
    Outcome::Done
}

async fn finish(capture: Capture, reply: Reply<SavedSandbox>) {
    drop(reply.send(capture.finish().await));
}

/// Waits until an instant; for ever without one.
async fn at(instant: Option<tokio::time::Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
