//! Processes that survive their client.
//!
//! ```text
//!             ┌─────────┐  output   ┌────────┐  follower, at its own offset       ┌──────┐
//!  process ──►│  pump   │──────────►│ output │───────────────────────────────────►│ host │
//!             └─────────┘           └────────┘                                    └──────┘
//! ```
//!
//! The pump appends to the output. An attached client follows the output from an offset in it, so
//! replay and live output are one stream and cannot overlap. While a client is attached, the pump
//! waits rather than discard bytes that the client has not been sent.
//!
//! A session with a terminal keeps a [ring](crate::ring) of its output. A session without one, a
//! *job*, keeps its two streams on disk; a client can follow them from any byte that is kept. An
//! ended session is kept for a while, for its exit code: see [`Limits`](crate::limits::Limits).

mod attach;
mod create;
mod job_log;
mod kept;
mod output;
mod pump;
mod registry;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bhatti_proto::{ErrorKind, SessionInfo, SignalRequest};
use rustix::process::Signal;
use tokio::sync::{Notify, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until};

use crate::Agent;
use crate::input;
use crate::limits::{STOP_GRACE_MAX, TERM_GRACE};
use crate::processes::Processes;
use crate::reaper::Ended;
use crate::refusal::{OpError, refused};
use output::Output;

pub(crate) use attach::serve_attach;
pub(crate) use create::{serve_create, start_init};
pub(crate) use kept::start_kept;
pub(crate) use registry::Sessions;

/// The session of the guest's init script.
pub(crate) const INIT_ID: &str = "init";

/// One session.
pub(crate) struct Session {
    pub(crate) id: String,
    argv: String,
    terminal: Option<pump::Terminal>,
    created_at: i64,
    processes: Rc<Processes>,
    /// Whether the job starts again when the guest boots anew.
    restarts: bool,
    /// The signal that asks the command to end.
    stop_signal: Signal,
    /// The kill that follows a request to end.
    kill: RefCell<Option<PendingKill>>,
    max_idle_sec: Option<u64>,
    stdin: RefCell<Option<pump::StdinSender>>,
    /// Room for input that waits for the process, in bytes.
    room: Arc<Semaphore>,
    output: RefCell<Output>,
    end: Cell<Option<Ended>>,
    tag: Option<String>,
    note: Option<String>,
    attachment: RefCell<Attachment>,
    /// Notifies of changes to the fields above.
    changed: Notify,
}

/// A kill of a session's processes that is due later.
struct PendingKill {
    at: Instant,
    task: AbortHandle,
}

/// The attachment of a client to the output.
#[derive(Debug, Default)]
struct Attachment {
    /// Counts attachments and detachments. Code that acts on one checks that it is still the
    /// latest.
    generation: u64,
    /// The offset of the next byte for the attached client; `None` if no client is attached.
    position: Option<u64>,
}

impl Session {
    pub(crate) fn is_running(&self) -> bool {
        self.end.get().is_none()
    }

    pub(crate) fn is_attached(&self) -> bool {
        self.attachment.borrow().position.is_some()
    }

    pub(crate) const fn is_job(&self) -> bool {
        self.terminal.is_none()
    }

    /// Describes the session without its tag and note.
    pub(crate) fn info(&self) -> SessionInfo {
        let output = self.output.borrow();
        SessionInfo {
            session_id: self.id.clone(),
            argv: self.argv.clone(),
            tty: self.terminal.is_some(),
            running: self.is_running(),
            exit_code: self.end.get().map(|end| end.code),
            attached: self.is_attached(),
            created_at: self.created_at,
            output_start: self.is_job().then(|| output.start()),
            output_end: self.is_job().then(|| output.end()),
            restart: self.restarts,
            pid: u32::try_from(self.processes.leader().as_raw_nonzero().get()).ok(),
            tag: None,
            note: None,
        }
    }

    /// Describes the session with all that is known of it.
    pub(crate) fn info_in_full(&self) -> SessionInfo {
        SessionInfo { tag: self.tag.clone(), note: self.note.clone(), ..self.info() }
    }

    /// Whether `name` names this session: its id, or the process id or tag of a session that runs.
    fn is_called(&self, name: &str) -> bool {
        let pid = || self.processes.leader().as_raw_nonzero().to_string();
        self.id == name
            || name.strip_prefix("pid:").is_some_and(|rest| self.is_running() && rest == pid())
            || name
                .strip_prefix("tag:")
                .is_some_and(|rest| self.is_running() && self.tag.as_deref() == Some(rest))
    }

