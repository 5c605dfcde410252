//! The agent's services on two Unix sockets.

use std::io;
use std::path::Path;
use std::rc::Rc;

use tokio::net::{UnixListener, UnixStream};

use crate::Agent;
use crate::log;
use crate::serve::{ACCEPT_RETRY, spawn_control, spawn_forward};

/// Both listening sockets, before they serve connections.
pub(crate) struct Listeners {
    control: UnixListener,
    forward: UnixListener,
}

impl Listeners {
    /// Listens at these paths, and replaces sockets or files that are there.
    pub(crate) fn open(control: &Path, forward: &Path) -> io::Result<Self> {
        Ok(Self { control: listen(control)?, forward: listen(forward)? })
    }

    /// Serves both sockets until the future is dropped.
    pub(crate) async fn serve(self, agent: &Rc<Agent>) {
        tokio::join!(accept_control(agent, self.control), accept_forward(agent, self.forward));
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}

async fn accept_control(agent: &Rc<Agent>, listener: UnixListener) {
    loop {
        spawn_control(agent, accept(&listener).await);
    }
}

async fn accept_forward(agent: &Rc<Agent>, listener: UnixListener) {
    loop {
        spawn_forward(agent, accept(&listener).await);
    }
}

/// Accepts the next connection. If descriptors or memory run out, retries until some are free.
async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                log::line(format_args!("failed to accept a connection: {error}"));
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
