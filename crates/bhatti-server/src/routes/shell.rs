//! `/sandboxes/{sandbox}/ws`: a terminal on a WebSocket.
//!
//! Output goes to the client in binary messages. What the client sends is what was typed, unless it is a text message with a
//! [`ShellRequest`]. A client that goes away leaves the session running; who attaches later first gets what it missed, as far as the
//! guest has kept it.

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
use crate::auth::Caller;
use crate::extract::{ApiPath, ApiQuery};
use crate::shells::Claim;
use crate::status::ApiError;
use crate::websocket::{Receiver, Sender, Upgrade, split};

/// Runs the best shell that the image has, as a login shell.
const SHELL: &str =
    "for s in zsh bash sh; do s=$(command -v $s) && exec env SHELL=\"$s\" \"$s\" -li; done";

/// Exit codes of what was told to end, and of what was killed since it did not.
const SIGNALLED: [i32; 2] = [128 + 15, 128 + 9];

/// Which session is wanted.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ShellQuery {
    /// The session to come back to.
    session: Option<String>,
    /// Whether a new session is wanted, even if there is one without a client; the newest of those is taken otherwise.
    #[serde(default)]
    new: bool,
    /// Rows of the terminal; 24 if absent.
    rows: Option<u16>,
    /// Columns of the terminal; 80 if absent.
    cols: Option<u16>,
    /// The command of a new session and its arguments, one by one; a login shell if absent.
    #[serde(default)]
    cmd: Vec<String>,
    /// Who a new session runs as; the image's usual user if absent.
    user: Option<String>,
    /// Where a new session begins.
    cwd: Option<String>,
    /// `NAME=VALUE`: variables laid over the sandbox's environment in a new session.
    #[serde(default)]
    env: Vec<String>,
    /// Seconds after which a new session's process is ended, its exit code 124; never if absent.
    timeout_sec: Option<u32>,
}

/// How long a program may take to read what was typed last when its client has left.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// Input that may wait for a program that does not read, in bytes.
const TYPED_BYTES_MAX: usize = 1 << 20;

/// What one message costs beside its bytes.
const MESSAGE_BYTES: usize = 64;

/// Something for a terminal.
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
    /// When its process is ended, if it is new and has a limit.
    deadline: Option<Instant>,
    input: ExecInput,
    output: SessionOutput,
    _claim: Claim,
}

/// A terminal session on a WebSocket, new or one that its client had left. The first message is `ShellServerMessage` of type `session`.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/ws", tag = "sessions", params(("sandbox" = String, Path), ShellQuery),
    responses((status = 101, description = "The WebSocket is open."), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn run(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(called): ApiPath<String>,
    ApiQuery(query): ApiQuery<ShellQuery>,
    upgrade: Result<Upgrade, ApiError>,
) -> Result<Response, ApiError> {
    state.control.find_id(owner, &called)?;
    let upgrade = upgrade?;
    Ok(upgrade.serve(move |socket| async move {
        let _open = state.metrics.open_websocket();
        let (sender, mut receiver) = split(socket);
        let last = match attach(&state, owner, &called, query).await {
            Ok(attached) => {
                // Nobody listened to it meanwhile.
                receiver.heard_now();
                relay((&state, owner), attached, &sender, &mut receiver).await
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
    called: &str,
    query: ShellQuery,
) -> Result<Attached, ApiError> {
    let used = state.control.enter(owner, called).await?;
    let (rows, cols) = (query.rows, query.cols);
    // One after the other: a session that is made here is not taken by who looks for one without a client.
    let door = state.shells.door(used.id);
    let _turn = door.lock().await;
    if let Some(id) = &query.session {
        let claim = state.shells.claim(used.id, id).ok_or_else(|| {
            ApiError::new(ErrorCode::Attached, format!("session {id} has another client"))
                .hint("end that one first, or open a new session: ?new=true")
        })?;
        return take_up(used, id, claim, rows, cols).await;
    }
    if !query.new && query.cmd.is_empty() {
        let sessions = used.agent.list_sessions().await?;
        // The newest first. One that somebody claims meanwhile, or that ends, is simply not taken.
        for info in sessions.into_iter().rev().filter(|info| info.tty && info.running) {
            let Some(claim) = state.shells.claim(used.id, &info.session_id) else { continue };
            let used = state.control.enter(owner, called).await?;
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
            .hint("it is a job: read its output instead"));
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
    // Counted from before the guest does: who is ended by its limit ends after this.
    let deadline = timeout_sec.map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
    let (info, input, output) = used.agent.create_session(request).await?;
    let claim = state.shells.claim(used.id, &info.session_id);
    let claim = claim
        .ok_or_else(|| ApiError::new(ErrorCode::Attached, "another client was faster to attach"))?;
    Ok(Attached { used, info, is_new: true, deadline, input, output, _claim: claim })
}

/// Relays until the session has ended, and returns the last message; none if the client has gone, which leaves the session running.
async fn relay(
    (state, owner): (&AppState, UserId),
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
            // What was typed before the client left is meant, if the program reads it.
            drop(timeout(LEAVE_LIMIT, feed).await);
            error.map(error_message)
        }
        () = &mut feed => None,
        ended = state.ended(owner) => Some(error_message(ended)),
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
                // A session's guest does not say why it was signalled.
                let is_over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
                let exit_code =
                    if is_over && SIGNALLED.contains(&exit_code) { TIMED_OUT } else { exit_code };
                return Some(ShellServerMessage::Exit { exit_code });
            }
            Err(error) => return Some(error_message(error.into())),
        }
    }
}

/// Takes what is typed, until the client goes away, however long the terminal's program does not read.
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
                // Whoever types something that looks like JSON means it.
                Err(_) => Typed::Bytes(text.into()),
            },
            Message::Binary(bytes) => Typed::Bytes(bytes),
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) => continue,
        };
        if waiting.fetch_add(typed.cost(), Ordering::Relaxed) > TYPED_BYTES_MAX {
            let message = format!("more than {TYPED_BYTES_MAX} bytes of input wait to be read");
            return Some(
                ApiError::new(ErrorCode::BadRequest, message).hint("upload it as a file instead"),
            );
        }
        // Nobody takes it any more when the session has ended.
        drop(queue.send(typed));
    }
}

/// Writes queued input to the terminal, until nobody queues any. A session that takes no more says by its output how it ended.
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
    // The half lives on: without it the client would be detached.
    std::future::pending::<()>().await;
}

fn error_message(error: ApiError) -> ShellServerMessage {
    ShellServerMessage::Error { error: error.message, code: error.code, hint: error.hint }
}
