//! Serves connections: one connection, one operation.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use bhatti_proto::{Frame, FrameReader, FrameType, FrameWriter, exit_payload};
use tokio::sync::Notify;

use crate::connection::{HostReader, HostWriter, Transport, split};
use crate::exec;
use crate::reaper::Reaper;

/// What all connections share.
pub(crate) struct Agent {
    /// Collects the children.
    pub(crate) reaper: Rc<Reaper>,
    shutdown_asked: Cell<bool>,
    shutdown: Notify,
}

impl Agent {
    /// An agent with nothing to do yet.
    pub(crate) fn new(reaper: Rc<Reaper>) -> Rc<Self> {
        Rc::new(Self { reaper, shutdown_asked: Cell::new(false), shutdown: Notify::new() })
    }

    /// Waits until the host asks for the guest to be shut down.
    pub(crate) async fn shutdown_requested(&self) {
        while !self.shutdown_asked.get() {
            self.shutdown.notified().await;
        }
    }
}

/// Serves one connection to the control port, in a task of its own.
pub(crate) fn spawn_control<T: Transport>(agent: &Rc<Agent>, transport: T) {
    let agent = Rc::clone(agent);
    tokio::task::spawn_local(async move {
        let (from_host, to_host) = split(transport);
        // The host's end is gone or broken: there is nobody left to tell.
        drop(control(&agent, FrameReader::new(from_host), FrameWriter::new(to_host)).await);
    });
}

/// Serves one connection to the forward port, in a task of its own.
pub(crate) fn spawn_forward<T: Transport>(transport: T) {
    tokio::task::spawn_local(async move { drop(crate::forward::serve(transport).await) });
}

async fn control<T: Transport>(
    agent: &Rc<Agent>,
    mut reader: HostReader<T>,
    mut writer: HostWriter<T>,
) -> io::Result<()> {
    let Some(frame) = reader.next().await.map_err(io::Error::other)? else { return Ok(()) };
    match frame.frame_type {
        FrameType::EXEC_REQ => exec::serve(agent, &frame, reader, &mut writer).await?,
        FrameType::SHUTDOWN_REQ => shutdown(agent, &mut writer).await?,
        _ => refuse(&frame, &mut writer).await?,
    }
    writer.shutdown().await
}

async fn refuse<T: Transport>(frame: &Frame, writer: &mut HostWriter<T>) -> io::Result<()> {
    let message = format!("unexpected frame type {}", frame.frame_type);
    writer.send(FrameType::ERROR, message.as_bytes()).await
}

async fn shutdown<T: Transport>(agent: &Agent, writer: &mut HostWriter<T>) -> io::Result<()> {
    writer.send(FrameType::EXIT, &exit_payload(0)).await?;
    agent.shutdown_asked.set(true);
    agent.shutdown.notify_waiters();
    Ok(())
}
