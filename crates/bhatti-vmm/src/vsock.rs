//! The agent channel through a hypervisor's hybrid vsock: a Unix socket on the host, on which
//! each connection begins with the guest's port.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use bhatti_engine::{AgentChannel, AgentStream, ChannelError};
use bhatti_host::socket;
use parking_lot::Mutex;
use rustix::net::{Shutdown, shutdown};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;

/// Maximum length of the greeting: `OK`, a space, and a port of the host.
const GREETING_BYTES: usize = 32;

/// Connects through the hypervisor's socket, with one connection per stream.
#[derive(Debug)]
pub struct VsockChannel {
    directory: PathBuf,
    socket: &'static str,
    /// The open streams.
    streams: Mutex<Vec<Weak<UnixStream>>>,
}

#[async_trait]
impl AgentChannel for VsockChannel {
    async fn open(&self, port: u32) -> Result<Box<dyn AgentStream>, ChannelError> {
        let stream = Arc::new(self.connect(port).await.map_err(ChannelError)?);
        let mut streams = self.streams.lock();
        streams.retain(|stream| stream.strong_count() > 0);
        streams.push(Arc::downgrade(&stream));
        Ok(Box::new(Whole(stream)))
    }

    fn ends_directions_apart(&self) -> bool {
        false
    }
}

/// A stream that stays open in both directions until it is dropped: if the host closes its
/// direction, the hypervisor ends both directions, and discards data in flight.
struct Whole(Arc<UnixStream>);

impl AsyncRead for Whole {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buffer.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(|bytes| buffer.advance(bytes))),
            }
        }
    }
}

impl AsyncWrite for Whole {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

impl VsockChannel {
    /// Creates a channel through the socket named `socket` in `directory`.
    #[must_use]
    pub fn new(directory: PathBuf, socket: &'static str) -> Self {
        Self { directory, socket, streams: Mutex::default() }
    }

    /// Ends all open streams: the guest has forgotten them, and the hypervisor does not report
    /// that to a host that only reads.
    pub fn reset(&self) {
        for stream in self.streams.lock().drain(..).filter_map(|stream| stream.upgrade()) {
            if let Err(error) = shutdown(&*stream, Shutdown::Both) {
                tracing::debug!(%error, "A stream had already ended");
            }
        }
    }

    async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut stream = socket::connect_in(&self.directory, self.socket).await?;
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

/// Reads one line and nothing after it: the following bytes are the agent's.
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
