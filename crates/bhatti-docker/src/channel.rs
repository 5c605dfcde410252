//! The channel to the guest agent: two sockets in a directory that the container can write.

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use async_trait::async_trait;
use bhatti_engine::{AgentChannel, AgentStream, ChannelError};
use bhatti_host::socket;
use bhatti_proto::{CONTROL_PORT, FORWARD_PORT};
use tokio::net::UnixStream;

/// The name of that directory in the sandbox's directory.
pub(crate) const DIRECTORY: &str = "agent";

/// Connects to the agent's sockets, one connection per stream.
#[derive(Clone, Debug)]
pub(crate) struct SharedChannel {
    /// The directory of the sockets.
    pub(crate) directory: PathBuf,
}

impl SharedChannel {
    async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let name = match port {
            CONTROL_PORT => "control.sock",
            FORWARD_PORT => "forward.sock",
            _ => return Err(io::ErrorKind::AddrNotAvailable.into()),
        };
        // Follows no link: the container could place one to another sandbox's socket.
        let socket = socket::open_in(&self.directory, name)?;
        UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
    }
}

#[async_trait]
impl AgentChannel for SharedChannel {
    async fn open(&self, port: u32) -> Result<Box<dyn AgentStream>, ChannelError> {
        Ok(Box::new(self.connect(port).await.map_err(ChannelError)?))
    }

    fn carries_half_close(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn link_to_another_sandboxs_socket_is_not_followed() {
        let (own, others) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let other = others.path().join("control.sock");
        let _listener = UnixListener::bind(&other).unwrap();
        let channel = |directory: &std::path::Path| SharedChannel { directory: directory.into() };
        assert!(channel(others.path()).connect(CONTROL_PORT).await.is_ok());

        symlink(other, own.path().join("control.sock")).unwrap();

        assert!(channel(own.path()).connect(CONTROL_PORT).await.is_err());
    }
}
