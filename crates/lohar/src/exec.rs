//! Runs a command with its standard streams in frames.
//!
//! The command leads a process group of its own. It is over when its process has ended: what is then still in the pipes is sent on,
//! what a background grandchild may write later is not waited for. When the host goes away the group is killed.

mod input;
mod output;
mod start;

use std::io;
use std::rc::Rc;

use bhatti_proto::{ExecRequest, Frame, FrameType, StartError, StartErrorKind, exit_payload};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::connection::{HostReader, HostWriter, Transport};
use crate::serve::Agent;
use output::Finished;

/// Serves one `EXEC_REQ`.
pub(crate) async fn serve<T: Transport>(
    agent: &Rc<Agent>,
    frame: &Frame,
    reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> io::Result<()> {
    let request = match frame.json::<ExecRequest>() {
        Ok(request) => request,
        Err(error) => {
            let message = format!("bad exec request: {error}");
            return refuse(writer, false, StartError { kind: StartErrorKind::BadRequest, message })
                .await;
        }
    };
    let started = match check(&request) {
        Ok(()) => start::start(&agent.reaper, &request),
        Err(message) => {
            Err(StartError { kind: StartErrorKind::BadRequest, message: message.to_owned() })
        }
    };
    match started {
        Ok(process) => relay(process, reader, writer).await,
        Err(error) => refuse(writer, request.error_details, error).await,
    }
}

fn check(request: &ExecRequest) -> Result<(), &'static str> {
    if request.session_id.is_some() {
        Err("session not found")
    } else if request.argv.is_empty() {
        Err("empty argv")
    } else if request.tty == Some(true) {
        Err("this agent has no terminal sessions")
    } else {
        Ok(())
    }
}

async fn refuse<T: Transport>(
    writer: &mut HostWriter<T>,
    details: bool,
    error: StartError,
) -> io::Result<()> {
    if details {
        return writer.send_json(FrameType::START_ERROR, &error).await.map_err(io::Error::other);
    }
    writer.send(FrameType::ERROR, error.message.as_bytes()).await
}

async fn relay<T: Transport>(
    process: start::Process,
    reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> io::Result<()> {
    let start::Process { group, exit, stdin, stdout, stderr } = process;
    let finished = tokio::select! {
        finished = output::pump(stdout, stderr, exit, writer) => finished,
        () = input::pump(reader, stdin, group) => Finished::HostGone,
    };
    match finished {
        Finished::Exited(code) => writer.send(FrameType::EXIT, &exit_payload(code)).await,
        Finished::HostGone => {
            kill_group(group, Signal::KILL);
            Ok(())
        }
    }
}

/// Signals a process group. One that is gone needs no signal.
fn kill_group(group: Pid, signal: Signal) {
    let _: Result<(), Errno> = kill_process_group(group, signal);
}
