//! The driver of one sandbox: the only writer of its state.
//!
//! ```text
//!  requests ──►┌────────┐ publishes   state and VM, for whoever uses the sandbox
//!              │ driver │────────────►
//!  VMM ends ──►└────────┘ writes      the row, before every effect
//! ```
//!
//! It lives from the sandbox's creation, or the daemon's start, to the sandbox's destruction.

use std::path::PathBuf;
use std::sync::Arc;

use bhatti_engine::{RemoveError, Vm};
use bhatti_store::StoreError;
use bhatti_types::{Denied, FailReason, Report, SandboxId, SandboxState};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};

use crate::Shared;

/// Requests that may wait for a driver.
const REQUEST_QUEUE: usize = 16;

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

/// What a driver lets others see.
#[derive(Clone)]
struct Published {
    state: SandboxState,
    vm: Option<Arc<dyn Vm>>,
}

enum Request {
    Destroy(oneshot::Sender<Result<(), DestroyError>>),
}

enum Event {
    Request(Request),
    VmmEnded,
}

/// The way to a driver.
#[derive(Clone)]
pub(crate) struct Handle {
    requests: mpsc::Sender<Request>,
    published: watch::Receiver<Published>,
}

impl Handle {
    /// The VM, if processes can be started in it.
    pub(crate) fn vm(&self) -> Result<Arc<dyn Vm>, Denied> {
        let published = self.published.borrow();
        published.state.admit_use()?;
        published.vm.clone().ok_or(Denied::StillCreating)
    }

    pub(crate) async fn destroy(&self) -> Result<(), DestroyError> {
        let (reply, destroyed) = oneshot::channel();
        self.requests.send(Request::Destroy(reply)).await.map_err(|_| DestroyError::AlreadyGone)?;
        destroyed.await.map_err(|_| DestroyError::AlreadyGone)?
    }
}

/// Drives one sandbox.
pub(crate) struct Driver {
    id: SandboxId,
    shared: Arc<Shared>,
    requests: mpsc::Receiver<Request>,
    published: watch::Sender<Published>,
}

impl Driver {
    /// A driver of a sandbox that stands at `state`, registered; it does nothing until it is run.
    pub(crate) fn register(
        shared: &Arc<Shared>,
        id: SandboxId,
        state: SandboxState,
        vm: Option<Arc<dyn Vm>>,
    ) -> Self {
        let (requests, waiting) = mpsc::channel(REQUEST_QUEUE);
        let (publisher, published) = watch::channel(Published { state, vm });
        shared.registry.insert(id, Handle { requests, published });
        Self { id, shared: Arc::clone(shared), requests: waiting, published: publisher }
    }

    /// Where the sandbox's files are.
    pub(crate) fn directory(&self) -> PathBuf {
        directory(&self.shared, self.id)
    }

    /// Drives the sandbox until it is destroyed.
    pub(crate) async fn run(mut self) {
        while self.published.borrow().state != SandboxState::Destroyed {
            let Some(event) = self.next_event().await else { return };
            self.apply(event).await;
        }
    }

    /// The sandbox's VM runs.
    pub(crate) fn running(&self, vm: Arc<dyn Vm>) -> Result<(), StoreError> {
        self.shared.store.set_sandbox_state(self.id, SandboxState::Running)?;
        self.publish(SandboxState::Running, Some(vm));
        Ok(())
    }

    /// The sandbox never came to be: nobody is to find it.
    pub(crate) fn abandon(self) -> Result<(), StoreError> {
        self.shared.registry.remove(self.id);
        self.shared.store.delete_sandbox(self.id)
    }

    async fn next_event(&mut self) -> Option<Event> {
        let vm = self.published.borrow().vm.clone();
        let ended = async {
            match &vm {
                Some(vm) => vm.ended().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            request = self.requests.recv() => request.map(Event::Request),
            () = ended => Some(Event::VmmEnded),
        }
    }

    async fn apply(&self, event: Event) {
        match event {
            Event::VmmEnded => self.fail(FailReason::VmmExited),
            Event::Request(Request::Destroy(reply)) => {
                let destroyed = self.destroy().await;
                if let Err(error) = &destroyed {
                    error!(sandbox = %self.id, error = %Report(error), "Failed to destroy a sandbox");
                }
                // Whoever asked may be gone.
                drop(reply.send(destroyed));
            }
        }
    }

    fn fail(&self, reason: FailReason) {
        let vm = self.published.borrow().vm.clone();
        let console = vm.map(|vm| vm.console_tail()).unwrap_or_default();
        warn!(sandbox = %self.id, %reason, console, "Sandbox failed");
        let state = SandboxState::Failed(reason);
        if let Err(error) = self.shared.store.set_sandbox_state(self.id, state) {
            error!(sandbox = %self.id, error = %Report(&error), "Failed to write a sandbox's state");
        }
        self.publish(state, None);
    }

    async fn destroy(&self) -> Result<(), DestroyError> {
        // A store on a full disk cannot note what is about to happen. What the sandbox's files take is then the room that it lacks, so
        // they go all the same; a daemon that dies in between finds a running sandbox without a VM, which is true.
        let noted = self.shared.store.set_sandbox_state(self.id, SandboxState::Destroyed);
        if let Err(error) = noted {
            warn!(sandbox = %self.id, error = %Report(&error), "Failed to note that a sandbox is being destroyed");
        }
        self.publish(SandboxState::Destroyed, None);
        self.shared.registry.remove(self.id);
        self.shared
            .engine
            .remove(self.id, &self.directory())
            .await
            .map_err(DestroyError::Remove)?;
        self.shared.store.delete_sandbox(self.id).map_err(DestroyError::Store)?;
        info!(sandbox = %self.id, "Sandbox destroyed");
        Ok(())
    }

    fn publish(&self, state: SandboxState, vm: Option<Arc<dyn Vm>>) {
        self.published.send_replace(Published { state, vm });
    }
}

/// Where the files of a sandbox are.
pub(crate) fn directory(shared: &Shared, id: SandboxId) -> PathBuf {
    shared.config.sandboxes_dir.join(id.to_string())
}
