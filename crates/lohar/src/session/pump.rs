//! Moves input and output between a session's process and its session.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bhatti_proto::FrameType;
use rustix::io::Errno;
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use super::{Session, kept};
use crate::Agent;
use crate::discard::discard;
use crate::input::Queued;
use crate::reaper::Exit;

/// The master end of a session's terminal.
pub(crate) type Terminal = Rc<AsyncFd<OwnedFd>>;

/// The sender of a session's input.
pub(crate) type StdinSender = mpsc::UnboundedSender<Queued>;

/// The bytes that are read at once. Every session has one or two such buffers as long as its
/// process runs.
const READ_BYTES: usize = 8 << 10;

/// The most that is read of each stream after the process has ended, in bytes: as much as a pipe
/// or terminal can hold.
const DRAIN_BYTES_MAX: usize = 1 << 20;

/// One output stream of a process.
pub(super) enum Source {
    Terminal(Terminal),
    Pipe(pipe::Receiver, FrameType),
    Ended,
}

impl Source {
    const fn frame_type(&self) -> FrameType {
        match self {
            Self::Pipe(_, frame_type) => *frame_type,
            Self::Terminal(_) | Self::Ended => FrameType::STDOUT,
        }
    }

    /// Returns the buffer for reads.
    fn buffer(&self) -> Vec<u8> {
        match self {
            Self::Terminal(_) | Self::Pipe(..) => vec![0; READ_BYTES],
            Self::Ended => Vec::new(),
        }
    }

    /// Waits for output and returns its length, 0 at the end. Never resolves after that.
    async fn read(&mut self, buffer: &mut [u8]) -> usize {
        match self {
            Self::Pipe(pipe, _) => pipe.read(buffer).await.unwrap_or(0),
            Self::Terminal(terminal) => read_terminal(terminal, buffer).await,
            Self::Ended => std::future::pending().await,
        }
    }

    /// Reads the bytes that are there now.
    fn read_now(&self, buffer: &mut [u8]) -> usize {
        match self {
            Self::Pipe(pipe, _) => rustix::io::read(pipe.as_fd(), buffer).unwrap_or(0),
            Self::Terminal(terminal) => rustix::io::read(terminal.get_ref(), buffer).unwrap_or(0),
            Self::Ended => 0,
        }
    }
}

async fn read_terminal(terminal: &Terminal, buffer: &mut [u8]) -> usize {
    loop {
        let Ok(mut ready) = terminal.readable().await else { return 0 };
        match rustix::io::read(terminal.get_ref(), &mut *buffer) {
            Err(Errno::AGAIN) => ready.clear_ready(),
            // EIO: no process has the terminal open any more.
            result => return result.unwrap_or(0),
        }
    }
}

/// Moves a process's output into its session until the process has ended, then keeps the session
/// for the time that `Limits` sets.
pub(super) async fn run(
    agent: Rc<Agent>,
    session: Rc<Session>,
    mut sources: [Source; 2],
    mut exit: Exit,
) {
    let mut buffers = sources.each_ref().map(Source::buffer);
    let [first_buffer, second_buffer] = &mut buffers;
    let end = loop {
        session.room_for_output().await;
        let [first, second] = &mut sources;
        let (index, length) = tokio::select! {
            length = first.read(first_buffer) => (0, length),
            length = second.read(second_buffer) => (1, length),
            end = exit.ended() => break end,
        };
        if length == 0 {
            sources[index] = Source::Ended;
        } else {
            let buffer = if index == 0 { &*first_buffer } else { &*second_buffer };
            session.append(sources[index].frame_type(), &buffer[..length]);
        }
    };
    for source in &sources {
        drain(&session, source, first_buffer).await;
    }
    if session.restarts && !agent.is_shutting_down() {
        // Before any client gets the exit code.
        kept::forget(&agent, &session.id).await;
    }
    session.finish(end);
    for source in sources {
        if let Source::Pipe(pipe, _) = source {
            discard(&agent, pipe);
        }
    }
    let kept_ms = if session.is_job() {
        agent.limits.finished_job_ms
    } else {
        agent.limits.finished_session_ms
    };
    tokio::time::sleep(Duration::from_millis(kept_ms)).await;
    agent.sessions.remove(&session);
}

async fn drain(session: &Session, source: &Source, buffer: &mut [u8]) {
    let mut budget = DRAIN_BYTES_MAX;
    while budget > 0 {
        session.room_for_output().await;
        let length = source.read_now(buffer);
        if length == 0 {
            return;
        }
        budget = budget.saturating_sub(length);
        session.append(source.frame_type(), &buffer[..length]);
    }
}

impl Session {
    fn append(&self, frame_type: FrameType, bytes: &[u8]) {
        self.output.borrow_mut().append(frame_type, bytes);
        self.changed.notify_waiters();
    }

    /// Waits until output can be appended without discarding bytes that the attached client has
    /// not been sent.
    async fn room_for_output(&self) {
        while self
            .attachment
            .borrow()
            .position
            .is_some_and(|at| !self.output.borrow().has_room_behind(at))
        {
            self.changed.notified().await;
        }
    }
}

/// Writes a session's input to its terminal.
pub(super) async fn feed_terminal(terminal: Terminal, mut queued: mpsc::UnboundedReceiver<Queued>) {
    while let Some((bytes, _room)) = queued.recv().await {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let Ok(mut ready) = terminal.writable().await else { return };
            match rustix::io::write(terminal.get_ref(), rest) {
                Ok(length) => rest = &rest[length..],
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(_) => return,
            }
            // A kernel that takes a long line byte by byte always has room for one more byte.
            // Yield, so that other tasks run, too.
            tokio::task::yield_now().await;
        }
    }
}
