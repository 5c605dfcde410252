//! Drains pipes of ended commands to which background processes still write.
//!
//! A server that a command starts with `&` has the command's pipes as its standard output and
//! error. If the agent closed them, SIGPIPE would end the server at its first line. So the agent
//! reads until the last writer has gone, and discards the bytes.

use std::io::ErrorKind;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::unix::pipe;
use tokio::time::sleep;

use crate::Agent;

/// Bytes that are read at once.
const BUFFER_BYTES: usize = 16 << 10;

/// The pause after a full buffer. It slows down a process that floods its output, so that the
/// agent can serve other work.
const FLOOD_PAUSE: Duration = Duration::from_millis(1);

/// Drains a pipe to its end, in a separate task. If too many pipes are being drained already,
/// closes the pipe instead.
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

/// Reads up to one buffer. Separate from the task, so that the buffer is on the stack only during
/// the read.
#[inline(never)]
fn read_some(pipe: &pipe::Receiver) -> std::io::Result<usize> {
    pipe.try_read(&mut [0; BUFFER_BYTES])
}
