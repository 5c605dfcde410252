//! Waits for every child process: sends each exit code to the task that started the process, and
//! discards those of orphans.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use rustix::process::{Pid, WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// The exit code of a process whose end was not observed.
const EXIT_UNKNOWN: i32 = 1;

/// Reaps every child of this process.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    waiting: RefCell<HashMap<Pid, oneshot::Sender<Ended>>>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// The exit code: the process's own, or 128 plus the signal that ended it.
    pub(crate) code: i32,
    /// The signal that ended it.
    pub(crate) signal: Option<u8>,
}

/// Resolves to the end of one process.
#[derive(Debug)]
pub(crate) struct Exit(oneshot::Receiver<Ended>);

impl Reaper {
    /// Starts reaping, for as long as the agent runs. Must be called inside the agent's `LocalSet`.
    pub(crate) fn start() -> std::io::Result<Rc<Self>> {
        let reaper = Rc::new(Self::default());
        let mut child_ended = signal(SignalKind::child())?;
        let reaping = Rc::clone(&reaper);
        tokio::task::spawn_local(async move {
            // Children that ended before the handler was installed raised no signal for it.
            reaping.reap();
            while child_ended.recv().await.is_some() {
                reaping.reap();
            }
        });
        Ok(reaper)
    }

    /// Registers a child. Must be called before the first `.await` after its start.
    pub(crate) fn watch(&self, pid: Pid) -> Exit {
        let (ended, exit) = oneshot::channel();
        self.waiting.borrow_mut().insert(pid, ended);
        Exit(exit)
    }

    fn reap(&self) {
        // Stops if no child has ended. The only error is that there are no children.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(ended) = self.waiting.borrow_mut().remove(&pid) {
                // The task that started the process may have dropped the receiver.
                let _: Result<(), Ended> = ended.send(how_ended(status));
            }
        }
    }
}

impl Exit {
    /// Waits for the process to end, and returns its exit code.
    pub(crate) async fn code(&mut self) -> i32 {
        self.ended().await.code
    }

    /// Waits for the process to end.
    pub(crate) async fn ended(&mut self) -> Ended {
        (&mut self.0).await.unwrap_or(Ended { code: EXIT_UNKNOWN, signal: None })
    }
}

fn how_ended(status: WaitStatus) -> Ended {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Ended { code, signal: None },
        (None, Some(signal)) => Ended { code: 128 + signal, signal: u8::try_from(signal).ok() },
        (None, None) => Ended { code: EXIT_UNKNOWN, signal: None },
    }
}
