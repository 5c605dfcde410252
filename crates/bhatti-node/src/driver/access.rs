//! What a driver and those who use its sandbox share: whether it can be used right now, and by how many it is.

use std::sync::Arc;

use bhatti_agent::AgentClient;
use bhatti_engine::Vm;
use bhatti_types::{Denied, SandboxState, Thermal};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Duration, Instant};

use crate::admission::Admitted;

/// Where a sandbox stands, with its VM if it has one.
pub(crate) struct Access {
    inner: Mutex<Inner>,
    /// A user has gone, or the sandbox was changed: the driver's next deadline may be another.
    pub(crate) changed: Notify,
}

struct Inner {
    state: SandboxState,
    thermal: Thermal,
    vm: Option<Running>,
    leases: usize,
    last_activity: Instant,
    keep_hot: bool,
}

/// A VM that has a process, with the memory that was set aside for it.
#[derive(Clone)]
pub(crate) struct Running {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) agent: AgentClient,
    _admitted: Arc<Admitted>,
}

impl Running {
    /// A VM whose agent wants `token`.
    pub(crate) fn new(vm: Arc<dyn Vm>, token: &str, admitted: Admitted) -> Self {
        let agent = agent(&vm, token);
        Self { vm, agent, _admitted: Arc::new(admitted) }
    }

    /// The same VM, whose agent wants another token by now.
    pub(crate) fn with_token(self, token: &str) -> Self {
        Self { agent: agent(&self.vm, token), ..self }
    }
}

fn agent(vm: &Arc<dyn Vm>, token: &str) -> AgentClient {
    let agent = AgentClient::new(vm.channel());
    if token.is_empty() { agent } else { agent.with_token(token.as_bytes()) }
}

/// Somebody uses the sandbox for as long as this lives: it stays hot.
pub(crate) struct Lease(Arc<Access>);

/// What comes of an attempt to use a sandbox.
pub(crate) enum Entry {
    /// It is hot.
    Hot(AgentClient, Lease),
    /// Its driver has to wake it first.
    Asleep,
}

impl Access {
    pub(crate) fn new(state: SandboxState, keep_hot: bool) -> Arc<Self> {
        let inner = Inner {
            state,
            thermal: Thermal::Cold,
            vm: None,
            leases: 0,
            last_activity: Instant::now(),
            keep_hot,
        };
        Arc::new(Self { inner: Mutex::new(inner), changed: Notify::new() })
    }

    /// Uses the sandbox, if it can be used right now.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Entry, Denied> {
        let mut inner = self.inner.lock();
        inner.state.admit_use()?;
        let agent = match &inner.vm {
            Some(running) if inner.thermal == Thermal::Hot => running.agent.clone(),
            _ => return Ok(Entry::Asleep),
        };
        inner.leases += 1;
        inner.last_activity = Instant::now();
        Ok(Entry::Hot(agent, Lease(Arc::clone(self))))
    }

    /// Closes the sandbox to new users, unless it has some or is wanted hot. Then the driver may pause it.
    pub(crate) fn close_if_unused(&self) -> bool {
        let mut inner = self.inner.lock();
        let unused = inner.leases == 0 && !inner.keep_hot && inner.thermal == Thermal::Hot;
        if unused {
            inner.thermal = Thermal::Warm;
        }
        unused
    }

    /// When the sandbox is to get cooler: never while somebody uses it.
    pub(crate) fn deadline(
        &self,
        warm_after: Duration,
        cold_after: Option<Duration>,
    ) -> Option<Instant> {
        let inner = self.inner.lock();
        if inner.state != SandboxState::Running || inner.keep_hot || inner.leases > 0 {
            return None;
        }
        match inner.thermal {
            Thermal::Hot => Some(inner.last_activity + warm_after),
            Thermal::Warm => Some(inner.last_activity + warm_after + cold_after?),
            Thermal::Cold => None,
        }
    }

    /// Since when a warm sandbox that runs has not been used; `None` if it is used, hot, or has no VM.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let inner = self.inner.lock();
        let is_idle = inner.vm.is_some() && inner.thermal == Thermal::Warm && inner.leases == 0;
        is_idle.then_some(inner.last_activity)
    }

    pub(crate) fn state(&self) -> SandboxState {
        self.inner.lock().state
    }

    /// None unless the sandbox is one that runs.
    pub(crate) fn thermal(&self) -> Option<Thermal> {
        let inner = self.inner.lock();
        (inner.state == SandboxState::Running).then_some(inner.thermal)
    }

    pub(crate) fn running(&self) -> Option<Running> {
        self.inner.lock().vm.clone()
    }

    pub(crate) fn set_state(&self, state: SandboxState) {
        self.inner.lock().state = state;
    }

    pub(crate) fn set_thermal(&self, thermal: Thermal) {
        self.inner.lock().thermal = thermal;
    }

    pub(crate) fn set_keep_hot(&self, keep_hot: bool) {
        self.inner.lock().keep_hot = keep_hot;
        self.changed.notify_one();
    }

    /// Puts a VM in place, or takes it away.
    pub(crate) fn set_vm(&self, vm: Option<Running>, thermal: Thermal) {
        let mut inner = self.inner.lock();
        inner.vm = vm;
        inner.thermal = thermal;
    }

    /// Something was done in the sandbox.
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
