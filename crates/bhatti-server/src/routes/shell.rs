//! `/sandboxes/{sandbox}/ws`: a terminal on a WebSocket.
//!
//! Output goes to the client in binary messages. Each message of the client is terminal input,
//! unless it is a text message with a [`ShellRequest`]. If the client disconnects, the session
//! keeps running. A client that attaches later first gets the output that it missed, as far as
//! the guest has kept it.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::extract::ws::Message;
use axum::response::Response;
use bhatti_agent::{ExecEvent, ExecInput, SessionOutput};
use bhatti_api::{ErrorCode, ShellRequest, ShellServerMessage, TIMED_OUT};
use bhatti_node::SandboxUse;
use bhatti_proto::{ExecRequest, SessionInfo};
use bhatti_types::UserId;
use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use utoipa::IntoParams;

use super::exec::{Command, agent_request};
use super::sessions::of_session;
use crate::AppState;
use crate::extract::{ApiPath, ApiQuery};
use crate::shells::Claim;
use crate::status::ApiError;
use crate::websocket::{Receiver, Sender, Upgrade, split};
use bhatti_edge::Identity;

/// Runs the best shell that the image has, as a login shell.
const SHELL: &str =
    "for s in zsh bash sh; do s=$(command -v $s) && exec env SHELL=\"$s\" \"$s\" -li; done";

/// Exit codes of a process that SIGTERM ended, and of one that SIGKILL ended because SIGTERM did
/// not.
const SIGNALLED: [i32; 2] = [128 + 15, 128 + 9];

/// Selects the session.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ShellQuery {
    /// Session to attach to.
    session: Option<String>,
    /// Start a new session, even if there is one without a client (default: attach to the newest
    /// session without a client). `cmd` implies it.
    #[serde(default)]
    new: bool,
    /// Rows of the terminal (default: 24).
    rows: Option<u16>,
    /// Columns of the terminal (default: 80).
    cols: Option<u16>,
    /// Command of a new session and its arguments, one by one (default: a login shell).
    #[serde(default)]
    cmd: Vec<String>,
    /// User that a new session runs as (default: the image's usual user).
    user: Option<String>,
    /// Working directory of a new session.
    cwd: Option<String>,
    /// Environment variable of a new session, as `NAME=VALUE` (repeatable). It overrides the
    /// sandbox's environment.
    #[serde(default)]
    env: Vec<String>,
    /// Seconds after which a new session's process is ended, with exit code 124 (default: no
    /// limit).
    timeout_sec: Option<u32>,
}

/// Time limit for a program to read the last input after its client has left.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// Maximum amount of input that waits for a program that does not read, in bytes.
const TYPED_BYTES_MAX: usize = 1 << 20;

/// Overhead of a message, in bytes.
const MESSAGE_BYTES: usize = 64;

/// Input for a terminal.
enum Typed {
    Bytes(Bytes),
    Resize { rows: u16, cols: u16 },
}

impl Typed {
    fn cost(&self) -> usize {
        MESSAGE_BYTES
            + match self {
                Self::Bytes(bytes) => bytes.len(),
                Self::Resize { .. } => 0,
            }
    }
}

/// A session with its client.
struct Attached {
    used: SandboxUse,
    info: SessionInfo,
    is_new: bool,
    /// When the session's process is ended, if the session is new and has a time limit.
    deadline: Option<Instant>,
    input: ExecInput,
    output: SessionOutput,
    _claim: Claim,
}

