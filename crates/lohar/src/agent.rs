//! What all connections share.

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
    /// Collects the children.
    pub(crate) reaper: Rc<Reaper>,
    /// What it gives at most.
    pub(crate) limits: Limits,
    /// What the host made of this guest.
    pub(crate) settings: RefCell<Settings>,
    /// What the image sets for every process.
    pub(crate) image_environment: BTreeMap<String, String>,
    /// Processes that survive their client.
    pub(crate) sessions: Sessions,
    /// What happens in the guest.
    pub(crate) events: broadcast::Sender<GuestEvent>,
    /// Where jobs keep their output.
    pub(crate) state_dir: PathBuf,
    /// What is its own to change.
    pub(crate) place: Place,
    /// How many descriptors its children begin with, which are fewer than it has itself.
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
    /// As PID 1 of a machine whose kernel is its own.
    Machine,
    /// As PID 1 of a container, on the host's kernel.
    Container,
    /// As an ordinary process: test mode.
    Process,
}

impl Place {
    /// Whether users live here.
    pub(crate) const fn is_guest(self) -> bool {
        matches!(self, Self::Machine | Self::Container)
    }

    /// Whether the kernel is its own: clock, cgroups, mounts and random numbers.
    pub(crate) const fn has_kernel(self) -> bool {
        matches!(self, Self::Machine)
    }
}

/// Something that is counted for as long as it lives.
pub(crate) struct Counted {
    agent: Rc<Agent>,
    counter: fn(&Agent) -> &Cell<usize>,
}

/// A command that runs without a session, registered for as long as it lives.
pub(crate) struct Running {
    agent: Rc<Agent>,
    exec_id: Option<String>,
}

impl Agent {
    /// An agent with nothing to do yet. Its process may have as many descriptors from here on as it can.
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

    /// Counts a connection; none if there are too many.
    pub(crate) fn count_connection(self: &Rc<Self>) -> Result<Counted, OpError> {
        self.count(|agent| &agent.connections, self.limits.connections, "connections")
    }

    /// Counts a watch; none if there are too many.
    pub(crate) fn count_watch(self: &Rc<Self>) -> Result<Counted, OpError> {
        self.count(|agent| &agent.watches, self.limits.watches, "watches")
    }

    /// Counts a pipe of an ended command; none if there are too many.
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

    /// Something was done in the guest for the host.
    pub(crate) fn touch(&self) {
        self.last_activity.set(unix_now());
    }

    /// What happened lately.
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

    /// Whether the users' processes stand still.
    pub(crate) fn set_suspended(&self, suspended: bool) {
        if !suspended {
            self.wakes.set(self.wakes.get() + 1);
        }
        self.suspended.set(suspended);
        self.awake.notify_waiters();
    }

    /// Waits until a process can be started: one that is born frozen never gets to its program, and whoever starts it waits for that.
    pub(crate) async fn awake(&self) {
        while self.suspended.get() {
            self.awake.notified().await;
        }
    }

    /// The guest is to be shut down.
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
