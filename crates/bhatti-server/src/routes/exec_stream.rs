//! `/sandboxes/{sandbox}/exec/ws`: a command with its streams on a WebSocket.
//!
//! The first message starts it. After that, binary messages carry the streams, the first byte saying which; text messages carry the
//! rest. See [`bhatti_api::channel`], [`StreamRequest`] and [`StreamServerMessage`].
//!
//! ```text
//!  client ──► receive ──► queue of one window ──► feed ──► command's input        (signals and the client's end pass the queue)
//!  client ◄── send ◄───── acknowledgements ◄───────┘
//!               ▲───────────────────────────────────────── command's output
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Extension;
use axum::extract::ws::{
    Message, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection,
};
use axum::extract::{Path, State};
use axum::response::Response;
use bhatti_agent::{ExecControl, ExecEvent, ExecInput, ExecOutput};
use bhatti_api::{ErrorCode, STDIN_WINDOW_BYTES, StreamRequest, StreamServerMessage, channel};
use bhatti_types::UserId;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::exec::agent_request;
use crate::AppState;
use crate::auth::Caller;
use crate::json::BODY_BYTES_MAX;
use crate::status::ApiError;

/// How long a client may take to say what to start.
const START_LIMIT: Duration = Duration::from_secs(10);

/// How long a client may take to read the last message and close. A socket that is dropped before, with input of the client's unread,
/// would be reset, and take output with it that is still on its way.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

type Sender = SplitSink<WebSocket, Message>;
type Receiver = SplitStream<WebSocket>;

/// Something for the command's input.
enum Input {
    Bytes(Bytes),
    End,
}

pub(crate) async fn run(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    Path(called): Path<String>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(|error| ApiError::bad_request(&error))?;
    // What can be refused with a proper status is.
    state.supervisor.find(owner, &called)?;
    let upgrade = upgrade.max_message_size(BODY_BYTES_MAX);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let (mut sender, mut receiver) = socket.split();
        let last = match start(&state, owner, &called, &mut receiver).await {
            Ok((input, output)) => relay(input, output, &mut sender, &mut receiver).await,
            Err(error) => Some(error_message(error)),
        };
        if let Some(last) = last {
            // The client may be gone: then nothing of this arrives, and nothing has to.
            drop(timeout(CLOSE_LIMIT, close(&last, &mut sender, &mut receiver)).await);
        }
    }))
}

async fn close(last: &StreamServerMessage, sender: &mut Sender, receiver: &mut Receiver) {
    if send(last, sender).await.is_some() && sender.close().await.is_ok() {
        while let Some(Ok(_)) = receiver.next().await {}
    }
}

async fn start(
    state: &AppState,
    owner: UserId,
    called: &str,
    receiver: &mut Receiver,
) -> Result<(ExecInput, ExecOutput), ApiError> {
    let bad = |what: &str| ApiError::new(ErrorCode::BadRequest, what);
    let first = timeout(START_LIMIT, receiver.next())
        .await
        .map_err(|_| bad("no start message came in time"))?;
    let Some(Ok(Message::Text(json))) = first else {
        return Err(bad("the first message must be text"));
    };
    let request =
        serde_json::from_str(&json).map_err(|error| bad(&format!("invalid json: {error}")))?;
    let StreamRequest::Start { cmd, env, cwd } = request else {
        return Err(bad("the first message must be `start`"));
    };
    Ok(state.supervisor.exec(owner, called, agent_request(cmd, env, cwd)?).await?)
}

/// Relays until the command has ended, and returns the last message; none if the client has gone.
async fn relay(
    input: ExecInput,
    output: ExecOutput,
    sender: &mut Sender,
    receiver: &mut Receiver,
) -> Option<StreamServerMessage> {
    let control = input.control();
    // Bounded by the window that `receive` checks.
    let (queue, queued) = mpsc::unbounded_channel();
    let (acknowledge, acknowledged) = mpsc::unbounded_channel();
    let feed_on = async {
        feed(input, queued, acknowledge).await;
        std::future::pending::<()>().await;
    };
    let taken = AtomicU64::new(0);
    tokio::select! {
        last = send_output(output, acknowledged, &taken, sender) => last,
        error = receive(&control, queue, &taken, receiver) => error.map(error_message),
        () = feed_on => None,
    }
}