/// Opens a terminal session on a WebSocket.
///
/// The session is new, or one that its client has left. The first message is a
/// `ShellServerMessage` of type `session`.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/ws", tag = "sessions", params(("sandbox" = String, Path), ShellQuery),
    responses((status = 101, description = "The WebSocket is open."), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn run(
    State(state): State<AppState>,
    Extension(identity): Extension<Identity>,
    ApiPath(id_or_name): ApiPath<String>,
    ApiQuery(query): ApiQuery<ShellQuery>,
    upgrade: Result<Upgrade, ApiError>,
) -> Result<Response, ApiError> {
    let owner = identity.user();
    state.control.find_id(owner, &id_or_name)?;
    let upgrade = upgrade?;
    Ok(upgrade.serve(move |socket| async move {
        let _open = state.metrics.open_websocket();
        let (sender, mut receiver) = split(socket);
        let attached = tokio::select! {
            attached = attach(&state, owner, &id_or_name, query) => attached,
            ended = state.ended(&identity) => Err(ended),
        };
        let last = match attached {
            Ok(attached) => {
                // The daemon did not read from the client meanwhile.
                receiver.heard_now();
                relay((&state, &identity), attached, &sender, &mut receiver).await
            }
            Err(error) => Some(error_message(error)),
        };
        if let Some(last) = last {
            sender.close(&last, &mut receiver).await;
        }
    }))
}

async fn attach(
    state: &AppState,
    owner: UserId,
    id_or_name: &str,
    query: ShellQuery,
) -> Result<Attached, ApiError> {
    let used = state.control.enter(owner, id_or_name).await?;
    let (rows, cols) = (query.rows, query.cols);
    // One client at a time: otherwise, a client that looks for a session without a client could
    // take a session that is just being created here.
    let door = state.shells.door(used.id);
    let _turn = door.lock().await;
    if let Some(id) = &query.session {
        let claim = state.shells.claim(used.id, id).ok_or_else(|| {
            ApiError::new(
                ErrorCode::Attached,
                format!("session {id} is attached to another client"),
            )
            .hint("detach the other client first, or open a new session: ?new=true")
        })?;
        return take_up(used, id, claim, rows, cols).await;
    }
    if !query.new && query.cmd.is_empty() {
        let sessions = used.agent.list_sessions().await?;
        // The newest first. A session that ends meanwhile, or that another client claims, is
        // skipped.
        for info in sessions.into_iter().rev().filter(|info| info.tty && info.running) {
            let Some(claim) = state.shells.claim(used.id, &info.session_id) else { continue };
            let used = state.control.enter(owner, id_or_name).await?;
            match take_up(used, &info.session_id, claim, rows, cols).await {
                Err(ApiError { code: ErrorCode::NotFound, .. }) => {}
                Ok(attached) if !attached.info.running => {}
                taken => return taken,
            }
        }
    }
    create(state, used, query).await
}

async fn take_up(
    used: SandboxUse,
    id: &str,
    claim: Claim,
    rows: Option<u16>,
    cols: Option<u16>,
) -> Result<Attached, ApiError> {
    let (info, mut input, output) =
        used.agent.attach(id, None).await.map_err(of_session(&used, id))?;
    if !info.tty {
        return Err(ApiError::new(ErrorCode::BadRequest, format!("session {id} has no terminal"))
            .hint("the session is a job: read its output instead"));
    }
    if let (Some(rows), Some(cols)) = (rows, cols) {
        input.resize(rows, cols).await?;
    }
    Ok(Attached { used, info, is_new: false, deadline: None, input, output, _claim: claim })
}

async fn create(
    state: &AppState,
    used: SandboxUse,
    query: ShellQuery,
) -> Result<Attached, ApiError> {
    let ShellQuery { rows, cols, cmd, user, cwd, env: variables, timeout_sec, .. } = query;
    let shell = || ["/bin/sh", "-c", SHELL].map(str::to_owned).to_vec();
    let mut env = BTreeMap::from([("TERM".to_owned(), "xterm-256color".to_owned())]);
    for variable in &variables {
        let (name, value) = variable.split_once('=').ok_or_else(|| {
            ApiError::new(ErrorCode::BadRequest, format!("`{variable}` is not NAME=VALUE"))
        })?;
        env.insert(name.to_owned(), value.to_owned());
    }
    let cmd = if cmd.is_empty() { shell() } else { cmd };
    let command = agent_request(Command { cmd, env, cwd, user, timeout_sec })?;
    let request = ExecRequest { tty: Some(true), rows, cols, ..command };
    // Counted from before the guest starts its timer, so a process that the guest's limit ends,
    // ends after this deadline.
    let deadline = timeout_sec.map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
    let (info, input, output) = used.agent.create_session(request).await?;
    let claim = state.shells.claim(used.id, &info.session_id);
    let claim = claim.ok_or_else(|| {
        ApiError::new(ErrorCode::Attached, "another client attached to the session first")
    })?;
    Ok(Attached { used, info, is_new: true, deadline, input, output, _claim: claim })
}

/// Relays until the session has ended, and returns the last message. Returns `None` if the client
/// has gone, which leaves the session running.
async fn relay(
    (state, identity): (&AppState, &Identity),
    attached: Attached,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Option<ShellServerMessage> {
    let Attached { used: _used, info, is_new, deadline, input, output, _claim } = attached;
    let session = ShellServerMessage::Session { session_id: info.session_id, new: is_new };
    sender.send_json(&session).await?;
    let (queue, queued) = mpsc::unbounded_channel();
    let waiting = AtomicUsize::new(0);
    let mut feed = pin!(feed(input, queued, &waiting));
    tokio::select! {
        last = send_output(output, deadline, sender) => last,
        error = receive(queue, &waiting, sender, receiver) => {
            // Input that was typed before the client left still counts, if the program reads it.
            drop(timeout(LEAVE_LIMIT, feed).await);
            error.map(error_message)
        }
        () = &mut feed => None,
        ended = state.ended(identity) => Some(error_message(ended)),
    }
}

async fn send_output(
    mut output: SessionOutput,
    deadline: Option<Instant>,
    sender: &Sender,
) -> Option<ShellServerMessage> {
    loop {
        match output.next().await {
            Ok(ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes)) => {
                sender.send(Message::Binary(bytes)).await?;
            }
            Ok(ExecEvent::TimedOut) => {}
            Ok(ExecEvent::Exit(exit_code)) => {
                // The guest does not report why a session's process was signaled.
                let is_over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
                let exit_code =
                    if is_over && SIGNALLED.contains(&exit_code) { TIMED_OUT } else { exit_code };
                return Some(ShellServerMessage::Exit { exit_code });
            }
            Err(error) => return Some(error_message(error.into())),
        }
    }
}

/// Queues input until the client disconnects, however long the terminal's program does not read.
async fn receive(
    queue: mpsc::UnboundedSender<Typed>,
    waiting: &AtomicUsize,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Option<ApiError> {
    loop {
        let typed = match receiver.next(sender).await? {
            Message::Text(text) => match serde_json::from_str(&text) {
                Ok(ShellRequest::Resize { rows, cols }) => Typed::Resize { rows, cols },
                // Other text is input, even if it looks like JSON.
                Err(_) => Typed::Bytes(text.into()),
            },
            Message::Binary(bytes) => Typed::Bytes(bytes),
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) => continue,
        };
        if waiting.fetch_add(typed.cost(), Ordering::Relaxed) > TYPED_BYTES_MAX {
            let message = format!("more than {TYPED_BYTES_MAX} bytes of input wait to be read");
            return Some(
                ApiError::new(ErrorCode::BadRequest, message)
                    .hint("upload the input as a file instead"),
            );
        }
        // If the session has ended, the input is dropped.
        drop(queue.send(typed));
    }
}

/// Writes queued input to the terminal until the queue closes. If the session accepts no more
/// input, its output shows how it ended.
async fn feed(
    mut input: ExecInput,
    mut queued: mpsc::UnboundedReceiver<Typed>,
    waiting: &AtomicUsize,
) {
    loop {
        let Some(typed) = queued.recv().await else { return };
        let cost = typed.cost();
        let fed = match typed {
            Typed::Bytes(bytes) => input.write(&bytes).await,
            Typed::Resize { rows, cols } => input.resize(rows, cols).await,
        };
        if fed.is_err() {
            break;
        }
        waiting.fetch_sub(cost, Ordering::Relaxed);
    }
    // Keep the input half alive: dropping it would detach the client.
    std::future::pending::<()>().await;
}

fn error_message(error: ApiError) -> ShellServerMessage {
    ShellServerMessage::Error { error: error.message, code: error.code, hint: error.hint }
}
