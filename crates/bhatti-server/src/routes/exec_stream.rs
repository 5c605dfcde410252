//! `/sandboxes/{sandbox}/exec/ws`: a command with its streams on a WebSocket.
//!
//! The first message starts it. After that, binary messages carry the streams, the first byte saying which; text messages carry the
//! rest. See [`bhatti_api::channel`], [`StreamRequest`] and [`StreamServerMessage`].

use std::time::Duration;

use axum::Extension;
use axum::extract::ws::{
    Message, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection,
};
use axum::extract::{Path, State};
use axum::response::Response;
use bhatti_agent::{ExecEvent, ExecInput, ExecOutput};
use bhatti_api::{ErrorCode, StreamRequest, StreamServerMessage, channel};
use bhatti_types::UserId;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::time::timeout;

use super::exec::agent_request;
use crate::AppState;
use crate::auth::Caller;
use crate::json::BODY_BYTES_MAX;
use crate::status::ApiError;

/// How long a client may take to say what to start.
const START_LIMIT: Duration = Duration::from_secs(10);

type Sender = SplitSink<WebSocket, Message>;
type Receiver = SplitStream<WebSocket>;

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
            Ok((input, output)) => relay(input, output, &mut sender, receiver).await,
            Err(error) => Some(error_message(error)),
        };
        // The client may be gone: then nothing of this arrives, and nothing has to.
        if let Some(last) = last
            && let Ok(json) = serde_json::to_string(&last)
        {
            drop(sender.send(Message::text(json)).await);
            drop(sender.close().await);
        }
    }))
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
    receiver: Receiver,
) -> Option<StreamServerMessage> {
    tokio::select! {
        last = send_output(output, sender) => last,
        error = receive_input(input, receiver) => error.map(error_message),
    }
}

async fn send_output(mut output: ExecOutput, sender: &mut Sender) -> Option<StreamServerMessage> {
    loop {
        let (stream, bytes) = match output.next().await {
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

/// Passes input on until the client goes away or sends something that makes no sense.
async fn receive_input(mut input: ExecInput, mut receiver: Receiver) -> Option<ApiError> {
    let mut takes_input = true;
    loop {
        let passed_on = match receiver.next().await {
            Some(Ok(Message::Binary(bytes))) => match bytes.split_first() {
                Some((&channel::STDIN, stdin)) if takes_input => input.write(stdin).await,
                Some((&channel::STDIN, _)) => Ok(()),
                _ => {
                    return Some(ApiError::new(
                        ErrorCode::BadRequest,
                        "binary messages begin with the byte 1",
                    ));
                }
            },
            Some(Ok(Message::Text(json))) => match serde_json::from_str(&json) {
                Ok(StreamRequest::StdinEof) => input.end().await,
                Ok(StreamRequest::Signal { signal }) => input.signal(signal).await,
                Ok(StreamRequest::Start { .. }) => {
                    return Some(ApiError::new(
                        ErrorCode::BadRequest,
                        "the command has been started",
                    ));
                }
                Err(error) => {
                    return Some(ApiError::new(
                        ErrorCode::BadRequest,
                        format!("invalid json: {error}"),
                    ));
                }
            },
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => Ok(()),
            Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
        };
        // A command that has ended takes no more; its output says how it ended.
        takes_input = takes_input && passed_on.is_ok();
    }
}

fn error_message(error: ApiError) -> StreamServerMessage {
    StreamServerMessage::Error { error: error.message, code: error.code, hint: error.hint }
}
