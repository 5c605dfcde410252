//! What a driver shares with its callers: the sandbox's state, and the leases that keep it hot.

use std::sync::Arc;

use bhatti_agent::AgentClient;
use bhatti_engine::Vm;
use bhatti_types::{Denied, SandboxState, Thermal};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Duration, Instant};

use super::state::{Kind, State};
use crate::admission::Admitted;

/// A sandbox's state and leases. The driver alone changes the state.
pub(crate) struct Access {
    inner: Mutex<Inner>,
    /// Notified when a lease ends or `keep_hot` changes: the driver's next deadline may have moved.
    pub(crate) changed: Notify,
}

struct Inner {
    state: State,
    leases: usize,
    last_activity: Instant,
    keep_hot: bool,
}

/// A VM that has a process, with the memory that is reserved for it.
#[derive(Clone)]
pub(crate) struct Running {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) agent: AgentClient,
    admitted: Arc<Admitted>,
}

impl Running {
    /// A VM whose agent asks for `token`.
    pub(crate) fn new(vm: Arc<dyn Vm>, token: &str, admitted: Admitted) -> Self {
        let agent = agent(&vm, token);
        Self { vm, agent, admitted: Arc::new(admitted) }
    }

    /// Returns the same VM, whose agent now asks for another token.
    pub(crate) fn with_token(self, token: &str) -> Self {
        Self { agent: agent(&self.vm, token), ..self }
    }

    /// Returns the memory that is reserved for the VM.
    pub(crate) fn admitted(&self) -> Arc<Admitted> {
        Arc::clone(&self.admitted)
    }
}

fn agent(vm: &Arc<dyn Vm>, token: &str) -> AgentClient {
    let agent = AgentClient::new(vm.channel());
    if token.is_empty() { agent } else { agent.with_token(token.as_bytes()) }
}

/// A use of a sandbox: the sandbox stays hot until this is dropped.
pub(crate) struct Lease(Arc<Access>);

/// The result of an attempt to take a lease.
pub(crate) enum Entry {
    /// The sandbox is hot.
    Hot(AgentClient, Lease),
    /// The driver has to wake the sandbox first.
    Asleep,
}

impl Access {
    pub(crate) fn new(state: State, keep_hot: bool) -> Arc<Self> {
        let inner = Inner { state, leases: 0, last_activity: Instant::now(), keep_hot };
        Arc::new(Self { inner: Mutex::new(inner), changed: Notify::new() })
    }

    /// Takes a lease if the sandbox is hot.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Entry, Denied> {
        let mut inner = self.inner.lock();
        inner.state.kind().sandbox_state().admit_use()?;
        let State::Hot(running) = &inner.state else { return Ok(Entry::Asleep) };
        let agent = running.agent.clone();
        inner.leases += 1;
        inner.last_activity = Instant::now();
        Ok(Entry::Hot(agent, Lease(Arc::clone(self))))
    }

    /// Closes a hot sandbox to new leases, so that the driver may pause it. Does nothing if it has
    /// leases, stays hot, or was used after `asked_at`. Returns whether it is closed.
    pub(crate) fn close_if_unused(&self, asked_at: Instant) -> bool {
        let mut inner = self.inner.lock();
        let is_unused = inner.leases == 0 && !inner.keep_hot && inner.last_activity <= asked_at;
        match &inner.state {
            State::Hot(running) if is_unused => {
                inner.state = State::Warm(running.clone());
                true
            }
            _ => false,
        }
    }

    /// Returns when the sandbox is to cool; `None` while it has leases.
    pub(crate) fn deadline(
        &self,
        warm_after: Duration,
        cold_after: Option<Duration>,
    ) -> Option<Instant> {
        let inner = self.inner.lock();
        if inner.keep_hot || inner.leases > 0 {
            return None;
        }
        match inner.state {
            State::Hot(_) => Some(inner.last_activity + warm_after),
            State::Warm(_) => Some(inner.last_activity + warm_after + cold_after?),
            _ => None,
        }
    }

    /// Returns since when a warm sandbox is unused; `None` if it has leases or is not warm.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let inner = self.inner.lock();
        let is_idle = matches!(inner.state, State::Warm(_)) && inner.leases == 0;
        is_idle.then_some(inner.last_activity)
    }

    /// Returns a copy of the state.
    pub(super) fn snapshot(&self) -> State {
        self.inner.lock().state.clone()
    }

    pub(crate) fn kind(&self) -> Kind {
        self.inner.lock().state.kind()
    }

    pub(crate) fn state(&self) -> SandboxState {
        self.kind().sandbox_state()
    }

    /// Returns the activity of a running sandbox.
    pub(crate) fn thermal(&self) -> Option<Thermal> {
        self.kind().thermal()
    }

    pub(crate) fn running(&self) -> Option<Running> {
        self.inner.lock().state.running().cloned()
    }

    /// Returns the memory that is reserved for the sandbox's VM.
    pub(crate) fn memory(&self) -> Option<Arc<Admitted>> {
        self.inner.lock().state.memory()
    }

    pub(crate) fn set(&self, state: State) {
        self.inner.lock().state = state;
    }

    pub(super) fn keep_hot(&self) -> bool {
        self.inner.lock().keep_hot
    }

    pub(crate) fn set_keep_hot(&self, keep_hot: bool) {
        self.inner.lock().keep_hot = keep_hot;
        self.changed.notify_one();
    }

    /// Records a use now.
    pub(crate) fn touch(&self) {
        self.inner.lock().last_activity = Instant::now();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut inner = self.0.inner.lock();
        inner.leases -= 1;
        inner.last_activity = Instant::now();
        drop(inner);
        self.0.changed.notify_one();
    }
}
