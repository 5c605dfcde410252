//! Processes as streams of events.

use std::time::Duration;

use axum::extract::Request;
use axum::http::HeaderMap;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bhatti_agent::{CallError, ExecEvent, ExecInput, SessionOutput};
use bhatti_proto::{ErrorKind, ExecRequest};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::process::{Config, Pty, Selector, Size};
use super::{info, refused, user};
use crate::Target;
use crate::connect::{Code, Messages, RpcError, Sender, keepalive, late, over, stream, time_limit};

/// How long after a process's time limit the guest ends the process, if this daemon did not.
const BACKUP_MS: u64 = 2000;

/// The longest note of a session, in bytes.
const NOTE_BYTES_MAX: usize = 4 << 10;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Start {
    process: Config,
    pty: Option<Pty>,
    tag: Option<String>,
    stdin: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Connect {
    process: Selector,
}

/// Starts a process and streams its events. The process goes on if the client goes away.
pub(super) async fn start(target: Target, request: Request) -> Result<Response, RpcError> {
    let headers = request.headers().clone();
    let (user, limit) = (user(&headers)?, time_limit(&headers)?);
    let Start { process, pty, tag, stdin } = Messages::of(request)?.only().await?;
    if process.cmd.is_empty() {
        return Err(RpcError::new(Code::InvalidArgument, "`process.cmd` is empty"));
    }
    let note = serde_json::to_string(&process).ok().filter(|note| note.len() <= NOTE_BYTES_MAX);
    let cwd = process.cwd.clone();
    let size = pty.map(|pty| pty.size.unwrap_or(Size { cols: 80, rows: 24 }));
    let mut env: std::collections::BTreeMap<_, _> =
        info::of_sandbox(&target).map(|(name, value)| (name.to_owned(), value)).into();
    env.extend(process.envs);
    let milliseconds = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    let exec = ExecRequest {
        argv: std::iter::once(process.cmd).chain(process.args).collect(),
        env,
        tty: size.map(|_| true),
        rows: size.map(|size| size.rows),
        cols: size.map(|size| size.cols),
        cwd: process.cwd,
        user: user.clone(),
        timeout_ms: limit.map(|limit| milliseconds(limit).saturating_add(BACKUP_MS)),
        session: true,
        at_home: true,
        tag,
        note,
        ..ExecRequest::default()
    };
    let created = target.used.agent.create_session(exec).await;
    let (session, mut input, output) =
        created.map_err(|error| not_started(error, cwd.as_deref(), user.as_deref()))?;
    if stdin == Some(false) && size.is_none() {
        input.end().await.map_err(|error| refused(error, None))?;
    }
    let pid = session.pid.unwrap_or_default();
    let deadline = limit.map(|limit| Instant::now() + limit);
    let session = session.session_id;
    let run = Run {
        target,
        input: Some(input),
        output,
        session,
        pid,
        has_terminal: size.is_some(),
        deadline,
    };
    Ok(run.begin(&headers))
}

/// Streams the events of a process from now on.
pub(super) async fn connect(target: Target, request: Request) -> Result<Response, RpcError> {
    let headers = request.headers().clone();
    let limit = time_limit(&headers)?;
    let Connect { process } = Messages::of(request)?.only().await?;
    let observed = target.used.agent.observe(&process.name()?, Some(u64::MAX)).await;
    let (session, _input, output) = observed.map_err(|error| refused(error, None))?;
    let pid = session.pid.unwrap_or_default();
    let deadline = limit.map(|limit| Instant::now() + limit);
    let (has_terminal, session) = (session.tty, session.session_id);
    let run = Run { target, input: None, output, session, pid, has_terminal, deadline };
    Ok(run.begin(&headers))
}

fn not_started(error: CallError, cwd: Option<&str>, user: Option<&str>) -> RpcError {
    match &error {
        CallError::Agent(agent) if agent.kind == ErrorKind::BadCwd => {
            let cwd = cwd.unwrap_or_default();
            RpcError::new(Code::InvalidArgument, format!("cwd '{cwd}' does not exist"))
        }
        CallError::Agent(agent) if agent.kind == ErrorKind::NotFound => {
            RpcError::new(Code::InvalidArgument, agent.message.clone())
        }
        _ => refused(error, user),
    }
}

/// A process whose events are streamed.
struct Run {
    target: Target,
    /// The input of a process that this stream started. Dropping it detaches.
    input: Option<ExecInput>,
    output: SessionOutput,
    /// The agent's id of the session.
    session: String,
    pid: u32,
    has_terminal: bool,
    /// When the stream ends, and with it a process that it started.
    deadline: Option<Instant>,
}

/// How a stream of events ended.
enum Ended {
    /// The process ended.
    Process(Value),
    /// The time is over.
    Deadline,
    /// The client is gone.
    Client,
    /// The sandbox is gone.
    Sandbox,
    /// The output could not be followed.
    Failed(RpcError),
}

impl Run {
    fn begin(self, headers: &HeaderMap) -> Response {
        let (sender, response) = stream();
        tokio::spawn(self.follow(sender, keepalive(headers)));
        response
    }

    async fn follow(mut self, sender: Sender, keepalive: Duration) {
        let started = json!({ "event": { "start": { "pid": self.pid } } });
        if !sender.send(&started).await {
            return;
        }
        match self.events(&sender, keepalive).await {
            Ended::Process(end) => {
                let sent = sender.send(&json!({ "event": { "end": end } })).await;
                if sent {
                    sender.end(Ok(())).await;
                }
            }
            Ended::Deadline => {
                // First: no event of the process's end may follow.
                sender.end(Err(late())).await;
                if self.input.is_some() {
                    self.kill().await;
                }
            }
            Ended::Failed(error) => sender.end(Err(error)).await,
            // A cut connection tells SDKs to ask whether the sandbox lives.
            Ended::Client | Ended::Sandbox => {}
        }
    }

    async fn kill(&mut self) {
        let name = format!("pid:{}", self.pid);
        // The process may have ended by itself, or its sandbox.
        drop(self.target.used.agent.kill_session(&name).await);
    }

    async fn events(&mut self, sender: &Sender, keepalive: Duration) -> Ended {
        let mut over = std::pin::pin!(over(self.deadline));
        loop {
            let event = tokio::select! {
                biased;
                () = sender.gone() => return Ended::Client,
                () = &mut over => return Ended::Deadline,
                event = timeout(keepalive, self.output.next()) => event,
            };
            let message = match event {
                Err(_) => json!({ "keepalive": {} }),
                Ok(Ok(ExecEvent::Stdout(bytes))) => self.data("stdout", &bytes),
                Ok(Ok(ExecEvent::Stderr(bytes))) => self.data("stderr", &bytes),
                Ok(Ok(ExecEvent::TimedOut)) => continue,
                Ok(Ok(ExecEvent::Exit(code))) => {
                    if self.output.was_taken_over() && self.follows_on().await {
                        continue;
                    }
                    return Ended::Process(end(code, self.output.signal()));
                }
                Ok(Err(CallError::Agent(error))) => {
                    return Ended::Failed(RpcError::new(Code::ResourceExhausted, error.message));
                }
                Ok(Err(_)) => return Ended::Sandbox,
            };
            let message = json!({ "event": message });
            let sent = tokio::select! {
                sent = sender.send(&message) => sent,
                () = &mut over => return Ended::Deadline,
            };
            if !sent {
                return Ended::Client;
            }
        }
    }

    /// Follows the output on beside a client of the native API that took the session over. Returns
    /// false if the process has ended meanwhile.
    async fn follows_on(&mut self) -> bool {
        let from = Some(self.output.position());
        match self.target.used.agent.observe(&self.session, from).await {
            Ok((_, _input, output)) => {
                self.output = output;
                true
            }
            Err(_) => false,
        }
    }

    fn data(&self, stream: &str, bytes: &Bytes) -> Value {
        let stream = if self.has_terminal { "pty" } else { stream };
        json!({ "data": { stream: STANDARD.encode(bytes) } })
    }
}

/// Describes the end of a process, in Go's words.
fn end(code: i32, signal: Option<u8>) -> Value {
    match signal {
        Some(signal) => {
            let status = format!("signal: {}", signal_text(signal));
            json!({ "exitCode": -1, "status": status, "error": status })
        }
        None if code == 0 => json!({ "exited": true, "status": "exit status 0" }),
        None => {
            let status = format!("exit status {code}");
            json!({ "exitCode": code, "exited": true, "status": status, "error": status })
        }
    }
}

/// Returns the name of a signal as Go's `syscall.Signal` has it.
fn signal_text(signal: u8) -> String {
    let text = match signal {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        number => return format!("signal {number}"),
    };
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_of_a_process_is_told_as_sdks_read_it() {
        assert_eq!(end(0, None), json!({ "exited": true, "status": "exit status 0" }));
        let status = "exit status 137";
        let failed = json!({ "exitCode": 137, "exited": true, "status": status, "error": status });
        assert_eq!(end(137, None), failed);
        let killed =
            json!({ "exitCode": -1, "status": "signal: killed", "error": "signal: killed" });
        assert_eq!(end(137, Some(9)), killed);
    }
}
