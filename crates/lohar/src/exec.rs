//! Runs a command with its standard streams in frames.
//!
//! The command leads its own process group. The command is over when its process has ended; the
//! agent still sends the bytes that are in the pipes then. Later output of background processes
//! is read and discarded, so that they keep running (see [`crate::discard`]). If the host goes
//! away, the agent kills the group.

mod output;

use std::rc::Rc;
use std::time::Duration;

use bhatti_proto::{ErrorKind, ExecRequest, Frame, FrameType, SignalRequest, exit_payload};
use rustix::process::Signal;
use tokio::time::sleep;

use crate::Agent;
use crate::connection::{HostReader, HostWriter, Transport};
use crate::launch::{self, Piped};
use crate::limits::TERM_GRACE;
use crate::processes::Confinement;
use crate::refusal::{OpError, bad_json, host_gone, refused};
use crate::session;
use output::Finished;

/// Serves one `EXEC_REQ`.
pub(crate) async fn serve<T: Transport>(
    agent: &Rc<Agent>,
    frame: &Frame,
    reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    agent.touch();
    let request: ExecRequest =
        frame.json().map_err(|error| bad_json("bad exec request", &error))?;
    if request.session_id.is_some() {
        return session::serve_attach(agent, &request, reader, writer).await;
    }
    if request.argv.is_empty() {
        return Err(refused(ErrorKind::BadRequest, "empty argv").into());
    }
    if request.tty == Some(true) || request.session || request.detach {
        return session::serve_create(agent, &request, reader, writer).await;
    }
    let confinement =
        if request.timeout_ms.is_some() { Confinement::Own } else { Confinement::Shared };
    let process = launch::piped(agent, &request, confinement)?;
    let _running = agent.register(request.exec_id, &process.processes);
    // Kills the process if the host cannot be told that it has started.
    let started = async {
        if request.error_details {
            writer.send(FrameType::STARTED, &[]).await.map_err(host_gone)?;
        }
        Ok(())
    };
    if let Err(gone) = started.await {
        process.processes.signal(Signal::KILL);
        return Err(gone);
    }
    relay(agent, process, request.timeout_ms, reader, writer).await
}

/// Serves one `SIGNAL_REQ`.
pub(crate) fn signal(agent: &Agent, request: &SignalRequest) -> Result<(), OpError> {
    match (&request.exec_id, &request.session_id) {
        (Some(exec_id), None) => {
            let signal = crate::input::signal_numbered(request.signal)?;
            let command = agent.command(exec_id);
            command
                .ok_or_else(|| refused(ErrorKind::NoSuchSession, "command not found"))?
                .signal(signal);
        }
        (None, Some(session_id)) => session::signal(agent, session_id, request)?,
        _ => {
            return Err(refused(ErrorKind::BadRequest, "name either a command or a session").into());
        }
    }
    Ok(())
}

async fn relay<T: Transport>(
    agent: &Rc<Agent>,
    process: Piped,
    timeout_ms: Option<u64>,
    reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let Piped { processes, exit, stdin, stdout, stderr } = process;
    let mut timed_out = false;
    let limit = async {
        if let Some(timeout_ms) = timeout_ms {
            sleep(Duration::from_millis(timeout_ms)).await;
            timed_out = true;
            processes.end(Signal::TERM, TERM_GRACE);
        }
        std::future::pending::<()>().await;
    };
    let finished = tokio::select! {
        finished = output::pump(agent, stdout, stderr, exit, writer) => finished,
        () = crate::input::pump(reader, stdin, &processes) => Finished::HostGone,
        () = limit => Finished::HostGone,
    };
    match finished {
        Finished::Exited(code) => {
            if timed_out {
                writer.send(FrameType::TIMEOUT, &[]).await.map_err(host_gone)?;
            }
            writer.send(FrameType::EXIT, &exit_payload(code)).await.map_err(host_gone)
        }
        Finished::HostGone => {
            processes.signal(Signal::KILL);
            Err(OpError::HostGone)
        }
    }
}
