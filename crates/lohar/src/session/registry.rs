//! The registry of sessions.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use bhatti_proto::{AgentError, ErrorKind, SessionInfo};
use rustix::process::Signal;

use super::Session;
use crate::limits::Limits;
use crate::refusal::refused;

/// Sessions in the order of their creation.
#[derive(Default)]
pub(crate) struct Sessions {
    by_number: RefCell<BTreeMap<u64, Rc<Session>>>,
    last_number: Cell<u64>,
}

impl Sessions {
    /// Assigns the number of the next session, with a terminal or without one. Refused if too
    /// many sessions run. Removes the oldest finished sessions beyond their limit.
    pub(super) fn admit(&self, limits: &Limits, with_terminal: bool) -> Result<u64, AgentError> {
        let mut sessions = self.by_number.borrow_mut();
        let running = || sessions.values().filter(|session| session.is_running());
        let too_many = |what, limit| {
            refused(ErrorKind::Limit, format!("too many {what}: the limit is {limit}"))
        };
        if running().count() >= limits.sessions {
            return Err(too_many("sessions", limits.sessions));
        }
        let terminals = || running().filter(|session| session.terminal.is_some()).count();
        if with_terminal && terminals() >= limits.terminals {
            return Err(too_many("sessions with a terminal", limits.terminals));
        }
        let finished: Vec<u64> = sessions
            .iter()
            .filter(|(_, session)| !session.is_running())
            .map(|(number, _)| *number)
            .collect();
        let excess = finished.len().saturating_sub(limits.finished_sessions.saturating_sub(1));
        for number in finished.into_iter().take(excess) {
            sessions.remove(&number);
        }
        self.last_number.set(self.last_number.get() + 1);
        Ok(self.last_number.get())
    }

    /// Asks the sessions that have a stop signal of their own to end. Returns them.
    pub(crate) fn ask_to_end(&self) -> Vec<Rc<Session>> {
        let sessions = self.by_number.borrow();
        let has_own =
            |session: &&Rc<Session>| session.is_running() && session.stop_signal != Signal::TERM;
        let asked: Vec<_> = sessions.values().filter(has_own).cloned().collect();
        asked.iter().for_each(|session| session.signal(session.stop_signal));
        asked
    }

    /// Reserves this number, and all lower ones, for the sessions that had them.
    pub(super) fn reserve(&self, number: u64) {
        self.last_number.set(self.last_number.get().max(number));
    }

    pub(super) fn insert(&self, number: u64, session: &Rc<Session>) {
        self.by_number.borrow_mut().insert(number, Rc::clone(session));
    }

    /// Returns the newest session that is called so: see [`Session::is_called`].
    pub(crate) fn get(&self, name: &str) -> Option<Rc<Session>> {
        self.by_number.borrow().values().rfind(|session| session.is_called(name)).cloned()
    }

    /// Forgets a session.
    pub(crate) fn remove(&self, gone: &Rc<Session>) {
        self.by_number.borrow_mut().retain(|_, session| !Rc::ptr_eq(session, gone));
    }

    /// All sessions, oldest first, without their tags and notes.
    pub(crate) fn list(&self) -> Vec<SessionInfo> {
        self.by_number.borrow().values().map(|session| session.info()).collect()
    }

    /// All sessions, oldest first.
    pub(crate) fn all(&self) -> Vec<Rc<Session>> {
        self.by_number.borrow().values().cloned().collect()
    }

    /// Returns the number of sessions that run, of sessions with a client, and of jobs that run.
    pub(crate) fn count(&self) -> (u32, u32, u32) {
        let sessions = self.by_number.borrow();
        let count = |wanted: fn(&Session) -> bool| {
            u32::try_from(sessions.values().filter(|session| wanted(session)).count())
                .unwrap_or(u32::MAX)
        };
        let running_jobs = count(|session| session.is_running() && session.is_job());
        (count(Session::is_running), count(Session::is_attached), running_jobs)
    }
}
