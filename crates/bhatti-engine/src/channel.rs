//! The channel to the guest agent in a VM.

use std::io;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

/// The stream of one operation.
pub trait AgentStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> AgentStream for T {}

/// The guest agent cannot be reached.
#[derive(Debug, thiserror::Error)]
#[error("the guest agent cannot be reached")]
pub struct ChannelError(#[source] pub io::Error);

/// Opens streams to the agent's ports.
#[async_trait]
pub trait AgentChannel: Send + Sync {
    /// Opens a stream to `port` of the agent: the control port or the forward port of the
    /// host–guest protocol.
    ///
    /// # Errors
    ///
    /// Returns an error if the VM has ended or its agent does not answer in time.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    async fn open(&self, port: u32) -> Result<Box<dyn AgentStream>, ChannelError>;

    /// Whether the agent still notices that a stream was dropped after its sending direction was
    /// closed. The agent does so if each stream has its own connection; it need not if streams
    /// share a connection.
    fn carries_half_close(&self) -> bool {
        false
    }

    /// Whether one direction of a stream can end before the other.
    fn ends_directions_apart(&self) -> bool {
        true
    }
}