    /// Signals the process group, if its leader has not ended. `KILL` goes to every process of
    /// the session.
    pub(crate) fn signal(&self, signal: Signal) {
        if !self.is_running() {
            return;
        }
        if signal == Signal::KILL {
            self.processes.kill();
        } else {
            self.processes.signal(signal);
        }
    }

    /// Asks the process group to end, and kills what is left of it after `grace`, or shortly after
    /// its leader has ended. Of several such kills, the earliest stays.
    fn stop(self: &Rc<Self>, signal: Signal, grace: Duration) {
        if !self.is_running() {
            return;
        }
        let at = Instant::now() + grace.min(STOP_GRACE_MAX);
        let mut kill = self.kill.borrow_mut();
        if kill.as_ref().is_some_and(|pending| pending.at <= at) {
            self.signal(signal);
            return;
        }
        let remembered = self.processes.remember();
        self.signal(signal);
        let session = Rc::clone(self);
        let task = tokio::task::spawn_local(async move {
            tokio::select! {
                () = sleep_until(at) => {}
                () = session.ended() => sleep_until(at.min(Instant::now() + TERM_GRACE)).await,
            }
            remembered.kill();
        });
        if let Some(later) = kill.replace(PendingKill { at, task: task.abort_handle() }) {
            later.task.abort();
        }
    }

    /// Attaches a client, which displaces the attached one. Returns the attachment's generation.
    fn attach(&self, from: Option<u64>) -> u64 {
        let output = self.output.borrow();
        let start = output.start();
        let position = from.map_or(start, |from| from.clamp(start, output.end()));
        let mut attachment = self.attachment.borrow_mut();
        attachment.generation += 1;
        attachment.position = Some(position);
        self.changed.notify_waiters();
        attachment.generation
    }

    /// Ends an attachment, unless another has displaced it already.
    fn detach(self: &Rc<Self>, generation: u64) {
        let mut attachment = self.attachment.borrow_mut();
        if attachment.generation != generation {
            return;
        }
        attachment.generation += 1;
        attachment.position = None;
        let idle_generation = attachment.generation;
        drop(attachment);
        self.changed.notify_waiters();
        self.watch_idleness(idle_generation);
    }

    /// Kills the process if no client attaches within its idle time.
    fn watch_idleness(self: &Rc<Self>, generation: u64) {
        let Some(seconds) = self.max_idle_sec else { return };
        let session = Rc::clone(self);
        tokio::task::spawn_local(async move {
            sleep(Duration::from_secs(seconds)).await;
            if session.attachment.borrow().generation == generation {
                session.signal(Signal::KILL);
            }
        });
    }

    /// Waits until the process has ended.
    async fn ended(&self) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // From here on no change is missed.
            changed.as_mut().enable();
            if !self.is_running() {
                return;
            }
            changed.await;
        }
    }

    /// Records that the process has ended and its output is complete.
    fn finish(&self, end: Ended) {
        self.end.set(Some(end));
        self.stdin.take();
        self.changed.notify_waiters();
    }
}

/// Returns the session with this id, process id or tag: see [`Session::is_called`].
pub(crate) fn find(agent: &Agent, id: &str) -> Result<Rc<Session>, OpError> {
    let found = agent.sessions.get(id);
    found.ok_or_else(|| refused(ErrorKind::NoSuchSession, "session not found").into())
}

/// Signals a session.
///
/// # Errors
///
/// Refused if there is no such session or signal.
pub(crate) fn signal(agent: &Agent, id: &str, request: &SignalRequest) -> Result<(), OpError> {
    let session = find(agent, id)?;
    let signal = match request.signal {
        0 => session.stop_signal,
        number => input::signal_numbered(number)?,
    };
    match request.kill_after_ms {
        Some(grace) => session.stop(signal, Duration::from_millis(grace)),
        None => session.signal(signal),
    }
    Ok(())
}

/// Kills a session. A job whose process has ended already is forgotten.
pub(crate) fn kill(agent: &Agent, id: &str) -> Result<(), OpError> {
    let session = find(agent, id)?;
    if session.is_running() {
        session.signal(Signal::KILL);
    } else if session.is_job() {
        agent.sessions.remove(&session);
    }
    Ok(())
}
