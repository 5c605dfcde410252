//! A terminal on a WebSocket.

use bhatti_api::{ErrorBody, ShellRequest, ShellServerMessage};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

use crate::path::{sandbox_path, with_query};
use crate::websocket::{Sink, Source, lost, unexpected};
use crate::{Client, ClientError};

/// Selects a session; see the API's `GET /sandboxes/{sandbox}/ws`.
#[derive(Clone, Debug, Default)]
pub struct ShellOptions {
    /// The session to attach to.
    pub session: Option<String>,
    /// Whether to create a new session in any case.
    pub new: bool,
    /// Rows and columns of the terminal.
    pub size: Option<(u16, u16)>,
    /// The command of a new session; a login shell if empty.
    pub command: Vec<String>,
    /// The environment variables of a new session.
    pub env: Vec<(String, String)>,
    /// The user that a new session runs as.
    pub user: Option<String>,
    /// The working directory of a new session.
    pub workdir: Option<String>,
    /// The time limit of a new session, in seconds.
    pub timeout_sec: Option<u32>,
}

/// An event of a terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShellEvent {
    /// The client is attached. This event comes first.
    Session {
        /// The session's id, for attaching again.
        id: String,
        /// Whether the session is new.
        is_new: bool,
    },
    /// Bytes that the terminal wrote.
    Output(Bytes),
    /// The process ended with this exit code. Nothing follows.
    Exit(i32),
}

/// The input of a terminal. Dropping both halves leaves the session running.
pub struct ShellInput(Sink);

/// The output of a terminal.
pub struct ShellOutput(Source);

impl Client {
    /// Opens a terminal session, or attaches to an existing one.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails. The first event of the output, or its error, tells
    /// whether the session exists.
    pub async fn open_shell(
        &self,
        sandbox: &str,
        options: &ShellOptions,
    ) -> Result<(ShellInput, ShellOutput), ClientError> {
        let query = options.pairs();
        let pairs = query.iter().map(|(name, value)| (*name, value.as_str()));
        let path = with_query(&sandbox_path(sandbox, "/ws"), pairs);
        let (sink, source) = self.open_websocket(&path).await?;
        Ok((ShellInput(sink), ShellOutput(source)))
    }
}

impl ShellOptions {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut pairs = Vec::new();
        pairs.extend(self.session.iter().map(|session| ("session", session.clone())));
        if self.new {
            pairs.push(("new", "true".to_owned()));
        }
        if let Some((rows, cols)) = self.size {
            pairs.extend([("rows", rows.to_string()), ("cols", cols.to_string())]);
        }
        pairs.extend(self.command.iter().map(|argument| ("cmd", argument.clone())));
        pairs.extend(self.env.iter().map(|(name, value)| ("env", format!("{name}={value}"))));
        pairs.extend(self.user.iter().map(|user| ("user", user.clone())));
        pairs.extend(self.workdir.iter().map(|directory| ("cwd", directory.clone())));
        pairs.extend(self.timeout_sec.iter().map(|seconds| ("timeout_sec", seconds.to_string())));
        pairs
    }
}

impl ShellInput {
    /// Sends keyboard input.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        self.0.send(Message::binary(bytes.to_vec())).await.map_err(lost)
    }

    /// Resizes the terminal.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn resize(&mut self, rows: u16, cols: u16) -> Result<(), ClientError> {
        let json = serde_json::to_string(&ShellRequest::Resize { rows, cols })
            .map_err(|error| ClientError::Unexpected(error.to_string()))?;
        self.0.send(Message::text(json)).await.map_err(lost)
    }

    /// Detaches from the session, which keeps running.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone. The client is then detached already.
    pub async fn leave(&mut self) -> Result<(), ClientError> {
        self.0.close().await.map_err(lost)
    }
}

impl ShellOutput {
    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// Returns [`ClientError::Refused`] if the session does not exist or the sandbox is lost.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<ShellEvent, ClientError> {
        loop {
            match self.0.next().await {
                Some(Ok(Message::Binary(bytes))) => return Ok(ShellEvent::Output(bytes)),
                Some(Ok(Message::Text(json))) => return event(&json),
                Some(Ok(Message::Close(_))) | None => return Err(ClientError::StreamLost(None)),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(lost(error)),
            }
        }
    }
}

fn event(json: &str) -> Result<ShellEvent, ClientError> {
    match serde_json::from_str(json) {
        Ok(ShellServerMessage::Session { session_id, new }) => {
            Ok(ShellEvent::Session { id: session_id, is_new: new })
        }
        Ok(ShellServerMessage::Exit { exit_code }) => Ok(ShellEvent::Exit(exit_code)),
        Ok(ShellServerMessage::Error { error, code, hint }) => {
            Err(ClientError::Refused(Box::new(ErrorBody::new(code, error, hint, String::new(), 0))))
        }
        Err(_) => Err(unexpected(json)),
    }
}
