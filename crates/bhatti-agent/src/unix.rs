//! The agent behind two Unix sockets: in test mode, and with engines whose guest shares a
//! directory with the host.

use std::io;
use std::path::PathBuf;

use async_trait::async_trait;
use bhatti_engine::{AgentChannel, AgentStream, ChannelError};
use bhatti_proto::{CONTROL_PORT, FORWARD_PORT};
use tokio::net::UnixStream;

/// Connects to the agent's sockets, one connection per stream.
#[derive(Clone, Debug)]
pub struct UnixChannel {
    /// The control service's socket.
    pub control: PathBuf,
    /// The forward service's socket.
    pub forward: PathBuf,
}

#[async_trait]
impl AgentChannel for UnixChannel {
    async fn open(&self, port: u32) -> Result<Box<dyn AgentStream>, ChannelError> {
        let path = match port {
            CONTROL_PORT => &self.control,
            FORWARD_PORT => &self.forward,
            _ => return Err(ChannelError(io::ErrorKind::AddrNotAvailable.into())),
        };
        let stream = UnixStream::connect(path).await.map_err(ChannelError)?;
        Ok(Box::new(stream))
    }

    fn carries_half_close(&self) -> bool {
        true
    }
}
