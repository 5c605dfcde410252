//! The agent behind a hypervisor's hybrid vsock: a Unix socket on the host, on which each connection begins by naming the guest's port.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use bhatti_engine::{AgentChannel, AgentStream, ChannelError};
use bhatti_host::socket;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;

/// The longest greeting: `OK`, a space, and a port of the host's.
const GREETING_BYTES: usize = 32;

/// Connects through the hypervisor's socket, one connection per stream.
#[derive(Clone, Debug)]
pub struct VsockChannel {
    /// Where the hypervisor's socket is.
    pub directory: PathBuf,
    /// Its name there.
    pub socket: &'static str,
}

#[async_trait]
impl AgentChannel for VsockChannel {
    async fn open(&self, port: u32) -> Result<Box<dyn AgentStream>, ChannelError> {
        let stream = self.connect(port).await.map_err(ChannelError)?;
        Ok(Box::new(Whole(stream)))
    }

    fn ends_directions_apart(&self) -> bool {
        false
    }
}

/// A stream that is open in both directions until it is dropped: a hypervisor that finds the host's direction closed ends both, whatever is
/// still on its way.
struct Whole(UnixStream);

impl AsyncRead for Whole {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Whole {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().0).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

impl VsockChannel {
    async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let stream = socket::connect_in(&self.directory, self.socket)?;
        stream.set_nonblocking(true)?;
        let mut stream = UnixStream::from_std(stream)?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
        let greeting = read_line(&mut stream).await?;
        if !greeting.starts_with(b"OK ") {
            let shown = String::from_utf8_lossy(&greeting);
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the hypervisor answered `{}` instead of `OK`", shown.escape_default()),
            ));
        }
        Ok(stream)
    }
}

/// Reads a line and nothing behind it: that is the agent's.
async fn read_line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    while line.len() < GREETING_BYTES {
        match stream.read_u8().await {
            Ok(b'\n') => return Ok(line),
            Ok(byte) => line.push(byte),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    "nothing in the guest listens on this port",
                ));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(line)
}
