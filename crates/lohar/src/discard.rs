//! Pipes whose command has ended and that background processes still write to.
//!
//! A server that a command starts with `&` has the command's pipes as its standard output and error. Closed pipes would end it with
//! SIGPIPE at its first line, so the agent goes on reading until the last writer has gone, and keeps nothing of it.

use std::io::ErrorKind;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::unix::pipe;
use tokio::time::sleep;

use crate::agent::Agent;

/// Bytes that are read at once.
const BUFFER_BYTES: usize = 16 << 10;

/// The pause after a full buffer: a process that floods its output is slowed down, so that the agent serves others.
const FLOOD_PAUSE: Duration = Duration::from_millis(1);

/// Reads a pipe to its end, in a task of its own. If too many pipes are read so already, the pipe is closed instead.
pub(crate) fn discard(agent: &Rc<Agent>, pipe: pipe::Receiver) {
    let Ok(counted) = agent.count_discarded_pipe() else { return };
    tokio::task::spawn_local(async move {
        let _counted = counted;
        while pipe.readable().await.is_ok() {
            match read_some(&pipe) {
                Ok(0) => return,
                Ok(BUFFER_BYTES) => sleep(FLOOD_PAUSE).await,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    });
}

/// Not part of the task: its buffer is on the stack only while it is used.
#[inline(never)]
fn read_some(pipe: &pipe::Receiver) -> std::io::Result<usize> {
    pipe.try_read(&mut [0; BUFFER_BYTES])
}
