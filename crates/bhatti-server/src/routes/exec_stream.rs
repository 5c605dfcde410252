//! `/sandboxes/{sandbox}/exec/ws`: a command with its streams on a WebSocket.
//!
//! The first message starts the command. After that, binary messages carry the streams, and their
//! first byte names the stream. Text messages carry everything else. See [`bhatti_api::channel`],
//! [`StreamRequest`] and [`StreamServerMessage`].
//!
//! Signals and the disconnect of the client bypass the queue:
//!
//! ```text
//!  client ──► receive ──► queue of one window ──► feed ──► command's input
//!  client ◄── send ◄───── acknowledgments ◄────────┘
//!               ▲───────────────────────────────────────── command's output
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::extract::ws::Message;
use axum::response::Response;
use bhatti_agent::{ExecControl, ExecEvent, ExecInput, ExecOutput};
use bhatti_api::{
    ErrorCode, STDIN_WINDOW_BYTES, StreamRequest, StreamServerMessage, TIMED_OUT, channel,
};
use bhatti_edge::Identity;
use bhatti_types::UserId;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, SimplexStream, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::exec::{Command, agent_request};
use crate::AppState;
use crate::extract::ApiPath;
use crate::status::ApiError;
use crate::websocket::{Receiver, Sender, Upgrade, split};

/// Time limit for the client's start message.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Maximum number of bytes written to the command at once.
const PIECE_BYTES: usize = 32 << 10;

