//! Commands whose streams travel on a WebSocket.

use std::sync::Arc;

use bhatti_api::{ErrorBody, STDIN_WINDOW_BYTES, StreamRequest, StreamServerMessage, channel};
use bytes::{Buf, Bytes};
use futures_util::{SinkExt, StreamExt};
use tokio::sync::Semaphore;
use tokio_tungstenite::tungstenite::Message;

use crate::websocket::{Sink, Source, lost, unexpected};
use crate::{Client, ClientError};

/// The most input that one message carries, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// An event of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandEvent {
    /// Bytes that the command wrote to its standard output.
    Stdout(Bytes),
    /// Bytes that the command wrote to its standard error.
    Stderr(Bytes),
    /// The command ended with this exit code. Nothing follows.
    Exit(i32),
}

/// The input of a command. Dropping both halves kills the command.
pub struct CommandInput {
    sink: Sink,
    window: Arc<Semaphore>,
}

/// The output of a command. Dropping both halves kills the command.
pub struct CommandOutput {
    stream: Source,
    window: Arc<Semaphore>,
}

pub(crate) async fn start(
    client: &Client,
    path: &str,
    start: &StreamRequest,
) -> Result<(CommandInput, CommandOutput), ClientError> {
    let (sink, output) = client.open_websocket(path).await?;
    let window =
        Arc::new(Semaphore::new(usize::try_from(STDIN_WINDOW_BYTES).unwrap_or(MESSAGE_BYTES_MAX)));
    let mut input = CommandInput { sink, window: Arc::clone(&window) };
    input.send_text(start).await?;
    Ok((input, CommandOutput { stream: output, window }))
}

impl CommandInput {
    /// Waits until a [`write`](Self::write) of [`MESSAGE_BYTES_MAX`] bytes does not wait for the
    /// command. Meanwhile the caller must poll the output, which receives the acknowledgments.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn ready(&self) {
        let bytes = u32::try_from(MESSAGE_BYTES_MAX).unwrap_or(u32::MAX);
        // The window is never closed.
        drop(self.window.acquire_many(bytes).await);
    }

    /// Writes to the command's standard input. Waits while the command does not read. Meanwhile
    /// the caller must poll the output.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        for chunk in bytes.chunks(MESSAGE_BYTES_MAX) {
            let length = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
            if let Ok(room) = self.window.acquire_many(length).await {
                room.forget();
            }
            let mut message = Vec::with_capacity(1 + chunk.len());
            message.push(channel::STDIN);
            message.extend_from_slice(chunk);
            self.sink.send(Message::binary(message)).await.map_err(lost)?;
        }
        Ok(())
    }

    /// Ends the command's standard input.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn end(&mut self) -> Result<(), ClientError> {
        self.send_text(&StreamRequest::StdinEof).await
    }

    /// Signals the command's process group.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn signal(&mut self, signal: u8) -> Result<(), ClientError> {
        self.send_text(&StreamRequest::Signal { signal }).await
    }

    async fn send_text(&mut self, message: &StreamRequest) -> Result<(), ClientError> {
        let json = serde_json::to_string(message)
            .map_err(|error| ClientError::Unexpected(error.to_string()))?;
        self.sink.send(Message::text(json)).await.map_err(lost)
    }
}

impl CommandOutput {
    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// Returns [`ClientError::Refused`] if the command could not be started, or if the sandbox is
    /// lost.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<CommandEvent, ClientError> {
        loop {
            match self.stream.next().await {
                Some(Ok(Message::Binary(bytes))) => return output_event(bytes),
                Some(Ok(Message::Text(json))) => {
                    if let Some(event) = self.text_event(&json)? {
                        return Ok(event);
                    }
                }
                Some(Ok(Message::Close(_))) | None => return Err(ClientError::StreamLost(None)),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(lost(error)),
            }
        }
    }
}

impl CommandOutput {
    fn text_event(&self, json: &str) -> Result<Option<CommandEvent>, ClientError> {
        match serde_json::from_str(json) {
            Ok(StreamServerMessage::Exit { exit_code }) => Ok(Some(CommandEvent::Exit(exit_code))),
            Ok(StreamServerMessage::StdinAck { bytes }) => {
                // A daemon never acknowledges more than was sent. If it did, the window would
                // only grow.
                self.window
                    .add_permits(usize::try_from(bytes).unwrap_or_default().min(MESSAGE_BYTES_MAX));
                Ok(None)
            }
            Ok(StreamServerMessage::Error { error, code, hint }) => Err(ClientError::Refused(
                Box::new(ErrorBody::new(code, error, hint, String::new(), 0)),
            )),
            Err(_) => Err(unexpected(json)),
        }
    }
}

fn output_event(mut bytes: Bytes) -> Result<CommandEvent, ClientError> {
    let stream = bytes.first().copied();
    bytes.advance(bytes.len().min(1));
    match stream {
        Some(channel::STDOUT) => Ok(CommandEvent::Stdout(bytes)),
        Some(channel::STDERR) => Ok(CommandEvent::Stderr(bytes)),
        _ => Err(ClientError::Unexpected("bytes of an unknown stream".to_owned())),
    }
}
