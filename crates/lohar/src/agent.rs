//! What the agent counts and announces: connections, commands, suspension and shutdown.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use bhatti_proto::{ActivityInfo, ErrorKind};

use crate::Agent;
use crate::processes::Processes;
use crate::refusal::{OpError, refused};

/// Counts one use against a limit until dropped.
pub(crate) struct Counted {
    agent: Rc<Agent>,
    counter: fn(&Agent) -> &Cell<usize>,
}

/// The registration of a running command without a session. Ends when dropped.
pub(crate) struct Running {
    agent: Rc<Agent>,
    exec_id: Option<String>,
}

impl Agent {
    /// Counts a connection. Refused if there are too many.
    pub(crate) fn count_connection(self: &Rc<Self>) -> Result<Counted, OpError> {
        self.count(|agent| &agent.connections, self.limits.connections, "connections")
    }

    /// Counts a watch. Refused if there are too many.
    pub(crate) fn count_watch(self: &Rc<Self>) -> Result<Counted, OpError> {
        self.count(|agent| &agent.watches, self.limits.watches, "watches")
    }

    /// Counts a pipe of an ended command. Refused if there are too many.
    pub(crate) fn count_discarded_pipe(self: &Rc<Self>) -> Result<Counted, OpError> {
        let limit = self.limits.discarded_pipes;
        self.count(|agent| &agent.discarded_pipes, limit, "pipes of ended commands")
    }

    fn count(
        self: &Rc<Self>,
        counter: fn(&Self) -> &Cell<usize>,
        limit: usize,
        what: &str,
    ) -> Result<Counted, OpError> {
        let count = counter(self);
        if count.get() >= limit {
            return Err(refused(
                ErrorKind::Limit,
                format!("too many {what}: the limit is {limit}"),
            )
            .into());
        }
        count.set(count.get() + 1);
        Ok(Counted { agent: Rc::clone(self), counter })
    }

    /// Registers a command that runs, under the name that the host gave it.
    pub(crate) fn register(
        self: &Rc<Self>,
        exec_id: Option<String>,
        processes: &Rc<Processes>,
    ) -> Running {
        if let Some(exec_id) = &exec_id {
            self.commands.borrow_mut().insert(exec_id.clone(), Rc::clone(processes));
        }
        self.running_commands.set(self.running_commands.get() + 1);
        Running { agent: Rc::clone(self), exec_id }
    }

    /// The processes of a command, by the name that the host gave it.
    pub(crate) fn command(&self, exec_id: &str) -> Option<Rc<Processes>> {
        self.commands.borrow().get(exec_id).cloned()
    }

    /// Records that the host uses the guest now.
    pub(crate) fn touch(&self) {
        self.last_activity.set(unix_now());
    }

    /// Returns the guest's recent activity.
    pub(crate) fn activity(&self) -> ActivityInfo {
        let (active_sessions, attached_sessions, jobs) = self.sessions.count();
        ActivityInfo {
            last_activity_unix: self.last_activity.get(),
            active_sessions,
            attached_sessions,
            running_jobs: jobs + self.running_commands.get(),
        }
    }

    /// How often the guest was woken.
    pub(crate) fn wakes(&self) -> u64 {
        self.wakes.get()
    }

    /// Sets whether the users' processes are frozen, and notifies tasks that wait for them.
    pub(crate) fn set_suspended(&self, suspended: bool) {
        if !suspended {
            self.wakes.set(self.wakes.get() + 1);
        }
        self.suspended.set(suspended);
        self.awake.notify_waiters();
    }

    /// Waits until a process can be started. A process that starts frozen never reaches its
    /// program, and the agent would block while it waits for that.
    pub(crate) async fn awake(&self) {
        while self.suspended.get() {
            self.awake.notified().await;
        }
    }

    /// Requests the shutdown of the guest.
    pub(crate) fn ask_for_shutdown(&self) {
        self.shutdown_asked.set(true);
        self.shutdown.notify_waiters();
    }

    /// Whether the host has asked for the guest to be shut down.
    pub(crate) const fn is_shutting_down(&self) -> bool {
        self.shutdown_asked.get()
    }

    /// Waits until the host asks for the guest to be shut down.
    pub(crate) async fn shutdown_requested(&self) {
        while !self.shutdown_asked.get() {
            self.shutdown.notified().await;
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let count = (self.counter)(&self.agent);
        count.set(count.get() - 1);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(exec_id) = &self.exec_id {
            self.agent.commands.borrow_mut().remove(exec_id);
        }
        self.agent.running_commands.set(self.agent.running_commands.get() - 1);
    }
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
