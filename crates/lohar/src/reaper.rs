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
    waiting: RefCell<HashMap<Pid, oneshot::Sender<i32>>>,
}

/// Resolves to the exit code of one process: its own, or 128 plus the signal that ended it.
#[derive(Debug)]
pub(crate) struct Exit(oneshot::Receiver<i32>);

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
                let _: Result<(), i32> = ended.send(exit_code(status));
            }
        }
    }
}

impl Exit {
    /// Waits for the process to end.
    pub(crate) async fn code(&mut self) -> i32 {
        (&mut self.0).await.unwrap_or(EXIT_UNKNOWN)
    }
}

fn exit_code(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => EXIT_UNKNOWN,
    }
}
