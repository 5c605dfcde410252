//! A TCP connection to a port in a sandbox.

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

use crate::path::sandbox_path;
use crate::websocket::{Sink, Source, lost};
use crate::{Client, ClientError};

/// The sending half of a connection to a port. Dropping both halves ends the connection.
pub struct ForwardSender(Sink);

/// The receiving half of a connection to a port.
pub struct ForwardReceiver(Source);

impl Client {
    /// Connects to a TCP port in a sandbox.
    ///
    /// # Errors
    ///
    /// Returns [`ClientError::Refused`] if nothing listens at the port.
    pub async fn forward(
        &self,
        sandbox: &str,
        port: u16,
    ) -> Result<(ForwardSender, ForwardReceiver), ClientError> {
        let path = sandbox_path(sandbox, &format!("/forward/{port}"));
        let (sink, source) = self.open_websocket(&path).await?;
        Ok((ForwardSender(sink), ForwardReceiver(source)))
    }
}

impl ForwardSender {
    /// Sends bytes. An empty `bytes` ends this direction.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), ClientError> {
        self.0.send(Message::Binary(bytes)).await.map_err(lost)
    }
}

impl ForwardReceiver {
    /// Waits for the next bytes. Returns `None` at the end.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection was lost.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            match self.0.next().await {
                Some(Ok(Message::Binary(bytes))) => {
                    return Ok((!bytes.is_empty()).then_some(bytes));
                }
                Some(Ok(Message::Close(_))) | None => return Ok(None),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(lost(error)),
            }
        }
    }
}
