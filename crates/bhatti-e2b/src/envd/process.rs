//! `process.Process`: processes by process id or tag. Each is a session of the agent, so it is also
//! a job or a terminal of the native API.

use std::collections::BTreeMap;

use axum::extract::Request;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bhatti_proto::{InputEnd, SessionInfo};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{methods, refused, run};
use crate::Target;
use crate::connect::{Code, Messages, RpcError, answered, answered_stream, message};

methods! {
    Start: Stream,
    Connect: Stream,
    List: Unary,
    SendInput: Unary,
    StreamInput: Stream,
    CloseStdin: Unary,
    SendSignal: Unary,
    Update: Unary,
}

/// Names a process.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Selector {
    pid: Option<u32>,
    tag: Option<String>,
}

impl Selector {
    /// Returns the agent's name of the process.
    pub(super) fn name(&self) -> Result<String, RpcError> {
        match (self.pid, &self.tag) {
            (Some(pid), None) => Ok(format!("pid:{pid}")),
            (None, Some(tag)) => Ok(format!("tag:{tag}")),
            _ => Err(RpcError::new(Code::InvalidArgument, "name a process by `pid` or by `tag`")),
        }
    }
}

/// What is run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Config {
    pub(super) cmd: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) args: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) envs: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cwd: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Size {
    pub(super) cols: u16,
    pub(super) rows: u16,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Pty {
    pub(super) size: Option<Size>,
}

/// Bytes for a process, in base64.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Input {
    stdin: Option<String>,
    pty: Option<String>,
}

impl Input {
    fn bytes(&self) -> Result<Vec<u8>, RpcError> {
        let text = self.stdin.as_deref().or(self.pty.as_deref()).unwrap_or_default();
        STANDARD
            .decode(text)
            .map_err(|_| RpcError::new(Code::InvalidArgument, "the input is not base64"))
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ToProcess {
    process: Selector,
    input: Input,
    pty: Option<Pty>,
    signal: Option<Signal>,
}

/// A signal, by its name or its number.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Signal {
    Name(String),
    Number(u8),
}

/// A message of `StreamInput`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct InputPart {
    start: Option<ToProcess>,
    data: Option<Data>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Data {
    input: Input,
}

/// Carries out a call.
pub(super) async fn call(
    target: Target,
    method: Method,
    request: Request,
) -> Result<Response, RpcError> {
    let agent = &target.used.agent;
    let failed = |error| refused(error, None);
    match method {
        Method::Start => return run::start(target, request).await,
        Method::Connect => return run::connect(target, request).await,
        Method::StreamInput => {
            return Ok(answered_stream(stream_input(&target, request).await));
        }
        _ => {}
    }
    if method == Method::List {
        let _empty: IgnoredAny = message(request).await?;
        let sessions = agent.list_sessions_in_full().await.map_err(failed)?;
        let processes: Vec<_> = sessions.iter().filter_map(listed).collect();
        return Ok(answered(Ok(json!({ "processes": processes }))));
    }
    let call: ToProcess = message(request).await?;
    let name = call.process.name()?;
    match method {
        Method::SendInput => {
            let bytes = call.input.bytes()?;
            let input = agent.send_input(&name, InputEnd::Continue).await;
            let mut input = input.map_err(no_input)?;
            input.write(&bytes).await.map_err(failed)?;
            input.finish().await.map_err(failed)?;
        }
        Method::CloseStdin => {
            let info = agent.find_session(&name).await.map_err(failed)?;
            if info.tty {
                let message = "a terminal's input cannot be closed: send the byte 4 instead";
                return Err(RpcError::new(Code::Unknown, message));
            }
            let input = agent.send_input(&name, InputEnd::Close).await.map_err(failed)?;
            input.finish().await.map_err(failed)?;
        }
        Method::SendSignal => {
            agent.signal_session(&name, signal(call.signal.as_ref())?).await.map_err(failed)?;
        }
        Method::Update => {
            let info = agent.find_session(&name).await.map_err(failed)?;
            if let Some(Size { cols, rows }) = call.pty.and_then(|pty| pty.size) {
                if !info.tty {
                    let message = "the process has no terminal";
                    return Err(RpcError::new(Code::InvalidArgument, message));
                }
                let input = agent.send_input(&name, InputEnd::Continue).await;
                let mut input = input.map_err(failed)?;
                input.resize(rows, cols).await.map_err(failed)?;
                input.finish().await.map_err(failed)?;
            }
        }
        Method::Start | Method::Connect | Method::StreamInput | Method::List => {}
    }
    Ok(answered(Ok(json!({}))))
}

/// A process that takes no input is an internal error to SDKs.
fn no_input(error: bhatti_agent::CallError) -> RpcError {
    let refused = refused(error, None);
    match refused.code {
        Code::InvalidArgument => RpcError::new(Code::Internal, "the process has no stdin"),
        _ => refused,
    }
}

/// Sends the input of a client stream, in the order of its messages.
async fn stream_input(target: &Target, request: Request) -> Result<Value, RpcError> {
    let failed = |error| refused(error, None);
    let mut messages = Messages::of(request)?;
    let mut input = None;
    while let Some(part) = messages.next::<InputPart>().await? {
        if let Some(start) = part.start {
            let name = start.process.name()?;
            let begun = target.used.agent.send_input(&name, InputEnd::Continue).await;
            input = Some(begun.map_err(no_input)?);
        }
        if let Some(data) = part.data {
            let input = input.as_mut().ok_or_else(|| {
                RpcError::new(Code::InvalidArgument, "the stream begins without `start`")
            })?;
            input.write(&data.input.bytes()?).await.map_err(failed)?;
        }
    }
    if let Some(input) = input {
        input.finish().await.map_err(failed)?;
    }
    Ok(json!({}))
}

/// Describes a process that runs.
fn listed(session: &SessionInfo) -> Option<Value> {
    let pid = session.pid.filter(|_| session.running)?;
    let note = session.note.as_deref();
    let config = note.and_then(|note| serde_json::from_str::<Config>(note).ok());
    let config =
        config.unwrap_or_else(|| Config { cmd: session.argv.clone(), ..Config::default() });
    let mut process = json!({ "config": config, "pid": pid });
    if let Some(tag) = &session.tag {
        process["tag"] = json!(tag);
    }
    Some(process)
}

fn signal(named: Option<&Signal>) -> Result<u8, RpcError> {
    match named {
        Some(Signal::Name(name)) if name == "SIGNAL_SIGTERM" => Ok(15),
        Some(Signal::Name(name)) if name == "SIGNAL_SIGKILL" => Ok(9),
        Some(Signal::Number(number @ (9 | 15))) => Ok(*number),
        other => {
            let message = format!("unknown signal {other:?}: SIGNAL_SIGTERM or SIGNAL_SIGKILL");
            Err(RpcError::new(Code::InvalidArgument, message))
        }
    }
}