/// Runs a command with its streams on a WebSocket.
///
/// The first message is a `StreamRequest` of type `start`. After that, binary messages carry the
/// streams, and their first byte names the stream (1 standard input, 2 output, 3 error). Text
/// messages carry everything else.
#[utoipa::path(get, operation_id = "stream", path = "/sandboxes/{sandbox}/exec/ws", tag = "exec", params(("sandbox" = String, Path)),
    responses((status = 101, description = "The WebSocket is open."), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn run(
    State(state): State<AppState>,
    Extension(identity): Extension<Identity>,
    ApiPath(id_or_name): ApiPath<String>,
    upgrade: Result<Upgrade, ApiError>,
) -> Result<Response, ApiError> {
    let owner = identity.user();
    // A refusal before the upgrade has a proper status.
    state.control.find_id(owner, &id_or_name)?;
    let upgrade = upgrade?;
    Ok(upgrade.serve(move |socket| async move {
        let _open = state.metrics.open_websocket();
        let (sender, mut receiver) = split(socket);
        let started = tokio::select! {
            started = start(&state, owner, &id_or_name, &sender, &mut receiver) => started,
            ended = state.ended(&identity) => Err(ended),
        };
        let last = match started {
            Ok((input, output)) => {
                // The daemon did not read from the client meanwhile.
                receiver.heard_now();
                relay((&state, &identity), input, output, &sender, &mut receiver).await
            }
            Err(error) => Some(error_message(error)),
        };
        if let Some(last) = last {
            sender.close(&last, &mut receiver).await;
        }
    }))
}

async fn start(
    state: &AppState,
    owner: UserId,
    id_or_name: &str,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Result<(ExecInput, ExecOutput), ApiError> {
    let bad = |what: &str| ApiError::new(ErrorCode::BadRequest, what);
    let first = timeout(START_LIMIT, receiver.next(sender))
        .await
        .map_err(|_| bad("the start message did not arrive in time"))?;
    let Some(Message::Text(json)) = first else {
        return Err(bad("the first message must be text"));
    };
    let request =
        serde_json::from_str(&json).map_err(|error| bad(&format!("invalid json: {error}")))?;
    let StreamRequest::Start { mut cmd, entrypoint, env, cwd, user, timeout_sec } = request else {
        return Err(bad("the first message must be `start`"));
    };
    if entrypoint {
        cmd = state.control.image_command(owner, id_or_name, cmd)?;
    }
    let request = agent_request(Command { cmd, env, cwd, user, timeout_sec })?;
    Ok(state.control.exec(owner, id_or_name, request, None).await?)
}

/// Relays until the command has ended, and returns the last message. Returns `None` if the client
/// has gone.
async fn relay(
    (state, identity): (&AppState, &Identity),
    input: ExecInput,
    output: ExecOutput,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Option<StreamServerMessage> {
    let control = input.control();
    // The queue has room for the window that `receive` checks, in pieces of any size.
    let window = usize::try_from(STDIN_WINDOW_BYTES).unwrap_or(usize::MAX);
    let (queued, queue) = tokio::io::simplex(window);
    let (acknowledge, acknowledged) = mpsc::unbounded_channel();
    let feed_on = async {
        feed(input, queued, acknowledge).await;
        std::future::pending::<()>().await;
    };
    let taken = AtomicU64::new(0);
    tokio::select! {
        last = send_output(output, acknowledged, &taken, sender) => last,
        error = receive(&control, queue, &taken, sender, receiver) => error.map(error_message),
        () = feed_on => None,
        ended = state.ended(identity) => Some(error_message(ended)),
    }
}

/// Sends output and acknowledgments until the command has ended.
async fn send_output(
    mut output: ExecOutput,
    mut acknowledged: mpsc::UnboundedReceiver<u64>,
    taken: &AtomicU64,
    sender: &Sender,
) -> Option<StreamServerMessage> {
    let mut timed_out = false;
    loop {
        let event = tokio::select! {
            event = output.next() => event,
            Some(bytes) = acknowledged.recv() => {
                taken.fetch_add(bytes, Ordering::Relaxed);
                sender.send_json(&StreamServerMessage::StdinAck { bytes }).await?;
                continue;
            }
        };
        let (stream, bytes) = match event {
            Ok(ExecEvent::Stdout(bytes)) => (channel::STDOUT, bytes),
            Ok(ExecEvent::Stderr(bytes)) => (channel::STDERR, bytes),
            Ok(ExecEvent::TimedOut) => {
                timed_out = true;
                continue;
            }
            Ok(ExecEvent::Exit(exit_code)) => {
                let exit_code = if timed_out { TIMED_OUT } else { exit_code };
                return Some(StreamServerMessage::Exit { exit_code });
            }
            Err(error) => return Some(error_message(error.into())),
        };
        let mut message = Vec::with_capacity(1 + bytes.len());
        message.push(stream);
        message.extend_from_slice(&bytes);
        sender.send(Message::binary(message)).await?;
    }
}

/// Writes queued input to the command. If the command accepts no more input, the rest stays
/// unread, and the output shows how the command ended.
async fn feed(
    mut input: ExecInput,
    mut queued: ReadHalf<SimplexStream>,
    acknowledge: mpsc::UnboundedSender<u64>,
) {
    let mut piece = vec![0; PIECE_BYTES];
    // Reading from memory does not fail.
    while let Ok(length) = queued.read(&mut piece).await {
        if length == 0 {
            drop(input.end().await);
            break;
        }
        if input.write(&piece[..length]).await.is_err() {
            break;
        }
        // If the command has ended, nothing waits for the acknowledgment.
        let _: Result<(), mpsc::error::SendError<u64>> = acknowledge.send(length as u64);
    }
    // Keep the input half alive: dropping it would kill the command.
    std::future::pending::<()>().await;
}

/// Handles the client's messages, until the client disconnects or sends an invalid one.
async fn receive(
    control: &ExecControl,
    mut queue: WriteHalf<SimplexStream>,
    taken: &AtomicU64,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Option<ApiError> {
    let bad = |what: String| Some(ApiError::new(ErrorCode::BadRequest, what));
    let (mut sent, mut ended) = (0, false);
    loop {
        match receiver.next(sender).await? {
            Message::Binary(mut bytes) if bytes.first() == Some(&channel::STDIN) => {
                let bytes = bytes.split_off(1);
                if bytes.is_empty() || ended {
                    continue;
                }
                sent += bytes.len() as u64;
                if sent - taken.load(Ordering::Relaxed) > STDIN_WINDOW_BYTES {
                    return bad(format!(
                        "the client sent more than {STDIN_WINDOW_BYTES} unacknowledged bytes of input"
                    ));
                }
                // The queue has room. If the command has ended, the input is dropped.
                drop(queue.write_all(&bytes).await);
            }
            Message::Binary(_) => {
                return bad("a binary message must begin with the byte 1".to_owned());
            }
            Message::Text(json) => match serde_json::from_str(&json) {
                Ok(StreamRequest::StdinEof) if ended => continue,
                Ok(StreamRequest::StdinEof) => {
                    ended = true;
                    drop(queue.shutdown().await);
                }
                Ok(StreamRequest::Signal { signal }) => {
                    // A command that has just ended needs no signal.
                    drop(control.signal(signal).await);
                    continue;
                }
                Ok(StreamRequest::Start { .. }) => {
                    return bad("the command has already been started".to_owned());
                }
                Err(error) => return bad(format!("invalid json: {error}")),
            },
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) => {}
        }
    }
}

fn error_message(error: ApiError) -> StreamServerMessage {
    StreamServerMessage::Error { error: error.message, code: error.code, hint: error.hint }
}