/// Sends output and acknowledgements until the command has ended.
async fn send_output(
    mut output: ExecOutput,
    mut acknowledged: mpsc::UnboundedReceiver<u64>,
    taken: &AtomicU64,
    sender: &mut Sender,
) -> Option<StreamServerMessage> {
    loop {
        let event = tokio::select! {
            event = output.next() => event,
            Some(bytes) = acknowledged.recv() => {
                taken.fetch_add(bytes, Ordering::Relaxed);
                send(&StreamServerMessage::StdinAck { bytes }, sender).await?;
                continue;
            }
        };
        let (stream, bytes) = match event {
            Ok(ExecEvent::Stdout(bytes)) => (channel::STDOUT, bytes),
            Ok(ExecEvent::Stderr(bytes)) => (channel::STDERR, bytes),
            Ok(ExecEvent::TimedOut) => continue,
            Ok(ExecEvent::Exit(exit_code)) => return Some(StreamServerMessage::Exit { exit_code }),
            Err(error) => return Some(error_message(error.into())),
        };
        let mut message = Vec::with_capacity(1 + bytes.len());
        message.push(stream);
        message.extend_from_slice(&bytes);
        sender.send(Message::binary(message)).await.ok()?;
    }
}

/// Writes queued input to the command. One that takes no more, or has ended, leaves the rest unread; its output says how it ended.
async fn feed(
    mut input: ExecInput,
    mut queued: mpsc::UnboundedReceiver<Input>,
    acknowledge: mpsc::UnboundedSender<u64>,
) {
    while let Some(next) = queued.recv().await {
        let (length, fed) = match next {
            Input::Bytes(bytes) => (bytes.len() as u64, input.write(&bytes).await),
            Input::End => (0, input.end().await),
        };
        if fed.is_err() {
            break;
        }
        // Nobody is told any more when the command has ended.
        let _: Result<(), mpsc::error::SendError<u64>> = acknowledge.send(length);
    }
    // The half lives on: without it the command would be killed.
    std::future::pending::<()>().await;
}

/// Takes what the client sends, until it goes away or sends something that makes no sense.
async fn receive(
    control: &ExecControl,
    queue: mpsc::UnboundedSender<Input>,
    taken: &AtomicU64,
    receiver: &mut Receiver,
) -> Option<ApiError> {
    let bad = |what: String| Some(ApiError::new(ErrorCode::BadRequest, what));
    let mut sent = 0;
    loop {
        let input = match receiver.next().await {
            Some(Ok(Message::Binary(mut bytes))) if bytes.first() == Some(&channel::STDIN) => {
                let bytes = bytes.split_off(1);
                sent += bytes.len() as u64;
                if sent - taken.load(Ordering::Relaxed) > STDIN_WINDOW_BYTES {
                    return bad(format!(
                        "more than {STDIN_WINDOW_BYTES} bytes of input came unacknowledged"
                    ));
                }
                Input::Bytes(bytes)
            }
            Some(Ok(Message::Binary(_))) => {
                return bad("binary messages begin with the byte 1".to_owned());
            }
            Some(Ok(Message::Text(json))) => match serde_json::from_str(&json) {
                Ok(StreamRequest::StdinEof) => Input::End,
                Ok(StreamRequest::Signal { signal }) => {
                    // A command that has just ended needs no signal.
                    drop(control.signal(signal).await);
                    continue;
                }
                Ok(StreamRequest::Start { .. }) => {
                    return bad("the command has been started".to_owned());
                }
                Err(error) => return bad(format!("invalid json: {error}")),
            },
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
        };
        // Nobody takes it any more when the command has ended.
        drop(queue.send(input));
    }
}

async fn send(message: &StreamServerMessage, sender: &mut Sender) -> Option<()> {
    let json = serde_json::to_string(message).ok()?;
    sender.send(Message::text(json)).await.ok()
}

fn error_message(error: ApiError) -> StreamServerMessage {
    StreamServerMessage::Error { error: error.message, code: error.code, hint: error.hint }
}
