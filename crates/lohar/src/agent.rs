//! State that all connections share.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bhatti_proto::{ActivityInfo, ErrorKind, GuestEvent};
use tokio::sync::{Notify, broadcast};

use crate::descriptors::raise_limit;
use crate::file::Workers;
use crate::image_environment;
use crate::limits::Limits;
use crate::processes::{Cgroups, Processes};
use crate::reaper::Reaper;
use crate::refusal::{OpError, refused};
use crate::session::Sessions;
use crate::settings::Settings;

/// Events that a slow listener may fall behind before it loses some.
const EVENT_QUEUE: usize = 64;

/// The agent.
pub(crate) struct Agent {
    /// Reaps child processes.
    pub(crate) reaper: Rc<Reaper>,
    /// The agent's limits.
    pub(crate) limits: Limits,
    /// The settings that the host applied.
    pub(crate) settings: RefCell<Settings>,
    /// Variables that the image sets for every process.
    pub(crate) image_environment: BTreeMap<String, String>,
    /// Processes that survive their client.
    pub(crate) sessions: Sessions,
    /// Sends events of the guest to listeners.
    pub(crate) events: broadcast::Sender<GuestEvent>,
    /// The directory of job output and of jobs that restart.
    pub(crate) state_dir: PathBuf,
    /// Where the agent runs, which decides how much of the system it may change.
    pub(crate) place: Place,
    /// The soft limit of descriptors for children, which is lower than that of the agent.
    pub(crate) child_descriptors: Option<u64>,
    /// Threads for file operations.
    pub(crate) file_workers: Workers,
    /// The cgroups of commands.
    pub(crate) cgroups: Rc<Cgroups>,
    commands: RefCell<HashMap<String, Rc<Processes>>>,
    running_commands: Cell<u32>,
    connections: Cell<usize>,
    watches: Cell<usize>,
    discarded_pipes: Cell<usize>,
    last_activity: Cell<i64>,
    shutdown_asked: Cell<bool>,
    shutdown: Notify,
    suspended: Cell<bool>,
    wakes: Cell<u64>,
    awake: Notify,
}

/// Where the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// As PID 1 of a VM, with its own kernel.
    Machine,
    /// As PID 1 of a container, on the host's kernel.
    Container,
    /// As an ordinary process: test mode.
    Process,
}

impl Place {
    /// Whether this is a guest, with users of its own.
    pub(crate) const fn is_guest(self) -> bool {
        matches!(self, Self::Machine | Self::Container)
    }

    /// Whether the agent has its own kernel: clock, cgroups, mounts and random numbers.
    pub(crate) const fn has_kernel(self) -> bool {
        matches!(self, Self::Machine)
    }
}

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
    /// Creates an idle agent, and raises the limit of descriptors of its process to the maximum.
    pub(crate) fn new(
        reaper: Rc<Reaper>,
        limits: Limits,
        state_dir: PathBuf,
        place: Place,
    ) -> Rc<Self> {
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        Rc::new(Self {
            reaper,
            limits,
            settings: RefCell::default(),
            image_environment: if place.is_guest() {
                image_environment::read()
            } else {
                BTreeMap::new()
            },
            sessions: Sessions::default(),
            events,
            state_dir,
            place,
            child_descriptors: raise_limit(place),
            file_workers: Workers::new(
                limits.file_operations,
                Duration::from_millis(limits.file_wait_ms),
            ),
            cgroups: Rc::default(),
            commands: RefCell::default(),
            running_commands: Cell::new(0),
            connections: Cell::new(0),
            watches: Cell::new(0),
            discarded_pipes: Cell::new(0),
            last_activity: Cell::new(0),
            shutdown_asked: Cell::new(false),
            shutdown: Notify::new(),
            suspended: Cell::new(false),
            wakes: Cell::new(0),
            awake: Notify::new(),
        })
    }

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
